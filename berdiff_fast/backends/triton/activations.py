# SPDX-License-Identifier: Apache-2.0
"""What goes from layer to layer of the fused network, and how its kernels are launched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Launch(Protocol):
    """Starts a kernel; while others are compiled, only compiles it."""

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None: ...


@dataclass
class Activation:
    """x (N, H, W, C) and, of each of T tiles of an image, sums and sums of squares (N, T, 2, C) float32."""

    x: torch.Tensor
    sums: torch.Tensor


def images_per_row(images: int, table: torch.Tensor) -> int:
    """How many images share a row of a table, (channels,) or (steps, channels)."""
    return images if table.ndim == 1 else images // table.shape[0]
