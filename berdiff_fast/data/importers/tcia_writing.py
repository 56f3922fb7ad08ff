# SPDX-License-Identifier: Apache-2.0
"""Scans of LIDC-IDRI to HDF5: readings become nodules, nodules become cuts, one scan after the other."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from berdiff_fast.data import pixels
from berdiff_fast.data.importers import lidc_xml
from berdiff_fast.data.importers.lidc_nodules import grouped
from berdiff_fast.data.importers.lidc_outlines import Body
from berdiff_fast.data.importers.tcia_cuts import Cutter
from berdiff_fast.data.importers.tcia_tree import Bad, Scan
from berdiff_fast.data.importers.trees import SPLITS, Slice, Tree
from berdiff_fast.data.importers.writing import SplitReport, Writer
from berdiff_fast.imaging import volumes
from berdiff_fast.io.volume import Volume

_SHOWN = 8
_LUNG = (-1000.0, 400.0)  # HU, for the preview alone
_INT16 = np.iinfo(np.int16)


@dataclass
class Nodules:
    """Counts over all scans that were written.

    Attributes:
        scans: of each what ``import.json`` tells.
        sizes: how many readings each nodule has.
        twice: nodules with two outlines of one session.
        hollow: readings that enclose no pixel.
        crowded: slices that show another nodule of the scan, too.
        spacings: of the scans' pixels.
    """

    scans: list[dict[str, Any]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    twice: int = 0
    hollow: int = 0
    crowded: int = 0
    spacings: set[tuple[float, float] | None] = field(default_factory=set)

    @property
    def count(self) -> int:
        return len(self.sizes)


@dataclass(frozen=True)
class Written:
    """What an import wrote; ``shown`` are some slices (image, masks) to look at."""

    splits: dict[str, SplitReport]
    nodules: Nodules
    shown: list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Cut:
    """A slice to be written: its nodule in the scan, its place among all slices of it, and what is in it."""

    nodule: int
    index: int
    path: str
    image: np.ndarray
    masks: np.ndarray


def write_scans(
    folder: Path,
    tree: Tree,
    scans: list[Scan],
    place: dict[str, str],
    ids: dict[str, int],
    raters: int,
    size: tuple[int, int],
    spacing: tuple[float, float] | None,
    attributes: dict[str, Any],
    progress: bool,
) -> Written:
    """Write each split's file. A scan is read as a whole before any of it is written, and left out as a whole."""
    from tqdm import tqdm

    room: Counter[str] = Counter()
    for scan in scans:
        room[place.get(scan.series.patient, "")] += scan.outlines
    nodules, first_nodule = Nodules(), Counter[str]()
    shown: list[tuple[np.ndarray, np.ndarray]] = []
    writers: dict[str, Writer] = {}
    every = max(1, math.ceil(len(scans) / _SHOWN))
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(scans, unit="scan", disable=None if progress else True))
        for number, scan in enumerate(bar):
            patient = scan.series.patient
            if patient not in place:
                tree.problems.add(scan.series.name, f"its patient {patient!r} is not in the split file")
                continue
            try:
                cuts, of_scan = _cuts(tree, scan, raters, size, spacing)
            except Bad as bad:
                tree.problems.add(bad.path, bad.reason)
                continue
            nodules.scans.append({**scan.counts, "nodules": of_scan.count, "cuts": len(cuts)})
            nodules.sizes += of_scan.sizes
            nodules.twice, nodules.hollow = nodules.twice + of_scan.twice, nodules.hollow + of_scan.hollow
            nodules.crowded += of_scan.crowded
            name = place[patient]
            if cuts and name not in writers:
                path = folder / f"{name}.h5"
                shape = (raters, *size)
                writers[name] = Writer(path, room[name], size, shape, {**attributes, "split": name}, np.int16)
                stack.callback(writers[name].close)
            valid = np.arange(raters) < len(scan.sessions)
            for cut in cuts:
                nodule = first_nodule[patient] + cut.nodule
                files = dict.fromkeys(range(len(scan.sessions)), scan.xml)
                one = Slice(patient, str(nodule), cut.index, cut.path, files)
                writers[name].append(cut.image, cut.masks.astype(np.uint8), ids[patient], nodule, one, valid)
            first_nodule[patient] += of_scan.count
            if cuts:
                nodules.spacings.add(scan.spacing)
                if number // every >= len(shown):
                    best = max(cuts, key=lambda cut: cut.masks.sum())
                    shown.append((pixels.to_image(best.image, _LUNG), best.masks.astype(np.uint8)))
        told = spacing or (next(iter(nodules.spacings)) if len(nodules.spacings) == 1 else None)
        if told is not None:
            for writer in writers.values():
                writer.tell("pixel_spacing", np.array(told, np.float64))
        done = {name: writer.finish() for name, writer in writers.items()}
    none = (0,) * raters
    return Written({name: done.get(name, SplitReport(0, 0, none, none)) for name in SPLITS}, nodules, shown)


