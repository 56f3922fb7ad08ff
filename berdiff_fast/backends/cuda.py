# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ kernels. They run on the caller's current stream, on the device of the tensors."""

from __future__ import annotations

import torch

import berdiff_fast._cuda as _cuda
from berdiff_fast.backends.native import NativeBackend


class CudaBackend(NativeBackend):
    """Every op under a guard for the device of its output."""

    def noise(self, out: torch.Tensor, *arguments) -> None:
        with torch.cuda.device_of(out):
            super().noise(out, *arguments)

    def q_sample(self, out: torch.Tensor, *arguments) -> None:
        with torch.cuda.device_of(out):
            super().q_sample(out, *arguments)

    def step(self, out: torch.Tensor, *arguments) -> None:
        with torch.cuda.device_of(out):
            super().step(out, *arguments)

    def posterior(self, out: torch.Tensor, *arguments) -> None:
        with torch.cuda.device_of(out):
            super().posterior(out, *arguments)

    def overlap(self, out: torch.Tensor, *arguments) -> None:
        with torch.cuda.device_of(out):
            super().overlap(out, *arguments)

    def diffusion_loss(self, value: torch.Tensor, *arguments) -> None:
        with torch.cuda.device_of(value):
            super().diffusion_loss(value, *arguments)


def _current_stream(out: torch.Tensor) -> int:
    return torch.cuda.current_stream(out.device).cuda_stream


backend = CudaBackend(_cuda, context=_current_stream)
