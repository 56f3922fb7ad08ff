# SPDX-License-Identifier: Apache-2.0
"""What masks depend on beside images, seeds and weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

#: What the last step does: keep what is more likely than not, as the published code does, or draw.
FINALS = ("threshold", "sample")


@dataclass(frozen=True, eq=False)
class Plan:
    """The steps of a sampler, all of it checked."""

    #: In the order they are visited.
    timesteps: tuple[int, ...]
    #: (S, 4) float64 in that order: the numbers of each step (``NoiseSchedule.step_table``).
    table: torch.Tensor
    #: What the logits are of: "epsilon" or "y_0".
    prediction: str
    #: One of ``FINALS``.
    final: str
    #: K.
    mask_channels: int
    #: Of the draws.
    backend: str

    @property
    def last(self) -> int:
        """The number of the last step."""
        return len(self.timesteps) - 1

    def threshold(self, step: int) -> bool:
        """Whether a step keeps what is more likely than not instead of drawing."""
        return step == self.last and self.final == "threshold"

    def dtype(self, step: int, dtype: torch.dtype) -> torch.dtype:
        """The dtype of what a step draws from states of ``dtype``: masks are bool."""
        return torch.bool if step == self.last else dtype

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Plans with the same key draw the same masks."""
        return (*self.timesteps, *self.table.flatten().tolist(), self.prediction, self.final, self.backend)
