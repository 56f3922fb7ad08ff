# SPDX-License-Identifier: Apache-2.0
"""Whole scans: slice after slice through ``Sampler``, on the scan's own grid, and as many masks as it takes."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from berdiff_fast import checks, limits, locks, rng
from berdiff_fast.imaging.volumes import Volume
from berdiff_fast.model import BerDiff, fingerprint
from berdiff_fast.sampling import Sampler
from berdiff_fast.scans.drawing import SliceBySlice, Way, WholeVolume
from berdiff_fast.scans.sampled import SampledRegions, SampledVolume
from berdiff_fast.scans.store import Store
from berdiff_fast.scans.study import Study
from berdiff_fast.scans.tiling import Tiling, check_range

#: What is said before the work, and can be done without.
hints = logging.getLogger("berdiff_fast.hints")


def sample_volume(
    model: BerDiff,
    volume: Volume | np.ndarray | Sequence[Volume],
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
) -> SampledVolume | SampledRegions:
    """n masks of each slice of a volume, which together are n masks of the volume.

    Mask k uses the same random numbers in every slice. Slices that look alike therefore have masks that are alike, mask
    k can be read as one body from slice to slice, and a slice by itself gets the masks that it has in the volume.

    A slice is resampled to the model's ``pixel_spacing`` if it has one, and cut into tiles of the model's ``size`` if
    it has one and the slice is larger. Each tile is scaled by ``model.preprocess`` on its own, as in training. Where
    tiles overlap, a voxel belongs to the tile whose middle is nearest. Of a model that denoises a window only
    (``output_crop``), it is the windows that cover the slice. Everything is undone on the way back.

    A model of three dimensions draws the volume at once, cut or padded as the volumes were that it was trained on.

    Args:
        model: a ``BerDiff`` of slices or of volumes, with its preprocessing.
        volume: from ``imaging.volumes.read``, or an array (S, H, W) or (H, W). For a model of C channels a volume of
            each, in their order, all on one grid; or an array (C, S, H, W); or for red, green and blue one picture that
            was read with ``colour=True``. Of a model that was trained on slices with their neighbours (``import
            --context``) these are taken from the volume, whatever ``slices`` are drawn.
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
        Masks on the grid of ``volume``; nothing is marked where nothing was sampled. Of a model of several regions
        (mask channels) ``SampledRegions``, with the masks of each.

    Raises:
        ValueError, TypeError: naming the argument, before any work.
        BusyError: another call works in ``work``.
    """
    if not isinstance(model, BerDiff) or model.preprocessing is None:
        raise TypeError("model must be a BerDiff that knows its preprocessing, as bf.load returns it")
    study = Study.of(volume, model)
    volume = study.shown
    seed = checks.integer("seed", seed)
    sampler = Sampler(model, n, steps, **options)
    axis = volume.axis(plane)
    way: Way
    if model.spatial_dims == 3:
        for name, value in (("slices", slices), ("center", center), ("center_mm", center_mm), ("roi", roi)):
            if value is not None:
                raise ValueError(f"{name} is for models of slices, and this one draws whole volumes; got {value}")
        way = WholeVolume.of(model, study, axis)
    else:
        way = _by_slices(model, study, axis, slices, center, center_mm, roi, overlap)
    way.check_room(sampler.n * model.mask_channels)
    plan = {
        "n": sampler.n,
        "timesteps": sampler.timesteps,
        "seed": seed,
        **way.plan(),
        "options": {k: str(v) for k, v in options.items() if k not in ("max_batch", "backend")},
    }
    if model.mask_channels > 1:
        plan["mask_channels"] = model.mask_channels
    layers = math.ceil(sampler.n / 8)  # of bits, for each region
    shape_of_bits = (model.mask_channels * layers, *volume.array.shape)
    first, last = way.slices
    with contextlib.ExitStack() as stack:
        if work is None:
            store = Store.in_memory(shape_of_bits, axis)
        else:
            Path(work).mkdir(parents=True, exist_ok=True)
            stack.enter_context(locks.exclusive(Path(work)))
            done_by = {"contract": rng.DRAW_CONTRACT, "model": fingerprint(model), "volume": study.fingerprint()}
            identity = json.dumps({"plan": plan, **done_by}, sort_keys=True)
            store = Store(Path(work), identity, shape_of_bits, axis)
        todo = [i for i in range(first, last) if i not in store.done]
        advance = stack.enter_context(_bar(progress, last - first, last - first - len(todo)))
        for i, masks in way.draw(sampler, seed, todo, advance):
            regions = (masks[:, k] for k in range(model.mask_channels))
            store.put(i, np.concatenate([np.packbits(one, axis=0, bitorder="little") for one in regions]))
    limits.give_back()
    channels = study.volumes if volume.colour is None else ()
    if model.mask_channels == 1:
        return SampledVolume(volume, sampler.n, store.bits, plan, channels)
    names = model.regions.names if model.regions else [str(k) for k in range(model.mask_channels)]
    of_region = {
        name: SampledVolume(volume, sampler.n, store.bits[k * layers : (k + 1) * layers], plan, channels)
        for k, name in enumerate(names)
    }
    return SampledRegions(volume, sampler.n, of_region, model.regions, plan, channels)


def _by_slices(
    model: BerDiff,
    study: Study,
    axis: int,
    slices: tuple[int, int] | None,
    center: tuple[float, float] | None,
    center_mm: tuple[float, float, float] | None,
    roi: tuple[int, int, int, int] | None,
    overlap: float,
) -> SliceBySlice:
    """Which slices, and how they are cut."""
    assert model.preprocessing is not None
    volume = study.shown
    shape = tuple(np.delete(volume.array.shape, axis).tolist())
    span = check_range("slices", slices, volume.array.shape[axis])
    if center_mm is not None:
        center = _center(volume, axis, center_mm, span, center is not None or roi is not None)
    if center is None and roi is None and model.preprocessing.foreground:
        center, roi = study.middle(axis, model)
    tiling = Tiling.of(model, volume, axis, shape, center, roi, overlap)
    if center is None:
        _hint(model, tiling)
    return SliceBySlice(model, study, axis, span, tiling)


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


def _hint(model: BerDiff, tiling: Tiling) -> None:
    """Say before the work that a model may know the middle of its images only."""
    assert model.preprocessing is not None
    if model.preprocessing.size is None or len(tiling.tiles) == 1:
        return
    height, width = model.preprocessing.size[-2:]
    hints.warning(
        "the model was trained on images of %d x %d, and each slice is cut into %d of them. A model that was trained "
        "on cuts around what it marks, as lidc was around nodules, knows the middle of a cut only: give it a center "
        "(--center ROW COLUMN or --center-mm X Y Z)",
        height,
        width,
        len(tiling.tiles),
    )


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
