# SPDX-License-Identifier: Apache-2.0
"""All formats: which one a file is, reading it, and writing on its grid."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from berdiff_fast.files import whole_file
from berdiff_fast.io import dicom, hdf5, itk, nifti, padding, pictures
from berdiff_fast.io.quiet import line, without_chatter
from berdiff_fast.io.slices import Slices, blocks
from berdiff_fast.io.volume import Format, Volume

_ALL: dict[str, Format] = {
    one.name: one
    for one in (
        nifti.FORMAT,
        itk.NRRD,
        itk.METAIMAGE,
        dicom.FORMAT,
        pictures.PICTURE,
        pictures.ARRAY,
        hdf5.FORMAT,
    )
}

#: Formats by the ends of file names.
FORMATS = {name: one.endings for name, one in _ALL.items()}


def read(path: str | os.PathLike[str], *, series: str | None = None, colour: bool = False) -> Volume:
    """Read a scan or a picture.

    Args:
        path: a file of one of ``FORMATS``, or a folder with a DICOM series. A picture, and a slice of (H, W), is a
            volume of one slice.
        series: the series' UID, where a folder holds several.
        colour: whether a colour picture is asked for (``Volume.colour``), which is refused otherwise.

    Raises:
        FileNotFoundError, ValueError: it cannot be read, or is not one grey volume of finite numbers, or its slices are
            not evenly spaced, or it is not a colour picture and that is asked for; the message is one line and begins
            with the path.
        ImportError: the format needs a package that is not installed; it says which.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    kind = "dicom" if path.is_dir() else format_of(path)
    if colour and kind not in ("picture", "numpy"):
        raise ValueError(f"{path}: is no picture (PNG, JPEG, TIFF or NumPy), and only pictures are read in colour")
    try:
        with without_chatter():
            volume = pictures.read_colour(path) if colour else _ALL[kind].read(path, series)
    except ImportError:
        raise
    except ValueError as error:
        raise ValueError(f"{path}: {line(error)}") from None
    except Exception as error:  # decoders raise what they like on broken files
        raise ValueError(f"{path}: cannot be read: {line(error)}") from None
    volume = _checked(volume)
    found = None if colour else padding.guess(volume.array)
    return volume if found is None else replace(volume, padding=(*volume.padding, found))


def format_of(path: Path) -> str:
    """A key of ``FORMATS``, by the end of the name; DICOM files often have none, and are known by how they begin."""
    name = path.name.lower()
    for kind, ends in FORMATS.items():
        if name.endswith(ends):
            return kind
    if dicom.is_dicom(path):
        return "dicom"
    known = " ".join(end for ends in FORMATS.values() for end in ends)
    raise ValueError(f"{path}: must be a DICOM folder or a file that ends in one of {known}")


def _checked(volume: Volume) -> Volume:
    array, path = volume.array, volume.path
    if array.ndim != 3:
        raise ValueError(
            f"{path}: must be one volume of 3 dimensions (or a slice of 2), got {array.ndim}: {array.shape}"
        )
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path}: must hold real numbers, one for each voxel, got {array.dtype}")
    if array.size == 0:
        raise ValueError(f"{path}: must not be empty, got shape {array.shape}")
    if array.dtype.kind == "f":
        bad = sum(int(part.size - np.isfinite(part).sum()) for part in blocks(array))
        if bad:
            raise ValueError(f"{path}: must be finite, got {bad} voxels that are NaN or infinite, of {array.size}")
    if volume.spacing is not None and not all(np.isfinite(s) and s > 0 for s in volume.spacing):
        raise ValueError(f"{path}: spacing must be positive, got {volume.spacing} mm")
    if not np.isfinite(volume.origin).all():
        raise ValueError(f"{path}: origin must be finite, got {volume.origin} mm")
    direction = volume.direction
    if not np.isfinite(direction).all() or np.abs(direction.T @ direction - np.eye(3)).max() > 2e-3:
        raise ValueError(
            f"{path}: direction must be a rotation, got {direction.round(4).tolist()}; resample it to a grid with "
            "right angles first"
        )
    return volume


def write(path: str | os.PathLike[str], array: np.ndarray | Slices, like: Volume) -> None:
    """Write voxels on the grid of another volume, in the format of the path's ending.

    Args:
        path: ends in .nii, .nii.gz, .nrrd, .mha, .npy, or as a picture, which holds one slice.
        array: (S, H, W) as ``like``, or its slices, made one by one; bool becomes 0 and 1 (0 and 255 in a picture).
        like: whose geometry it has. What was read from NIfTI is written to NIfTI with the forms, codes and units of its
            header.

    Raises:
        ValueError: an array of another shape, or an ending that is not known.
        OSError: it cannot be written; what was there is as it was.
    """
    path = Path(path)
    if array.shape != like.array.shape:
        raise ValueError(f"array must have the shape of its grid, {like.array.shape}, got {array.shape}")
    kind = next((k for k, ends in FORMATS.items() if path.name.lower().endswith(ends)), None)
    headers_alone = path.name.lower().endswith((".nhdr", ".mhd"))
    writer = None if kind is None or headers_alone or (kind == "picture" and len(array) != 1) else _ALL[kind].write
    if writer is None:
        raise ValueError(f"path must end as a format that {len(array)} slices can be written in, got {path.name}")
    with whole_file(path) as new:
        writer(new, array, like)
