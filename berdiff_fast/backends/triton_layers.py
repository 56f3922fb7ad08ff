# SPDX-License-Identifier: Apache-2.0
"""The layers of a U-Net in Triton, for GPUs with tensor cores: a convolution that leaves the next norm's sums.

Activations are (N, H, W, C), C innermost. A convolution adds its bias, the 1 x 1 projections of a skip path and a
residual before it rounds and writes, and leaves for each of its tiles and channels the sum and the sum of squares of
what it wrote. So a residual block is two norms and two convolutions, six launches in all, and nothing is read or
written twice.

Sums of squares are not centred: in float32 they lose digits where a channel's mean is many times its standard
deviation, by (mean / deviation)^2 2^-24 of the variance. That is far below the rounding of the types that this is
made for.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def silu(y):
    """y / (1 + exp(-y)), its reciprocal as the square of a reciprocal root: one instruction, exact to 2^-22."""
    root = tl.rsqrt(1.0 + tl.exp(-y))
    return y * (root * root)


@triton.jit
def tap_offset(tap, phase, TAPS: tl.constexpr):
    """Which input pixel a tap reads, relative to the output pixel."""
    if TAPS == 9:
        dy = tap // 3 - 1
        dx = tap % 3 - 1
    elif TAPS == 4:  # the four taps that are left of nine on an image whose pixels are each repeated 2 x 2 times
        dy = tap // 2 - 1 + phase // 2
        dx = tap % 2 - 1 + phase % 2
    else:
        dy = 0
        dx = 0
    return dy, dx


@triton.jit
def write_tile(
    found,
    output,
    bias,
    residual,
    out,
    sums,
    top,
    left,
    phase,
    height,
    width,
    COUT: tl.constexpr,
    SIDE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Bias and residual added to products (OUTPUTS, ROWS COLUMNS), rounded and written, and their sums."""
    channel = output + tl.arange(0, OUTPUTS)
    index = tl.arange(0, ROWS * COLUMNS)
    y = top + index // COLUMNS
    x = left + index % COLUMNS
    row = (y * SIDE + phase // 2) * (width * SIDE) + x * SIDE + phase % 2
    at = row[None, :] * COUT + channel[:, None]
    found += tl.load(bias + channel)[:, None]
    if MASKED:
        live = ((y < height) & (x < width))[None, :]
        if RESIDUAL:
            found += tl.load(residual + at, mask=live, other=0.0).to(tl.float32)
        rounded = found.to(out.dtype.element_ty)
        tl.store(out + at, rounded, mask=live)
        found = tl.where(live, rounded.to(tl.float32), 0.0)
    else:
        if RESIDUAL:
            found += tl.load(residual + at).to(tl.float32)
        rounded = found.to(out.dtype.element_ty)
        tl.store(out + at, rounded)
        found = rounded.to(tl.float32)
    tl.store(sums + channel, tl.sum(found, axis=1))
    tl.store(sums + COUT + channel, tl.sum(found * found, axis=1))


@triton.jit(do_not_specialize=["height", "width", "down", "across", "images_per_row"])
def convolution_kernel(
    out,
    sums,
    x,
    a,
    b,
    weight,
    bias,
    residual,
    height,
    width,
    down,
    across,
    images_per_row,
    COUNT: tl.constexpr,
    COUNT_A: tl.constexpr,
    COUNT_B: tl.constexpr,
    COUT: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    PHASES: tl.constexpr,
    RESIDUAL: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    K: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A convolution of 3 x 3 or 1 x 1, as a product of matrices one of which is never made (implicit GEMM).

    Tiles of x come by the tensor memory accelerator, whose zeros beyond the border are the padding. The weights are the
    left factor and the pixels the right one: tensor cores take the right one from shared memory, where it lies, and
    sums over pixels are sums within a thread. (As the left factor Triton 3.6 loads the pixels into registers, and
    overwrites them while they are read.)

    Args:
        out: (N, H, W, COUT); (N, 2 H, 2 W, COUT) with four phases.
        sums: (N, tiles of an image, 2, COUT) float32.
        x: descriptor of (N, H, W, COUNT) with blocks (1, ROWS, COLUMNS, K); with STRIDE 2, of the same memory as
            (N, H, 2, W, 2 COUNT), which is the input of twice the size.
        a, b: descriptors of (N, H, W, COUNT_A) and (N, H, W, COUNT_B), which are projected (1 x 1) and added, unless
        they
            have no channels.
        weight: descriptor of (PHASES COUT, TAPS COUNT + COUNT_A + COUNT_B) with blocks (OUTPUTS, K).
        bias: (rows, COUT) float32, each for ``images_per_row`` images.
        residual: as out; read if RESIDUAL.
        height, width: H, W of the output, of one phase.
        down, across: tiles per image along H and W.
    """
    SIDE: tl.constexpr = 1 if PHASES == 1 else 2
    M: tl.constexpr = ROWS * COLUMNS
    output = tl.program_id(0) % (COUT // OUTPUTS) * OUTPUTS
    tile = tl.program_id(0) // (COUT // OUTPUTS)  # neighbours read the same tile of x
    phase = tile % PHASES
    image = tile // PHASES // (down * across)
    place = tile // PHASES % (down * across)
    top = place // across * ROWS
    left = place % across * COLUMNS
    products = tl.zeros((OUTPUTS, M), tl.float32)
    # Numbers of channels are constants: with a loop that counts them the compiler does not load ahead. All taps of some
    # channels follow each other, whose pixels are then in the cache.
    for k in tl.range(TAPS * (COUNT // K), num_stages=STAGES):
        tap = k % TAPS
        channel = k // TAPS * K
        dy, dx = tap_offset(tap, phase, TAPS)
        if STRIDE == 1:
            pixels = x.load([image, top + dy, left + dx, channel]).reshape(M, K)
        else:
            # Row 2 y + dy is row y of the even ones or, for dy = 1 and dy = -1, y or y - 1 of the odd ones.
            odd_y = dy & 1
            odd_x = dx & 1
            pixels = x.load(
                [image, top + (dy - odd_y) // 2, odd_y, left + (dx - odd_x) // 2, odd_x * COUNT + channel]
            ).reshape(M, K)
        w = weight.load([phase * COUT + output, tap * COUNT + channel])
        products = tl.dot(w, pixels.T, products, input_precision="ieee")
    if COUNT_A > 0:
        for k in tl.range(COUNT_A // K, num_stages=STAGES):
            pixels = a.load([image, top, left, k * K]).reshape(M, K)
            w = weight.load([output, TAPS * COUNT + k * K])
            products = tl.dot(w, pixels.T, products, input_precision="ieee")
    if COUNT_B > 0:
        for k in tl.range(COUNT_B // K, num_stages=STAGES):
            pixels = b.load([image, top, left, k * K]).reshape(M, K)
            w = weight.load([output, TAPS * COUNT + COUNT_A + k * K])
            products = tl.dot(w, pixels.T, products, input_precision="ieee")

    to = sums + tile.to(tl.int64) * (2 * COUT)
    bias += image // images_per_row * COUT
    area = (height * SIDE * width * SIDE).to(tl.int64) * COUT  # elements of an image; within one, 32 bits suffice
    if OUTPUTS < 128:
        write_tile(
            products, output, bias, residual + image * area, out + image * area, to, top, left, phase, height, width,
            COUT, SIDE, RESIDUAL, MASKED, ROWS, COLUMNS, OUTPUTS,
        )  # fmt: skip
    else:  # by halves, for want of registers
        HALF: tl.constexpr = OUTPUTS // 2
        first, second = products.reshape(2, HALF, M).permute(1, 2, 0).split()
        write_tile(
            first, output, bias, residual + image * area, out + image * area, to, top, left, phase, height, width,
            COUT, SIDE, RESIDUAL, MASKED, ROWS, COLUMNS, HALF,
        )  # fmt: skip
        write_tile(
            second, output + HALF, bias, residual + image * area, out + image * area, to, top, left, phase, height,
            width, COUT, SIDE, RESIDUAL, MASKED, ROWS, COLUMNS, HALF,
        )  # fmt: skip


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


@triton.jit
def norm_kernel(
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
    """Scale, shift and SiLU of two tensors concatenated by channel; CHANNELS divides the channels of both.

    Args:
        out: (N, H W, C + C').
        factors: (N, 2, C + C') float32.
        x, other: (N, H W, C) and (N, H W, C').
    """
    image = tl.program_id(0) // spans
    pixel = tl.program_id(0) % spans * PIXELS + tl.arange(0, PIXELS)
    first = tl.program_id(1) * CHANNELS
    index = tl.arange(0, CHANNELS)
    channels = count + other_count
    live = (pixel < pixels)[:, None]
    row = (image.to(tl.int64) * pixels + pixel)[:, None]
    scale = tl.load(factors + 2 * channels * image + first + index)
    shift = tl.load(factors + 2 * channels * image + channels + first + index)
    if first < count:
        y = tl.load(x + row * count + first + index[None, :], mask=live, other=0.0)
    else:
        y = tl.load(other + row * other_count + (first - count) + index[None, :], mask=live, other=0.0)
    y = y.to(tl.float32) * scale[None, :] + shift[None, :]
    if SILU:
        y = silu(y)
    tl.store(out + row * channels + first + index[None, :], y.to(out.dtype.element_ty), mask=live)


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


# ---------------------------------------------------------------------- launches


@dataclass
class Activation:
    """x (N, H, W, C) and, of each of T tiles of an image, sums and sums of squares (N, T, 2, C) float32."""

    x: torch.Tensor
    sums: torch.Tensor


@dataclass
class Weight:
    """A convolution's weights, made for ``convolution_kernel``.

    Attributes:
        matrix: (phases outputs, taps inputs + projected inputs).
        bias: (outputs,) float32, or a row per timestep.
        inputs: channels of what is convolved.
        projected: channels of each tensor of a skip path that is projected and added.
        taps: 9, 1, or 4 with the four phases of an upsampling.
        stride: 1 or 2.
    """

    matrix: torch.Tensor
    bias: torch.Tensor
    inputs: int
    projected: tuple[int, ...] = ()
    taps: int = 9
    stride: int = 1

    @property
    def phases(self) -> int:
        return 4 if self.taps == 4 else 1

    @property
    def outputs(self) -> int:
        return self.matrix.shape[0] // self.phases


@dataclass(frozen=True)
class Tiling:
    """What a program of ``convolution_kernel`` makes: ``rows`` x ``columns`` pixels of ``outputs`` channels, by steps
    of ``k`` input channels."""

    rows: int
    columns: int
    outputs: int
    k: int
    stages: int


#: Programs with which a GPU is taken to be full. Measured on an H200, whose 132 processors take two each.
FULL = 90


def tiling(images: int, height: int, width: int, weight: Weight, element_size: int) -> Tiling:
    """By a fixed rule, so that results depend on nothing that was timed; measured on an H200 (docs/performance.md)."""
    columns = 16 if width > 8 else 8
    channels = (weight.inputs, *weight.projected)
    most = 128 // element_size  # 128 bytes are a row of the swizzled tile
    k = next(k for k in (most, most // 2, most // 4) if all(c % k == 0 for c in channels))
    found = None
    for outputs, pixels in ((128, 128), (64, 128), (64, 64), (32, 64), (16, 64)):
        rows = pixels // columns
        if weight.outputs % outputs or (rows > max(height, 4) and pixels > 64) or (found is not None and outputs < 32):
            continue
        tiles = images * triton.cdiv(height, rows) * triton.cdiv(width, columns) * weight.phases
        deep = outputs * pixels <= 4096 and k == most and all(c % (2 * k) == 0 for c in channels)
        found = Tiling(rows, columns, outputs, 2 * k if deep else k, 3)
        if tiles * (weight.outputs // outputs) >= FULL:
            break
    assert found is not None, f"{weight.outputs} outputs"
    return found


class TritonLayers:
    """The layers as ``network.fused`` calls them, on a GPU or, under Triton's interpreter, on the CPU."""

    def __init__(self) -> None:
        self._thread = threading.local()  # another thread may launch while this one compiles

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Within this, the thread's kernels are compiled, several at a time, and none is launched."""
        self._thread.compiles = True
        try:
            with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as executor, triton.AsyncCompileMode(executor):
                yield
        finally:
            self._thread.compiles = False

    def _launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        if getattr(self._thread, "compiles", False):
            kernel.warmup(*arguments, grid=grid, **constants)
        else:
            kernel[grid](*arguments, **constants)

    def stem(self, y_t: torch.Tensor, weight: torch.Tensor, features: torch.Tensor, patch: int) -> Activation:
        """See ``stem_kernel``."""
        n, masks = y_t.shape[:2]
        images, height, width, channels = features.shape
        out = features.new_empty(n, height, width, channels)
        pixels, outputs = (64 if channels % 64 == 0 else 128), next(o for o in (64, 32, 16) if channels % o == 0)
        tiles = triton.cdiv(height * width, pixels)
        sums = out.new_empty(n, tiles, 2, channels, dtype=torch.float32)
        with _on(out):
            self._launch(
                stem_kernel, (n * tiles, channels // outputs),
                out, sums, y_t, weight, features, height, width, tiles, n // images,
                COUT=channels, MASKS=masks, PATCH=patch, TAPS=weight.shape[0], PIXELS=pixels, OUTPUTS=outputs,
                num_warps=4,
            )  # fmt: skip
        return Activation(out, sums)

    def factors(
        self, x: Activation, other: Activation | None, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
    ) -> torch.Tensor:
        """See ``norm_factors_kernel``; weight and bias (channels,) or, with as many rows as there are steps, (steps,
        channels).
        """
        n, height, width, count = x.x.shape
        second = x if other is None else other
        channels = count + (0 if other is None else second.x.shape[-1])
        factors = weight.new_empty(n, 2, channels)
        with _on(factors):
            self._launch(
                norm_factors_kernel, (n * groups,),
                factors, x.sums, second.sums, weight, bias, x.sums.shape[1], second.sums.shape[1], count,
                channels - count, height * width, groups, eps, _images_per_row(n, weight),
                TILES=32, SIZE=triton.next_power_of_2(channels // groups), num_warps=4,
            )  # fmt: skip
        return factors

    def norm(self, x: Activation, other: Activation | None, factors: torch.Tensor, silu: bool) -> torch.Tensor:
        """Scale, shift and SiLU of x and other concatenated: (N, H, W, C + C')."""
        n, height, width, count = x.x.shape
        second = x if other is None else other
        channels = factors.shape[-1]
        out = x.x.new_empty(n, height, width, channels)
        block = math.gcd(64, count, channels - count)
        spans = triton.cdiv(height * width, 64)
        with _on(out):
            self._launch(
                norm_kernel, (n * spans, channels // block),
                out, factors, x.x, second.x, count, channels - count, height * width, spans,
                SILU=silu, CHANNELS=block, PIXELS=64, num_warps=4,
            )  # fmt: skip
        return out

    def convolution(
        self,
        x: torch.Tensor,
        weight: Weight,
        bias: torch.Tensor,
        projected: tuple[torch.Tensor, ...] = (),
        residual: torch.Tensor | None = None,
    ) -> Activation:
        """See ``convolution_kernel``; ``bias`` is the timestep's, (outputs,), or has a row for each of several."""
        n, height, width = x.shape[0], x.shape[1] // weight.stride, x.shape[2] // weight.stride
        tile = tiling(n, height, width, weight, x.element_size())
        down, across = triton.cdiv(height, tile.rows), triton.cdiv(width, tile.columns)
        side = 2 if weight.phases == 4 else 1
        out = x.new_empty(n, height * side, width * side, weight.outputs)
        sums = out.new_empty(n, down * across * weight.phases, 2, weight.outputs, dtype=torch.float32)
        block = [1, tile.rows, tile.columns, tile.k]
        if weight.stride == 2:
            halves = x.view(n, height, 2, width, 2 * weight.inputs)
            source = TensorDescriptor.from_tensor(halves, [1, tile.rows, 1, tile.columns, tile.k])
        else:
            source = TensorDescriptor.from_tensor(x, block)
        others = [TensorDescriptor.from_tensor(p, block) for p in projected]
        a, b = (*others, source, source)[:2]
        channels = (*weight.projected, 0, 0)
        matrix = TensorDescriptor.from_tensor(weight.matrix, [tile.outputs, tile.k])
        programs = n * down * across * weight.phases * (weight.outputs // tile.outputs)
        with _on(out):
            self._launch(
                convolution_kernel, (programs,),
                out, sums, source, a, b, matrix, bias, out if residual is None else residual, height, width, down,
                across, _images_per_row(n, bias), COUNT=weight.inputs, COUNT_A=channels[0], COUNT_B=channels[1],
                COUT=weight.outputs, TAPS=weight.taps, STRIDE=weight.stride, PHASES=weight.phases, RESIDUAL=residual
                is not None, MASKED=height % tile.rows != 0 or width % tile.columns != 0, ROWS=tile.rows,
                COLUMNS=tile.columns, K=tile.k, OUTPUTS=tile.outputs, STAGES=tile.stages, num_warps=4,
            )  # fmt: skip
        return Activation(out, sums)

    def head(
        self, x: Activation, factors: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, masks: int, patch: int
    ) -> torch.Tensor:
        """Norm, SiLU and the last convolution: logits (N, masks, patch H, patch W). See ``head_products_kernel``."""
        n, height, width, channels = x.x.shape
        columns = weight.shape[1]
        products = factors.new_empty(n, height * width, columns)
        logits = x.x.new_empty(n, masks, patch * height, patch * width)
        k = math.gcd(channels, 64)
        spans = triton.cdiv(height * width, 128)
        sum_spans = triton.cdiv(height * width, 256)
        with _on(logits):
            self._launch(
                head_products_kernel, (n * spans,),
                products, x.x, factors, weight, height * width, spans,
                C=channels, COLUMNS=columns, PIXELS=128, K=k, num_warps=4,
            )  # fmt: skip
            self._launch(
                head_sums_kernel, (n * sum_spans, masks * patch * patch),
                logits, products, bias, height, width, sum_spans,
                MASKS=masks, PATCH=patch, COLUMNS=columns, PIXELS=256, num_warps=4,
            )  # fmt: skip
        return logits


def _images_per_row(images: int, table: torch.Tensor) -> int:
    return images if table.ndim == 1 else images // table.shape[0]


def _on(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()
