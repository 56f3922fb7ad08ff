# SPDX-License-Identifier: Apache-2.0
"""NIfTI 1 and 2: headers by nibabel, voxels and checks here.

A NIfTI header says where its voxels lie up to three times: by the sform (any matrix), by the qform (a rotation, with
the spacing in pixdim) and by pixdim alone, each with a code that says whether it counts, and in units of its own.
Readers differ in which they take. So what is written on a scan's grid repeats all of it: whatever a reader makes of the
scan, it makes of the mask. Where the ways disagree, one line says so.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from berdiff_fast._optional import require
from berdiff_fast.io import claims
from berdiff_fast.io.slices import Slices, blocks, contiguous, deflate
from berdiff_fast.io.volume import Format, Volume, affine, warn

#: From NIfTI's right, anterior, superior to left, posterior, superior.
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])

#: mm in a unit of length, by its code; a file that names none means mm.
_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}

#: Axes this far from right angles (the cosine between them) are read, with a warning; float32 alone makes 1e-6.
_SHEAR, _NOISE = 1.001e-3, 1e-5

#: Descriptions that we write: of a grid without a spacing; and of a scan's own, whose oddities were told with the scan.
_UNTOLD, _REPEATED = b"spacing is not known", b"grid as the scan's header has it"


@dataclass(frozen=True)
class Grid:
    """A header's own words of where its voxels lie, and what was made of them."""

    header: Any
    spacing: tuple[float, float, float] | None
    origin: tuple[float, float, float]
    direction: np.ndarray

    def is_of(self, volume: Volume) -> bool:
        """Whether the volume still has the grid that was read."""
        shape = tuple(max(1, int(size)) for size in self.header["dim"][1:4])
        return (
            shape == volume.array.shape[::-1]
            and self.spacing == volume.spacing
            and self.origin == volume.origin
            and np.array_equal(self.direction, volume.direction)
        )


# ---------------------------------------------------------------------- reading


