# SPDX-License-Identifier: Apache-2.0
"""The op ``diffusion_loss`` in Triton: the arithmetic of ``csrc/include/berdiff/loss.h``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from berdiff_fast.backends.triton.common import as_bytes, blocks_of, launch, locate, on, widen
from berdiff_fast.schedule import LOSS_CASE, LOSS_COLUMNS

#: Of the loss table: how many columns there are, how many belong to one value of epsilon, and their places.
COLUMNS = tl.constexpr(len(LOSS_COLUMNS))
CASE = tl.constexpr(LOSS_CASE)
TOTAL = tl.constexpr(LOSS_COLUMNS.index("total_0"))
RATIO = tl.constexpr(LOSS_COLUMNS.index("ratio_0"))
OVER = tl.constexpr(LOSS_COLUMNS.index("over_0"))
UNDER = tl.constexpr(LOSS_COLUMNS.index("under_0"))
P_OVER = tl.constexpr(LOSS_COLUMNS.index("p_over_0"))
P_UNDER = tl.constexpr(LOSS_COLUMNS.index("p_under_0"))
KL_WEIGHT = tl.constexpr(LOSS_COLUMNS.index("kl_weight"))
BCE_WEIGHT = tl.constexpr(LOSS_COLUMNS.index("bce_weight"))


@triton.jit
def exp_minus_abs(x):
    a = tl.abs(x)
    a = tl.where(a > 87.0, 87.0, a)
    t = tl.fma(a, -1.4426950216293335, 12583039.0)
    n = t - 12583039.0
    f = tl.fma(n, -3.194618329871446e-05, tl.fma(n, -0.693115234375, -a))
    p = tl.fma(f, 0.0013814602280035615, 0.008368715643882751)
    p = tl.fma(p, f, 0.04166838899254799)
    p = tl.fma(p, f, 0.1666652113199234)
    p = tl.fma(p, f, 0.4999999403953552)
    p = tl.fma(f * f, p, f) + 1.0
    return p * (t.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)


@triton.jit
def log_remainder(r):
    p = tl.fma(r, 0.07778041064739227, -0.12777335941791534)
    p = tl.fma(p, r, 0.13114036619663239)
    p = tl.fma(p, r, -0.1419614553451538)
    p = tl.fma(p, r, 0.16627094149589539)
    p = tl.fma(p, r, -0.20001636445522308)
    p = tl.fma(p, r, 0.2500077784061432)
    p = tl.fma(p, r, -0.33333325386047363)
    return tl.fma(p, r, 0.4999999701976776)


@triton.jit
def log_gap(x, one_plus_x):
    t = one_plus_x.to(tl.int32, bitcast=True) - 0x3F3504F3
    k = (t & -0x800000).to(tl.float32)
    m = ((t & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    r = tl.where(k == 0.0, x, m - 1.0)
    return tl.fma(r * r, log_remainder(r), tl.fma(k, -8.262958317573066e-08, x - r))


@triton.jit
def loss_case(columns, epsilon, COLUMN: tl.constexpr):
    """A column of the loss table for the value of epsilon: float32, of the shape of ``epsilon``.

    Args:
        columns: a row of the loss table.
        COLUMN: for epsilon = 0; that for epsilon = 1 is CASE columns further on.
    """
    zero = tl.load(columns + COLUMN).to(tl.float32)
    one = tl.load(columns + COLUMN + CASE).to(tl.float32)
    return tl.where(epsilon, one, zero)


@triton.jit
def diffusion_loss_kernel(
    gradient,
    pixels,
    chunks_per_row,
    logits,
    y_t,
    y_0,
    ignore,
    columns,
    kept,
    partial,
    PREDICTS_Y0: tl.constexpr,
    IGNORES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Bits and slope of every pixel, and the sum of a chunk's bits.

    Args:
        gradient: (rows, pixels) float32 or bfloat16.
        logits: (rows, pixels) of a float type.
        y_t, y_0: (rows, pixels) of any types.
        ignore: (rows, pixels) of any type, not zero where a pixel does not count; read if IGNORES.
        columns: (rows, COLUMNS) float64, rows of the loss table.
        kept: (rows,) int64, the pixels that count; read if IGNORES.
        partial: (rows, chunks_per_row) float32.
    """
    program = tl.program_id(0)
    row, _blocks, pixel = locate(program, chunks_per_row, BLOCKS)
    counts = pixel < pixels
    at = row * pixels + pixel
    truth = widen(tl.load(y_0 + at, mask=counts, other=0)) != 0.0
    epsilon = truth ^ (widen(tl.load(y_t + at, mask=counts, other=0)) != 0.0)
    if not PREDICTS_Y0:
        truth = epsilon
    z = widen(tl.load(logits + at, mask=counts, other=0.0))
    z = tl.where(truth, z, -z)
    live = counts
    count = pixels
    if IGNORES:
        counts = counts & (widen(tl.load(ignore + at, mask=counts, other=0)) == 0.0)
        count = tl.maximum(tl.load(kept + row), 1)
    columns += COLUMNS * row
    kl_weight = tl.load(columns + KL_WEIGHT).to(tl.float32) / count.to(tl.float32)
    bce_weight = tl.load(columns + BCE_WEIGHT).to(tl.float32) / count.to(tl.float32)

    small = exp_minus_abs(z)
    most = 1.0 / (1.0 + small)
    rest = small * most
    right = tl.where(z > 0.0, most, rest)
    wrong = tl.where(z > 0.0, rest, most)
    upper = small > 0.4142135679721832
    r = tl.where(upper, tl.fma(small, 0.5, -0.5), small)
    above = tl.where(z > 0.0, 0.0, -z)
    bce = tl.where(upper, 0.6931471824645996, 0.0) + above + (r - r * r * log_remainder(r))

    over_scale = loss_case(columns, epsilon, OVER)
    under_scale = loss_case(columns, epsilon, UNDER)
    D = tl.fma(loss_case(columns, epsilon, TOTAL), wrong, right)
    N = tl.fma(loss_case(columns, epsilon, RATIO), wrong, right)
    per_D = 1.0 / D
    share = wrong * per_D
    over = share * over_scale
    under = share * under_scale
    ratio_over = 1.0 + over
    ratio_under = tl.where(under < -0.5, N * per_D, 1.0 + under)
    curvature = (kl_weight * over_scale) * (-under_scale) * right * (share * (1.0 / (ratio_over * D * N)))
    slope = wrong * (bce_weight + curvature)
    slope = tl.where(counts, tl.where(truth, -slope, slope), 0.0)
    tl.store(gradient + at, slope.to(gradient.dtype.element_ty), mask=live)

    kl = loss_case(columns, epsilon, P_OVER) * log_gap(over, ratio_over)
    kl = tl.fma(loss_case(columns, epsilon, P_UNDER), log_gap(under, ratio_under), kl)
    bits = tl.fma(kl_weight, kl, bce_weight * bce)
    tl.store(partial + program, tl.sum(tl.where(counts, bits, 0.0), axis=0))


