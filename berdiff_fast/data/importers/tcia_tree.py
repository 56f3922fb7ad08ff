# SPDX-License-Identifier: Apache-2.0
"""The folder that The Cancer Imaging Archive gives of LIDC-IDRI: series of DICOM files, and the readings of CT scans.

A folder holds one series, as the archive has it (``LIDC-IDRI-0001/STUDY/SERIES/1-001.dcm``); what it is, its files say,
and not its name. A reading lies beside the series that it is of, or in a folder without DICOM files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from berdiff_fast.data.importers import lidc_xml
from berdiff_fast.data.importers.lidc_outlines import is_bridged
from berdiff_fast.data.importers.trees import Problems, Tree
from berdiff_fast.io import dicom, dicom_pixels
from berdiff_fast.io.dicom_stack import Frame, heights_of, stack
from berdiff_fast.io.quiet import line, without_chatter

_DEEPEST = 8  # folders below the root; a link to a folder above it would lead on for ever

#: Where the z of a reading and that of the slice that it names differ by more, in mm, another slice must not be nearer.
_ROUNDED = 0.1


@dataclass(frozen=True)
class Series:
    """A folder with a series, as its first file tells of it, and the paths of its files."""

    folder: str
    uid: str
    modality: str
    patient: str
    files: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.folder or "."


@dataclass(frozen=True)
class Place:
    """Of a slice that a reading names: its file, and its number among all of the scan from below (along the normal)."""

    path: str
    index: int


@dataclass(frozen=True)
class Scan:
    """A CT scan and its reading, judged; without pixels and without outlines.

    Attributes:
        series, xml: the folder and the reading's path.
        shape: (H, W) of a slice.
        spacing: (row, column) in mm, or None.
        slices: of those that hold an outline, by SOPInstanceUID.
        sessions: which of the file's sessions are of this scan.
        outlines: the most slices that its nodules can have.
        counts: what a report tells of it.
    """

    series: Series
    xml: str
    shape: tuple[int, int]
    spacing: tuple[float, float] | None
    slices: dict[str, Place]
    sessions: tuple[int, ...]
    outlines: int
    counts: dict[str, Any]


@dataclass
class Found:
    """What there is in a tree.

    Attributes:
        pairs: CT series, each with the path of its reading.
        other: how many series of other modalities.
        chest_xrays: how many readings of chest X-rays.
    """

    pairs: list[tuple[Series, str]] = field(default_factory=list)
    other: Counter[str] = field(default_factory=Counter)
    chest_xrays: int = 0


def find(tree: Tree, progress: bool = False) -> Found:
    """List series and readings, and match them by the series' UID. What has no other half is a problem."""
    from tqdm import tqdm

    found, ct, xmls = Found(), list[Series](), list[tuple[str, str]]()
    bar = tqdm(_folders(tree, "", 0), unit="folder", desc="listing", disable=None if progress else True)
    for folder, files in bar:
        series = _first(tree, folder, [path for path in files if not path.lower().endswith(".xml")])
        if series is not None and series.modality != "CT":
            found.other[series.modality or "unknown"] += 1
        elif series is not None:
            ct.append(series)
        xmls += [(folder, path) for path in files if path.lower().endswith(".xml")]
    by_uid: dict[str, Series] = {}
    for series in ct:
        if by_uid.setdefault(series.uid, series) is not series:
            there = by_uid[series.uid].name
            tree.problems.add(series.name, f"duplicate: series {series.uid} is also in {there}")
    readings = _readings(tree, xmls, {series.folder: series for series in ct}, found)
    reading_of: dict[str, str] = {}
    for uid, path in readings:
        if uid not in by_uid:
            tree.problems.add(path, f"reads series {uid:.80}, of which there is no CT here")
        elif reading_of.setdefault(uid, path) != path:
            tree.problems.add(path, f"duplicate: {reading_of[uid]} reads the same series")
    for uid, series in by_uid.items():
        if uid in reading_of:
            found.pairs.append((series, reading_of[uid]))
        else:
            tree.problems.add(series.name, f"there is no XML that reads its series {uid}")
    return found


