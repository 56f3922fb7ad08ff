# SPDX-License-Identifier: Apache-2.0
"""Whole scans: slice after slice through ``Sampler``, on the scan's own grid, and as many masks as it takes."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from berdiff_fast import checks, limits, locks, rng
from berdiff_fast.imaging.volumes import Volume
from berdiff_fast.io.padding import lowest_tissue
from berdiff_fast.model import BerDiff, fingerprint
from berdiff_fast.sampled import SampledVolume
from berdiff_fast.sampling import Sampler, sample
from berdiff_fast.store import Store as _Store

#: What is said before the work, and can be done without.
hints = logging.getLogger("berdiff_fast.hints")


def sample_until(
    model: Any,
    img: torch.Tensor | np.ndarray,
    tolerance: float = 0.05,
    max_n: int = 256,
    *,
    batch: int = 16,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw masks until their mean is known well enough: the same masks that a larger n would have given.

    The standard error of the mean map at a pixel is sqrt(p (1 - p) / n), with p = (marked + 1) / (n + 2), so that a
    few masks that agree are not taken for certainty (Laplace's rule of succession). That is for independent masks;
    those of a model with a mode prior are spread evenly over their classes, and their mean is off by less.

    Args:
        model, img: as in ``sample``.
        tolerance: the largest standard error, at any pixel of any image, to be content with.
        max_n: masks per image at most.
        batch: masks per image that are drawn before looking again.
        **options: of ``sample``, but n and first_sample.

    Returns:
        bool (B, n, K, *spatial) and the standard error (B, K, *spatial).

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if not 0 < float(tolerance) < 1:
        raise ValueError(f"tolerance must be between 0 and 1, got {tolerance!r}")
    max_n, batch = checks.integer("max_n", max_n, 1), checks.integer("batch", batch, 1)
    for name in ("n", "first_sample", "return_probability"):
        if name in options:
            raise TypeError(f"{name} is not an option of sample_until, which chooses it")
    if options.get("seed") is None:  # drawn once: the batches are parts of one sequence
        options["seed"] = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
    parts: list[torch.Tensor] = []
    n, marked = 0, torch.zeros(())
    while True:
        more = min(batch, max_n - n)
        drawn = sample(model, img, more, first_sample=n, **options)
        assert isinstance(drawn, torch.Tensor)
        parts.append(drawn)
        n, marked = n + more, marked.to(drawn.device) + drawn.sum(1)
        p = (marked + 1) / (n + 2)
        error = (p * (1 - p) / n).sqrt()
        if n >= max_n or float(error.max()) <= tolerance:
            return torch.cat(parts, 1), error


# ---------------------------------------------------------------------- volumes


def sampled_region(plan: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    """Where a ``SampledVolume.plan`` has masks drawn of a volume (S, H, W): bool of that shape."""
    axis, (first, last) = plan["axis"], plan["slices"]
    original = tuple(np.delete(shape, axis).tolist())
    tiling = _Tiling(
        original,
        tuple(plan["resampled_to"]),
        tuple(plan["tile_pixels"]),
        [(row, column) for row, column in plan["tiles"]],
        tuple(plan["inside"]),
        tuple(plan.get("tile_window", plan["tile_pixels"])),
    )
    everywhere = torch.zeros(len(tiling.tiles), 1, *tiling.size, dtype=torch.bool)
    (top, left), (height, width) = tiling.margin, tiling.marked
    everywhere[..., top : top + height, left : left + width] = True
    region = np.zeros(shape, bool)
    np.moveaxis(region, axis, 0)[first:last] = tiling.join(everywhere)[0].numpy()
    return region


def sample_volume(
    model: BerDiff,
    volume: Volume | np.ndarray,
    n: int = 16,
    steps: int | Sequence[int] = 10,
    *,
    seed: int = 0,
    plane: str | int = "axial",
    slices: tuple[int, int] | None = None,
    center: tuple[float, float] | None = None,
    center_mm: tuple[float, float, float] | None = None,
    roi: tuple[int, int, int, int] | None = None,
    overlap: float = 0.25,
    work: str | os.PathLike[str] | None = None,
    progress: bool = False,
    **options: Any,
) -> SampledVolume:
    """n masks of each slice of a volume, which together are n masks of the volume.

    Mask k uses the same random numbers in every slice. Slices that look alike therefore have masks that are alike, mask
    k can be read as one body from slice to slice, and a slice by itself gets the masks that it has in the volume.

    A slice is resampled to the model's ``pixel_spacing`` if it has one, and cut into tiles of the model's ``size`` if
    it has one and the slice is larger. Each tile is scaled by ``model.preprocess`` on its own, as in training. Where
    tiles overlap, a voxel belongs to the tile whose middle is nearest. Of a model that denoises a window only
    (``output_crop``), it is the windows that cover the slice. Everything is undone on the way back.

    Args:
        model: a ``BerDiff`` of images with one channel, with its preprocessing.
        volume: from ``imaging.volumes.read``, or an array (S, H, W) or (H, W).
        n, steps: as in ``sample``.
        seed: of the whole volume. With one tile a slice, they are the masks of ``sample(model, slice, seed=seed)``.
        plane: which slices are sampled: "axial", "coronal" or "sagittal", or the axis of the array that they are
            stacked along. The axes that are left are called row and column, and are not turned: as stored.
        slices: (first, last + 1) along it; all by default.
        center: (row, column) of what is to be marked: a single tile of the model's ``size`` around it.
        center_mm: (x, y, z) in mm in the patient's left, posterior and superior (LPS; RAS, as NIfTI has it, is
            (-x, -y, z)), instead of ``center``: the row and the column there.
        roi: (row, row, column, column), from and up to: only there.
        overlap: of tiles, as a share of their size.
        work: a folder to keep what is done in, so that the same call goes on there after an interruption; the caller
            removes it. By default everything is in memory.
        progress: show a progress bar.
        **options: of ``sample``: method, spacing, final, prepare, dtype, max_batch, backend, ...

    Returns:
        Masks on the grid of ``volume``; nothing is marked where nothing was sampled.

    Raises:
        ValueError, TypeError: naming the argument, before any work.
        BusyError: another call works in ``work``.
    """
    if isinstance(volume, np.ndarray):
        volume = Volume(volume[None] if volume.ndim == 2 else volume)
    if not isinstance(model, BerDiff) or model.preprocessing is None:
        raise TypeError("model must be a BerDiff that knows its preprocessing, as bf.load returns it")
    if (model.img_channels or 1) != 1 or model.mask_channels != 1 or model.spatial_dims != 2:
        raise ValueError("model must be for slices with one channel of image and mask")
    seed = checks.integer("seed", seed)
    sampler = Sampler(model, n, steps, **options)
    axis = volume.axis(plane)
    shape = tuple(np.delete(volume.array.shape, axis).tolist())
    count = volume.array.shape[axis]
    first, last = _range("slices", slices, count)
    if center_mm is not None:
        center = _center(volume, axis, center_mm, (first, last), center is not None or roi is not None)
    tiling = _Tiling.of(model, volume, axis, shape, center, roi, overlap)
    tiling.check_room(sampler.n)
    if center is None:
        _hint(model, tiling)
    seeds = rng.image_seeds(seed, len(tiling.tiles))
    plan = {
        "n": sampler.n,
        "timesteps": sampler.timesteps,
        "seed": seed,
        "axis": axis,
        "slices": [first, last],
        "tiles": [list(tile) for tile in tiling.tiles],
        "tile_pixels": list(tiling.size),
        "inside": list(tiling.inside),
        "resampled_to": list(tiling.shape),
        **({"tile_window": list(tiling.marked)} if tiling.marked != tiling.size else {}),
        "options": {k: str(v) for k, v in options.items() if k not in ("max_batch", "backend")},
    }
    shape_of_bits = (math.ceil(sampler.n / 8), *volume.array.shape)
    device = next(model.parameters()).device
    # Whole slices at a time, as many as fill a call of the network.
    pixels = math.prod(tiling.size) * len(tiling.tiles) * sampler.n
    together = max(1, (2**18 if device.type == "cpu" else 2**23) // pixels)
    with contextlib.ExitStack() as stack:
        if work is None:
            store = _Store.in_memory(shape_of_bits, axis)
        else:
            Path(work).mkdir(parents=True, exist_ok=True)
            stack.enter_context(locks.exclusive(Path(work)))
            done_by = {"contract": rng.DRAW_CONTRACT, "model": fingerprint(model), "volume": volume.fingerprint()}
            identity = json.dumps({"plan": plan, **done_by}, sort_keys=True)
            store = _Store(Path(work), identity, shape_of_bits, axis)
        todo = [i for i in range(first, last) if i not in store.done]
        advance = stack.enter_context(_bar(progress, last - first, last - first - len(todo)))
        for start in range(0, len(todo), together):
            chosen = todo[start : start + together]
            tiles = torch.cat(
                [tiling.cut(part, volume.outside(part)) for part in (volume.array.take(i, axis) for i in chosen)]
            )
            img = model.preprocess(tiles[:, None]).to(device)
            moved = functools.partial(_move, advance, chosen)
            masks = sampler(img, seed=seeds.repeat(len(chosen)), progress=moved)
            assert isinstance(masks, torch.Tensor)
            for i, of_slice in zip(chosen, masks[:, :, 0].cpu().split(len(tiling.tiles)), strict=True):
                bits = np.packbits(tiling.join(of_slice).numpy(), axis=0, bitorder="little")
                store.put(i, bits)
    return SampledVolume(volume, sampler.n, store.bits, plan)


def _center(
    volume: Volume, axis: int, point: tuple[float, float, float], slices: tuple[int, int], otherwise: bool
) -> tuple[float, float]:
    """The row and the column of a point, which has to lie in one of the slices."""
    if otherwise:
        raise ValueError("center_mm, center and roi exclude each other")
    indices = volume.index_of(point, "center_mm")
    at = round(indices[axis])
    if not slices[0] <= at < slices[1]:
        raise ValueError(
            f"center_mm must lie in one of the slices {slices[0]} to {slices[1] - 1}, got {tuple(point)}, which is in "
            f"slice {at}; give slices that have it"
        )
    row, column = np.delete(indices, axis).tolist()
    return row, column


def _hint(model: BerDiff, tiling: _Tiling) -> None:
    """Say before the work that a model may know the middle of its images only."""
    assert model.preprocessing is not None
    if model.preprocessing.size is None or len(tiling.tiles) == 1:
        return
    height, width = model.preprocessing.size
    hints.warning(
        "the model was trained on images of %d x %d, and each slice is cut into %d of them. A model that was trained "
        "on cuts around what it marks, as lidc was around nodules, knows the middle of a cut only: give it a center "
        "(--center ROW COLUMN or --center-mm X Y Z)",
        height,
        width,
        len(tiling.tiles),
    )


def _range(name: str, given: tuple[int, int] | None, count: int) -> tuple[int, int]:
    if given is None:
        return 0, count
    first, last = (checks.integer(name, x) for x in given)
    if not 0 <= first < last <= count:
        raise ValueError(f"{name} must be (first, last + 1) within 0 to {count}, got {given}")
    return first, last


#: Tiles of a slice; more would only repeat each other.
_MOST_TILES = 10_000


@dataclass(frozen=True)
class _Tiling:
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
    ) -> _Tiling:
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
            region = (*_range("roi", roi[:2], original[0]), *_range("roi", roi[2:], original[1]))
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

    def cut(self, array: np.ndarray, outside: np.ndarray | None = None) -> torch.Tensor:
        """The tiles (tiles, h, w) of a slice, filled up with the lowest value where they reach beyond it.

        What is ``outside`` the scan (bool, of the array's shape) gets the lowest value of the tile's rest, so that it
        has no part in the tile's minimum and maximum.
        """
        x = torch.from_numpy(np.ascontiguousarray(array).astype(np.float32))
        beyond = None
        if outside is not None:
            beyond = torch.from_numpy(np.ascontiguousarray(outside))
            x[beyond] = lowest_tissue(array, outside)
        if self.shape != self.original:
            smaller = any(a < b for a, b in zip(self.shape, self.original, strict=True))
            how: dict[str, Any] = dict(size=self.shape, mode="bilinear", antialias=smaller)
            x = F.interpolate(x[None, None], **how)[0, 0]
            beyond = None if beyond is None else F.interpolate(beyond[None, None].float(), **how)[0, 0] > 0
        found = []
        for row, column in self.tiles:
            tile = torch.full(self.size, float(x.min()))
            (r, c, h, w) = self._within(row, column)
            part = x[r : r + h, c : c + w].clone()
            if beyond is not None:
                out = beyond[r : r + h, c : c + w]
                if bool(out.any()) and not bool(out.all()):
                    part[out] = part[~out].min()
            tile[r - row : r - row + h, c - column : c - column + w] = part
            found.append(tile)
        return torch.stack(found)

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


def _move(advance: Callable[[float, str], object], slices: Sequence[int], share: float) -> None:
    """Tell of a share of the work on some slices."""
    advance(share * len(slices), f"slice {slices[-1]}")


@contextlib.contextmanager
def _bar(show: bool, total: int, done: int) -> Iterator[Callable[[float, str], object]]:
    """A bar over slices; it is told how many more are done, in parts of one too, and what is worked on."""
    if not show:
        yield lambda count, done: None
        return
    from tqdm.auto import tqdm

    # It moves within a slice, which takes long on a CPU: so many tenths of slices.
    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    with tqdm(total=total, initial=done, desc="sampling", unit="slice", bar_format=form) as bar:

        def advance(slices: float, now: str) -> None:
            bar.set_postfix_str(now, refresh=False)
            bar.update(slices)

        yield advance
