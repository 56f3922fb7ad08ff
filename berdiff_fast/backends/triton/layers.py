# SPDX-License-Identifier: Apache-2.0
"""The layers of a U-Net in Triton, for GPUs with tensor cores: a convolution that leaves the next norm's sums.

Activations are (N, H, W, C), C innermost. A convolution adds its bias, the 1 x 1 projections of a skip path and a
residual before it rounds and writes, and leaves for each of its tiles and channels the sum and the sum of squares of
what it wrote. So a residual block is two norms and two convolutions, six launches in all, and nothing is read or
written twice.

Sums of squares are not centred: in float32 they lose digits where a channel's mean is many times its standard
deviation, by (mean / deviation)^2 2^-24 of the variance. That is far below the rounding of the types that this is
made for.


from __future__ import annotations"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton

from berdiff_fast.backends.triton import convolution, ends, group_norm
from berdiff_fast.backends.triton.activations import Activation
from berdiff_fast.backends.triton.convolution import Weight


class TritonLayers:
    """The layers as ``network.fused`` calls them, on a GPU or, under Triton's interpreter, on the CPU."""

    def __init__(self) -> None:
        self._thread = threading.local()  # another thread may launch while this one compiles

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Within this, the thread's kernels are compiled, several at a time, and none is launched."""
        self._thread.compiles = True
        try:
            with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as executor, triton.AsyncCompileMode(executor):
                yield
        finally:
            self._thread.compiles = False

    def _launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        if getattr(self._thread, "compiles", False):
            kernel.warmup(*arguments, grid=grid, **constants)
        else:
            kernel[grid](*arguments, **constants)

    def stem(self, y_t: torch.Tensor, weight: torch.Tensor, features: torch.Tensor, patch: int) -> Activation:
        """The first convolution: see ``ends.stem``."""
        return ends.stem(self._launch, y_t, weight, features, patch)

    def factors(
        self, x: Activation, other: Activation | None, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
    ) -> torch.Tensor:
        """A norm's scales and shifts (N, 2, C + C'): see ``group_norm.factors``."""
        return group_norm.factors(self._launch, x, other, weight, bias, groups, eps)

    def norm(self, x: Activation, other: Activation | None, factors: torch.Tensor, silu: bool) -> torch.Tensor:
        """A norm applied: see ``group_norm.norm``."""
        return group_norm.norm(self._launch, x, other, factors, silu)

    def convolution(
        self,
        x: torch.Tensor,
        weight: Weight,
        bias: torch.Tensor,
        projected: tuple[torch.Tensor, ...] = (),
        residual: torch.Tensor | None = None,
    ) -> Activation:
        """Any other convolution: see ``convolution.convolution``."""
        return convolution.convolution(self._launch, x, weight, bias, projected, residual)

    def head(
        self, x: Activation, factors: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, masks: int, patch: int
    ) -> torch.Tensor:
        """Norm, SiLU and the last convolution: see ``ends.head``."""
        return ends.head(self._launch, x, factors, weight, bias, masks, patch)
