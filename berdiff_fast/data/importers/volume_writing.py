# SPDX-License-Identifier: Apache-2.0
"""Cases of volumes as examples in HDF5 files: slices, slices with their neighbours, or whole volumes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from berdiff_fast.channels import neighbours
from berdiff_fast.data import pixels
from berdiff_fast.data.importers.case_reading import CaseRead, CaseReader
from berdiff_fast.data.importers.cases import Case
from berdiff_fast.data.importers.trees import SPLITS, Slice
from berdiff_fast.data.importers.writing import SplitReport, Writer
from berdiff_fast.io import colours, cuts

#: Sides of slices are multiples of this, which networks halve.
_MULTIPLE = 16

#: The most slices of a case.
_MOST_SLICES = 4096

#: Slices or volumes in the preview.
_SHOWN = 8


@dataclass(frozen=True)
class Example:
    """What becomes a row of a file.

    Attributes:
        number: which slice; 0 of a whole volume.
        image: (C, *spatial) float32.
        masks: (R, K, *spatial) bool.
    """

    number: int
    image: np.ndarray
    masks: np.ndarray


@dataclass(frozen=True)
class Cutting:
    """How a case is cut into examples.

    Attributes:
        size: (H, W) of slices, or (D, H, W) of whole volumes.
        foreground: cut around the middle of what is not 0; else out of the middle.
        context_slices: of slices: how many neighbours on either side stand beside each as channels.
        empty_share, seed: which slices are taken of those that nobody marked.
    """

    size: tuple[int, ...]
    foreground: bool
    context_slices: int = 0
    empty_share: float = 0.0
    seed: int = 0

    @property
    def whole(self) -> bool:
        """Whether examples are volumes."""
        return len(self.size) == 3

    def problem(self, case: Case, read: CaseRead) -> tuple[str, str] | None:
        """A path of the case and why it cannot be cut so: too few slices, or marks beyond the cut; None if it can."""
        count = read.shape[0]
        if not self.whole and self.context_slices >= count:
            few = f"has {count} slice{'s' * (count > 1)}, too few for a context of {self.context_slices} on either side"
            return case.images[0], few
        if cuts.cut_masks(read.masks, self._starts(read), self.size).sum() < read.masks.sum():
            what = "voxels" if self.whole else "pixels"
            return next(
                iter(case.masks.values())
            ), f"marks more than the {pixels.by(self.size)} {what} that are cut out"
        return None

    def examples(self, case: Case, read: CaseRead) -> Iterator[Example]:
        """The examples of a case without a problem, one after the other."""
        count, starts = read.shape[0], self._starts(read)
        masks = cuts.cut_masks(read.masks, starts, self.size)
        if self.whole:
            yield Example(0, self._image(read, [np.s_[:]], starts), masks)
            return
        marked = np.asarray(masks.any((0, 1, 3, 4)))
        for s in range(count):
            if marked[s] or _is_drawn(case.name, s, self.empty_share, self.seed):
                yield Example(s, self._image(read, neighbours(s, count, self.context_slices), starts), masks[:, :, s])

    def _starts(self, read: CaseRead) -> list[int]:
        """Of each dimension of a cut: where it begins."""
        dims = len(self.size)
        return cuts.starts(read.shape[-dims:], self.size, read.box[-dims:] if self.foreground else None)

    def _image(self, read: CaseRead, indices: Sequence[Any], starts: list[int]) -> np.ndarray:
        """(channels, *size): of each volume its slices of these indices, each cut as ``sample_volume`` cuts it."""
        found = []
        for volume in read.volumes:
            array = np.moveaxis(volume.array, read.axis, 0)
            for index in indices:
                outside = None if self.foreground else volume.outside(array[index])
                x = cuts.tissue(array[index], outside)
                found.append(cuts.cut(x, starts, self.size, outside, 0.0 if self.foreground else None))
        return np.stack(found)


def measured(
    cases: list[Case], reader: CaseReader, foreground: bool, whole: bool, progress: bool
) -> tuple[tuple[int, ...], list[Case]]:
    """The smallest size that holds every case, of slices or ``whole`` volumes, and the cases that could be read.

    Heights and widths are multiples of 16; a network keeps the depth as it is.
    """
    from tqdm import tqdm

    sides, good = [(1, 1, 1)], []
    for case in tqdm(cases, unit="case", desc="measuring", disable=None if progress else True):
        read = reader(case)
        if read is not None:
            depth, height, width = (high - low for low, high in read.box)
            sides.append((depth, height, width) if foreground else read.shape)
            good.append(case)
    depth, height, width = (max(side) for side in zip(*sides, strict=True))
    height, width = (-(-side // _MULTIPLE) * _MULTIPLE for side in (height, width))
    return ((depth, height, width) if whole else (height, width)), good


def write_cases(
    folder: Path,
    cases: list[Case],
    place: dict[str, str],
    ids: dict[str, int],
    reader: CaseReader,
    cutting: Cutting,
    missing_mask: str,
    attributes: dict[str, Any],
    progress: bool,
) -> tuple[dict[str, SplitReport], list[tuple[np.ndarray, np.ndarray]], int]:
    """Write each split's file, case after case.

    Returns:
        What is in each split, a few examples to look at (image and masks of a slice), and how many kinds of spacing
        there are.
    """
    from tqdm import tqdm

    shown: list[tuple[np.ndarray, np.ndarray]] = []
    writers: dict[str, Writer] = {}
    visits: Counter[str] = Counter()
    spacings: dict[tuple[float, ...] | None, tuple[float, ...] | None] = {}
    every = max(1, len(cases) // _SHOWN)
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(cases, unit="case", disable=None if progress else True))
        for number, case in enumerate(bar):
            if case.patient not in place:
                reader.problems.add(case.images[0], f"its patient {case.patient!r} is not in the split file")
                continue
            read = reader(case)
            if read is None:
                continue
            problem = cutting.problem(case, read)
            if problem is not None:
                reader.problems.add(*problem)
                continue
            name, statistics = place[case.patient], read.statistics.repeat(2 * cutting.context_slices + 1, axis=0)
            best: Example | None = None
            for example in cutting.examples(case, read):
                if name not in writers:
                    planned = sum(1 for c in cases if place.get(c.patient) == name)
                    writers[name] = Writer(
                        folder / f"{name}.h5",
                        planned * (1 if cutting.whole else _MOST_SLICES),
                        example.image.shape,
                        example.masks.shape,
                        {**attributes, "split": name},
                        reader.depth.dtype,
                        statistics=True,
                    )
                    stack.callback(writers[name].close)
                writers[name].append(
                    reader.depth(example.image),
                    example.masks.astype(np.uint8),
                    ids[case.patient],
                    visits[case.patient],
                    Slice(case.patient, case.name, example.number, case.images[0], case.masks),
                    read.valid if missing_mask == "absent" else None,
                    statistics,
                )
                if best is None or example.masks.sum() > best.masks.sum():
                    best = example
            spacing = read.spacing if read.spacing is None or cutting.whole else read.spacing[1:]
            spacings.setdefault(spacing and tuple(round(mm, 4) for mm in spacing), spacing)
            visits[case.patient] += 1
            if number // every >= len(shown) and best is not None:
                shown.append(_look(best, cutting, reader.colour))
        if len(spacings) == 1 and None not in spacings:
            for writer in writers.values():
                writer.tell("pixel_spacing", np.array(next(iter(spacings.values())), np.float64))
        done = {name: writer.finish() for name, writer in writers.items() if writer.rows}
    none = (0,) * reader.raters
    return {name: done.get(name, SplitReport(0, 0, none, none)) for name in SPLITS}, shown, len(spacings)


def _look(example: Example, cutting: Cutting, colour: bool) -> tuple[np.ndarray, np.ndarray]:
    """A slice (H, W) uint8 and its masks (R, H, W): of a volume, the slice with the most marks."""
    image, masks = example.image, example.masks[:, 0]
    if cutting.whole:
        s = int(masks.sum((0, 2, 3)).argmax())
        image, masks = image[:, s], masks[:, s]
    grey = colours.luminance(image) if colour else image[cutting.context_slices]
    return pixels.to_image(grey, None), masks.astype(np.uint8)


def _is_drawn(case: str, index: int, share: float, seed: int) -> bool:
    """A slice by itself, whatever others there are."""
    digest = hashlib.sha256(f"{case}#{index}#{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
