# SPDX-License-Identifier: Apache-2.0
"""NRRD and MetaImage: headers judged as text, voxels by SimpleITK."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from berdiff_fast._optional import require
from berdiff_fast.io import text_headers
from berdiff_fast.io.quiet import line, without_stderr
from berdiff_fast.io.slices import Slices, contiguous, deflate
from berdiff_fast.io.volume import Format, Volume


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
        with without_stderr():
            reader.ReadImageInformation()
            check_voxels(reader.GetDimension(), reader.GetSize(), reader.GetNumberOfComponents())
            volume = _volume(reader.Execute(), kind, path)
        return volume if known else replace(volume, spacing=None)

    return read


class _Voxels:
    """The voxels of an image of the library's, which stay where they are as long as an array looks at them."""

    def __init__(self, image: Any) -> None:
        self.image = image
        view = require("SimpleITK").GetArrayViewFromImage(image)
        # What is read is ours alone, so it may be written to.
        self.__array_interface__ = {**view.__array_interface__, "data": (view.ctypes.data, False)}


def _volume(image: Any, kind: str, path: Path) -> Volume:
    while image.GetDimension() > 3:
        image = image[..., 0]
    spacing, origin = image.GetSpacing(), image.GetOrigin()
    direction = np.array(image.GetDirection()).reshape(image.GetDimension(), -1)
    array = np.asarray(_Voxels(image))
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


def _write(path: Path, array: np.ndarray | Slices, like: Volume) -> None:
    kind = np.dtype(np.uint8) if array.dtype == bool else array.dtype.newbyteorder("<")
    header = _header(path, array.shape, kind, like)
    with path.open("wb") as file:
        file.write(header)
        packed = deflate(file, contiguous(array, kind), gzip=path.suffix.lower() == ".nrrd")
        at = header.find(_PACKED)
        if at >= 0:
            file.seek(at + len(_PACKED))
            file.write(b"%-20d" % packed)


#: Where MetaImage says how many bytes its voxels have become, which is known when they are written.
_PACKED = b"CompressedDataSize = "


def _header(path: Path, shape: tuple[int, ...], kind: np.dtype[Any], like: Volume) -> bytes:
    """The library's header of a compressed volume of a shape: that of a single voxel, with other sizes in it."""
    sitk = require("SimpleITK")
    image = sitk.GetImageFromArray(np.zeros((1, 1, 1), kind.newbyteorder("=")))
    image.SetSpacing(like.spacing or (1.0, 1.0, 1.0))
    image.SetOrigin(like.origin)
    image.SetDirection(like.direction.flatten().tolist())
    with tempfile.TemporaryDirectory() as folder:
        voxel = Path(folder) / f"voxel{path.suffix.lower()}"
        try:
            with without_stderr():
                sitk.WriteImage(image, str(voxel), useCompression=True)
            written = voxel.read_bytes()
        except RuntimeError as error:
            raise OSError(f"{path.name} cannot be written: {line(error)}") from None
    last = b"\n\n" if voxel.suffix == ".nrrd" else b"\nElementDataFile = LOCAL\n"
    header = written[: written.index(last) + len(last)]
    sizes = b" ".join(b"%d" % size for size in reversed(shape))
    header = re.sub(rb"(?m)^(sizes: |DimSize = )1 1 1$", lambda found: found[1] + sizes, header)
    if like.spacing is None:  # what nobody told is not told on
        header = re.sub(rb"(?m)^(ElementSpacing = |ElementSize = |space directions: |spacings: ).*\n", b"", header)
    return re.sub(rb"(?m)^" + _PACKED + rb"\d+$", _PACKED + b" " * 20, header)


NRRD = Format("nrrd", (".nrrd", ".nhdr"), _reader("nrrd", "NrrdImageIO"), _write)
METAIMAGE = Format("metaimage", (".mha", ".mhd"), _reader("metaimage", "MetaImageIO"), _write)
