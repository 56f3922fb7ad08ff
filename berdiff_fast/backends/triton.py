# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels, for a GPU without the CUDA module; under ``TRITON_INTERPRET=1`` also for the CPU.

The arithmetic is that of ``csrc/include/berdiff/draw.h``, line by line; launches forbid fused operations.
"""

from __future__ import annotations

import contextlib
import math

import torch
import triton
import triton.language as tl

from berdiff_fast.backends.protocol import Rows

#: Philox blocks (of four pixels) per program. No autotuning: kernels may run inside a captured graph. The masks do not
#: depend on it, so the interpreter, whose cost is by the program, takes larger ones.
BLOCKS = 256
_INTERPRETED_BLOCKS = 2**15

INITIAL_NOISE = tl.constexpr(0)
SAMPLING_STEP = tl.constexpr(1)
TRAINING_NOISE = tl.constexpr(2)


@triton.jit
def locate(program, chunks_per_row, BLOCKS: tl.constexpr):
    """Row, first block and pixel numbers of a program; in int64, for masks beyond 2^31 pixels in all."""
    program = program.to(tl.int64)
    row = program // chunks_per_row
    blocks = (program % chunks_per_row) * BLOCKS + tl.arange(0, BLOCKS).to(tl.int64)
    pixels = (program % chunks_per_row) * (4 * BLOCKS) + tl.arange(0, 4 * BLOCKS).to(tl.int64)
    return row, blocks, pixels


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
def widen(x):
    """float32 of any element, exactly; bfloat16 by its bits, since the interpreter drops its subnormal numbers."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


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


@triton.jit
def masks_as_integers(a, b, image, a_masks, b_masks, mask, pixel, pixels):
    """The given masks of an image, those of a before those of b, at the given pixels: (masks, pixels) of 0 and 1."""
    live = (pixel < pixels)[None, :]
    in_a = (mask < a_masks)[:, None] & live
    in_b = ((mask >= a_masks) & (mask < a_masks + b_masks))[:, None] & live
    of_a = tl.load(a + (image * a_masks + mask)[:, None] * pixels + pixel[None, :], mask=in_a, other=0)
    of_b = tl.load(b + (image * b_masks + mask - a_masks)[:, None] * pixels + pixel[None, :], mask=in_b, other=0)
    return ((widen(of_a) != 0.0) | (widen(of_b) != 0.0)).to(tl.int8)


@triton.jit
def overlap_kernel(
    out,
    a,
    b,
    a_masks,
    b_masks,
    pixels,
    spans,
    MASKS: tl.constexpr,
    PIXELS: tl.constexpr,
    STEPS: tl.constexpr,
):
    # A square of the counts, of MASKS x MASKS, over a span of STEPS x PIXELS pixels: a product of integer matrices.
    image = tl.program_id(0).to(tl.int64) // spans
    pixel = (tl.program_id(0).to(tl.int64) % spans) * (STEPS * PIXELS) + tl.arange(0, PIXELS).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * MASKS + tl.arange(0, MASKS).to(tl.int64)
    column = tl.program_id(2).to(tl.int64) * MASKS + tl.arange(0, MASKS).to(tl.int64)
    counts = tl.zeros((MASKS, MASKS), tl.int32)
    # No prefetching: stages of floats would take more shared memory than many GPUs have.
    for _ in tl.range(STEPS, num_stages=1):
        rows = masks_as_integers(a, b, image, a_masks, b_masks, row, pixel, pixels)
        columns = masks_as_integers(a, b, image, a_masks, b_masks, column, pixel, pixels)
        counts = tl.dot(rows, tl.trans(columns), counts, out_dtype=tl.int32)
        pixel += PIXELS
    masks = a_masks + b_masks
    at = (image * masks + row)[:, None] * masks + column[None, :]
    live = (row < masks)[:, None] & (column < masks)[None, :]
    tl.atomic_add(out + at, counts.to(tl.int64), mask=live, sem="relaxed")


#: Masks and pixels of a program of the overlap kernel, and how often it takes so many pixels. Twice as many at a time
#: need more registers than there are; so do these where, in masks of odd sizes, every pixel is a load of its own.
OVERLAP_SIZES = {"MASKS": 32, "PIXELS": 64, "STEPS": 64}
_ODD_OVERLAP_SIZES = {"MASKS": 32, "PIXELS": 32, "STEPS": 128}
_INTERPRETED_OVERLAP_SIZES = {"MASKS": 32, "PIXELS": 4096, "STEPS": 1}


