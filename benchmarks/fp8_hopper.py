#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Which matrix instructions Triton makes of a convolution from 8-bit floating point, for sm_90; needs no GPU.

    python benchmarks/fp8_hopper.py

A 3 x 3 convolution as an implicit GEMM (rows are pixels, a tap's channels at a time are the inner dimension), compiled
only; and ``tl.dot_scaled``. Prints one JSON line for each: the instructions in the PTX and how often, and the additions
that move partial sums into float32.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def convolution(
    x,  # (N, H, W, C)
    w,  # (O, 3, 3, C)
    out,  # (N, H, W, O)
    H,
    W,
    C: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    IMPRECISE: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    image, pixel = row // (H * W), row % (H * W)
    k = tl.arange(0, INNER)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for tap in range(9):
        i, j = pixel // W + tap // 3 - 1, pixel % W + tap % 3 - 1
        inside = (i >= 0) & (i < H) & (j >= 0) & (j < W)
        start = ((image * H + i) * W + j) * C
        for c in range(0, C, INNER):
            a = tl.load(x + start[:, None] + c + k[None, :], mask=inside[:, None], other=0.0)
            b = tl.load(w + (tap * C + c) + column[None, :] * (9 * C) + k[:, None])
            total = tl.dot(a, b, total, max_num_imprecise_acc=IMPRECISE)
    tl.store(out + row[:, None] * O + column[None, :], total.to(tl.bfloat16))


@triton.jit
def scaled(x, w, x_scale, w_scale, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr):
    m, n, k, s = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, INNER), tl.arange(0, INNER // 32)
    a, b = tl.load(x + m[:, None] * INNER + k[None, :]), tl.load(w + k[:, None] + n[None, :] * INNER)
    a_scale = tl.load(x_scale + m[:, None] * (INNER // 32) + s[None, :])
    b_scale = tl.load(w_scale + n[:, None] * (INNER // 32) + s[None, :])
    tl.store(out + m[:, None] * COLUMNS + n[None, :], tl.dot_scaled(a, a_scale, "e4m3", b, b_scale, "e4m3"))


def show(what: str, kernel: Any, pointers: dict[str, str], numbers: tuple[str, ...], constants: dict[str, Any]) -> None:
    signature = {**pointers, **dict.fromkeys(numbers, "i32"), **dict.fromkeys(constants, "constexpr")}
    names = kernel.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(kernel, signature, constants, aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 3}).asm["ptx"]
    found = Counter(re.findall(r"wgmma\.mma_async\.\S+|mma\.sync\.\S+", ptx))
    additions = len(re.findall(r"\badd(?:\.rn)?\.f32", ptx))
    print(json.dumps({"triton": triton.__version__, "what": what, "instructions": found, "additions": additions}))


def main() -> None:
    for dtype, inner, choices in (("bf16", 64, (None,)), ("fp8e4nv", 128, (None, 0, 32, 128))):
        pointers = {"x": f"*{dtype}", "w": f"*{dtype}", "out": "*bf16"}
        for imprecise in choices:
            constants = dict(C=256, O=256, ROWS=128, COLUMNS=128, INNER=inner, IMPRECISE=imprecise)
            what = f"convolution, {dtype}, max_num_imprecise_acc={imprecise}"
            show(what, convolution, pointers, ("H", "W"), constants)
    pointers = {"x": "*fp8e4nv", "w": "*fp8e4nv", "x_scale": "*u8", "w_scale": "*u8", "out": "*fp32"}
    show("dot_scaled, e4m3", scaled, pointers, (), dict(ROWS=128, COLUMNS=128, INNER=128))


if __name__ == "__main__":
    main()