def _cuts(
    tree: Tree, scan: Scan, raters: int, size: tuple[int, int], spacing: tuple[float, float] | None
) -> tuple[list[Cut], Nodules]:
    """All cuts of a scan, and counts of its nodules.

    Raises:
        Bad: a file cannot be read, or a nodule is larger than the cut.
    """
    try:
        message = lidc_xml.read(tree.root / scan.xml)
    except ValueError as error:
        raise Bad(scan.xml, str(error)) from None
    bodies = [
        Body.of(outlined, rater)
        for rater, session in enumerate(scan.sessions)
        for outlined in message.sessions[session].nodules
    ]
    groups = [_Nodule([bodies[k] for k in group], scan, raters) for group in grouped(bodies)]
    groups.sort(key=lambda nodule: nodule.height)  # from below upwards, as slices are numbered
    counts = Nodules(
        sizes=[len(one.bodies) for one in groups],
        twice=sum(len({body.session for body in one.bodies}) < len(one.bodies) for one in groups),
        hollow=sum(not any(mask.any() for mask in body.masks.values()) for body in bodies),
    )
    cutter = Cutter.of(size, scan.shape, scan.spacing, spacing)
    found = []
    # A slice is read once, and not kept.
    for uid in sorted({uid for one in groups for uid in one.slices}, key=lambda uid: scan.slices[uid].index):
        there, volume = scan.slices[uid], _slice(tree, scan.slices[uid].path, scan.shape)
        seen = {number: one.masks(uid) for number, one in enumerate(groups) if uid in one.slices}
        for number, masks in seen.items():
            middle = groups[number].middle
            cut, complete = cutter.masks(masks, middle)
            if not complete:
                raise Bad(
                    scan.xml,
                    f"the nodule at row {middle[0]:g}, column {middle[1]:g} of {there.path} reaches beyond the "
                    f"{pixels.by(size)} pixels that are cut out (size)",
                )
            if not cut.any():  # resampled away
                continue
            others = (other for k, other in seen.items() if k != number)
            counts.crowded += any(cutter.masks(other, middle)[0].any() for other in others)
            image = np.rint(cutter.image(volume, middle))
            if image.min() < _INT16.min or image.max() > _INT16.max:
                told = f"from {image.min():g} to {image.max():g}"
                raise Bad(there.path, f"has values {told}, which are no Hounsfield units")
            found.append(Cut(number, there.index, there.path, image.astype(np.int16), cut))
    return sorted(found, key=lambda cut: (cut.nodule, cut.index)), counts


class _Nodule:
    """A nodule with all its readings.

    Attributes:
        slices: in which any reader has it, by their UIDs, from below.
        middle: of the box around what all readers marked in all slices, a row and a column.
        height: the mean place of its slices.
    """

    def __init__(self, bodies: list[Body], scan: Scan, raters: int) -> None:
        self.bodies, self._shape = bodies, (raters, *scan.shape)
        marked = {uid for body in bodies for uid, mask in body.masks.items() if mask.any()}
        self.slices = sorted(marked, key=lambda uid: scan.slices[uid].index)
        self.height = float(np.mean([scan.slices[uid].index for body in bodies for uid in body.masks]))
        rows, columns = set[int](), set[int]()
        for body in bodies:
            for mask in body.masks.values():
                rows |= {body.top + int(k) for k in np.flatnonzero(mask.any(1))}
                columns |= {body.left + int(k) for k in np.flatnonzero(mask.any(0))}
        self.middle = (_half(rows), _half(columns))

    def masks(self, uid: str) -> np.ndarray:
        """All readers' masks of a slice, bool (R, H, W)."""
        found = np.zeros(self._shape, bool)
        for body in self.bodies:
            if uid in body.masks:
                mask = body.masks[uid]
                height, width = mask.shape
                found[body.session, body.top : body.top + height, body.left : body.left + width] |= mask
        return found


def _half(places: set[int]) -> float:
    return (min(places) + max(places) + 1) / 2 if places else 0.0


def _slice(tree: Tree, path: str, shape: tuple[int, int]) -> Volume:
    try:
        volume = volumes.read(tree.root / path)
    except (ValueError, OSError) as error:
        raise Bad(path, str(error).removeprefix(f"{tree.root / path}: ")) from None
    if volume.array.shape != (1, *shape):
        raise Bad(path, "has changed while it was read")
    if volume.hounsfield is False:
        raise Bad(path, "is not in Hounsfield units (RescaleType)")
    return volume
