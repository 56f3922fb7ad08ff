# SPDX-License-Identifier: Apache-2.0
"""The ops that draw, in Triton: the arithmetic of ``csrc/include/berdiff/draw.h``, line by line.

Launches forbid fused operations, so that each rounds for itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from berdiff_fast.backends.protocol import Rows
from berdiff_fast.backends.triton.common import as_bytes, launch, locate, widen

INITIAL_NOISE = tl.constexpr(0)
SAMPLING_STEP = tl.constexpr(1)
TRAINING_NOISE = tl.constexpr(2)


@triton.jit
def philox_words(
    seeds,
    row,
    blocks,
    tag,
    STREAM: tl.constexpr,
    samples_per_image,
    first_row,
    first_sample,
    SEED_COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Philox4x32-10: the words of the blocks, in pixel order."""
    mask = row + first_row
    of_image = seeds + mask // samples_per_image * SEED_COLUMNS
    seed = tl.load(of_image)
    if SEED_COLUMNS > 1:
        first_sample += tl.load(of_image + 1)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0 = blocks.to(tl.uint32)
    c1 = tl.zeros_like(c0) + (mask % samples_per_image + first_sample).to(tl.uint32)
    c2 = tl.zeros_like(c0) + tag.to(tl.uint32)
    c3 = tl.full(c0.shape, STREAM, tl.uint32)
    m0 = tl.full(c0.shape, 0xD2511F53, tl.uint32)
    m1 = tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
    w0 = tl.full((1,), 0x9E3779B9, tl.uint32)
    w1 = tl.full((1,), 0xBB67AE85, tl.uint32)
    k0 = k0 + tl.zeros_like(w0)
    k1 = k1 + tl.zeros_like(w1)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(m0, c0)
        high1 = tl.umulhi(m1, c2)
        low0 = m0 * c0
        low1 = m1 * c2
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + w0
        k1 = k1 + w1
    return tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), (4 * BLOCKS,))


