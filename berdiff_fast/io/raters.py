# SPDX-License-Identifier: Apache-2.0
"""Raters' masks, brought onto a scan's grid: volumes on the same voxels, DICOM segmentations, RTSTRUCT contours.

A mask is compared with a scan in space, not by its indices. It may be stored the other way round, or with its axes in
another order; then it is reoriented. It may not lie elsewhere, and it is never resampled.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from berdiff_fast.io import dicom, dicom_pixels, formats
from berdiff_fast.io.quiet import line, without_chatter
from berdiff_fast.io.volume import Volume, affine, warn

_SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
_RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"

#: How far a voxel may lie from the scan's, in voxels: converters round, and this is still the same voxel.
_OFF = 0.1


def read(paths: Sequence[str | os.PathLike[str] | Volume], scan: Volume) -> list[Volume]:
    """Read raters' masks onto a scan's grid; what was read already stays.

    Args:
        paths: files of any format that a scan may have, DICOM segmentations, or RTSTRUCTs. ``FILE#NAME`` takes the
            segment or the region of a name (or number) where a file holds several.
        scan: whose grid they are to have.

    Raises:
        FileNotFoundError, ValueError: one cannot be read, lies elsewhere than the scan, or several structures are in a
            file and none is named; in one line.
    """
    return [path if isinstance(path, Volume) else _read_one(Path(path), scan) for path in paths]


def _read_one(path: Path, scan: Volume) -> Volume:
    path, name = _split(path)
    with without_chatter():
        kind = _kind(path)
    if kind is None:
        if name is not None:
            raise ValueError(f"raters: {path} is no DICOM segmentation or RTSTRUCT, so nothing in it is named {name!r}")
        return onto(formats.read(path), scan)
    try:
        with without_chatter():
            mask = (_contoured if kind == _RTSTRUCT else _segmented)(path, name, scan)
    except ImportError:
        raise
    except Exception as error:  # of what it is fed, pydicom raises anything
        raise ValueError(f"raters: {path}: {line(error)}") from None
    return replace(scan, array=mask, path=path, padding=(), instances=(), frames=(), header=None, colour=None)


def _split(path: Path) -> tuple[Path, str | None]:
    if path.exists() or "#" not in path.name:
        return path, None
    file, _, name = path.name.rpartition("#")
    return path.with_name(file), name


def _kind(path: Path) -> str | None:
    """The class of a DICOM file that is no scan, else None."""
    if not path.is_file() or not (dicom.is_dicom(path) or path.suffix.lower() in dicom.FORMAT.endings):
        return None
    try:
        kind = str(dicom.read_header(path).get("SOPClassUID", ""))
    except ValueError:
        return None
    return kind if kind in (*_SEGMENTATIONS, _RTSTRUCT) else None


# ---------------------------------------------------------------------- volumes on the same voxels


def onto(rater: Volume, scan: Volume) -> Volume:
    """A mask with the scan's grid, reoriented where it is stored the other way round.

    Raises:
        ValueError: it has another shape, or lies elsewhere.
    """
    if not rater.is_placed or not scan.is_placed:
        _check_shape(rater.array, rater, scan)
        if rater.is_placed != scan.is_placed:
            which = rater if scan.is_placed else scan
            warn(rater.path, f"cannot be compared in space, since {which.path.name} does not say where it lies")
        return _on_grid(rater, rater.array, scan)
    turned = np.rint(scan.direction.T @ rater.direction)  # from the rater's axes to the scan's
    off = float(np.abs(scan.direction @ turned - rater.direction).max())
    permuted = (np.abs(turned).sum(axis=0) == 1).all() and (np.abs(turned).sum(axis=1) == 1).all()
    # The spacing that one of them does not tell is taken to be the other's; of two, 1 mm stands for a voxel.
    spacing = scan.spacing or (_turned_spacing(rater.spacing, turned.T) if rater.spacing and permuted else (1.0,) * 3)
    theirs = rater.spacing or (_turned_spacing(spacing, turned) if permuted else spacing)
    if not permuted or off > 0.1:
        raise ValueError(f"raters: {rater.path} lies elsewhere than the scan: its axes run along other directions")
    # Reoriented, it has to have the scan's shape.
    order = [int(np.abs(turned[axis]).argmax()) for axis in range(3)]  # which of the rater's axes is the scan's x, y, z
    array = rater.array.transpose([2 - order[2], 2 - order[1], 2 - order[0]])
    flips = tuple(slice(None, None, -1 if turned[axis, order[axis]] < 0 else 1) for axis in (2, 1, 0))
    array = array[flips]
    _check_shape(array, rater, scan)
    # Where the scan's corner voxels are among the rater's indices, against where they are to be.
    sizes = np.array(scan.array.shape[::-1])
    corners = np.array([[x, y, z] for x in (0, sizes[0] - 1) for y in (0, sizes[1] - 1) for z in (0, sizes[2] - 1)])
    expected = np.empty((8, 3))
    for axis in range(3):
        along = corners[:, axis]
        expected[:, order[axis]] = sizes[axis] - 1 - along if turned[axis, order[axis]] < 0 else along
    here = _points(affine(spacing, scan.origin, scan.direction), corners)
    there = _points(affine(theirs, rater.origin, rater.direction), expected)
    apart = np.linalg.norm(here - there, axis=1).max()
    if apart > _OFF * min(spacing):
        raise ValueError(
            f"raters: {rater.path} lies elsewhere than the scan: other origin, spacing or direction, its voxels are up "
            f"to {apart:.3g} mm off"
        )
    if array.strides == rater.array.strides:
        return rater
    return _on_grid(rater, np.ascontiguousarray(array), scan)


def _on_grid(rater: Volume, array: np.ndarray, scan: Volume) -> Volume:
    return replace(
        rater,
        array=array,
        spacing=scan.spacing,
        origin=scan.origin,
        direction=scan.direction,
        placed=scan.placed,
        header=None,
    )


def _check_shape(array: np.ndarray, rater: Volume, scan: Volume) -> None:
    if array.shape != scan.array.shape:
        raise ValueError(f"raters: {rater.path} has the shape {rater.array.shape}, and the scan {scan.array.shape}")


def _turned_spacing(spacing: tuple[float, ...], turned: np.ndarray) -> tuple[float, float, float]:
    x, y, z = np.abs(turned).T @ np.array(spacing)
    return float(x), float(y), float(z)


def _points(matrix: np.ndarray, indices: np.ndarray) -> np.ndarray:
    return indices @ matrix[:3, :3].T + matrix[:3, 3]


# ---------------------------------------------------------------------- DICOM segmentations


def _segmented(path: Path, name: str | None, scan: Volume) -> np.ndarray:
    """A segment, frame by frame at its place."""
    header, stored = dicom_pixels.stored_values(path)
    _check_frame_of_reference(header, scan)
    segments = {int(s.SegmentNumber): str(s.get("SegmentLabel", "")) for s in header.get("SegmentSequence") or []}
    groups = header.PerFrameFunctionalGroupsSequence
    labels = str(header.get("SegmentationType", "BINARY")) == "LABELMAP"
    of_frame = [
        None if labels else int(_item(group, header, "SegmentIdentificationSequence").ReferencedSegmentNumber)
        for group in groups
    ]
    marked = np.unique(stored).tolist() if labels else [s for s, f in zip(of_frame, stored, strict=True) if f.any()]
    number = _choose(segments, {int(n) for n in marked if n}, name, "segments")
    threshold = 1.0
    if str(header.get("SegmentationType", "")) == "FRACTIONAL":
        threshold = 0.5 * float(header.get("MaximumFractionalValue", 255))
    mask = np.zeros(scan.array.shape, bool)
    frames = dicom.frames_of(header, path, len(stored))
    for pixels, of, (frame, _) in zip(stored, of_frame, frames, strict=True):
        part = pixels == number if labels else pixels >= threshold
        if (labels or of == number) and part.any():
            if not frame.is_placed or frame.spacing is None:
                raise ValueError(f"{frame.name} does not say where it lies")
            _put(mask, part, frame, scan)
    return mask


def _item(group: Any, header: Any, name: str) -> Any:
    shared = header.get("SharedFunctionalGroupsSequence") or [{}]
    items = group.get(name) or shared[0].get(name)
    if not items:
        raise ValueError(f"a frame lacks its {name}")
    return items[0]


def _put(mask: np.ndarray, part: np.ndarray, frame: Any, scan: Volume) -> None:
    """Mark the voxels whose middles are those of the marked pixels of a frame."""
    rows, columns = np.nonzero(part)
    along, down = frame.orientation[:3], frame.orientation[3:]
    points = frame.position + np.outer(columns * frame.spacing[1], along) + np.outer(rows * frame.spacing[0], down)
    indices = _indices(points, scan)
    nearest = np.rint(indices)
    off = np.abs(indices - nearest).max()
    if off > _OFF:
        raise ValueError(f"lies elsewhere than the scan: {frame.name} is {off:.2g} of a voxel between its voxels")
    if (nearest < 0).any() or (nearest >= mask.shape[::-1]).any():
        raise ValueError(f"lies elsewhere than the scan: {frame.name} marks places outside it")
    x, y, z = nearest.astype(int).T
    mask[z, y, x] = True


def _indices(points: np.ndarray, scan: Volume) -> np.ndarray:
    """(n, 3) in mm to (x, y, z) of voxels, not rounded."""
    if scan.spacing is None or not scan.is_placed:
        raise ValueError("cannot be placed: the scan does not say where its voxels lie")
    inverse = np.linalg.inv(affine(scan.spacing, scan.origin, scan.direction))
    return points @ inverse[:3, :3].T + inverse[:3, 3]


def _choose(there: dict[int, str], marked: set[int], name: str | None, what: str) -> int:
    """The number of what is named, or of the only one that marks anything."""
    if name is not None:
        found = [n for n, label in there.items() if label == name] or [n for n in there if str(n) == name]
        if len(found) != 1:
            raise ValueError(f"has {len(found) or 'no'} {what} of the name {name!r}; there are {_listed(there)}")
        return found[0]
    known = [n for n in there if n in marked] or [*there]
    if len(known) != 1:
        raise ValueError(f"has {len(known)} {what}; name one as FILE#NAME: {_listed({n: there[n] for n in known})}")
    return known[0]


def _listed(there: dict[int, str]) -> str:
    shown = ", ".join(f"{label!r} ({n})" for n, label in [*there.items()][:8])
    return shown + (", ..." if len(there) > 8 else "")


def _check_frame_of_reference(header: Any, scan: Volume) -> None:
    """A scan from DICOM names the space that its coordinates are of; those of another space mean nothing here."""
    if not scan.instances:
        return
    source = dicom_pixels.open_file(scan.instances[0], stop_before_pixels=True, specific_tags=["FrameOfReferenceUID"])
    referenced = [item.get("FrameOfReferenceUID") for item in header.get("ReferencedFrameOfReferenceSequence") or []]
    theirs = {str(uid) for uid in (header.get("FrameOfReferenceUID"), *referenced) if uid}
    ours = str(source.get("FrameOfReferenceUID") or "")
    if ours and theirs and ours not in theirs:
        raise ValueError("is of another frame of reference than the scan, so its coordinates are not comparable")


# ---------------------------------------------------------------------- contours


def _contoured(path: Path, name: str | None, scan: Volume) -> np.ndarray:
    """A region of an RTSTRUCT, filled slice by slice.

    A voxel is inside where its middle is, by the even-odd rule: so a contour within another is a hole, and a channel
    that leads to one (a "keyhole") encloses nothing. Contours lie in slices of the scan; nothing is filled in between.
    """
    header = dicom_pixels.open_file(path)
    _check_frame_of_reference(header, scan)
    regions = {int(r.ROINumber): str(r.get("ROIName", "")) for r in header.get("StructureSetROISequence") or []}
    contours: dict[int, list[np.ndarray]] = {}
    for region in header.get("ROIContourSequence") or []:
        for contour in region.get("ContourSequence") or []:
            if str(contour.get("ContourGeometricType", "")) not in ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR"):
                continue
            points = np.array([float(x) for x in contour.ContourData])
            if len(points) % 3 or len(points) < 9 or not np.isfinite(points).all():
                raise ValueError(f"has a contour of {len(points)} numbers, which are no three points or more")
            contours.setdefault(int(region.ReferencedROINumber), []).append(points.reshape(-1, 3))
    if not contours:
        raise ValueError("has no closed contours")
    number = _choose(regions, set(contours), name, "regions")
    mask = np.zeros(scan.array.shape, bool)
    for points in contours.get(number, []):
        indices = _indices(points, scan)
        spread = np.ptp(indices, axis=0)
        axis = int(spread.argmin())  # across the slice that it lies in
        height = float(indices[:, axis].mean())
        if spread[axis] > 2 * _OFF or abs(height - round(height)) > _OFF:
            raise ValueError("lies elsewhere than the scan: a contour is not in one of its slices")
        if not 0 <= round(height) < mask.shape[2 - axis]:
            raise ValueError("lies elsewhere than the scan: a contour is outside it")
        plane = np.moveaxis(mask, 2 - axis, 0)[round(height)]
        across, down = [a for a in (0, 1, 2) if a != axis]
        plane ^= even_odd(indices[:, down], indices[:, across], plane.shape)
    return mask


def even_odd(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Fill a polygon: bool (H, W), True where a ray from a pixel's middle crosses its edges an odd number of times.

    An edge counts for the rows from its upper end on and before its lower one, and for columns right of it or on it.
    So polygons that share an edge share no pixel and leave none out.

    Args:
        rows, columns: where the corners lie, in pixels; pixel (i, j) has its middle at (i, j).
        shape: (H, W).
    """
    crossings = np.zeros((shape[0], shape[1] + 1), np.int64)
    for r0, c0, r1, c1 in zip(rows, columns, np.roll(rows, -1), np.roll(columns, -1), strict=True):
        if r0 == r1:
            continue
        if r0 > r1:
            r0, c0, r1, c1 = r1, c1, r0, c0
        first, last = max(0, int(np.ceil(r0))), min(shape[0], int(np.ceil(r1)))
        if first >= last:
            continue
        row = np.arange(first, last)
        at = np.ceil(c0 + (row - r0) * (c1 - c0) / (r1 - r0)).clip(0, shape[1]).astype(int)
        np.add.at(crossings, (row, at), 1)
    return np.cumsum(crossings, axis=1)[:, : shape[1]] % 2 == 1
