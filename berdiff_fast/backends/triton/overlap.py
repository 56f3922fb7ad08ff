# SPDX-License-Identifier: Apache-2.0
"""The op ``overlap`` in Triton."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from berdiff_fast.backends.triton.common import LAUNCH_OPTIONS, as_bytes, on, widen

#: Masks and pixels of a program of the overlap kernel, and how often it takes so many pixels. Twice as many at a time
#: need more registers than there are; so do these where, in masks of odd sizes, every pixel is a load of its own.
SIZES = {"MASKS": 32, "PIXELS": 64, "STEPS": 64}
_ODD_SIZES = {"MASKS": 32, "PIXELS": 32, "STEPS": 128}
_INTERPRETED_SIZES = {"MASKS": 32, "PIXELS": 4096, "STEPS": 1}


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
    """A square of the counts, of MASKS x MASKS, over a span of STEPS x PIXELS pixels: a product of integer matrices.

    Args:
        out: (images, masks, masks) int64, to which the counts are added; masks = a_masks + b_masks.
        a: (images, a_masks, pixels) of any type.
        b: (images, b_masks, pixels) of any type.
        spans: of an image.
    """
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


def overlap(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    images, a_masks, b_masks = a.shape[0], a.shape[1], b.shape[1]
    pixels = math.prod(a.shape[2:])
    sizes = SIZES if pixels % 16 == 0 else _ODD_SIZES
    sizes = sizes if out.is_cuda else _INTERPRETED_SIZES
    spans = triton.cdiv(pixels, sizes["PIXELS"] * sizes["STEPS"])
    groups = triton.cdiv(a_masks + b_masks, sizes["MASKS"])
    if spans == 0:
        return
    with on(out):
        overlap_kernel[(images * spans, groups, groups)](
            out, as_bytes(a), as_bytes(b), a_masks, b_masks, pixels, spans, **sizes, **LAUNCH_OPTIONS
        )