# ---------------------------------------------------------------------- the loss: csrc/include/berdiff/loss.h


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
    zero = tl.load(columns + COLUMN).to(tl.float32)
    one = tl.load(columns + COLUMN + 6).to(tl.float32)
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
    columns += 14 * row
    kl_weight = tl.load(columns + 12).to(tl.float32) / count.to(tl.float32)
    bce_weight = tl.load(columns + 13).to(tl.float32) / count.to(tl.float32)

    small = exp_minus_abs(z)
    most = 1.0 / (1.0 + small)
    rest = small * most
    right = tl.where(z > 0.0, most, rest)
    wrong = tl.where(z > 0.0, rest, most)
    upper = small > 0.4142135679721832
    r = tl.where(upper, tl.fma(small, 0.5, -0.5), small)
    above = tl.where(z > 0.0, 0.0, -z)
    bce = tl.where(upper, 0.6931471824645996, 0.0) + above + (r - r * r * log_remainder(r))

    over_scale = loss_case(columns, epsilon, 2)
    under_scale = loss_case(columns, epsilon, 3)
    D = tl.fma(loss_case(columns, epsilon, 0), wrong, right)
    N = tl.fma(loss_case(columns, epsilon, 1), wrong, right)
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

    kl = loss_case(columns, epsilon, 4) * log_gap(over, ratio_over)
    kl = tl.fma(loss_case(columns, epsilon, 5), log_gap(under, ratio_under), kl)
    bits = tl.fma(kl_weight, kl, bce_weight * bce)
    tl.store(partial + program, tl.sum(tl.where(counts, bits, 0.0), axis=0))