def _readings(
    tree: Tree, xmls: list[tuple[str, str]], beside: dict[str, Series], found: Found
) -> Iterator[tuple[str, str]]:
    """The series' UID and the path of each reading of a CT, from folders and paths of XML files."""
    for folder, path in xmls:
        try:
            message = lidc_xml.read(tree.root / path)
        except ValueError as error:
            tree.problems.add(path, str(error))
            continue
        near = beside.get(folder)
        if message.chest_xray:
            found.chest_xrays += 1
        elif near is not None and near.uid != message.series:
            tree.problems.add(path, f"reads series {message.series:.80}, and lies beside series {near.uid}")
        else:
            yield message.series, path


def _folders(tree: Tree, where: str, depth: int) -> Iterator[tuple[str, list[str]]]:
    """Every folder, and the paths of the files in it that may be of use."""
    folders, names = tree.entries(where)
    files = []
    for name in names:
        path = f"{where}/{name}" if where else name
        if name.lower().endswith((".xml", ".dcm")) or (name != "DICOMDIR" and _may_be_dicom(tree, path)):
            files.append(path)
        else:
            tree.ignored.append(path)
    yield where, files
    for name in folders:
        inside = f"{where}/{name}" if where else name
        if depth < _DEEPEST:
            yield from _folders(tree, inside, depth + 1)
        else:
            tree.ignored.append(inside)


def _may_be_dicom(tree: Tree, path: str) -> bool:
    try:
        return dicom.may_be_dicom(tree.root / path)
    except OSError:
        return False


def _first(tree: Tree, folder: str, files: list[str]) -> Series | None:
    """The series of a folder, by the first file that can be read; None where there is none."""
    bad: tuple[str, str] | None = None
    for path in files:
        try:
            with _reading():
                header = dicom.read_header(tree.root / path)
                modality, uid, patient = (_told(header, tag) for tag in ("Modality", "SeriesInstanceUID", "PatientID"))
        except ValueError as error:
            bad = bad or (path, str(error))
            continue
        patient = patient or folder.split("/")[0]
        if patient and uid and f"{patient}{uid}".isprintable():
            return Series(folder, uid, modality, patient, tuple(files))
        lacking = "SeriesInstanceUID" if not uid else "PatientID"
        bad = bad or (path, f"has no {lacking}, or one that cannot be printed")
    if bad is not None:
        tree.problems.add(*bad)
    return None


@contextmanager
def _reading() -> Iterator[None]:
    """Whatever a library raises or prints on a broken file is one ValueError of one line, which does not name it.

    pydicom decodes an element when it is asked for, so that is to be done within.
    """
    try:
        with without_chatter():
            yield
    except ImportError:
        raise
    except ValueError as error:
        raise ValueError(line(error)) from None
    except Exception as error:
        raise ValueError(f"cannot be read: {line(error)}") from None


# ---------------------------------------------------------------------- a scan


