# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ kernels. They run on the caller's current stream, on the device of the tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

import berdiff_fast._cuda as _cuda
from berdiff_fast.backends.native import NativeBackend

_Op = TypeVar("_Op", bound=Callable[..., None])


def _guarded(op: _Op) -> _Op:
    """The op under a guard for the device of its output."""

    @functools.wraps(op)
    def call(self: CudaBackend, out: torch.Tensor, *arguments: Any) -> None:
        with torch.cuda.device_of(out):
            op(self, out, *arguments)

    return cast(_Op, call)


class CudaBackend(NativeBackend):
    """Every op on the device of its output, which need not be the current one."""

    initial_noise = _guarded(NativeBackend.initial_noise)
    q_sample = _guarded(NativeBackend.q_sample)
    sample_step = _guarded(NativeBackend.sample_step)
    posterior = _guarded(NativeBackend.posterior)
    overlap = _guarded(NativeBackend.overlap)
    diffusion_loss = _guarded(NativeBackend.diffusion_loss)


def _current_stream(out: torch.Tensor) -> int:
    return torch.cuda.current_stream(out.device).cuda_stream


backend: CudaBackend = CudaBackend(_cuda, context=_current_stream)