@triton.jit
def diffusion_loss_value_kernel(value, partial, chunks_per_row, BLOCK: tl.constexpr):
    """The sum of a row's chunks, in an order that depends on nothing else.

    Args:
        value: (rows,) float32.
        partial: (rows, chunks_per_row) float32.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK).to(tl.int64)
    sums = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, chunks_per_row, BLOCK):
        chunk = first + at
        live = chunk < chunks_per_row
        sums += tl.load(partial + row * chunks_per_row + chunk, mask=live, other=0.0).to(tl.float64)
    tl.store(value + row, tl.sum(sums, axis=0).to(tl.float32))


def diffusion_loss(
    value: torch.Tensor,
    gradient: torch.Tensor,
    logits: torch.Tensor,
    y_t: torch.Tensor,
    y_0: torch.Tensor,
    columns: torch.Tensor,
    ignore: torch.Tensor | None,
    kept: torch.Tensor | None,
    predicts_y0: bool,
) -> None:
    count = value.shape[0]
    pixels = gradient.numel() // count
    chunks = triton.cdiv(pixels, 4 * blocks_of(gradient, pixels))
    partial = value.new_empty(count * chunks)
    launch(
        diffusion_loss_kernel,
        count,
        pixels,
        gradient,
        logits,
        as_bytes(y_t),
        as_bytes(y_0),
        None if ignore is None else as_bytes(ignore),
        columns,
        kept,
        partial,
        PREDICTS_Y0=predicts_y0,
        IGNORES=ignore is not None,
    )
    with on(value):
        diffusion_loss_value_kernel[(count,)](value, partial, chunks, BLOCK=128, num_warps=1)
