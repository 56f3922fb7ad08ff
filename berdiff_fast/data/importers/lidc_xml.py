# SPDX-License-Identifier: Apache-2.0
"""Readings of LIDC-IDRI: an XML file for each scan, with a session for each time that it was read.

A reader outlined nodules of 3 mm and more, in each slice; marked smaller ones by a point; and marked what is of 3 mm
and more and no nodule by a point, too (Armato et al. 2011, Med Phys 38:915). Readings of chest X-rays have another
root, and are told apart. Names are compared without their namespace.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import numpy as np

_ROOT, _CHEST_XRAY = "LidcReadMessage", "IdriReadMessage"

#: Readings have some 100 kB.
_MOST_BYTES = 64 * 2**20

#: Beyond, the sessions of a file are no readings of one scan.
_MOST_SESSIONS = 100

#: Nodules of 3 mm or more in a file; the archive has at most 49. All pairs of them are compared.
_MOST_NODULES = 1000


@dataclass(frozen=True)
class Outline:
    """A path of pixels around a part of a nodule in one slice, or around what is to be left out of it.

    Attributes:
        slice_uid, z: the slice's SOPInstanceUID, and where it lies, in mm.
        inclusion: whether what is enclosed belongs to the nodule; else it does not.
        points: (P, 2) int64, the row (yCoord) and the column (xCoord) of each pixel, from 0.
    """

    slice_uid: str
    z: float
    inclusion: bool
    points: np.ndarray


@dataclass(frozen=True)
class Outlined:
    """A nodule of 3 mm or more, as one reader outlined it.

    Attributes:
        name: what the reader's station called it.
        outlines: of at least two pixels each.
        strays: how many further regions were a single pixel, which encloses nothing.
    """

    name: str
    outlines: tuple[Outline, ...]
    strays: int = 0


@dataclass(frozen=True)
class Session:
    """What one reader marked in one reading of the scan.

    Attributes:
        nodules: of 3 mm or more.
        small, non_nodules: how many nodules below 3 mm, and how many other marks.
        slice_uids: slices in which anything is marked.
    """

    nodules: tuple[Outlined, ...]
    small: int
    non_nodules: int
    slice_uids: frozenset[str]


@dataclass(frozen=True)
class Message:
    """A file of readings.

    Attributes:
        series: the SeriesInstanceUID of what was read.
        sessions: the readings, in the order of the file; none of a chest X-ray.
        chest_xray: whether it is of a chest X-ray.
    """

    series: str
    sessions: tuple[Session, ...]
    chest_xray: bool = False


def read(path: Path) -> Message:
    """Read and judge a file.

    Raises:
        ValueError: it cannot be read, is no reading, or does not say what a reading says. The message does not name it.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"has more than {_MOST_BYTES >> 20} MB, which no reading has")
        root = _parsed(path.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from None
    if root.tag not in (_ROOT, _CHEST_XRAY):
        raise ValueError(f"is no reading of LIDC-IDRI: its root must be {_ROOT} or {_CHEST_XRAY}, got {root.tag:.60}")
    sessions = root.findall("readingSession")
    chest_xray = not sessions and (root.tag == _CHEST_XRAY or root.find("CXRreadingSession") is not None)
    series = _series(root)
    if chest_xray:
        return Message(series, (), True)
    if not 0 < len(sessions) <= _MOST_SESSIONS:
        raise ValueError(f"must have 1 to {_MOST_SESSIONS} reading sessions, got {len(sessions)}")
    read = tuple(_session(one, f"session {k}") for k, one in enumerate(sessions, start=1))
    count = sum(len(one.nodules) for one in read)
    if count > _MOST_NODULES:
        raise ValueError(f"outlines {count} nodules, where at most {_MOST_NODULES} are expected")
    return Message(series, read)


def _parsed(data: bytes) -> Element:
    """The root, with names without their namespace. A file may declare no entities, so it cannot grow in memory."""

    def refuse(*_: object) -> None:
        raise ValueError("declares a document type, as no reading does, and is not read")

    builder = TreeBuilder()
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = lambda name, _: builder.start(name.rpartition(" ")[2], {})
    parser.EndElementHandler = lambda name: builder.end(name.rpartition(" ")[2])
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, LookupError) as error:
        raise ValueError(f"cannot be read as XML: {error}") from None
    return builder.close()


def _series(root: Element) -> str:
    header = root.find("ResponseHeader")
    for name in ("SeriesInstanceUid", "SeriesInstanceUID", "CTSeriesInstanceUid", "CXRSeriesInstanceUid"):
        found = None if header is None else header.findtext(name)
        if found and found.strip():
            return found.strip()
    raise ValueError("names no series: ResponseHeader must have a SeriesInstanceUid")


def _session(session: Element, where: str) -> Session:
    nodules, small = [], 0
    uids: set[str] = set()
    for mark in session.findall("unblindedReadNodule"):
        name = (mark.findtext("noduleID") or "").strip()
        here = f"{where}, nodule {name[:40]!r}"
        outlines = [_outline(roi, here) for roi in mark.findall("roi")]
        if not outlines:
            raise ValueError(f"{here} has no roi")
        uids |= {one.slice_uid for one in outlines}
        # Some small nodules have characteristics all the same, of zeros or blanks; points tell them for certain.
        drawn = tuple(one for one in outlines if (one.points != one.points[0]).any())
        if drawn:
            nodules.append(Outlined(name, drawn, len(outlines) - len(drawn)))
        else:
            small += 1
    marks = session.findall("nonNodule")
    uids |= {_text(mark, "imageSOP_UID", f"{where}, a nonNodule") for mark in marks}
    return Session(tuple(nodules), small, len(marks), frozenset(uids))


def _outline(roi: Element, where: str) -> Outline:
    uid = _text(roi, "imageSOP_UID", where)
    inclusion = _text(roi, "inclusion", where).upper()
    if inclusion not in ("TRUE", "FALSE"):
        raise ValueError(f"{where}: inclusion must be TRUE or FALSE, got {inclusion[:40]!r}")
    text = _text(roi, "imageZposition", where)
    try:
        z = float(text)
    except ValueError:
        z = math.nan
    if not math.isfinite(z):
        raise ValueError(f"{where}: imageZposition must be a number of mm, got {text[:40]!r}")
    edges = roi.findall("edgeMap")
    if not edges:
        raise ValueError(f"{where}: a roi at z = {z:g} has no edgeMap")
    points = [[_pixel(edge, name, where) for name in ("yCoord", "xCoord")] for edge in edges]
    return Outline(uid, z, inclusion == "TRUE", np.array(points, np.int64))


def _pixel(edge: Element, name: str, where: str) -> int:
    text = _text(edge, name, where)
    if not re.fullmatch(r"[-+]?[0-9]{1,6}", text):
        raise ValueError(f"{where}: {name} must be the number of a pixel, got {text[:40]!r}")
    return int(text)


def _text(element: Element, name: str, where: str) -> str:
    found = (element.findtext(name) or "").strip()
    if not found:
        raise ValueError(f"{where}: {name} is missing in a {element.tag}")
    return found
