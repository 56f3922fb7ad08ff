# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels for the CPU, and which instruction set they use."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

import berdiff_fast._cpu as _cpu
from berdiff_fast.backends.native import NOWHERE, NativeBackend, address, no_memory


def available_isas() -> list[str]:
    """Instruction sets that this build has and this CPU runs, the best one last."""
    return _cpu.available_isas()


def isa() -> str:
    """The instruction set in use: "portable", "avx2" or "avx512"."""
    return _cpu.isa()


def set_isa(name: str) -> None:
    """Use one instruction set from now on, in the whole process; "auto" takes the best.

    The environment variable ``BERDIFF_FAST_ISA`` does the same at import. The masks do not depend on it.

    Raises:
        ValueError: it was not compiled, or this CPU lacks it.
    """
    if name != "auto" and name not in available_isas():
        raise ValueError(f"isa must be 'auto' or one of {available_isas()} on this machine, got {name!r}")
    _cpu.set_isa(name)


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """``set_isa`` for the length of a ``with`` block."""
    previous = isa()
    set_isa(name)
    try:
        yield
    finally:
        set_isa(previous)


if "BERDIFF_FAST_ISA" in os.environ:
    try:
        set_isa(os.environ["BERDIFF_FAST_ISA"])
    except ValueError as error:
        raise ImportError(f"environment variable BERDIFF_FAST_ISA: {error}") from None


def _openmp() -> int:
    """Address of the entry to the thread pool that torch's own loops run on; 0 where it is not found.

    Torch brings its OpenMP along, and the compiled module is built without any: two pools would fight for the
    processors. The symbol is looked up as torch's own library sees it (Linux; elsewhere the kernels start threads).
    """
    library = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
    try:
        entry = ctypes.CDLL(library, os.RTLD_NOLOAD | os.RTLD_LAZY).GOMP_parallel
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(entry, ctypes.c_void_p).value or 0


_cpu.set_pool(_openmp())


class CppBackend(NativeBackend):
    """The ops of both modules, and those that only this one has."""

    def group_norm_silu(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        other: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor,
        groups: int,
        eps: float,
        silu: bool,
    ) -> None:
        images, channels, *spatial = out.shape
        own = x.shape[1]
        _cpu.group_norm_silu(
            out.data_ptr(),
            p if (p := x.data_ptr()) > NOWHERE else no_memory("x"),
            own,
            0 if other is None else address("other", other),
            channels - own,
            p if (p := weight.data_ptr()) > NOWHERE else no_memory("weight"),
            p if (p := bias.data_ptr()) > NOWHERE else no_memory("bias"),
            images,
            math.prod(spatial),
            groups,
            eps,
            silu,
            torch.get_num_threads(),
        )

    def winograd(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        residual: torch.Tensor | None,
        upsample: bool,
    ) -> None:
        images, outputs, height, width = out.shape
        _cpu.winograd(
            out.data_ptr(),
            p if (p := x.data_ptr()) > NOWHERE else no_memory("x"),
            p if (p := weight.data_ptr()) > NOWHERE else no_memory("weight"),
            p if (p := bias.data_ptr()) > NOWHERE else no_memory("bias"),
            0 if residual is None else address("residual", residual),
            images,
            height,
            width,
            x.shape[1],
            outputs,
            upsample,
            torch.get_num_threads(),
        )


backend: CppBackend = CppBackend(_cpu, context=lambda out: torch.get_num_threads())
