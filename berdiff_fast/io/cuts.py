# SPDX-License-Identifier: Apache-2.0
"""Cuts of slices and volumes that may reach beyond them: the same in an import as in sampling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from berdiff_fast.io.padding import lowest_tissue

#: First and last + 1 along slices, rows and columns.
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def foreground(arrays: Iterable[np.ndarray], axis: int) -> Box | None:
    """The box of what is not 0 in any of some volumes of one shape, with slices along ``axis``; None if all is 0."""
    body: np.ndarray | None = None
    for array in arrays:
        here = array != 0
        body = here if body is None else body | here
    if body is None or not body.any():
        return None
    body = np.moveaxis(body, axis, 0)
    slices, rows, columns = (np.flatnonzero(body.any(axes))[[0, -1]].tolist() for axes in ((1, 2), (0, 2), (0, 1)))
    return (slices[0], slices[1] + 1), (rows[0], rows[1] + 1), (columns[0], columns[1] + 1)


def starts(shape: Sequence[int], size: Sequence[int], box: Sequence[tuple[float, float]] | None = None) -> list[int]:
    """Where a cut of ``size`` begins along each dimension: around the middle of a ``box``, else out of the middle."""
    if box is None:
        return [(length - n) // 2 for length, n in zip(shape, size, strict=True)]
    return [round((low + high) / 2 - n / 2) for (low, high), n in zip(box, size, strict=True)]


def tissue(array: np.ndarray, outside: np.ndarray | None) -> np.ndarray:
    """float32 of a slice or a volume, with its lowest other value where it is ``outside`` the scan (bool)."""
    x = np.ascontiguousarray(array).astype(np.float32)
    if outside is not None:
        x[outside] = lowest_tissue(array, outside)
    return x


def cut(
    x: np.ndarray,
    begin: Sequence[int],
    size: Sequence[int],
    outside: np.ndarray | None = None,
    beyond: float | None = None,
) -> np.ndarray:
    """The part of ``x`` that begins at ``begin`` and has ``size``.

    Args:
        x: as ``tissue`` makes it.
        begin, size: for each dimension; a begin may be negative, and an end lie beyond ``x``.
        outside: bool of the shape of ``x``: what is outside the scan, and gets the lowest value of the part's rest, so
            that it has no share in the part's minimum.
        beyond: the value beyond ``x``; by default its lowest one.
    """
    found = np.full(tuple(size), x.min() if beyond is None else beyond, x.dtype)
    here, there = _overlap(begin, size, x.shape)
    part = x[there].copy()
    if outside is not None:
        out = outside[there]
        if out.any() and not out.all():
            part[out] = part[~out].min()
    found[here] = part
    return found


def cut_masks(masks: np.ndarray, begin: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """The same part of masks (..., *shape), which mark nothing beyond."""
    dims = len(size)
    found = np.zeros((*masks.shape[:-dims], *size), masks.dtype)
    here, there = _overlap(begin, size, masks.shape[-dims:])
    into: tuple[Any, ...] = (Ellipsis, *here)
    out_of: tuple[Any, ...] = (Ellipsis, *there)
    found[into] = masks[out_of]
    return found


def _overlap(
    begin: Sequence[int], size: Sequence[int], shape: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """What a cut and an array have in common, as indices of the one and of the other."""
    here, there = [], []
    for start, length, n in zip(begin, size, shape, strict=True):
        first, last = max(start, 0), max(min(start + length, n), 0)
        last = max(first, last)
        here.append(slice(first - start, last - start))
        there.append(slice(first, last))
    return tuple(here), tuple(there)