def _read(path: Path, series: str | None) -> Volume:
    with _opened(path) as (file, ratio):
        header = _header(file.read(540), path)
        shape = _shape(header)
        kind = _dtype(header)
        stored = path.stat().st_size
        start = _start(header)
        if ratio == 1 and stored < start + np.prod(shape, dtype=object) * kind.itemsize:
            wanted = start + int(np.prod(shape, dtype=object)) * kind.itemsize
            raise ValueError(f"is cut short: it has {stored} of {wanted} bytes")
        wanted = claims.check_voxels(shape, kind.itemsize, stored, ratio)
        file.seek(0)
        claims.skip(file, start)
        rescale = _rescale(header, kind)
        # Some slices at a time, in the type that it is to have: nothing of the volume is there twice.
        array = np.empty(shape[::-1], kind.newbyteorder("=") if rescale is None else rescale[2])
        found = start
        for place in blocks(array):
            data = claims.take(file, place.size * kind.itemsize)
            found += len(data)
            if len(data) < place.size * kind.itemsize:
                raise ValueError(f"is cut short: it has {found} of {start + wanted} bytes")
            part = np.frombuffer(data, kind).reshape(place.shape)
            place[...] = part if rescale is None else part * rescale[0] + rescale[1]
        if ratio > 1:
            claims.to_the_end(file)  # where gzip keeps its checksum
    grid, notes, placed = _geometry(header)
    for note in notes if _description(header) != _REPEATED else ():
        warn(path, note)
    return Volume(
        array,
        grid.spacing,
        grid.origin,
        grid.direction,
        "nifti",
        path,
        placed=placed,
        header=grid,
        window=_window(header),
    )


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, float]]:
    """The bytes of a file that is gzipped or not, whatever its name says, and how many times as many they can be."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if packed:
            with gzip.open(file) as inside:
                yield inside, claims.DEFLATE  # type: ignore[misc]
        else:
            yield file, 1.0


def _header(start: bytes, path: Path) -> Any:
    nib = require("nibabel")
    for order in "<>":
        size = struct.unpack(f"{order}i", start[:4])[0] if len(start) >= 4 else 0
        if size not in (348, 540):
            continue
        magic = start[344:348] if size == 348 else start[4:8]
        if magic[:3] in (b"ni1", b"ni2"):
            raise ValueError("is the header of a pair of files (.hdr and .img); convert it to one .nii")
        if len(start) < size:
            raise ValueError(f"is cut short: it has {len(start)} of {size} bytes of its header")
        if magic[:3] not in (b"n+1", b"n+2"):
            break
        header = nib.Nifti1Header if size == 348 else nib.Nifti2Header
        return header(start[:size], endianness=order, check=False)
    if path.name.lower().endswith(".gz"):
        raise ValueError("cannot be read: Not a gzipped file, and no NIfTI file either")
    raise ValueError("is not a NIfTI file")


def _shape(header: Any) -> tuple[int, int, int]:
    dim = [int(size) for size in header["dim"]]
    if not 1 <= dim[0] <= 7 or min(dim[1 : 1 + min(dim[0], 3)]) < 1:
        raise ValueError(f"cannot be read: its header claims the dimensions {dim}")
    sizes = [max(1, size) for size in dim[1 : 1 + dim[0]]]
    if len(sizes) > 4 and sizes[3] == 1 and sizes[4] > 1:
        raise ValueError(f"must hold one number for each voxel, got {sizes[4]} (colour, or vectors)")
    if any(size > 1 for size in sizes[3:]):
        raise ValueError(f"must be one volume of 3 dimensions, got {dim[0]}: {tuple(sizes)}")
    x, y, z = [*sizes, 1, 1][:3]
    return x, y, z


def _dtype(header: Any) -> np.dtype[Any]:
    code = int(header["datatype"])
    names = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
    several = {32: 2, 1792: 2, 2048: 2, 128: 3, 2304: 4}
    if code in several:
        raise ValueError(f"must hold one number for each voxel, got {several[code]} (colour, or vectors)")
    if code not in names:
        raise ValueError(f"cannot be read: voxels of the type {code}, which is unknown or not supported")
    kind = np.dtype(header.endianness + names[code])
    if int(header["bitpix"]) not in (0, kind.itemsize * 8):
        raise ValueError(f"cannot be read: its header says {int(header['bitpix'])} bits for voxels of {kind.name}")
    return kind


def _start(header: Any) -> int:
    least = int(header["sizeof_hdr"]) + 4
    offset = float(header["vox_offset"])
    if offset == 0:
        return least
    if not (least <= offset < 2**62 and offset == int(offset)):
        raise ValueError(f"cannot be read: its voxels are said to begin at byte {offset:g}")
    return int(offset)


def _rescale(header: Any, kind: np.dtype[Any]) -> tuple[np.float64, float, type] | None:
    """Slope, intercept and the type of what they make of voxels; None where voxels are as they are stored."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if not np.isfinite(slope) or slope == 0:
        return None
    intercept = intercept if np.isfinite(intercept) else 0.0
    if (slope, intercept) == (1, 0):
        return None
    return np.float64(slope), intercept, np.float64 if kind.newbyteorder("=") == np.float64 else np.float32


def _window(header: Any) -> tuple[float, float] | None:
    """cal_min and cal_max: what is to be shown black and white, after scaling."""
    low, high = float(header["cal_min"]), float(header["cal_max"])
    return (low, high) if np.isfinite([low, high]).all() and low < high else None


