# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels of the ops share: where a program's pixels are, and how it is launched."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl

#: Philox blocks (of four pixels) per program. No autotuning: kernels may run inside a captured graph. The masks do not
#: depend on it, so the interpreter, whose cost is by the program, takes larger ones.
BLOCKS = 256
_INTERPRETED_BLOCKS = 2**15

#: Passed to every launch and to every ahead-of-time compilation: products and sums stay separately rounded.
LAUNCH_OPTIONS = {"enable_fp_fusion": False, "num_warps": 4}


@triton.jit
def locate(program, chunks_per_row, BLOCKS: tl.constexpr):
    """Row, first block and pixel numbers of a program; in int64, for masks beyond 2^31 pixels in all."""
    program = program.to(tl.int64)
    row = program // chunks_per_row
    blocks = (program % chunks_per_row) * BLOCKS + tl.arange(0, BLOCKS).to(tl.int64)
    pixels = (program % chunks_per_row) * (4 * BLOCKS) + tl.arange(0, 4 * BLOCKS).to(tl.int64)
    return row, blocks, pixels


@triton.jit
def widen(x):
    """float32 of any element, exactly; bfloat16 by its bits, since the interpreter drops its subnormal numbers."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


def on(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """A guard for the device of a tensor; none is needed on a CPU."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Triton reads torch.bool as single bits; a mask is one byte a pixel."""
    return tensor.view(torch.uint8) if tensor.dtype is torch.bool else tensor


def blocks_of(out: torch.Tensor, pixels: int) -> int:
    """Philox blocks per program."""
    return BLOCKS if out.is_cuda else min(triton.next_power_of_2(triton.cdiv(pixels, 4)), _INTERPRETED_BLOCKS)


def launch(kernel: Any, rows: int, pixels: int, out: torch.Tensor, *arguments: Any, **constants: Any) -> None:
    """Start a kernel that works on rows of pixels by chunks, and begins with ``out, pixels, chunks_per_row``."""
    blocks = blocks_of(out, pixels)
    chunks = triton.cdiv(pixels, 4 * blocks)
    with on(out):
        kernel[(rows * chunks,)](
            as_bytes(out), pixels, chunks, *arguments, **constants, BLOCKS=blocks, **LAUNCH_OPTIONS
        )
