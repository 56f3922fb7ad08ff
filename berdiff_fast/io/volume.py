# SPDX-License-Identifier: Apache-2.0
"""A scan in memory: voxels, and where they lie in the patient."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from berdiff_fast.io.slices import Slices, blocks

logger = logging.getLogger("berdiff_fast")

#: Anatomical planes by the direction (L, P, S) that their slices are stacked in.
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}


@dataclass(frozen=True)
class Volume:
    """Voxels and where they lie.

    Attributes:
        array: (S, H, W) in the file's units (Hounsfield units for CT), as stored: the last axis runs fastest.
        spacing: mm between neighbours along (x, y, z), that is along W, H and S; None where the file does not say.
        origin: of voxel [0, 0, 0], and direction: 3 x 3, whose columns are the axes x, y and z, in mm in the patient's
            left, posterior and superior (DICOM's and ITK's convention).
        format: a key of ``FORMATS``.
        path: where it came from.
        instances: the DICOM files of the slices, in the order of ``array``; else empty.
        frames: which frame (from 0) of a DICOM file of many each slice of ``array`` is; else empty.
        placed: whether the file says where the voxels lie; None to conclude it from spacing, origin and direction.
        padding: (low, high) pairs: values from low to high mean "outside the scan", and are not tissue.
        header: what the format says of its grid in words of its own, copied to what is written in that format.
        instance_numbers: DICOM's InstanceNumber of each slice of ``array``, None where it has none; else empty.
        window: (low, high) that the file says its values are to be shown between; None where it does not.
        hounsfield: whether values are in Hounsfield units; None where the file does not say.
        colour: (3, S, H, W), red, green and blue of a colour picture, whose luminance ``array`` is; else None.
    """

    array: np.ndarray
    spacing: tuple[float, float, float] | None = None
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    direction: np.ndarray = field(default_factory=lambda: np.eye(3))
    format: str = "numpy"
    path: Path = Path()
    instances: tuple[Path, ...] = ()
    frames: tuple[int, ...] = ()
    placed: bool | None = None
    padding: tuple[tuple[float, float], ...] = ()
    header: Any = None
    instance_numbers: tuple[int | None, ...] = ()
    window: tuple[float, float] | None = None
    hounsfield: bool | None = None
    colour: np.ndarray | None = None

    @property
    def voxel_mm3(self) -> float | None:
        return None if self.spacing is None else float(np.prod(self.spacing))

    @property
    def is_placed(self) -> bool:
        """Whether it is known where the voxels lie."""
        if self.placed is not None:
            return self.placed
        return self.spacing is not None or any(self.origin) or not np.array_equal(self.direction, np.eye(3))

    def axis(self, plane: str | int) -> int:
        """The axis of ``array`` along which slices of a plane are stacked: the one nearest to its direction.

        Raises:
            ValueError: neither a plane ("axial", "coronal", "sagittal") nor an axis (0, 1, 2).
        """
        if isinstance(plane, str) and plane in PLANES:
            # Axes of the array are z, y, x.
            return 2 - int(np.abs(self.direction[PLANES[plane]]).argmax())
        if plane in (0, 1, 2) and not isinstance(plane, (bool, str)):
            return int(plane)
        raise ValueError(f"plane must be one of {[*PLANES]} or an axis, 0 to 2, got {plane!r}")

    def index_of(self, point: Sequence[float], name: str = "point") -> tuple[float, float, float]:
        """Return the indices in ``array``, (slice, row, column), not rounded, of a point: voxel 0 has its middle at 0.

        Args:
            point: (x, y, z) in mm in the patient's left, posterior and superior (LPS, as DICOM and ITK have it). RAS,
                as NIfTI has it, is (-x, -y, z).
            name: what the point is called in errors.

        Raises:
            ValueError: it is not three finite numbers, lies outside, or the volume does not say where it lies.
        """
        try:
            x = np.array([float(value) for value in point])
        except (TypeError, ValueError):
            x = np.empty(0)
        if x.shape != (3,) or not np.isfinite(x).all():
            raise ValueError(f"{name} must be three finite numbers X Y Z in mm, got {point!r}")
        if self.spacing is None or not self.is_placed:
            raise ValueError(
                f"{name} needs a scan that says where its voxels lie, and this one ({self.format}) does not; give a "
                "row and a column (center)"
            )
        sizes = np.array(self.array.shape[::-1])

        def index(point: np.ndarray) -> np.ndarray:
            return np.linalg.solve(self.direction * self.spacing, point - self.origin)

        def inside(index: np.ndarray) -> bool:
            return bool((index >= -0.5 - 1e-6).all() and (index <= sizes - 0.5 + 1e-6).all())

        found = index(x)
        if not inside(found):
            corners = np.array(np.meshgrid(*((-0.5, size - 0.5) for size in sizes))).reshape(3, -1).T
            reach = np.array(self.origin) + corners * self.spacing @ self.direction.T
            extent = ", ".join(
                f"{axis} {low:.1f} to {high:.1f}"
                for axis, low, high in zip("XYZ", reach.min(0), reach.max(0), strict=True)
            )
            place = ", ".join(
                f"{what} {value:.1f} of {size}"
                for what, value, size in zip(("slice", "row", "column"), found[::-1], sizes[::-1], strict=True)
            )
            ras = " As RAS (NIfTI) it would lie inside: give -X -Y Z." if inside(index(x * (-1, -1, 1))) else ""
            raise ValueError(
                f"{name} must lie in the scan, which reaches over {extent} mm (LPS: to the patient's left, back and "
                f"head), got {tuple(x.tolist())}, which would be {place}.{ras}"
            )
        z, y, x_ = np.clip(found, 0, sizes - 1)[::-1].round(6).tolist()
        return z, y, x_

    def outside(self, part: np.ndarray) -> np.ndarray | None:
        """Where a part of ``array`` holds padding and no tissue: bool of its shape, or None if nowhere."""
        found = None
        for low, high in self.padding:
            here = (part >= low) & (part <= high)
            found = here if found is None else found | here
        return found if found is not None and found.any() else None

    def fingerprint(self) -> str:
        """SHA-256 of voxels, geometry and padding."""
        digest = hashlib.sha256(repr((self.array.shape, str(self.array.dtype), self.spacing, self.origin)).encode())
        digest.update(np.ascontiguousarray(self.direction).tobytes())
        for part in blocks(self.array):  # in the order of its axes, whatever it is in memory
            digest.update(np.ascontiguousarray(part).data)
        if self.padding:
            digest.update(repr(self.padding).encode())
        if self.colour is not None:
            digest.update(np.ascontiguousarray(self.colour).data)
        return digest.hexdigest()


def affine(
    spacing: tuple[float, float, float], origin: tuple[float, float, float], direction: np.ndarray
) -> np.ndarray:
    """(4, 4), from indices (x, y, z) to mm."""
    found = np.eye(4)
    found[:3, :3] = direction * spacing
    found[:3, 3] = origin
    return found


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        name: a key of ``FORMATS``.
        endings: how names of such files end, in lower case.
        read: judges a file and reads it; takes the path and a series, which is DICOM's alone.
        write: writes voxels (S, H, W), an array or slice by slice, on the grid of a volume; None if it is not written.
    """

    name: str
    endings: tuple[str, ...]
    read: Callable[[Path, str | None], Volume]
    write: Callable[[Path, np.ndarray | Slices, Volume], None] | None = None


def warn(path: Path, words: str) -> None:
    """Say in one line what is odd with a file that is read all the same."""
    logger.warning("%s: %s", path, words)