def _geometry(header: Any) -> tuple[Grid, list[str], bool]:
    """The grid, what is odd with it, and whether it says where it lies."""
    shape = _shape(header)
    unit = int(header["xyzt_units"]) & 7
    if unit not in _MM:
        raise ValueError(f"names the unit {unit} of length, which is none")
    notes: list[str] = []
    pixdim = np.array(header["pixdim"][1:4], float)
    pixdim[int(header["dim"][0]) :] = [x if x > 0 else 1 for x in pixdim[int(header["dim"][0]) :]]
    told = np.isfinite(pixdim) & (pixdim != 0)
    if (pixdim[told] < 0).any():
        notes.append(f"pixdim is negative ({_mm(pixdim)}); its size is taken")
    pixdim = np.abs(pixdim)
    forms = _forms(header, notes)
    codes = f"sform code {int(header['sform_code'])}, qform code {int(header['qform_code'])}"
    if len(forms) == 2:
        apart = _apart(forms["sform"], forms["qform"], shape)
        finest = min(np.linalg.norm(forms["sform"][:3, :3], axis=0))
        if apart > max(0.01 * finest, 1e-4 * _extent(forms["sform"], shape)):
            notes.append(
                f"its sform and qform differ ({codes}): they put voxels up to {apart * _MM[unit]:.3g} mm apart; the "
                "sform is taken, and masks repeat both"
            )
    if forms:
        name, matrix = next(iter(forms.items()))
        spacing = np.linalg.norm(matrix[:3, :3], axis=0)
        shear = _shear(matrix)
        if shear > _SHEAR:
            raise ValueError(
                f"its {name} is sheared: axes are {shear:.2g} (cosine) off right angles; resample it to a grid with "
                "right angles first (nibabel.processing.resample_to_output, or a viewer's resampling)"
            )
        if shear > _NOISE:
            notes.append(
                f"its {name} is sheared by {shear:.1g}, which is taken as none; to mend it, store the nearest rotation "
                "(nibabel: img.set_qform(img.affine); img.set_sform(img.get_qform()))"
            )
        if told.all() and (np.abs(spacing / np.where(told, pixdim, 1) - 1) > 1e-3).any():
            notes.append(f"pixdim says {_mm(pixdim)}, its {name} {_mm(spacing)}; the {name} is taken")
        near = told & (np.abs(spacing - pixdim) <= 1e-5 * spacing)
        spacing = np.where(near, pixdim, spacing)
        direction = _rotation(matrix)
        origin = matrix[:3, 3]
    else:
        if int(header["sform_code"]) > 0 or int(header["qform_code"]) > 0:
            raise ValueError(f"does not say where it lies: {'; '.join(notes)} ({codes})")
        notes.append(f"does not say where it lies ({codes}): rows are taken to run to the left, columns to the back")
        spacing, direction, origin = pixdim, _LPS[:3, :3], np.zeros(3)
    mm = spacing * _MM[unit]
    known = bool(forms) or bool(told.all())
    if known and _description(header) == _UNTOLD and not forms:
        known = False
        notes.clear()
    if known and not ((mm > 1e-3) & (mm < 100)).all():
        names = {0: "no unit", 1: "m", 2: "mm", 3: "um"}
        notes.append(f"voxels of {_mm(mm)} mm: is its unit ({names[unit]}) right?")
    grid = Grid(
        header,
        (float(mm[0]), float(mm[1]), float(mm[2])) if known else None,
        tuple(float(x) + 0.0 for x in (_LPS[:3, :3] @ origin) * _MM[unit]),  # type: ignore[arg-type]
        _LPS[:3, :3] @ direction + 0.0,
    )
    return grid, notes, bool(forms)


def _description(header: Any) -> bytes:
    return bytes(header["descrip"]).rstrip(b"\0")


def _forms(header: Any, notes: list[str]) -> dict[str, np.ndarray]:
    """The matrices that count, the first of which is to be taken."""
    forms = {}
    if int(header["sform_code"]) > 0:
        matrix = np.eye(4)
        matrix[:3] = [header["srow_x"], header["srow_y"], header["srow_z"]]
        if int(header["dim"][0]) < 3 and not matrix[:3, 2].any():  # a flat one may leave its normal out
            across = np.cross(matrix[:3, 0], matrix[:3, 1])
            length = np.linalg.norm(across)
            matrix[:3, 2] = across / (length if length > 0 else 1)
        if _usable(matrix):
            forms["sform"] = matrix
        else:
            notes.append("its sform is singular or not finite, and is not taken")
    if int(header["qform_code"]) > 0:
        try:
            forms["qform"] = _qform(header)
        except ValueError as error:
            notes.append(f"its qform {error}, and is not taken")
    return forms


