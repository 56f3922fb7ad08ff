# SPDX-License-Identifier: Apache-2.0
"""The two ways in which masks of a volume are drawn: slice by slice in tiles, or the whole volume at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from berdiff_fast import limits, rng
from berdiff_fast.io import cuts
from berdiff_fast.model import BerDiff
from berdiff_fast.sampling import Sampler
from berdiff_fast.scans.study import Study
from berdiff_fast.scans.tiling import Tiling

#: How much voxels may differ in size from those a network of volumes was trained on, which are not resampled.
_ALIKE = 0.05

#: Tells how many slices more are done, in parts of one too, and which one is worked on.
Advance = Callable[[float, str], object]


class Way(Protocol):
    """How masks of a volume are drawn."""

    @property
    def slices(self) -> tuple[int, int]:
        """(first, last + 1) of those that get masks."""
        ...

    def check_room(self, n: int) -> None:
        """Raise ValueError if n masks want more memory than there is."""
        ...

    def plan(self) -> dict[str, Any]:
        """What of it the masks depend on, JSON-able."""
        ...

    def draw(self, sampler: Sampler, seed: int, todo: Sequence[int], advance: Advance) -> Iterator[tuple[int, Any]]:
        """Each slice of ``todo`` with its masks (n, K, H, W) bool, one after the other."""
        ...


@dataclass(frozen=True)
class SliceBySlice:
    """Slices along an axis, each cut into tiles."""

    model: BerDiff
    study: Study
    axis: int
    slices: tuple[int, int]
    tiling: Tiling

    def check_room(self, n: int) -> None:
        self.tiling.check_room(n)

    def plan(self) -> dict[str, Any]:
        tiling = self.tiling
        return {
            "axis": self.axis,
            "slices": list(self.slices),
            "tiles": [list(tile) for tile in tiling.tiles],
            "tile_pixels": list(tiling.size),
            "inside": list(tiling.inside),
            "resampled_to": list(tiling.shape),
            **({"tile_window": list(tiling.marked)} if tiling.marked != tiling.size else {}),
        }

    def draw(self, sampler: Sampler, seed: int, todo: Sequence[int], advance: Advance) -> Iterator[tuple[int, Any]]:
        tiling, preprocessing = self.tiling, self.model.preprocessing
        assert preprocessing is not None
        device = next(self.model.parameters()).device
        seeds = rng.image_seeds(seed, len(tiling.tiles))
        statistics = self.study.statistics(self.axis, preprocessing)
        # Whole slices at a time, as many as fill a call of the network.
        pixels = math.prod(tiling.size) * len(tiling.tiles) * sampler.n
        together = max(1, (2**18 if device.type == "cpu" else 2**23) // pixels)
        for start in range(0, len(todo), together):
            chosen = todo[start : start + together]
            tiles = torch.cat([self.study.cut(tiling, self.axis, i, preprocessing) for i in chosen])
            img = self.model.preprocess(tiles, statistics).to(device)
            masks = sampler(img, seed=seeds.repeat(len(chosen)), progress=functools.partial(_move, advance, chosen))
            assert isinstance(masks, torch.Tensor)
            for i, of_slice in zip(chosen, masks.cpu().split(len(tiling.tiles)), strict=True):
                joined = [tiling.join(of_slice[:, :, k]).numpy() for k in range(self.model.mask_channels)]
                yield i, np.stack(joined, axis=1)


@dataclass(frozen=True)
class WholeVolume:
    """A volume at once, for a network of three dimensions.

    Attributes:
        size: of what the network is shown, in slices, rows and columns: that of the volumes it was trained on, or more
            where the volume has more.
        starts: where this begins in the volume; it may reach beyond.
    """

    model: BerDiff
    study: Study
    axis: int
    slices: tuple[int, int]
    size: tuple[int, ...]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, model: BerDiff, study: Study, axis: int) -> WholeVolume:
        """The cut that an import of whole volumes takes of this one.

        Raises:
            ValueError: voxels of another size than the model's, or nothing but 0 where it looks at what is not.
        """
        preprocessing, volume = model.preprocessing, study.shown
        assert preprocessing is not None
        wanted = preprocessing.pixel_spacing
        if wanted is not None:
            if volume.spacing is None:
                raise ValueError(f"volume must say its spacing for this model, whose voxels are {wanted} mm")
            of_axes = [*volume.spacing[::-1]]
            here = (of_axes.pop(axis), *of_axes)
            if any(abs(a - b) > _ALIKE * b for a, b in zip(here, wanted, strict=True)):
                told = tuple(round(side, 4) for side in here)
                raise ValueError(
                    f"volume must have voxels of {wanted} mm (slice, row, column), got {told}; resample it"
                )
        shape = np.moveaxis(volume.array, axis, 0).shape
        box = study.box(axis) if preprocessing.foreground else None
        sides = shape if box is None else [high - low for low, high in box]
        least = preprocessing.size or (1, 1, 1)
        factors = (1, model.size_multiple, model.size_multiple)
        size = tuple(-(-max(side, n) // factor) * factor for side, n, factor in zip(sides, least, factors, strict=True))
        starts = tuple(cuts.starts(shape, size, box))
        slices = max(starts[0], 0), min(starts[0] + size[0], shape[0])
        return cls(model, study, axis, slices, size, starts)

    def check_room(self, n: int) -> None:
        shape = self.study.shown.array.shape
        what = f"n = {n:,} masks of a volume of {' x '.join(map(str, self.size))}"
        limits.room(what, (n + 8) * (math.prod(self.size) + math.prod(shape)), "give a smaller n")

    def plan(self) -> dict[str, Any]:
        shape = np.delete(self.study.shown.array.shape, self.axis).tolist()
        return {
            "axis": self.axis,
            "slices": list(self.slices),
            "tiles": [list(self.starts[1:])],
            "tile_pixels": list(self.size[1:]),
            "inside": [0, shape[0], 0, shape[1]],
            "resampled_to": shape,
            "whole_volume": {"starts": list(self.starts), "size": list(self.size)},
        }

    def draw(self, sampler: Sampler, seed: int, todo: Sequence[int], advance: Advance) -> Iterator[tuple[int, Any]]:
        if not todo:
            return
        preprocessing = self.model.preprocessing
        assert preprocessing is not None
        found = []
        for volume in self.study.volumes:
            array = np.moveaxis(volume.array, self.axis, 0)
            outside = None if preprocessing.foreground else volume.outside(array)
            beyond = 0.0 if preprocessing.foreground else None
            found.append(cuts.cut(cuts.tissue(array, outside), self.starts, self.size, outside, beyond))
        raw = torch.from_numpy(np.stack(found))[None]
        img = self.model.preprocess(raw, self.study.statistics(self.axis, preprocessing))
        img = img.to(next(self.model.parameters()).device)
        seeds = rng.image_seeds(seed, 1)
        masks = sampler(img, seed=seeds, progress=functools.partial(_move, advance, todo))
        assert isinstance(masks, torch.Tensor)
        shape = np.moveaxis(self.study.shown.array, self.axis, 0).shape
        drawn = masks[0].cpu().numpy()
        for i in todo:
            of_slice = drawn[:, :, i - self.starts[0]]
            yield i, cuts.cut_masks(of_slice, [-start for start in self.starts[1:]], shape[1:])


def _move(advance: Advance, slices: Sequence[int], share: float) -> None:
    """Tell of a share of the work on some slices."""
    advance(share * len(slices), f"slice {slices[-1]}")
