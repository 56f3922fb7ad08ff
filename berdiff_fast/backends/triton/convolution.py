# SPDX-License-Identifier: Apache-2.0
"""Convolutions of the fused network in Triton, for GPUs with tensor cores: each leaves the next norm's sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from berdiff_fast.backends.triton.activations import Activation, Launch, images_per_row
from berdiff_fast.backends.triton.common import on


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


def convolution(
    launch: Launch,
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
    with on(out):
        launch(
            convolution_kernel, (programs,),
            out, sums, source, a, b, matrix, bias, out if residual is None else residual, height, width, down,
            across, images_per_row(n, bias), COUNT=weight.inputs, COUNT_A=channels[0], COUNT_B=channels[1],
            COUT=weight.outputs, TAPS=weight.taps, STRIDE=weight.stride, PHASES=weight.phases, RESIDUAL=residual
            is not None, MASKED=height % tile.rows != 0 or width % tile.columns != 0, ROWS=tile.rows,
            COLUMNS=tile.columns, K=tile.k, OUTPUTS=tile.outputs, STAGES=tile.stages, num_warps=4,
        )  # fmt: skip
    return Activation(out, sums)