@triton.jit
def diffusion_loss_value_kernel(value, partial, chunks_per_row, BLOCK: tl.constexpr):
    """A row's chunks in an order that depends on nothing else."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK).to(tl.int64)
    sums = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, chunks_per_row, BLOCK):
        chunk = first + at
        live = chunk < chunks_per_row
        sums += tl.load(partial + row * chunks_per_row + chunk, mask=live, other=0.0).to(tl.float64)
    tl.store(value + row, tl.sum(sums, axis=0).to(tl.float32))


# ---------------------------------------------------------------------- GroupNorm and SiLU, channels last


@triton.jit
def load_both(x, other, pixel, channel, count, other_count, live):
    """Elements (pixels, channels) of two tensors concatenated by channel, as float32."""
    in_x = live[:, None] & (channel < count)[None, :]
    in_other = live[:, None] & ((channel >= count) & (channel < count + other_count))[None, :]
    of_x = tl.load(x + pixel[:, None] * count + channel[None, :], mask=in_x, other=0.0)
    of_other = tl.load(other + pixel[:, None] * other_count + channel[None, :] - count, mask=in_other, other=0.0)
    return tl.where((channel < count)[None, :], of_x.to(tl.float32), of_other.to(tl.float32))


@triton.jit
def group_norm_sums_kernel(
    sums, x, other, count, other_count, pixels, spans, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, STEPS: tl.constexpr
):
    # Of a span of pixels and CHANNELS channels: what they differ from the image's first pixel in all, and the squares.
    # Taking a value of the channel itself away keeps the variance exact where the mean is large.
    image = tl.program_id(0).to(tl.int64) // spans
    span = tl.program_id(0).to(tl.int64) % spans
    channel = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS).to(tl.int64)
    first = image * pixels + tl.zeros((1,), tl.int64)
    pivot = load_both(x, other, first, channel, count, other_count, first >= 0)
    pixel = span * (STEPS * PIXELS) + tl.arange(0, PIXELS).to(tl.int64)
    total = tl.zeros((CHANNELS,), tl.float32)
    squares = tl.zeros((CHANNELS,), tl.float32)
    for _ in range(STEPS):
        live = pixel < pixels
        off = load_both(x, other, image * pixels + pixel, channel, count, other_count, live) - pivot
        off = tl.where(live[:, None], off, 0.0)
        total += tl.sum(off, axis=0)
        squares += tl.sum(off * off, axis=0)
        pixel += PIXELS
    channels = count + other_count
    at = sums + 2 * channels * tl.program_id(0).to(tl.int64) + channel
    tl.store(at, total, mask=channel < channels)
    tl.store(at + channels, squares, mask=channel < channels)


@triton.jit
def group_norm_factors_kernel(
    factors,
    sums,
    x,
    other,
    weight,
    bias,
    count,
    other_count,
    pixels,
    spans,
    groups,
    eps,
    SIZE: tl.constexpr,
):
    # Mean and variance of a group, as the scale and the shift of each of its channels. In float64: a first pixel far
    # from the mean costs digits.
    image = tl.program_id(0).to(tl.int64) // groups
    group = tl.program_id(0).to(tl.int64) % groups
    channels = count + other_count
    size = channels // groups
    index = tl.arange(0, SIZE).to(tl.int64)
    live = index < size
    channel = group * size + index
    total = tl.zeros((SIZE,), tl.float64)
    squares = tl.zeros((SIZE,), tl.float64)
    for span in range(spans):
        at = sums + 2 * channels * (image * spans + span) + channel
        total += tl.load(at, mask=live, other=0.0).to(tl.float64)
        squares += tl.load(at + channels, mask=live, other=0.0).to(tl.float64)
    of_x = tl.load(x + image * pixels * count + channel, mask=live & (channel < count), other=0.0)
    of_other = tl.load(
        other + image * pixels * other_count + channel - count, mask=live & (channel >= count), other=0.0
    )
    pivot = tl.where(channel < count, of_x.to(tl.float64), of_other.to(tl.float64))
    number = tl.zeros((1,), tl.float64) + pixels
    means = tl.where(live, pivot + total / number, 0.0)
    mean = tl.sum(means, axis=0) / size
    off = tl.where(live, means - mean, 0.0)
    within = tl.where(live, squares - total * total / number, 0.0)
    variance = (tl.sum(within, axis=0) + number * tl.sum(off * off, axis=0)) / (number * size)
    scale = tl.load(weight + channel, mask=live, other=0.0) / tl.sqrt(variance + eps)
    shift = tl.load(bias + channel, mask=live, other=0.0) - mean * scale
    tl.store(factors + 2 * channels * image + channel, scale.to(tl.float32), mask=live)
    tl.store(factors + 2 * channels * image + channels + channel, shift.to(tl.float32), mask=live)


@triton.jit
def group_norm_apply_kernel(
    out,
    factors,
    x,
    other,
    count,
    other_count,
    pixels,
    spans,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64) // spans
    pixel = (tl.program_id(0).to(tl.int64) % spans) * PIXELS + tl.arange(0, PIXELS).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS).to(tl.int64)
    channels = count + other_count
    live = pixel < pixels
    known = channel < channels
    scale = tl.load(factors + 2 * channels * image + channel, mask=known, other=0.0)
    shift = tl.load(factors + 2 * channels * image + channels + channel, mask=known, other=0.0)
    pixel += image * pixels
    y = load_both(x, other, pixel, channel, count, other_count, live) * scale[None, :] + shift[None, :]
    if SILU:
        y = y * tl.sigmoid(y)  # as a quotient it spills a register on sm_80
    at = out + pixel[:, None] * channels + channel[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=live[:, None] & known[None, :])


#: Channels and pixels of a program of these kernels, and how often the first takes so many pixels.
GROUP_NORM_SIZES = {"CHANNELS": 64, "PIXELS": 64}
GROUP_NORM_STEPS = 8
_INTERPRETED_GROUP_NORM_SIZES = {"CHANNELS": 128, "PIXELS": 128}  # NumPy adds one after another: few at a time


#: Passed to every launch and to every ahead-of-time compilation: products and sums stay separately rounded.
LAUNCH_OPTIONS = {"enable_fp_fusion": False, "num_warps": 4}


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    # Triton reads torch.bool as single bits; the mask is one byte a pixel.
    return tensor.view(torch.uint8) if tensor.dtype is torch.bool else tensor


def _blocks(out: torch.Tensor, pixels: int) -> int:
    return BLOCKS if out.is_cuda else min(triton.next_power_of_2(triton.cdiv(pixels, 4)), _INTERPRETED_BLOCKS)


def _launch(kernel, rows: int, pixels: int, out: torch.Tensor, *arguments, **constants) -> None:
    blocks = _blocks(out, pixels)
    chunks = triton.cdiv(pixels, 4 * blocks)
    guard = torch.cuda.device_of(out) if out.is_cuda else contextlib.nullcontext()
    with guard:
        kernel[(rows * chunks,)](_bytes(out), pixels, chunks, *arguments, **constants, BLOCKS=blocks, **LAUNCH_OPTIONS)


class TritonBackend:
    """The same ops as ``NativeBackend``."""

    def initial_noise(self, out: torch.Tensor, rows: Rows) -> None:
        seeds, samples_per_image, first_row, first_sample = rows
        count = out.shape[0]
        _launch(
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
        self,
        out: torch.Tensor,
        y_0: torch.Tensor,
        t: torch.Tensor,
        flip: torch.Tensor,
        rows: Rows,
    ) -> None:
        seeds, samples_per_image, first_row, first_sample = rows
        count = out.shape[0]
        _launch(
            q_sample_kernel,
            count,
            out.numel() // count,
            out,
            _bytes(y_0),
            t,
            flip,
            seeds,
            samples_per_image,
            first_row,
            first_sample,
            SEED_COLUMNS=seeds.ndim,
        )

    def sample_step(
        self,
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
        _launch(
            sample_step_kernel,
            count,
            out.numel() // count,
            out,
            _bytes(y_t),
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
        self,
        out: torch.Tensor,
        y_t: torch.Tensor,
        logits: torch.Tensor,
        coefficients: torch.Tensor,
        predicts_y0: bool,
    ) -> None:
        _launch(posterior_kernel, 1, out.numel(), out, _bytes(y_t), logits, coefficients, PREDICTS_Y0=predicts_y0)

    def overlap(self, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        images, a_masks, b_masks = a.shape[0], a.shape[1], b.shape[1]
        pixels = math.prod(a.shape[2:])
        sizes = OVERLAP_SIZES if pixels % 16 == 0 else _ODD_OVERLAP_SIZES
        sizes = sizes if out.is_cuda else _INTERPRETED_OVERLAP_SIZES
        spans = triton.cdiv(pixels, sizes["PIXELS"] * sizes["STEPS"])
        groups = triton.cdiv(a_masks + b_masks, sizes["MASKS"])
        if spans == 0:
            return
        guard = torch.cuda.device_of(out) if out.is_cuda else contextlib.nullcontext()
        with guard:
            overlap_kernel[(images * spans, groups, groups)](
                out, _bytes(a), _bytes(b), a_masks, b_masks, pixels, spans, **sizes, **LAUNCH_OPTIONS
            )

    def diffusion_loss(
        self,
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
        chunks = triton.cdiv(pixels, 4 * _blocks(gradient, pixels))
        partial = value.new_empty(count * chunks)
        _launch(
            diffusion_loss_kernel,
            count,
            pixels,
            gradient,
            logits,
            _bytes(y_t),
            _bytes(y_0),
            None if ignore is None else _bytes(ignore),
            columns,
            kept,
            partial,
            PREDICTS_Y0=predicts_y0,
            IGNORES=ignore is not None,
        )
        with torch.cuda.device_of(value) if value.is_cuda else contextlib.nullcontext():
            diffusion_loss_value_kernel[(count,)](value, partial, chunks, BLOCK=128, num_warps=1)

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
        images, channels = out.shape[0], out.shape[-1]
        pixels = math.prod(out.shape[1:-1])
        source = (x, x if other is None else other, x.shape[-1], channels - x.shape[-1])
        sizes = GROUP_NORM_SIZES if out.is_cuda else _INTERPRETED_GROUP_NORM_SIZES
        blocks = triton.cdiv(channels, sizes["CHANNELS"])
        spans = triton.cdiv(pixels, sizes["PIXELS"] * GROUP_NORM_STEPS)
        sums = weight.new_empty(images * spans * 2 * channels)
        factors = weight.new_empty(images * 2 * channels)
        with torch.cuda.device_of(out) if out.is_cuda else contextlib.nullcontext():
            group_norm_sums_kernel[(images * spans, blocks)](
                sums, *source, pixels, spans, **sizes, STEPS=GROUP_NORM_STEPS, num_warps=4
            )
            group_norm_factors_kernel[(images * groups,)](
                factors,
                sums,
                *source[:2],
                weight,
                bias,
                *source[2:],
                pixels,
                spans,
                groups,
                eps,
                SIZE=triton.next_power_of_2(channels // groups),
                num_warps=1,
            )
            spans = triton.cdiv(pixels, sizes["PIXELS"])
            group_norm_apply_kernel[(images * spans, blocks)](
                out, factors, *source, pixels, spans, SILU=silu, **sizes, num_warps=4
            )


backend: TritonBackend = TritonBackend()
