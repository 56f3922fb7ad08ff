# SPDX-License-Identifier: Apache-2.0
"""GroupNorm and SiLU in Triton, channels last: the op ``group_norm_silu``, and the norms of the fused network.

Each makes factors, a scale and a shift per image and channel, of sums over the pixels, and applies them by the same
kernel. The op takes the sums itself; in the fused network the convolution before has left them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from berdiff_fast.backends.triton.activations import Activation, Launch, images_per_row
from berdiff_fast.backends.triton.common import on

#: Channels and pixels of a program of the op, and how often the one that sums takes so many pixels.
SIZES = {"CHANNELS": 64, "PIXELS": 64}
SUMS_STEPS = 8
_INTERPRETED_SIZES = {"CHANNELS": 128, "PIXELS": 128}  # NumPy adds one after another: few at a time


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
    """Of a span of pixels, what each channel differs from the image's first pixel in all, and the squares of that.

    Taking a value of the channel itself away keeps the variance exact where the mean is large.

    Args:
        sums: (images, spans, 2, C + C') float32.
        x: (images, pixels, C); other: (images, pixels, C').
        count, other_count: C, C'.
        spans: of STEPS PIXELS pixels, of an image.
    """
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
    """Mean and variance of a group, as the scale and the shift of each of its channels.

    In float64: a first pixel far from the mean costs digits.

    Args:
        factors: (images, 2, C + C') float32.
        sums: (images, spans, 2, C + C') float32, as ``group_norm_sums_kernel`` leaves them.
        x: (images, pixels, C); other: (images, pixels, C'); of each image the first pixel is read.
        weight, bias: (C + C',) float32.
        count, other_count: C, C'.
    """
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
def silu(y):
    """y / (1 + exp(-y)), its reciprocal as the square of a reciprocal root: one instruction, exact to 2^-22."""
    root = tl.rsqrt(1.0 + tl.exp(-y))
    return y * (root * root)


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
    WHOLE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Scale, shift and SiLU of two tensors concatenated by channel.

    Args:
        out: (images, pixels, C + C').
        factors: (images, 2, C + C') float32: scales and shifts.
        x: (images, pixels, C); other: (images, pixels, C').
        count, other_count: C, C'.
        spans: of PIXELS pixels, of an image.
        WHOLE: CHANNELS divides C and C', so that the channels of a program are all there and all of one tensor.
    """
    image = (tl.program_id(0) // spans).to(tl.int64)
    pixel = (tl.program_id(0) % spans).to(tl.int64) * PIXELS + tl.arange(0, PIXELS).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS).to(tl.int64)
    channels = count + other_count
    live = pixel < pixels
    known = channel < channels
    if WHOLE:
        scale = tl.load(factors + 2 * channels * image + channel)
        shift = tl.load(factors + 2 * channels * image + channels + channel)
    else:
        scale = tl.load(factors + 2 * channels * image + channel, mask=known, other=0.0)
        shift = tl.load(factors + 2 * channels * image + channels + channel, mask=known, other=0.0)
    pixel += image * pixels
    if WHOLE:
        if tl.program_id(1) * CHANNELS < count:
            y = tl.load(x + pixel[:, None] * count + channel[None, :], mask=live[:, None], other=0.0)
        else:
            y = tl.load(other + pixel[:, None] * other_count + channel[None, :] - count, mask=live[:, None], other=0.0)
        y = y.to(tl.float32)
    else:
        y = load_both(x, other, pixel, channel, count, other_count, live)
    y = y * scale[None, :] + shift[None, :]
    if SILU:
        # Two forms, so that each network's numbers stay what they are. As a quotient it spills registers on sm_80, and
        # so does this kernel with other orders of these lines (test_no_spills).
        y = silu(y) if WHOLE else y * tl.sigmoid(y)
    at = out + pixel[:, None] * channels + channel[None, :]
    if WHOLE:
        tl.store(at, y.to(out.dtype.element_ty), mask=live[:, None])
    else:
        tl.store(at, y.to(out.dtype.element_ty), mask=live[:, None] & known[None, :])


def group_norm_silu(
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
    pixels, own = math.prod(spatial), x.shape[1]
    source = (x, x if other is None else other, own, channels - own)
    sizes = SIZES if out.is_cuda else _INTERPRETED_SIZES
    blocks = triton.cdiv(channels, sizes["CHANNELS"])
    spans = triton.cdiv(pixels, sizes["PIXELS"] * SUMS_STEPS)
    sums = weight.new_empty(images * spans * 2 * channels)
    factors = weight.new_empty(images * 2 * channels)
    with on(out):
        group_norm_sums_kernel[(images * spans, blocks)](
            sums, *source, pixels, spans, **sizes, STEPS=SUMS_STEPS, num_warps=4
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
            out, factors, *source, pixels, spans, SILU=silu, WHOLE=False, **sizes, num_warps=4
        )


# ---------------------------------------------------------------------- of the fused network


@triton.jit
def add_tiles(sums, tiles, image, channel, in_it, count, TILES: tl.constexpr, SIZE: tl.constexpr):
    """Sums and sums of squares (SIZE) float64 of some channels over an image's tiles."""
    total = tl.zeros((SIZE,), tl.float64)
    squares = tl.zeros((SIZE,), tl.float64)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        at = sums + (image * tiles + tile).to(tl.int64)[:, None] * (2 * count) + channel[None, :]
        live = (tile < tiles)[:, None] & in_it[None, :]
        total += tl.sum(tl.load(at, mask=live, other=0.0).to(tl.float64), axis=0)
        squares += tl.sum(tl.load(at + count, mask=live, other=0.0).to(tl.float64), axis=0)
    return total, squares


@triton.jit(do_not_specialize=["tiles", "other_tiles", "pixels", "images_per_row"])
def norm_factors_kernel(
    factors,
    sums,
    other_sums,
    weight,
    bias,
    tiles,
    other_tiles,
    count,
    other_count,
    pixels,
    groups,
    eps,
    images_per_row,
    TILES: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Mean and variance of a group, as the scale and the shift of each of its channels.

    Args:
        factors: (N, 2, C + C') float32.
        sums, other_sums: (N, tiles, 2, C) and (N, other_tiles, 2, C') float32, of two tensors concatenated by channel.
        weight, bias: (rows, C + C') float32, each for ``images_per_row`` images.
        count, other_count: C, C'.
        pixels: H W.
    """
    image = tl.program_id(0) // groups
    channels = count + other_count
    size = channels // groups
    index = tl.arange(0, SIZE)
    channel = tl.program_id(0) % groups * size + index
    live = index < size
    row = image // images_per_row * channels
    scale = tl.load(weight + row + channel, mask=live, other=0.0)
    shift = tl.load(bias + row + channel, mask=live, other=0.0)
    total, squares = add_tiles(sums, tiles, image, channel, live & (channel < count), count, TILES, SIZE)
    if other_count > 0:
        in_other = live & (channel >= count)
        more = add_tiles(other_sums, other_tiles, image, channel - count, in_other, other_count, TILES, SIZE)
        total += more[0]
        squares += more[1]
    number = tl.zeros((1,), tl.float64) + pixels * size
    mean = tl.sum(total, axis=0) / number
    variance = tl.maximum(tl.sum(squares, axis=0) / number - mean * mean, 0.0)
    scale = scale / tl.sqrt(variance + eps)
    shift = shift - mean * scale
    to = factors + 2 * channels * image + channel
    tl.store(to, scale.to(tl.float32), mask=live)
    tl.store(to + channels, shift.to(tl.float32), mask=live)


def factors(
    launch: Launch,
    x: Activation,
    other: Activation | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
) -> torch.Tensor:
    """See ``norm_factors_kernel``; weight and bias (channels,) or, with as many rows as there are steps, (steps,
    channels).
    """
    n, height, width, count = x.x.shape
    second = x if other is None else other
    channels = count + (0 if other is None else second.x.shape[-1])
    factors = weight.new_empty(n, 2, channels)
    with on(factors):
        launch(
            norm_factors_kernel, (n * groups,),
            factors, x.sums, second.sums, weight, bias, x.sums.shape[1], second.sums.shape[1], count,
            channels - count, height * width, groups, eps, images_per_row(n, weight),
            TILES=32, SIZE=triton.next_power_of_2(channels // groups), num_warps=4,
        )  # fmt: skip
    return factors


def norm(launch: Launch, x: Activation, other: Activation | None, factors: torch.Tensor, silu: bool) -> torch.Tensor:
    """Scale, shift and SiLU of x and other concatenated: (N, H, W, C + C')."""
    n, height, width, count = x.x.shape
    second = x if other is None else other
    channels = factors.shape[-1]
    out = x.x.new_empty(n, height, width, channels)
    block = math.gcd(64, count, channels - count)
    spans = triton.cdiv(height * width, 64)
    with on(out):
        launch(
            group_norm_apply_kernel, (n * spans, channels // block),
            out, factors, x.x, second.x, count, channels - count, height * width, spans,
            SILU=silu, WHOLE=True, CHANNELS=block, PIXELS=64, num_warps=4,
        )  # fmt: skip
    return out
