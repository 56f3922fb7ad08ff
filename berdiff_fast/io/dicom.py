# SPDX-License-Identifier: Apache-2.0
"""DICOM series, single slices and files of many frames: read frame by frame, by the same checks.

A frame knows its place, its spacing and its rescale, whether a file holds one of them (then they are in its header) or
many (then they are in functional groups, per frame or shared). Files are headers and pixels to pydicom; what is
compressed is decoded by GDCM.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from berdiff_fast._optional import require
from berdiff_fast.io import claims, dicom_display, dicom_pixels
from berdiff_fast.io.dicom_stack import Frame, functional_groups, group_item, stack
from berdiff_fast.io.quiet import line
from berdiff_fast.io.volume import Format, Volume, warn

_DICOMDIR = "1.2.840.10008.1.3.10"

#: What is DICOM and no scan, and what it is to be given as.
_NO_SCANS = {
    "1.2.840.10008.5.1.4.1.1.66.4": "a DICOM segmentation, not a scan; give it as a rater",
    "1.2.840.10008.5.1.4.1.1.66.7": "a DICOM segmentation (label map), not a scan; give it as a rater",
    "1.2.840.10008.5.1.4.1.1.481.3": "an RTSTRUCT, not a scan; give it as a rater",
    _DICOMDIR: "a DICOMDIR, a table of contents; give the folder of one series, or one of its files",
}

#: Classes whose frames are described by functional groups alone: enhanced CT, MR and PET, and what was made so later.
_ENHANCED = tuple(f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("2.1", "2.2", "4.1", "4.4", "130", "128.1"))

_HEADER = [
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "Modality", "ImageType",
    "Rows", "Columns",
    "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "PixelSpacing", "ImagerPixelSpacing", "SpacingBetweenSlices", "SliceThickness",
    "ImageOrientationPatient", "ImagePositionPatient", "RescaleSlope", "RescaleIntercept", "RescaleType",
    "ModalityLUTSequence", "PixelPaddingValue", "PixelPaddingRangeLimit", "GridFrameOffsetVector",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "DetectorInformationSequence",
    *dicom_display.TAGS,
]  # fmt: skip


@dataclass(frozen=True)
class Values:
    """How stored values of a frame become those of the array."""

    slope: float
    intercept: float
    signed: bool


def is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_header(path: Path) -> Any:
    """The header of one file, without pixels.

    Raises:
        ValueError: it is not DICOM.
    """
    try:
        header = dicom_pixels.open_file(path, stop_before_pixels=True, specific_tags=[*_HEADER])
        known = "SOPClassUID" in header or "Rows" in header
    except ImportError:
        raise
    except Exception as error:  # of what it is fed, pydicom raises anything
        raise ValueError(f"cannot be read as DICOM: {line(error)}") from None
    if not known:
        raise ValueError("cannot be read: is not a DICOM file")
    return header


# ---------------------------------------------------------------------- reading


def _read(path: Path, series: str | None) -> Volume:
    require("pydicom")
    if path.is_file():
        header = read_header(path)
        _check_kind(header)
        return _volume(path, [path], [header])
    found = _series(path)
    if not found:
        raise ValueError(f"holds no DICOM series{_below(path)}")
    if series is None and len(found) > 1:
        raise ValueError(f"holds {len(found)} series; choose one with series: {', '.join(found)}")
    if series is not None and series not in found:
        raise ValueError(f"has no series {series}; it holds {', '.join(found)}")
    files = found[series or next(iter(found))]
    return _volume(path, [*files], [*files.values()])


def _check_kind(header: Any) -> None:
    kind = str(header.get("SOPClassUID", ""))
    if kind in _NO_SCANS:
        raise ValueError(f"is {_NO_SCANS[kind]}")


def _series(folder: Path) -> dict[str, dict[Path, Any]]:
    """Headers of the images in a folder, by series; what is no DICOM image is left out."""
    found: dict[str, dict[Path, Any]] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file() or not may_be_dicom(path):
            continue
        try:
            header = read_header(path)
        except ValueError:
            continue
        if "Rows" in header and str(header.get("SOPClassUID", "")) not in _NO_SCANS:
            found.setdefault(str(header.get("SeriesInstanceUID", "")), {})[path] = header
    return found


def may_be_dicom(path: Path) -> bool:
    """By its first bytes: the preamble, or without one the first group of a data set, in either order of bytes."""
    with path.open("rb") as file:
        start = file.read(132)
    return start[128:] == b"DICM" or (len(start) == 132 and start[:2] in (b"\x02\0", b"\x08\0", b"\0\x08"))


def _below(folder: Path, at_most: int = 2000) -> str:
    """Where below a folder there are series, in words."""
    count: Counter[Path] = Counter()
    for looked, path in enumerate(folder.rglob("*")):
        if looked >= at_most:
            break
        if path.is_file() and not path.name.startswith(".") and path.name != "DICOMDIR" and is_dicom(path):
            count[path.parent] += 1
    if not count:
        return ""
    there = ", ".join(f"{where.relative_to(folder)} ({number} files)" for where, number in count.most_common(3))
    return f" itself; give one of the folders below it: {there}"


def _volume(path: Path, files: list[Path], headers: list[Any]) -> Volume:
    frames: list[Frame] = []
    values: list[Values] = []
    for file, header in zip(files, headers, strict=True):
        count, _, _ = _in(file, path, dicom_pixels.judge, header)
        for number, (frame, value) in enumerate(_in(file, path, frames_of, header, file, count)):
            frames.append(frame)
            values.append(value)
            assert frame.number == number
    stacked = stack(frames, keep=len(files) == 1)
    for note in stacked.notes:
        warn(path, note)
    order = stacked.order
    claims.check_voxels((len(order), frames[0].rows, frames[0].columns), 1)
    array, padding = _array(path, [frames[i] for i in order], [values[i] for i in order], headers[0])
    many = len(files) == 1 and len(frames) > 1
    header_of = dict(zip(files, headers, strict=True))
    display = dicom_display.settings(
        [header_of[frames[i].file] for i in order],
        [frames[i].number for i in order],
        inverted=_is_inverted(headers[0], values[0]),
    )
    return Volume(
        array,
        stacked.spacing,
        stacked.origin,
        stacked.direction,
        "dicom",
        path,
        (files[0],) if len(files) == 1 else tuple(frames[i].file for i in order),
        tuple(order) if many else (),
        placed=stacked.placed,
        padding=padding,
        **display,
    )


def _in(file: Path, path: Path, judge: Any, *arguments: Any) -> Any:
    """What ``judge`` says; its errors name the file where the path is a folder."""
    try:
        return judge(*arguments)
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}" if file != path else str(error)) from None


# ---------------------------------------------------------------------- frames


def frames_of(header: Any, file: Path, count: int) -> list[tuple[Frame, Values]]:
    """Of a file: what its functional groups say of each frame, or its header of all."""
    per_frame = header.get("PerFrameFunctionalGroupsSequence") or []
    if len(per_frame) not in (0, count):
        raise ValueError(f"tells of {len(per_frame)} frames in its functional groups, and holds {count}")
    if not per_frame and str(header.get("SOPClassUID", "")) in _ENHANCED:
        raise ValueError("cannot be read: it lacks the functional groups that say where its frames lie")
    places = _places(header, count) if not per_frame and count > 1 else None
    found = []
    for number in range(count):
        groups = functional_groups(header, number)
        measures = group_item(groups, "PixelMeasuresSequence", header)
        position = _vector(group_item(groups, "PlanePositionSequence", header), "ImagePositionPatient", 3)
        orientation = _vector(group_item(groups, "PlaneOrientationSequence", header), "ImageOrientationPatient", 6)
        if places is not None:
            position, orientation = places[0][number], places[1]
        rescale = group_item(groups, "PixelValueTransformationSequence", header)
        spacing = _vector(measures, "PixelSpacing", 2)
        if spacing is None and not groups:
            spacing = _vector(header, "ImagerPixelSpacing", 2)
        frame = Frame(
            file=file,
            number=number,
            of=count,
            rows=int(header.Rows),
            columns=int(header.Columns),
            spacing=spacing,
            thickness=_number(measures, "SliceThickness"),
            between=_number(measures, "SpacingBetweenSlices"),
            position=position,
            orientation=orientation,
        )
        slope, intercept = _number(rescale, "RescaleSlope"), _number(rescale, "RescaleIntercept")
        found.append(
            (
                frame,
                Values(
                    1.0 if slope is None else slope,
                    0.0 if intercept is None else intercept,
                    bool(header.get("PixelRepresentation") or 0),
                ),
            )
        )
    return found


def _places(header: Any, count: int) -> tuple[list[Any], Any] | None:
    """Positions of frames without functional groups, as dose grids and nuclear medicine have them."""
    detector = next(iter(header.get("DetectorInformationSequence") or []), header)
    first = _vector(detector, "ImagePositionPatient", 3)
    first = _vector(header, "ImagePositionPatient", 3) if first is None else first
    along = _vector(detector, "ImageOrientationPatient", 6)
    along = _vector(header, "ImageOrientationPatient", 6) if along is None else along
    if first is None or along is None:
        return [None] * count, None
    normal = np.cross(along[:3], along[3:])
    if "GridFrameOffsetVector" in header:
        offsets = _vector(header, "GridFrameOffsetVector", count)
        assert offsets is not None
        return [np.add(first, (offset - offsets[0]) * normal) for offset in offsets], along
    between = _number(header, "SpacingBetweenSlices")
    if between is None or between == 0:
        return [None] * count, None
    return [np.add(first, k * between * normal) for k in range(count)], along


def _vector(item: Any, keyword: str, count: int) -> np.ndarray | None:
    value = item.get(keyword)
    if value is None or value == "" or (isinstance(value, Sequence) and len(value) == 0):
        return None
    try:
        found = np.array([float(x) for x in value])
    except (TypeError, ValueError):
        found = np.empty(0)
    if len(found) != count or not np.isfinite(found).all():
        raise ValueError(f"cannot be read: {keyword} must be {count} numbers, got {str(value)[:60]!r}")
    return found


def _number(item: Any, keyword: str) -> float | None:
    value = item.get(keyword)
    if value is None or str(value).strip() == "":
        return None
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = float("nan")
    if not np.isfinite(found):
        raise ValueError(f"cannot be read: {keyword} must be a number, got {str(value)[:60]!r}")
    return found


# ---------------------------------------------------------------------- values


def _array(
    path: Path, frames: list[Frame], values: list[Values], header: Any
) -> tuple[np.ndarray, tuple[tuple[float, float], ...]]:
    """Voxels in the units of the rescale, and which of them are padding."""
    same = len(set(values)) == 1
    array: np.ndarray | None = None
    kept: tuple[Path, Any, np.ndarray] | None = None
    outside = np.zeros(0, bool)
    padding: set[tuple[float, float]] = set()
    for place, (frame, value) in enumerate(zip(frames, values, strict=True)):
        if kept is None or kept[0] != frame.file:
            kept = (frame.file, *_in(frame.file, path, dicom_pixels.stored_values, frame.file))
        _, dataset, stored = kept
        if stored.shape[1:] != (frame.rows, frame.columns) or len(stored) != frame.of:
            raise ValueError(f"{frame.file.name}: has changed while it was read")
        part, ends = stored[frame.number], _padding(dataset, value.signed)
        if _is_inverted(dataset, value):
            low, high = _range(dataset, stored)
            part = (low + high - part.astype(np.int64)).astype(np.int64)
            ends = None if ends is None else (low + high - ends[1], low + high - ends[0])
        if array is None:
            # One rescale gives the smallest type that holds what it can become, as GDCM has it; several are not mixed.
            kind = _dtype(dataset, stored, value) if same else np.dtype(np.float64)
            array = np.empty((len(frames), frame.rows, frame.columns), kind)
        rescaled = part * value.slope + value.intercept if (value.slope, value.intercept) != (1, 0) else part
        if array.dtype.kind in "iu":
            limits_ = np.iinfo(array.dtype)
            if rescaled.min() < limits_.min or rescaled.max() > limits_.max:  # a slice of another number of bits
                array = array.astype(np.float64)
        array[place] = rescaled
        if ends is not None:
            if same:
                found = sorted(end * value.slope + value.intercept for end in ends)
                padding.add((found[0], found[1]))
            else:
                if not outside.size:
                    outside = np.zeros(array.shape, bool)
                outside[place] = (part >= ends[0]) & (part <= ends[1])
    assert array is not None
    if outside.any() and not outside.all():  # no single value means it: give it one that no tissue has
        none = float(np.floor(array[~outside].min()) - 1)
        array[outside] = none
        padding.add((none, none))
    return array, tuple(sorted(padding))


def _is_inverted(dataset: Any, value: Values) -> bool:
    """MONOCHROME1 says how to show a picture. Hounsfield units stay as they are; else bright is to mean dense."""
    if str(dataset.get("PhotometricInterpretation", "")).strip() != "MONOCHROME1":
        return False
    modality = str(dataset.get("Modality", ""))
    if modality in ("CR", "DX", "DR", "MG", "RG", "RF", "XA", "PX", "IO"):  # projections measure no unit
        return True
    measured = modality in ("CT", "PT", "NM", "MR", "RTDOSE") or value.intercept < 0
    return not (measured or str(dataset.get("RescaleType") or "").strip().upper() in ("HU", "OD"))


def _range(dataset: Any, stored: np.ndarray) -> tuple[int, int]:
    bits = int(dataset.get("BitsStored") or dataset.BitsAllocated)
    if stored.dtype.kind == "f":
        return int(np.floor(stored.min())), int(np.ceil(stored.max()))
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if stored.dtype.kind == "i" else (0, (1 << bits) - 1)
    return min(low, int(stored.min())), max(high, int(stored.max()))


def _dtype(dataset: Any, stored: np.ndarray, value: Values) -> np.dtype[Any]:
    if stored.dtype.kind == "f":
        return np.dtype(np.float64)
    if (value.slope, value.intercept) == (1, 0):
        return stored.dtype
    if value.slope != int(value.slope) or value.intercept != int(value.intercept):
        return np.dtype(np.float64)
    ends = sorted(end * value.slope + value.intercept for end in _range(dataset, stored))
    kinds = ("u1", "u2", "u4") if ends[0] >= 0 else ("i1", "i2", "i4")
    for kind in kinds:
        if np.iinfo(kind).min <= ends[0] and ends[1] <= np.iinfo(kind).max:
            return np.dtype(kind)
    return np.dtype(np.float64)


def _padding(dataset: Any, signed: bool) -> tuple[int, int] | None:
    """PixelPaddingValue to PixelPaddingRangeLimit, as stored; either may be written without its sign, or with one."""
    found = []
    bits = int(dataset.BitsAllocated)
    for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        value = dataset.get(keyword)
        if isinstance(value, bytes) and len(value) in (2, 4):
            value = int.from_bytes(value, "little", signed=signed)
        number = None if value is None else _number({keyword: value}, keyword)
        if number is not None:
            whole = int(number)
            if signed and whole >= 1 << bits - 1:
                whole -= 1 << bits
            elif not signed and whole < 0:
                whole += 1 << bits
            found.append(whole)
        elif keyword == "PixelPaddingValue":
            return None
    return min(found), max(found)


FORMAT = Format("dicom", (".dcm", ".ima"), _read)
