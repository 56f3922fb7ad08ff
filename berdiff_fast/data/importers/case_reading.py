# SPDX-License-Identifier: Apache-2.0
"""Cases of volumes as arrays on one grid, with what is known of the whole."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from berdiff_fast.data.importers.cases import Case
from berdiff_fast.data.importers.depth import Depth
from berdiff_fast.data.importers.trees import Problems
from berdiff_fast.imaging import volumes
from berdiff_fast.io import cuts
from berdiff_fast.io import raters as raters_io
from berdiff_fast.io.volume import Volume
from berdiff_fast.preprocessing import statistics_of
from berdiff_fast.regions import Regions

#: What keeps two labels of a label map apart no more than its neighbours.
_LOSSY = (".jpg", ".jpeg")


@dataclass
class CaseRead:
    """A case in memory: a volume for each channel, all on one grid, and masks, slices first, as sampling sees them.

    Attributes:
        volumes: C, as they were read.
        axis: of the arrays, along which slices are stacked.
        masks: (R, K, S, H, W) bool.
        valid: (R,) who read it.
        spacing: mm between slices, rows and columns, where the file tells.
        box: first and last + 1 of the slices, rows and columns that have what is not 0.
    """

    volumes: list[Volume]
    axis: int
    masks: np.ndarray
    valid: np.ndarray
    spacing: tuple[float, float, float] | None
    box: cuts.Box

    @property
    def shape(self) -> tuple[int, int, int]:
        """Slices, rows and columns."""
        count, height, width = self.masks.shape[2:]
        return count, height, width

    @property
    def statistics(self) -> np.ndarray:
        """(C, 4): of each channel minimum, maximum, mean and standard deviation of what is not 0."""
        return np.stack([statistics_of(volume.array) for volume in self.volumes])


class CaseReader:
    """Reads cases; None for one with a problem.

    Args:
        root: of the tree.
        regions: of the masks.
        raters: R.
        plane: of the slices.
        others: what a label is that no region names, "error" or "background".
        depth: the type that images are to have in the file.
        problems: gets what is wrong.
        colour: images are colour pictures.
    """

    def __init__(
        self,
        root: Path,
        regions: Regions,
        raters: int,
        plane: str,
        others: str,
        depth: Depth,
        problems: Problems,
        *,
        colour: bool = False,
    ) -> None:
        self.root, self.regions, self.raters, self.plane = root, regions, raters, plane
        self.others, self.depth, self.problems, self.colour = others, depth, problems, colour

    def __call__(self, case: Case) -> CaseRead | None:
        try:
            return self._read(case)
        except ValueError as error:
            path, _, reason = str(error).partition(": ")
            known = {str(self.root / p): p for p in (*case.images, *case.masks.values())}
            reason = reason if path in known else str(error)
            self.problems.add(known.get(path, case.images[0]), reason)
            return None

    def _read(self, case: Case) -> CaseRead:
        first = volumes.read(self.root / case.images[0], colour=self.colour)
        axis = first.axis(self.plane)
        if first.colour is not None:
            channels = [replace(first, array=x, colour=None) for x in first.colour]
        else:
            channels = [first, *(self._onto(path, first) for path in case.images[1:])]
        for volume, path in zip(channels, case.images * (len(channels) if self.colour else 1), strict=True):
            try:
                self.depth.check(volume.array, path)
            except ValueError as error:
                raise ValueError(f"{self.root / path}: {error}") from None
        shape = np.moveaxis(first.array, axis, 0).shape
        masks = np.zeros((self.raters, len(self.regions.table), *shape), bool)
        for rater, path in case.masks.items():
            masks[rater] = self._masks(path, first, axis)
        box = cuts.foreground((volume.array for volume in channels), axis)
        if box is None:
            raise ValueError(f"{self.root / case.images[0]}: is 0 everywhere")
        spacing = None
        if first.spacing is not None:
            of_axes = first.spacing[::-1]
            row, column = (of_axes[other] for other in range(3) if other != axis)
            spacing = (of_axes[axis], row, column)
        valid = np.array([rater in case.masks for rater in range(self.raters)])
        return CaseRead(channels, axis, masks, valid, spacing, box)

    def _masks(self, path: str, first: Volume, axis: int) -> np.ndarray:
        """A mask of each region, (K, S, H, W) bool."""
        if path.lower().endswith(_LOSSY):
            raise ValueError(f"{self.root / path}: is a JPEG, which does not keep labels apart; PNG does")
        labels = self._onto(path, first).array
        values = np.unique(labels)
        if (values != np.rint(values)).any() or values.min() < 0:
            raise ValueError(f"{self.root / path}: must be a label map of whole numbers, got {values[:5].tolist()}")
        foreign = sorted({int(v) for v in values} - self.regions.labels - {0})
        if foreign and self.others == "error":
            raise ValueError(
                f"{self.root / path}: has label {foreign[0]}, which no region of {self.regions} names "
                "(--other-labels background takes such for nothing)"
            )
        return self.regions.masks_of(np.moveaxis(labels, axis, 0))

    def _onto(self, path: str, first: Volume) -> Volume:
        volume = volumes.read(self.root / path)
        try:
            return raters_io.onto(volume, first)
        except ValueError as error:
            words = str(error).removeprefix("raters: ").removeprefix(f"{volume.path} ")
            raise ValueError(f"{self.root / path}: {words}") from None
