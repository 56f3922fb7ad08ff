# SPDX-License-Identifier: Apache-2.0
"""Cases of volumes as arrays on one grid, with what is known of the whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from berdiff_fast.data.importers.cases import Case
from berdiff_fast.data.importers.trees import Problems
from berdiff_fast.imaging import volumes
from berdiff_fast.io import raters as raters_io
from berdiff_fast.io.volume import Volume
from berdiff_fast.regions import Regions


@dataclass
class CaseRead:
    """A case in memory: channels (C, S, H, W) and label maps (R, S, H, W), slices first, as sampling sees them."""

    images: np.ndarray
    masks: np.ndarray  # (R, K, S, H, W) bool
    valid: np.ndarray  # (R,)
    spacing: tuple[float, float] | None
    box: tuple[int, int, int, int]  # rows and columns of what is not 0

    @property
    def statistics(self) -> np.ndarray:
        """(C, 4): of each channel minimum, maximum, mean and standard deviation of what is not 0."""
        found = []
        for x in self.images:
            inside = x[x != 0].astype(np.float64)
            deviation = float(inside.std()) if inside.size else 0.0
            found.append([x.min(), x.max(), inside.mean() if inside.size else 0.0, deviation or 1.0])
        return np.array(found, np.float64)


class CaseReader:
    """Reads cases; None for one with a problem."""

    def __init__(self, root: Path, regions: Regions, raters: int, plane: str, others: str, problems: Problems) -> None:
        self.root, self.regions, self.raters, self.plane = root, regions, raters, plane
        self.others, self.problems = others, problems

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
        first = volumes.read(self.root / case.images[0])
        axis = first.axis(self.plane)
        channels = [first.array, *(self._onto(path, first).array for path in case.images[1:])]
        images = np.stack([np.moveaxis(x, axis, 0) for x in channels])
        shape = images.shape[1:]
        masks = np.zeros((self.raters, len(self.regions.table), *shape), bool)
        for rater, path in case.masks.items():
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
            masks[rater] = self.regions.masks_of(np.moveaxis(labels, axis, 0))
        body = (images != 0).any((0, 1))
        rows, columns = np.flatnonzero(body.any(1)), np.flatnonzero(body.any(0))
        if not rows.size:
            raise ValueError(f"{self.root / case.images[0]}: is 0 everywhere")
        box = (int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)
        spacing = None
        if first.spacing is not None:
            row, column = np.delete(np.array(first.spacing)[::-1], axis).tolist()
            spacing = (row, column)
        valid = np.array([rater in case.masks for rater in range(self.raters)])
        return CaseRead(images, masks, valid, spacing, box)

    def _onto(self, path: str, first: Volume) -> Volume:
        volume = volumes.read(self.root / path)
        try:
            return raters_io.onto(volume, first)
        except ValueError as error:
            words = str(error).removeprefix("raters: ").removeprefix(f"{volume.path} ")
            raise ValueError(f"{self.root / path}: {words}") from None


def cut_around(x: np.ndarray, middle: tuple[float, float], size: tuple[int, int], beyond: float = 0) -> np.ndarray:
    """The (..., H, W) around a point of (..., h, w), with zeros, or another value, beyond."""
    found = np.full((*x.shape[:-2], *size), beyond, x.dtype)
    starts = [round(m - s / 2) for m, s in zip(middle, size, strict=True)]
    ours = [slice(max(0, -start), min(s, n - start)) for start, s, n in zip(starts, size, x.shape[-2:], strict=True)]
    theirs = [slice(max(0, start), min(n, start + s)) for start, s, n in zip(starts, size, x.shape[-2:], strict=True)]
    found[..., ours[0], ours[1]] = x[..., theirs[0], theirs[1]]
    return found