class Bad(ValueError):
    """What is wrong with a file or a folder of a scan, which is left out for it."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


def judge(tree: Tree, series: Series, xml: str, problems: Problems) -> Scan | None:
    """All headers of a scan, and its reading against them; None, and a problem, where they do not fit."""
    try:
        return _judged(tree, series, xml)
    except Bad as bad:
        problems.add(bad.path, bad.reason)
        return None


def _judged(tree: Tree, series: Series, xml: str) -> Scan:
    frames, uids = _frames(tree, series)
    try:
        heights, _ = heights_of(frames)
    except ValueError as error:
        raise Bad(series.name, str(error)) from None
    order = np.argsort(heights, kind="stable")
    index_of = {int(i): place for place, i in enumerate(order)}
    try:
        message = lidc_xml.read(tree.root / xml)
    except ValueError as error:
        raise Bad(xml, str(error)) from None
    marked = [one.slice_uids for one in message.sessions if one.slice_uids]
    if marked and not any(those & uids.keys() for those in marked):
        raise Bad(xml, f"names no slice of series {series.uid}: it reads another scan")
    sessions = tuple(k for k, one in enumerate(message.sessions) if not one.slice_uids or one.slice_uids & uids.keys())
    first = frames[0]
    size = (first.rows, first.columns)
    slices: dict[str, Place] = {}
    for session in sessions:
        for nodule in message.sessions[session].nodules:
            where = f"session {session + 1}, nodule {nodule.name[:40]!r}"
            for outline in nodule.outlines:
                number = uids.get(outline.slice_uid)
                if number is None:
                    raise Bad(xml, f"{where}: series {series.uid} misses its slice {outline.slice_uid}")
                _check_place(xml, where, outline, frames, number)
                _check_inside(xml, where, outline, size)
                slices[outline.slice_uid] = Place(series.files[number], index_of[number])
    spacing = None if first.spacing is None else (float(first.spacing[0]), float(first.spacing[1]))
    read = [message.sessions[k] for k in sessions]
    outlines = [o for one in read for nodule in one.nodules for o in nodule.outlines]
    counts = {
        "series": series.name,
        "xml": xml,
        "patient": series.patient,
        "slices": len(frames),
        "unevenly_spaced": _unevenness(frames),
        "sessions": len(sessions),
        "sessions_of_another_scan": len(message.sessions) - len(sessions),
        "readings": sum(len(one.nodules) for one in read),
        "small_nodules": sum(one.small for one in read),
        "non_nodules": sum(one.non_nodules for one in read),
        "outlines": sum(o.inclusion for o in outlines),
        "exclusions": sum(not o.inclusion for o in outlines),
        "bridged": sum(is_bridged(o.points) for o in outlines),
        "single_pixels": sum(nodule.strays for one in read for nodule in one.nodules),
    }
    return Scan(series, xml, size, spacing, slices, sessions, len(outlines), counts)


def _frames(tree: Tree, series: Series) -> tuple[list[Frame], dict[str, int]]:
    """The slices of a series, and the place of each by its SOPInstanceUID."""
    frames: list[Frame] = []
    uids: dict[str, int] = {}
    for path in series.files:
        try:
            with _reading():
                frame, uid = _frame(tree.root / path, series)
        except ValueError as error:
            raise Bad(path, str(error)) from None
        there = uids.setdefault(uid, len(frames))
        if there != len(frames):
            raise Bad(path, f"duplicate: {frames[there].file.name} is the same slice")
        frames.append(frame)
    return frames, uids


def _frame(path: Path, series: Series) -> tuple[Frame, str]:
    """A slice of a series, and its SOPInstanceUID."""
    header = dicom.read_header(path)
    found, patient = _told(header, "SeriesInstanceUID"), _told(header, "PatientID")
    if found != series.uid:
        raise ValueError(f"is of series {found:.80}, where others are of {series.uid}")
    if patient and patient != series.patient:
        raise ValueError(f"is of patient {patient!r:.60}, where others are of {series.patient!r:.60}")
    count, _, _ = dicom_pixels.judge(header)
    if count != 1:
        raise ValueError(f"holds {count} frames, where a file of a slice is expected")
    uid = _told(header, "SOPInstanceUID")
    if not uid:
        raise ValueError("has no SOPInstanceUID, by which readings name a slice")
    ((frame, _),) = dicom.frames_of(header, path, 1)
    return frame, uid


def _told(header: Any, tag: str) -> str:
    return str(header.get(tag) or "").strip()


def _check_place(xml: str, where: str, outline: lidc_xml.Outline, frames: list[Frame], number: int) -> None:
    """That no other slice lies nearer to the z of an outline than the one that it names."""
    z = np.array([frame.position[2] for frame in frames if frame.position is not None])
    off = np.abs(z - outline.z)
    if off[number] > _ROUNDED and off.min() < off[number]:
        name = frames[number].file.name
        raise Bad(
            xml, f"{where}: an outline at z = {outline.z:g} names the slice {name}, which lies at z = {z[number]:g}"
        )


def _check_inside(xml: str, where: str, outline: lidc_xml.Outline, size: tuple[int, int]) -> None:
    outside = outline.points[((outline.points < 0) | (outline.points >= size)).any(1)]
    if len(outside):
        row, column = outside[0].tolist()
        raise Bad(
            xml,
            f"{where}: an outline at z = {outline.z:g} reaches row {row}, column {column}, outside the image of "
            f"{size[0]} x {size[1]}",
        )


def _unevenness(frames: list[Frame]) -> str:
    """What is odd with how slices follow each other, in words: nothing that a slice by itself would suffer from."""
    try:
        stack(frames, keep=False)
    except ValueError as error:
        return str(error)
    return ""