@triton.jit
def uniform(words):
    return (words >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def exp_negative(z):
    z = tl.where(z < 64.0, z, 64.0)
    z = tl.where(z > -64.0, z, -64.0)
    w = z * -1.4426950216293335
    t = w + 12582912.0
    f = w - (t - 12582912.0)
    p = f * 0.001326470053754747 + 0.009671533480286598
    p = p * f + 0.05550733953714371
    p = p * f + 0.24022242426872253
    p = p * f + 0.6931470036506653
    p = p * f + 1.0
    return (p.to(tl.int32, bitcast=True) + (t.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def zero_or_one(y, DTYPE: tl.constexpr):
    # By way of float32: the interpreter cannot turn a bit into a bfloat16.
    return tl.where(y, 1.0, 0.0).to(DTYPE)


@triton.jit
def epsilon_logit(z, y, PREDICTS_Y0: tl.constexpr):
    if PREDICTS_Y0:
        z = tl.where(y, -z, z)
    return z


@triton.jit(do_not_specialize=["first_row", "first_sample"])
def initial_noise_kernel(
    out,
    pixels,
    chunks_per_row,
    seeds,
    samples_per_image,
    first_row,
    first_sample,
    SEED_COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Fair coin tosses: a bit is one where u < 1/2.

    Args:
        out: (rows, pixels) of any type.
        seeds: (B,) int64, or (B, SEED_COLUMNS): see ``Rows`` in backends/protocol.py, as for the numbers after it.
    """
    row, blocks, pixel = locate(tl.program_id(0), chunks_per_row, BLOCKS)
    words = philox_words(
        seeds,
        row,
        blocks,
        row * 0,
        INITIAL_NOISE,
        samples_per_image,
        first_row,
        first_sample,
        SEED_COLUMNS,
        BLOCKS,
    )
    y = uniform(words) < 0.5
    tl.store(out + row * pixels + pixel, zero_or_one(y, out.dtype.element_ty), mask=pixel < pixels)


@triton.jit(do_not_specialize=["first_row", "first_sample"])
def q_sample_kernel(
    out,
    pixels,
    chunks_per_row,
    y_0,
    t,
    flip,
    seeds,
    samples_per_image,
    first_row,
    first_sample,
    SEED_COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The forward process: a bit of y_0 is flipped where u is below the probability of its value.

    Args:
        out, y_0: (rows, pixels) of any types.
        t: (rows,) int64.
        flip: (rows, 2) float32, for a 0 and for a 1.
        seeds: (B,) int64, or (B, SEED_COLUMNS): see ``Rows`` in backends/protocol.py, as for the numbers after it.
    """
    row, blocks, pixel = locate(tl.program_id(0), chunks_per_row, BLOCKS)
    words = philox_words(
        seeds,
        row,
        blocks,
        tl.load(t + row),
        TRAINING_NOISE,
        samples_per_image,
        first_row,
        first_sample,
        SEED_COLUMNS,
        BLOCKS,
    )
    live = pixel < pixels
    y = widen(tl.load(y_0 + row * pixels + pixel, mask=live, other=0)) != 0.0
    p = tl.where(y, tl.load(flip + 2 * row + 1), tl.load(flip + 2 * row))
    y = y ^ (uniform(words) < p)
    tl.store(out + row * pixels + pixel, zero_or_one(y, out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["timestep", "first_row", "first_sample"])
def sample_step_kernel(
    out,
    pixels,
    chunks_per_row,
    y_t,
    logits,
    coefficients,
    nan_flag,
    seeds,
    timestep,
    samples_per_image,
    first_row,
    first_sample,
    PREDICTS_Y0: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SEED_COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The next mask: a bit of y_t is flipped where u (R + S E) < P + Q E.

    Args:
        out, y_t: (rows, pixels) of any types.
        logits: (rows, pixels) of a float type.
        coefficients: (4,) float32: P, Q, R, S.
        nan_flag: (1,) int32; becomes 1 where a logit is NaN.
        seeds: (B,) int64, or (B, SEED_COLUMNS): see ``Rows`` in backends/protocol.py, as for the numbers after it.
    """
    row, blocks, pixel = locate(tl.program_id(0), chunks_per_row, BLOCKS)
    live = pixel < pixels
    at = row * pixels + pixel
    y = widen(tl.load(y_t + at, mask=live, other=0)) != 0.0
    z = widen(tl.load(logits + at, mask=live, other=0.0))
    tl.store(nan_flag + tl.zeros_like(pixel), tl.full(pixel.shape, 1, tl.int32), mask=z != z)
    z = epsilon_logit(z, y, PREDICTS_Y0)
    if THRESHOLD:
        flip = z > 0.0
    else:
        words = philox_words(
            seeds,
            row,
            blocks,
            row * 0 + timestep,
            SAMPLING_STEP,
            samples_per_image,
            first_row,
            first_sample,
            SEED_COLUMNS,
            BLOCKS,
        )
        e = exp_negative(z)
        denominator = tl.load(coefficients + 2) + tl.load(coefficients + 3) * e
        numerator = tl.load(coefficients) + tl.load(coefficients + 1) * e
        flip = uniform(words) * denominator < numerator
    tl.store(out + at, zero_or_one(y ^ flip, out.dtype.element_ty), mask=live)


@triton.jit
def posterior_kernel(
    out, pixels, chunks_per_row, y_t, logits, coefficients, PREDICTS_Y0: tl.constexpr, BLOCKS: tl.constexpr
):
    """The probability that ``sample_step_kernel`` draws a one.

    Args:
        out: (pixels,) float32: all rows as one.
        y_t: (pixels,) of any type.
        logits: (pixels,) of a float type.
        coefficients: (4,) float32: P, Q, R, S.
    """
    _row, _blocks, at = locate(tl.program_id(0), chunks_per_row, BLOCKS)
    live = at < pixels
    y = widen(tl.load(y_t + at, mask=live, other=0)) != 0.0
    z = widen(tl.load(logits + at, mask=live, other=0.0))
    z = epsilon_logit(z, y, PREDICTS_Y0)
    e = exp_negative(z)
    denominator = tl.load(coefficients + 2) + tl.load(coefficients + 3) * e
    numerator = tl.load(coefficients) + tl.load(coefficients + 1) * e
    flip = tl.div_rn(numerator, denominator)
    mean = tl.where(y, 1.0 - flip, flip)
    tl.store(out + at, tl.where(z != z, z, mean), mask=live)


def initial_noise(out: torch.Tensor, rows: Rows) -> None:
    seeds, samples_per_image, first_row, first_sample = rows
    count = out.shape[0]
    launch(
        initial_noise_kernel,
        count,
        out.numel() // count,
        out,
        seeds,
        samples_per_image,
        first_row,
        first_sample,
        SEED_COLUMNS=seeds.ndim,
    )


def q_sample(
    out: torch.Tensor,
    y_0: torch.Tensor,
    t: torch.Tensor,
    flip: torch.Tensor,
    rows: Rows,
) -> None:
    seeds, samples_per_image, first_row, first_sample = rows
    count = out.shape[0]
    launch(
        q_sample_kernel,
        count,
        out.numel() // count,
        out,
        as_bytes(y_0),
        t,
        flip,
        seeds,
        samples_per_image,
        first_row,
        first_sample,
        SEED_COLUMNS=seeds.ndim,
    )


def sample_step(
    out: torch.Tensor,
    y_t: torch.Tensor,
    logits: torch.Tensor,
    coefficients: torch.Tensor,
    nan_flag: torch.Tensor,
    timestep: int,
    predicts_y0: bool,
    threshold: bool,
    rows: Rows,
) -> None:
    seeds, samples_per_image, first_row, first_sample = rows
    count = out.shape[0]
    launch(
        sample_step_kernel,
        count,
        out.numel() // count,
        out,
        as_bytes(y_t),
        logits,
        coefficients,
        nan_flag,
        seeds,
        timestep,
        samples_per_image,
        first_row,
        first_sample,
        PREDICTS_Y0=predicts_y0,
        THRESHOLD=threshold,
        SEED_COLUMNS=seeds.ndim,
    )


def posterior(
    out: torch.Tensor,
    y_t: torch.Tensor,
    logits: torch.Tensor,
    coefficients: torch.Tensor,
    predicts_y0: bool,
) -> None:
    launch(posterior_kernel, 1, out.numel(), out, as_bytes(y_t), logits, coefficients, PREDICTS_Y0=predicts_y0)
