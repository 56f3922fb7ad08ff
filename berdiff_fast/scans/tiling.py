# SPDX-License-Identifier: Apache-2.0
"""Slices cut into tiles of a model's size, and masks of tiles joined again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from berdiff_fast import checks, limits
from berdiff_fast.io import cuts
from berdiff_fast.io.volume import Volume
from berdiff_fast.model import BerDiff

#: Tiles of a slice; more would only repeat each other.
_MOST_TILES = 10_000


@dataclass(frozen=True)
class Tiling:
    """How slices are resampled and cut."""

    original: tuple[int, int]  # of a slice
    shape: tuple[int, int]  # resampled
    size: tuple[int, int]  # of a tile
    tiles: list[tuple[int, int]]  # first row and column of each, which may lie outside
    inside: tuple[int, int, int, int]  # rows and columns that may be marked
    marked: tuple[int, int]  # the middle of a tile, in which the model marks anything

    @property
    def margin(self) -> tuple[int, int]:
        """Rows above it, and columns to the left."""
        return (self.size[0] - self.marked[0]) // 2, (self.size[1] - self.marked[1]) // 2

    @classmethod
    def of(
        cls,
        model: BerDiff,
        volume: Volume,
        axis: int,
        original: tuple[int, ...],
        center: tuple[float, float] | None,
        roi: tuple[int, int, int, int] | None,
        overlap: float,
    ) -> Tiling:
        assert model.preprocessing is not None
        if center is not None and roi is not None:
            raise ValueError("roi and center exclude each other")
        if not 0 <= float(overlap) < 1:
            raise ValueError(f"overlap must be at least 0 and below 1, got {overlap}")
        scale = [1.0, 1.0]
        if model.preprocessing.pixel_spacing is not None:
            if volume.spacing is None:
                wanted_mm = model.preprocessing.pixel_spacing
                raise ValueError(f"volume must say its spacing for this model, whose pixels are {wanted_mm} mm")
            of_slice = np.delete(np.array(volume.spacing)[::-1], axis)
            scale = [float(s / t) for s, t in zip(of_slice, model.preprocessing.pixel_spacing, strict=True)]
        shape = tuple(max(1, round(size * s)) for size, s in zip(original, scale, strict=True))
        factor = model.size_multiple
        region = (0, original[0], 0, original[1])
        if roi is not None:
            if len(roi) != 4:
                raise ValueError(f"roi must be four numbers: row, row, column, column, got {roi}")
            region = (*check_range("roi", roi[:2], original[0]), *check_range("roi", roi[2:], original[1]))
        starts = [region[0] * scale[0], region[2] * scale[1]]
        ends = [region[1] * scale[0], region[3] * scale[1]]
        lengths = [max(1, round(e - s)) for s, e in zip(starts, ends, strict=True)]
        wanted = model.preprocessing.size or tuple(lengths)
        window = model.output_window.size
        size = tuple(max(-(-x // factor) * factor, window) for x in wanted)
        marked = (window, window) if window else size  # what of a tile can be marked: this is to cover the region
        if center is not None:
            if model.preprocessing.size is None:
                raise ValueError("center needs a model that knows the size of its images; give roi instead")
            if len(center) != 2 or not all(0 <= c < s for c, s in zip(center, original, strict=True)):
                raise ValueError(f"center must be (row, column) within {original}, got {tuple(center)}")
            tiles = [tuple(round(c * s - t / 2) for c, s, t in zip(center, scale, size, strict=True))]
        else:
            along = [
                [start - (t - w) // 2 for start in _cover(round(s), x, w, float(overlap))]
                for s, x, t, w in zip(starts, lengths, size, marked, strict=True)
            ]
            tiles = [(r, c) for r in along[0] for c in along[1]]
        inside = (round(starts[0]), round(ends[0]), round(starts[1]), round(ends[1]))
        return cls(original, shape, size, tiles, inside, marked)  # type: ignore[arg-type]

    def check_room(self, n: int) -> None:
        """Raise ValueError if a slice has more tiles than can be meant, or wants more memory than there is."""
        tiles, pixels = len(self.tiles), math.prod(self.shape)
        what = f"a slice of {pixels:,} pixels in {tiles:,} tiles of {self.size[0]} x {self.size[1]}, n = {n:,},"
        advice = "give a smaller overlap or n, a roi or a center"
        if tiles > _MOST_TILES:
            raise ValueError(f"{what} has more than {_MOST_TILES:,} tiles; {advice}")
        # Of every pixel which tile it belongs to, by float32 and by bool; of every tile its image and its masks.
        limits.room(what, 5 * tiles * pixels + (n + 8) * (tiles * math.prod(self.size) + pixels), advice)

    def cut(self, array: np.ndarray, outside: np.ndarray | None = None, beyond_it: float | None = None) -> torch.Tensor:
        """The tiles (tiles, h, w) of a slice; where they reach ``beyond_it``, they have this value, or the lowest one.

        What is ``outside`` the scan (bool, of the array's shape) gets the lowest value of the tile's rest, so that it
        has no part in the tile's minimum and maximum.
        """
        x = cuts.tissue(array, outside)
        if self.shape != self.original:
            smaller = any(a < b for a, b in zip(self.shape, self.original, strict=True))
            how: dict[str, Any] = dict(size=self.shape, mode="bilinear", antialias=smaller)
            x = F.interpolate(torch.from_numpy(x)[None, None], **how)[0, 0].numpy()
            if outside is not None:
                wide = torch.from_numpy(np.ascontiguousarray(outside))[None, None].float()
                outside = (F.interpolate(wide, **how)[0, 0] > 0).numpy()
        tiles = [cuts.cut(x, tile, self.size, outside, beyond_it) for tile in self.tiles]
        return torch.from_numpy(np.stack(tiles))

    def join(self, masks: torch.Tensor) -> torch.Tensor:
        """Masks (n, H, W) of a slice from those of its tiles (tiles, n, h, w)."""
        whole = torch.zeros(masks.shape[1], *self.shape, dtype=torch.bool)
        for tile, (row, column), mine in zip(masks, self.tiles, self._owned(), strict=True):
            r, c, h, w = self._within(row, column)
            part = tile[:, r - row : r - row + h, c - column : c - column + w]
            whole[:, r : r + h, c : c + w] |= part & mine[r : r + h, c : c + w]
        if self.shape == self.original:
            return whole
        return F.interpolate(whole[None].float(), self.original, mode="nearest-exact")[0] > 0.5

    def _within(self, row: int, column: int) -> tuple[int, int, int, int]:
        """First row and column of the part of a tile that is in the slice, its height and width."""
        r, c = max(row, 0), max(column, 0)
        return (
            r,
            c,
            max(0, min(row + self.size[0], self.shape[0]) - r),
            max(0, min(column + self.size[1], self.shape[1]) - c),
        )

    def _owned(self) -> list[torch.Tensor]:
        """For each tile, bool (H, W): the pixels closer to its middle than to any other's, in sizes of its window."""
        rows = torch.arange(self.shape[0])[:, None] + 0.5
        columns = torch.arange(self.shape[1])[None] + 0.5
        (top, left), (height, width) = self.margin, self.marked
        middles = [(row + top + height / 2, column + left + width / 2) for row, column in self.tiles]
        nearest = torch.stack(
            [torch.maximum((rows - r).abs() / height, (columns - c).abs() / width) for r, c in middles]
        ).argmin(0)
        top, bottom, left, right = self.inside
        allowed = torch.zeros(self.shape, dtype=torch.bool)
        allowed[max(top, 0) : bottom, max(left, 0) : right] = True
        return [(nearest == k) & allowed for k in range(len(self.tiles))]


def _cover(start: int, length: int, tile: int, overlap: float) -> list[int]:
    """Where tiles begin that cover [start, start + length), evenly spread; a larger one is put in the middle."""
    if tile >= length:
        return [start + (length - tile) // 2]
    # Never more than there are places.
    count = min(1 + math.ceil((length - tile) / (tile * (1 - overlap))), length - tile + 1)
    return [start + round(i * (length - tile) / (count - 1)) for i in range(count)]


def check_range(name: str, given: tuple[int, int] | None, count: int) -> tuple[int, int]:
    if given is None:
        return 0, count
    first, last = (checks.integer(name, x) for x in given)
    if not 0 <= first < last <= count:
        raise ValueError(f"{name} must be (first, last + 1) within 0 to {count}, got {given}")
    return first, last