def _qform(header: Any) -> np.ndarray:
    b, c, d = (float(header[f"quatern_{x}"]) for x in "bcd")
    pixdim = np.abs(np.array(header["pixdim"][1:4], float))
    flat = int(header["dim"][0])
    pixdim[flat:] = [x if x > 0 else 1 for x in pixdim[flat:]]
    square = 1 - (b * b + c * c + d * d)
    if not square >= -1e-5:
        raise ValueError("is no rotation")
    a = np.sqrt(max(square, 0.0))
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    matrix = np.eye(4)
    matrix[:3, :3] = rotation / np.linalg.norm(rotation, axis=0) * pixdim
    matrix[:3, 2] *= -1 if float(header["pixdim"][0]) < 0 else 1
    matrix[:3, 3] = [float(header[f"qoffset_{x}"]) for x in "xyz"]
    if not _usable(matrix):
        raise ValueError("lacks a spacing, or is not finite")
    return matrix


def _usable(matrix: np.ndarray) -> bool:
    lengths = np.linalg.norm(matrix[:3, :3], axis=0)
    if not (np.isfinite(matrix).all() and (lengths > 0).all()):
        return False
    return abs(float(np.linalg.det(matrix[:3, :3] / lengths))) > 1e-3


def _shear(matrix: np.ndarray) -> float:
    unit = matrix[:3, :3] / np.linalg.norm(matrix[:3, :3], axis=0)
    return float(np.abs(unit.T @ unit - np.eye(3)).max())


def _rotation(matrix: np.ndarray) -> np.ndarray:
    """The axes of a matrix, or where they are not quite at right angles the nearest ones that are."""
    unit = matrix[:3, :3] / np.linalg.norm(matrix[:3, :3], axis=0)
    if _shear(matrix) < 1e-7:
        return unit
    left, _, right = np.linalg.svd(unit)
    return left @ right


def _corners(shape: tuple[int, int, int]) -> np.ndarray:
    return np.array([[x, y, z, 1] for x in (0, shape[0] - 1) for y in (0, shape[1] - 1) for z in (0, shape[2] - 1)]).T


def _apart(a: np.ndarray, b: np.ndarray, shape: tuple[int, int, int]) -> float:
    return float(np.linalg.norm(((a - b) @ _corners(shape))[:3], axis=0).max())


def _extent(matrix: np.ndarray, shape: tuple[int, int, int]) -> float:
    return float(np.linalg.norm(matrix[:3, :3] @ np.array(shape)))


def _mm(values: np.ndarray) -> str:
    return " x ".join(f"{x:.4g}" for x in values)


# ---------------------------------------------------------------------- writing


def _write(path: Path, array: np.ndarray | Slices, like: Volume) -> None:
    header = _new_header(array.shape, like)
    kind = {"bool": "uint8", "float16": "float32"}.get(array.dtype.name, array.dtype.name)
    header.set_data_dtype(kind)
    parts = chain([header.binaryblock + bytes(4)], contiguous(array, np.dtype(kind).newbyteorder("<")))
    with path.open("wb") as file:
        if path.name.lower().endswith(".gz"):
            deflate(file, parts, gzip=True)
        else:
            for part in parts:
                file.write(part)


def _new_header(shape: tuple[int, ...], like: Volume) -> Any:
    nib = require("nibabel")
    repeats = isinstance(like.header, Grid) and like.header.is_of(like)
    # Codes of NIfTI-2 have 32 bits. One that wraps to nothing would leave the mask without a place.
    codes = [int(like.header.header[name]) for name in ("sform_code", "qform_code")] if repeats else [0]
    large = max(*shape, *codes) > 32767 or min(codes) < -32768
    header = (nib.Nifti2Header if large else nib.Nifti1Header)(endianness="<")
    if repeats:
        source = like.header.header
        for name in ("dim", "pixdim", "xyzt_units", "sform_code", "qform_code", "srow_x", "srow_y", "srow_z"):
            header[name] = source[name]
        for name in ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"):
            header[name] = source[name]
        header["descrip"] = _REPEATED
    else:
        header.set_data_shape(shape[::-1])
        if like.spacing is not None:
            matrix = _LPS @ affine(like.spacing, like.origin, like.direction)
            header.set_qform(matrix, 1)  # scanner's coordinates
            header.set_sform(matrix, 1)
            header.set_xyzt_units("mm")
        else:
            header["descrip"] = _UNTOLD
    header["vox_offset"] = header["sizeof_hdr"] + 4
    header["scl_slope"], header["scl_inter"] = 1, 0
    return header


FORMAT = Format("nifti", (".nii", ".nii.gz"), _read, _write)
