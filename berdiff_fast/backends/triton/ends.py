# SPDX-License-Identifier: Apache-2.0
"""The first and the last convolution of the fused network in Triton: few channels on one side, plain pointers."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from berdiff_fast.backends.triton.activations import Activation, Launch
from berdiff_fast.backends.triton.common import on
from berdiff_fast.backends.triton.group_norm import silu


@triton.jit
def stem_kernel(
    out,
    sums,
    y_t,
    weight,
    features,
    height,
    width,
    tiles,
    masks_per_image,
    COUT: tl.constexpr,
    MASKS: tl.constexpr,
    PATCH: tl.constexpr,
    TAPS: tl.constexpr,
    PIXELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """The first convolution, of few channels, onto the image's share of it: one product of matrices.

    Args:
        out: (N, H, W, COUT); sums: (N, tiles, 2, COUT) float32.
        y_t: (N, MASKS, PATCH H, PATCH W).
        weight: (TAPS, COUT) in the type of y_t: tap by tap the mask channels, 9 MASKS PATCH^2 in all, then zeros.
        features: (images, H, W, COUT): the image's share and the bias; ``masks_per_image`` masks follow each other.
    """
    image = tl.program_id(0) // tiles
    output = tl.program_id(1) * OUTPUTS
    pixel = tl.program_id(0) % tiles * PIXELS + tl.arange(0, PIXELS)
    channel = output + tl.arange(0, OUTPUTS)
    live = pixel < height * width
    at = pixel.to(tl.int64)[:, None] * COUT + channel[None, :]
    area = (height * width).to(tl.int64) * COUT
    tap = tl.arange(0, TAPS) // (MASKS * PATCH * PATCH)
    k = tl.arange(0, TAPS) % (MASKS * PATCH * PATCH)
    y = (pixel // width)[:, None] + (tap // 3 - 1)[None, :]
    x = (pixel % width)[:, None] + (tap % 3 - 1)[None, :]
    inside = live[:, None] & (tap < 9)[None, :] & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    line = ((image * MASKS + k // (PATCH * PATCH)) * height * PATCH + k % (PATCH * PATCH) // PATCH)[None, :] + y * PATCH
    bits = tl.load(y_t + line.to(tl.int64) * (width * PATCH) + x * PATCH + (k % PATCH)[None, :], mask=inside, other=0.0)
    of_bits = tl.load(weight + tl.arange(0, TAPS)[:, None] * COUT + channel[None, :])
    total = tl.load(features + image // masks_per_image * area + at, mask=live[:, None], other=0.0).to(tl.float32)
    total = tl.dot(bits, of_bits, total, input_precision="ieee")
    rounded = total.to(out.dtype.element_ty)
    tl.store(out + image * area + at, rounded, mask=live[:, None])
    found = tl.where(live[:, None], rounded.to(tl.float32), 0.0)
    to = sums + tl.program_id(0).to(tl.int64) * (2 * COUT) + channel
    tl.store(to, tl.sum(found, axis=0))
    tl.store(to + COUT, tl.sum(found * found, axis=0))


def stem(launch: Launch, y_t: torch.Tensor, weight: torch.Tensor, features: torch.Tensor, patch: int) -> Activation:
    """See ``stem_kernel``."""
    n, masks = y_t.shape[:2]
    images, height, width, channels = features.shape
    out = features.new_empty(n, height, width, channels)
    pixels, outputs = (64 if channels % 64 == 0 else 128), next(o for o in (64, 32, 16) if channels % o == 0)
    tiles = triton.cdiv(height * width, pixels)
    sums = out.new_empty(n, tiles, 2, channels, dtype=torch.float32)
    with on(out):
        launch(
            stem_kernel, (n * tiles, channels // outputs),
            out, sums, y_t, weight, features, height, width, tiles, n // images,
            COUT=channels, MASKS=masks, PATCH=patch, TAPS=weight.shape[0], PIXELS=pixels, OUTPUTS=outputs,
            num_warps=4,
        )  # fmt: skip
    return Activation(out, sums)


@triton.jit
def head_products_kernel(
    products,
    x,
    factors,
    weight,
    pixels,
    spans,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIXELS: tl.constexpr,
    K: tl.constexpr,
):
    """Norm and SiLU of each pixel, and its products with all taps of the last convolution.

    Args:
        products: (N, H W, COLUMNS) float32.
        x: (N, H W, C); factors: (N, 2, C) float32.
        weight: (C, COLUMNS) in the type of x: tap by tap the output channels, then zeros.
    """
    image = tl.program_id(0) // spans
    pixel = tl.program_id(0) % spans * PIXELS + tl.arange(0, PIXELS)
    column = tl.arange(0, COLUMNS)
    live = pixel < pixels
    row = image.to(tl.int64) * pixels + pixel
    found = tl.zeros((PIXELS, COLUMNS), tl.float32)
    for first in tl.static_range(0, C, K):
        channel = first + tl.arange(0, K)
        scale = tl.load(factors + 2 * C * image + channel)
        shift = tl.load(factors + 2 * C * image + C + channel)
        y = tl.load(x + row[:, None] * C + channel[None, :], mask=live[:, None], other=0.0).to(tl.float32)
        y = y * scale[None, :] + shift[None, :]
        y = silu(y).to(weight.dtype.element_ty)
        w = tl.load(weight + channel[:, None] * COLUMNS + column[None, :])
        found = tl.dot(y, w, found, input_precision="ieee")
    tl.store(products + row[:, None] * COLUMNS + column[None, :], found, mask=live[:, None])


@triton.jit
def head_sums_kernel(
    logits,
    products,
    bias,
    height,
    width,
    spans,
    MASKS: tl.constexpr,
    PATCH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """The last convolution: of each output pixel the products of its nine neighbours with their taps, added up.

    Args:
        logits: (N, MASKS, PATCH H, PATCH W).
        products: (N, H W, COLUMNS) float32.
        bias: (MASKS PATCH^2) float32.
    """
    CHANNELS: tl.constexpr = MASKS * PATCH * PATCH
    image = (tl.program_id(0) // spans).to(tl.int64)
    channel = tl.program_id(1)
    pixel = tl.program_id(0) % spans * PIXELS + tl.arange(0, PIXELS)
    live = pixel < height * width
    total = tl.zeros((PIXELS,), tl.float32) + tl.load(bias + channel)
    for tap in tl.static_range(9):
        y = pixel // width + (tap // 3 - 1)
        x = pixel % width + (tap % 3 - 1)
        inside = live & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        row = image * (height * width) + y * width + x
        total += tl.load(products + row * COLUMNS + tap * CHANNELS + channel, mask=inside, other=0.0)
    line = (image * MASKS + channel // (PATCH * PATCH)) * (height * PATCH)
    line = line + pixel // width * PATCH + channel % (PATCH * PATCH) // PATCH
    to = line * (width * PATCH) + pixel % width * PATCH + channel % PATCH
    tl.store(logits + to, total.to(logits.dtype.element_ty), mask=live)


def head(
    launch: Launch,
    x: Activation,
    factors: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    masks: int,
    patch: int,
) -> torch.Tensor:
    """Norm, SiLU and the last convolution: logits (N, masks, patch H, patch W). See ``head_products_kernel``."""
    n, height, width, channels = x.x.shape
    columns = weight.shape[1]
    products = factors.new_empty(n, height * width, columns)
    logits = x.x.new_empty(n, masks, patch * height, patch * width)
    k = math.gcd(channels, 64)
    spans = triton.cdiv(height * width, 128)
    sum_spans = triton.cdiv(height * width, 256)
    with on(logits):
        launch(
            head_products_kernel, (n * spans,),
            products, x.x, factors, weight, height * width, spans,
            C=channels, COLUMNS=columns, PIXELS=128, K=k, num_warps=4,
        )  # fmt: skip
        launch(
            head_sums_kernel, (n * sum_spans, masks * patch * patch),
            logits, products, bias, height, width, sum_spans,
            MASKS=masks, PATCH=patch, COLUMNS=columns, PIXELS=256, num_warps=4,
        )  # fmt: skip
    return logits
