# SPDX-License-Identifier: Apache-2.0
"""A scan with its channels: volumes on one grid, in the order that a model wants them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from berdiff_fast.channels import in_colour, neighbours, of_scans
from berdiff_fast.io import cuts
from berdiff_fast.io import raters as raters_io
from berdiff_fast.io.volume import Volume
from berdiff_fast.model import BerDiff
from berdiff_fast.preprocessing import Preprocessing, Statistics
from berdiff_fast.scans.tiling import Tiling


def scans_of(model: BerDiff) -> int:
    """How many scans a model is shown: its channels, without neighbours of slices."""
    return (model.img_channels or 1) // (2 * model.context_slices + 1)


@dataclass(frozen=True)
class Study:
    """Volumes on the grid of the first one.

    Attributes:
        volumes: one for each channel.
        shown: what stands for all of them: the first one, or the colour picture whose channels they are.
    """

    volumes: tuple[Volume, ...]
    shown: Volume

    @classmethod
    def of(cls, given: Volume | np.ndarray | Sequence[Volume], model: BerDiff) -> Study:
        """What a user gives for a model.

        Raises:
            TypeError, ValueError: other channels than the model has, or volumes that do not lie on one grid.
        """
        channels = scans_of(model)
        named = f" ({', '.join(of_scans(model.channels, model.context_slices))})" if model.channels else ""
        if isinstance(given, Volume) and given.colour is not None:
            if model.context_slices or not in_colour(model.channels, channels):
                raise ValueError(f"volume must have the model's {channels} channels{named}, got a colour picture")
            parts = (replace(given, array=x, colour=None) for x in given.colour)
            return cls(tuple(parts), given)
        if isinstance(given, np.ndarray):
            if channels == 1:
                given = Volume(given[None] if given.ndim == 2 else given)
            elif given.ndim != 4 or len(given) != channels:
                raise ValueError(f"volume must be ({channels}, S, H, W) for this model, got shape {given.shape}")
            else:
                given = [Volume(x) for x in given]
        volumes = (given,) if isinstance(given, Volume) else tuple(given)
        if not all(isinstance(volume, Volume) for volume in volumes):
            raise TypeError("volume must be a Volume, one for each channel, or an array")
        if len(volumes) != channels:
            raise ValueError(f"volume must have the model's {channels} channels{named}, got {len(volumes)}")
        first = volumes[0]
        try:
            return cls((first, *(raters_io.onto(volume, first) for volume in volumes[1:])), first)
        except ValueError as error:
            raise ValueError(f"volume: channels must lie on one grid: {str(error).removeprefix('raters: ')}") from None

    def fingerprint(self) -> str:
        """SHA-256 of all of it; of one channel, that of the volume."""
        if self.shown.colour is not None:
            return self.shown.fingerprint()
        each = [volume.fingerprint() for volume in self.volumes]
        return each[0] if len(each) == 1 else hashlib.sha256(" ".join(each).encode()).hexdigest()

    def cut(self, tiling: Tiling, axis: int, index: int, preprocessing: Preprocessing) -> torch.Tensor:
        """The tiles (tiles, C, h, w) of a slice; with its neighbours where they are channels too."""
        # Where slices were cut around what is not 0, there was 0 beyond them.
        beyond = 0.0 if preprocessing.foreground else None
        found = []
        for volume in self.volumes:
            for i in neighbours(index, volume.array.shape[axis], preprocessing.context_slices):
                part = volume.array.take(i, axis)
                found.append(tiling.cut(part, None if preprocessing.foreground else volume.outside(part), beyond))
        return torch.stack(found, dim=1)

    def statistics(self, axis: int, preprocessing: Preprocessing) -> Statistics | None:
        """What slices are scaled by, if by their volume: two (1, C, 1, 1); channel after channel, to save memory."""
        if not preprocessing.by_volume:
            return None
        each = [
            preprocessing.statistics(torch.from_numpy(np.ascontiguousarray(v.array, np.float32))[None, None])
            for v in self.volumes
        ]
        several = 2 * preprocessing.context_slices + 1
        first, second = (
            torch.cat([s[k].reshape(1, 1, 1, 1) for s in each if s for _ in range(several)], 1) for k in (0, 1)
        )
        return first, second

    def box(self, axis: int) -> cuts.Box:
        """First and last + 1 of the slices along an axis, the rows and the columns that have what is not 0.

        Raises:
            ValueError: it is 0 everywhere.
        """
        found = cuts.foreground((volume.array for volume in self.volumes), axis)
        if found is None:
            raise ValueError("volume is 0 everywhere, and this model looks at what is not")
        return found

    def middle(self, axis: int, model: BerDiff) -> tuple[tuple[float, float] | None, tuple[int, int, int, int] | None]:
        """Where slices are cut that were cut around what is not 0 in training: a center if a tile holds all of it,
        else the rows and columns that have it.

        Raises:
            ValueError: it is 0 everywhere.
        """
        _, rows, columns = self.box(axis)
        box = (*rows, *columns)
        assert model.preprocessing is not None
        size, spacing = model.preprocessing.size, model.preprocessing.pixel_spacing
        sides: list[float] = [box[1] - box[0], box[3] - box[2]]
        if spacing is not None and self.volumes[0].spacing is not None:
            own = np.delete(np.array(self.volumes[0].spacing)[::-1], axis)
            sides = [side * float(o) / wanted for side, o, wanted in zip(sides, own, spacing, strict=True)]
        if size is not None and all(side <= s for side, s in zip(sides, size, strict=True)):
            return ((box[0] + box[1]) / 2, (box[2] + box[3]) / 2), None
        return None, box
