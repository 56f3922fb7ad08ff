# SPDX-License-Identifier: Apache-2.0
"""NRRD and MetaImage: headers judged as text, voxels by SimpleITK."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from berdiff_fast._optional import require
from berdiff_fast.io import text_headers
from berdiff_fast.io.volume import Format, Volume
from berdiff_fast.io.words import line, silence


def check_voxels(dimension: int, size: Sequence[int], components: int) -> None:
    """Raise ValueError unless it is one grey volume."""
    if components != 1:
        raise ValueError(f"must hold one number for each voxel, got {components} (colour, or vectors)")
    if dimension > 3 and any(s > 1 for s in size[3:]):
        raise ValueError(f"must be one volume of 3 dimensions, got {dimension}: {tuple(size)}")


def _reader(kind: str, library: str) -> Any:
    def read(path: Path, series: str | None) -> Volume:
        sitk = require("SimpleITK")
        known = text_headers.judged(path, kind)
        if not is_utf8(path):  # the library would end the process
            raise ValueError("has a name that is not UTF-8; rename it")
        reader = sitk.ImageFileReader()
        reader.SetImageIO(library)  # by the header that was judged, whatever else the file may look like
        reader.SetFileName(str(path))
        with silence():
            reader.ReadImageInformation()
            check_voxels(reader.GetDimension(), reader.GetSize(), reader.GetNumberOfComponents())
            volume = _volume(reader.Execute(), kind, path)
        return volume if known else replace(volume, spacing=None)

    return read


def _volume(image: Any, kind: str, path: Path) -> Volume:
    sitk = require("SimpleITK")
    while image.GetDimension() > 3:
        image = image[..., 0]
    spacing, origin = image.GetSpacing(), image.GetOrigin()
    direction = np.array(image.GetDirection()).reshape(image.GetDimension(), -1)
    array = sitk.GetArrayFromImage(image)
    if image.GetDimension() == 2:
        array, spacing, origin = array[None], (*spacing, 1.0), (*origin, 0.0)
        direction = np.block([[direction, np.zeros((2, 1))], [np.zeros((1, 2)), np.ones((1, 1))]])
    return Volume(array, spacing, origin, direction, kind, path, placed=_tells_place(path))


def _tells_place(path: Path) -> bool:
    """Whether a header that was judged names an origin."""
    keys = (b"offset", b"position", b"origin", b"space origin")
    with path.open("rb") as file:
        for text in iter(lambda: file.readline(4096), b""):
            key = text.replace(b"=", b":").split(b":")[0].strip().lower()
            if key in keys:
                return True
            if text.strip() == b"" or key == b"elementdatafile":  # the last of the header
                return False
    return False


def is_utf8(path: Path) -> bool:
    try:
        str(path.resolve()).encode()
    except UnicodeEncodeError:
        return False
    return True


def _write(path: Path, array: np.ndarray, like: Volume) -> None:
    sitk = require("SimpleITK")
    image = sitk.GetImageFromArray(array.astype(np.uint8) if array.dtype == bool else array)
    image.SetSpacing(like.spacing or (1.0, 1.0, 1.0))
    image.SetOrigin(like.origin)
    image.SetDirection(like.direction.flatten().tolist())
    with tempfile.TemporaryDirectory() as folder:
        new = path if is_utf8(path) else Path(folder) / f"new{path.suffix}"
        try:
            with silence():
                sitk.WriteImage(image, str(new), useCompression=True)
        except RuntimeError as error:
            raise OSError(f"{path.name} cannot be written: {line(error)}") from None
        if new is not path:
            shutil.copyfile(new, path)


NRRD = Format("nrrd", (".nrrd", ".nhdr"), _reader("nrrd", "NrrdImageIO"), _write)
METAIMAGE = Format("metaimage", (".mha", ".mhd"), _reader("metaimage", "MetaImageIO"), _write)
