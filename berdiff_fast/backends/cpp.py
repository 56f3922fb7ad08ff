# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels for the CPU, and which instruction set they use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

import berdiff_fast._cpu as _cpu
from berdiff_fast.backends.native import NativeBackend


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

backend = NativeBackend(_cpu, context=lambda out: torch.get_num_threads())
