# SPDX-License-Identifier: Apache-2.0
"""The running average of the weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class Average:
    """An exponential average with a decay that grows, so that it soon forgets the random start (as in TensorFlow's).

    It is torch's ``AveragedModel`` with another way to update it: torch's reads the number of updates on the weights'
    device and back, for which the host waits until a GPU has done all it was given.

    Args:
        network: whose weights are averaged.
        decay: of the average, in the long run.

    Attributes:
        model: the ``AveragedModel``; ``model.module`` has the averages.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = AveragedModel(network)
        self._weights: list[torch.Tensor] = list(network.parameters())
        self._averages: list[torch.Tensor] = list(self.model.module.parameters())
        self._buffers = list(zip(self.model.module.buffers(), network.buffers(), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights as they are into the average."""
        count = int(self.model.n_averaged)  # on the CPU
        if count:
            decay = min(self.decay, (1 + count) / (10 + count))
            torch._foreach_lerp_(self._averages, self._weights, 1 - decay)
        else:
            torch._foreach_copy_(self._averages, self._weights)
        for average, buffer in self._buffers:
            average.copy_(buffer)
        self.model.n_averaged += 1
