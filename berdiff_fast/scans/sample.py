# SPDX-License-Identifier: Apache-2.0
"""Whole scans: slice after slice through ``Sampler``, on the scan's own grid, and as many masks as it takes."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from berdiff_fast import checks, limits, locks, rng
from berdiff_fast.imaging.volumes import Volume
from berdiff_fast.model import BerDiff, fingerprint
from berdiff_fast.sampling import Sampler
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

    Args:
        model: a ``BerDiff`` of images, with its preprocessing.
        volume: from ``imaging.volumes.read``, or an array (S, H, W) or (H, W). For a model of C channels a volume of
            each, in their order, all on one grid; or an array (C, S, H, W); or for red, green and blue one picture that
            was read with ``colour=True``.
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
    if model.spatial_dims != 2:
        raise ValueError("model must be for slices, got one of three dimensions")
    study = Study.of(volume, model)
    volume = study.shown
    seed = checks.integer("seed", seed)
    sampler = Sampler(model, n, steps, **options)
    axis = volume.axis(plane)
    shape = tuple(np.delete(volume.array.shape, axis).tolist())
    count = volume.array.shape[axis]
    first, last = check_range("slices", slices, count)
    if center_mm is not None:
        center = _center(volume, axis, center_mm, (first, last), center is not None or roi is not None)
    if center is None and roi is None and model.preprocessing.foreground:
        center, roi = study.middle(axis, model)
    tiling = Tiling.of(model, volume, axis, shape, center, roi, overlap)
    tiling.check_room(sampler.n * model.mask_channels)
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
    if model.mask_channels > 1:
        plan["mask_channels"] = model.mask_channels
    layers = math.ceil(sampler.n / 8)  # of bits, for each region
    shape_of_bits = (model.mask_channels * layers, *volume.array.shape)
    statistics = study.statistics(axis, model.preprocessing)
    device = next(model.parameters()).device
    # Whole slices at a time, as many as fill a call of the network.
    pixels = math.prod(tiling.size) * len(tiling.tiles) * sampler.n
    together = max(1, (2**18 if device.type == "cpu" else 2**23) // pixels)
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
        for start in range(0, len(todo), together):
            chosen = todo[start : start + together]
            tiles = torch.cat([study.cut(tiling, axis, i, model.preprocessing) for i in chosen])
            img = model.preprocess(tiles, statistics).to(device)
            moved = functools.partial(_move, advance, chosen)
            masks = sampler(img, seed=seeds.repeat(len(chosen)), progress=moved)
            assert isinstance(masks, torch.Tensor)
            for i, of_slice in zip(chosen, masks.cpu().split(len(tiling.tiles)), strict=True):
                joined = (tiling.join(of_slice[:, :, k]).numpy() for k in range(model.mask_channels))
                store.put(i, np.concatenate([np.packbits(one, axis=0, bitorder="little") for one in joined]))
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
    height, width = model.preprocessing.size
    hints.warning(
        "the model was trained on images of %d x %d, and each slice is cut into %d of them. A model that was trained "
        "on cuts around what it marks, as lidc was around nodules, knows the middle of a cut only: give it a center "
        "(--center ROW COLUMN or --center-mm X Y Z)",
        height,
        width,
        len(tiling.tiles),
    )


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
