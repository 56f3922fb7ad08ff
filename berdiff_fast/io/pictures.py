# SPDX-License-Identifier: Apache-2.0
"""Pictures in files, PNG, JPEG, TIFF or NPY: one grey or colour picture of all its levels, turned as a viewer shows it.

Pillow reads most of them. What it would read wrong without a word (16 bits of a colour picture become 8; grey of 16
bits whose 0 is white is not inverted; signed bytes become unsigned) or not at all (float16, float64) is read by
SimpleITK (PNG) and tifffile (TIFF), which the extra ``imaging`` brings, or refused.

Every function raises a ValueError that says what is wrong with the picture; the caller knows its path.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from berdiff_fast._optional import require
from berdiff_fast.io import claims, colours
from berdiff_fast.io.quiet import without_chatter, without_stderr
from berdiff_fast.io.slices import Slices, contiguous
from berdiff_fast.io.volume import Format, Volume

# Pillow's own words for it hold the path, which the caller names already.
_WORDS = {"UnidentifiedImageError": "not a PNG, JPEG or TIFF"}

#: What Pillow may take a file for; it knows formats that run programs.
_KNOWN = ("PNG", "JPEG", "TIFF", "BMP")


class _OtherKindError(ValueError):
    """The file is sound, and not what was asked for."""


def read(path: Path, *, colour: bool = False) -> tuple[np.ndarray, bool]:
    """One picture, (H, W) of any real dtype, and whether it was compressed with loss (JPEG).

    A picture that says how it is to be turned (EXIF orientation) is turned. Colour pictures pass as grey ones if they
    are grey, that is, if their channels are equal; transparent ones if nothing of them is.

    Args:
        path: the file.
        colour: whether a colour picture is asked for, (H, W, 3): red, green, blue. What is stored as one channel, or
            with a palette of greys, is none.

    Raises:
        ValueError: it cannot be read, or it is not one picture of the kind that is asked for.
        ImportError: reading it needs a package that is not installed.
    """
    try:
        with without_chatter():
            if path.suffix.lower() == ".npy":
                array, lossy = _arranged(load_npy(path), colour), False
            else:
                array, lossy = _picture(path, colour)
    except (_OtherKindError, MemoryError, ImportError):
        raise
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or _WORDS.get(type(error).__name__, error)}") from error
    except Exception as error:  # decoders raise what they like on broken files: SyntaxError, zlib.error, struct.error
        raise ValueError(f"cannot be read: {error}") from error
    if array.ndim != (3 if colour else 2) or array.dtype.kind not in "buif":
        raise ValueError(f"must be one (H, W) picture of real numbers, got shape {array.shape} of {array.dtype}")
    if array.size == 0:
        raise ValueError(f"is empty, of shape {array.shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError("has NaN or infinite values")
    return array, lossy


def load_npy(path: Path) -> np.ndarray:
    """An array of numbers, if the file holds as much as its header claims."""
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            raise ValueError("it is an archive of arrays, not one array")
    try:
        mapped: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        if "objects" in str(error):
            raise ValueError("Object arrays are pickles, which are code, and are not loaded") from None
        if "mmap length" in str(error):
            raise ValueError("cannot be read: it is cut short, or claims a size that it does not have") from None
        raise
    claims.check_voxels(mapped.shape, mapped.dtype.itemsize)
    del mapped  # its pages would count beside what is read
    return np.load(path, allow_pickle=False)


def grey(array: np.ndarray) -> np.ndarray:
    """(H, W) of (H, W, C), or (C, H, W), with equal channels; any other array as it is.

    Raises:
        ValueError: it is a colour picture, or one with transparent pixels.
    """
    if array.ndim != 3:
        return array
    if array.shape[-1] in (1, 2, 3, 4) and min(array.shape[:2]) > 4:
        channels = np.moveaxis(array, -1, 0)
    else:
        return array
    colours, alpha = (channels[:-1], channels[-1]) if len(channels) in (2, 4) else (channels, None)
    if not (colours == colours[:1]).all():
        raise _OtherKindError(f"is a colour picture (of shape {array.shape}), expected a grey one (or equal channels)")
    _check_opaque(alpha, array)
    return np.ascontiguousarray(colours[0])


def rgb(array: np.ndarray) -> np.ndarray:
    """(H, W, 3) of a colour picture (H, W, 3), or (H, W, 4) with an alpha that is opaque everywhere.

    Raises:
        ValueError: it is a grey picture, or one with transparent pixels.
    """
    if array.ndim != 3 or array.shape[-1] not in (3, 4):
        raise _OtherKindError(f"is a grey picture (of shape {array.shape}), expected a colour one, (H, W, 3)")
    _check_opaque(array[..., 3] if array.shape[-1] == 4 else None, array)
    return np.ascontiguousarray(array[..., :3])


def _arranged(array: np.ndarray, colour: bool) -> np.ndarray:
    return rgb(array) if colour else grey(array)


def _wanted(colour: bool) -> str:
    return "one of red, green and blue" if colour else "a grey one"


def _check_opaque(alpha: np.ndarray | None, array: np.ndarray) -> None:
    top = 1.0 if array.dtype.kind in "fb" else float(np.iinfo(array.dtype).max)
    if alpha is not None and not (alpha == top).all():
        raise _OtherKindError(f"has transparent pixels (shape {array.shape}), expected an opaque picture")


def _picture(path: Path, colour: bool) -> tuple[np.ndarray, bool]:
    from PIL import Image, ImageOps

    with path.open("rb") as file:
        start = file.read(32)
    if start[:8] == b"\x89PNG\r\n\x1a\n" and len(start) >= 26 and start[24] == 16 and start[25] in (2, 4, 6):
        return _deep_png(path, start, colour), False
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        tags = _tiff_tags(path)
        if _needs_tifffile(tags):
            return _tiff(path, colour), False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is told in a line
        picture = Image.open(path, formats=_KNOWN)
    with picture:
        _check_size(picture.size[::-1])
        _check_alone(picture)
        lossy = picture.format in ("JPEG", "MPO")
        see_through = picture.info.get("transparency")
        with without_stderr() if picture.format == "TIFF" else nullcontext():  # libtiff prints what Pillow raises
            picture.load()
        # A TIFF is turned as it is loaded.
        shown: Image.Image = picture if picture.format == "TIFF" else ImageOps.exif_transpose(picture)
        if shown.mode in ("L", "I", "F") or shown.mode.startswith("I;16"):
            array = np.asarray(shown)
            if isinstance(see_through, int) and (array == see_through).any():
                raise _OtherKindError("has transparent pixels, expected an opaque picture")
            array = array.astype(array.dtype.newbyteorder("="), copy=False)
            return (rgb(array) if colour else array), lossy
        if shown.mode not in ("1", "LA", "P", "PA", "RGB", "RGBA"):
            raise _OtherKindError(f"is a picture of mode {shown.mode}, expected {_wanted(colour)}")
        rgba = np.asarray(shown.convert("RGBA"))
    if not (rgba[..., 3] == 255).all():
        raise _OtherKindError("has transparent pixels, expected an opaque picture")
    plain = bool((rgba[..., :3] == rgba[..., :1]).all())
    if not colour and not plain:
        raise _OtherKindError("is a colour picture, expected a grey one (or equal channels)")
    # White or black all over, what was stored in three channels is a picture in colour still.
    if colour and plain and shown.mode not in ("RGB", "RGBA"):
        raise _OtherKindError("is a grey picture, expected a colour one")
    return (np.ascontiguousarray(rgba[..., :3]) if colour else rgba[..., 0]), lossy


def _check_alone(picture: Any) -> None:
    frames = getattr(picture, "n_frames", 1)
    if frames > 1:
        raise _OtherKindError(f"holds {frames} pictures, expected one")


def _check_size(size: tuple[int, ...]) -> None:
    limit = int(os.environ.get("BERDIFF_FAST_MAX_PIXELS", claims.MAX_PIXELS))
    if int(np.prod(size, dtype=object)) > limit:
        raise _OtherKindError(
            f"has {claims.by(size)} pixels, more than the {limit} that are read "
            "(BERDIFF_FAST_MAX_PIXELS sets the limit)"
        )


def _turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """As a viewer shows it, by the EXIF orientation 1 to 8."""
    if orientation in (5, 6, 7, 8):
        array = np.swapaxes(array, 0, 1)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return np.ascontiguousarray(array[rows, columns])


# ---------------------------------------------------------------------- PNG of 16 bits in colour


def _deep_png(path: Path, start: bytes, colour: bool) -> np.ndarray:
    """16 bits of several channels, of which Pillow would keep the upper 8."""
    columns, rows = struct.unpack(">II", start[16:24])
    _check_size((rows, columns))
    from PIL import Image

    with Image.open(path, formats=("PNG",)) as picture:
        _check_alone(picture)
        orientation = int(picture.getexif().get(0x0112, 1))
    array = _two_channels(path) if start[25] == 4 else _three_or_four(path)
    if array.shape[:2] != (rows, columns) or array.ndim != 3 or array.dtype != np.uint16:
        raise ValueError(f"16 bits for each channel became {array.shape} of {array.dtype}")
    return _turned(_arranged(array, colour), orientation)


def _two_channels(path: Path) -> np.ndarray:
    """Grey and alpha of 16 bits: four bytes a pixel, as in four channels of 8, which Pillow leaves as they are."""
    from PIL import Image

    data = bytearray(path.read_bytes())
    data[24], data[25] = 8, 6
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
        return np.ascontiguousarray(np.asarray(picture)).view(">u2").astype(np.uint16)


def _three_or_four(path: Path) -> np.ndarray:
    try:
        sitk = require("SimpleITK")
    except ImportError as error:
        raise ImportError(f"it has 16 bits for each of several channels: {error}") from error
    with without_stderr():
        reader = sitk.ImageFileReader()
        reader.SetImageIO("PNGImageIO")
        reader.SetFileName(str(path))
        return np.asarray(sitk.GetArrayFromImage(reader.Execute()))


# ---------------------------------------------------------------------- TIFF


def _tiff_tags(path: Path) -> dict[int, tuple[int, ...]]:
    """The first directory's numbers, by tag: of those that say how pixels are stored."""
    wanted = (256, 257, 258, 259, 262, 274, 277, 284, 339)
    with path.open("rb") as file:
        order = "<" if file.read(2) == b"II" else ">"
        (version,) = struct.unpack(f"{order}H", file.read(2))
        big = version == 43
        file.seek(8 if big else 4)
        (place,) = struct.unpack(f"{order}{'Q' if big else 'I'}", file.read(8 if big else 4))
        file.seek(place)
        (count,) = struct.unpack(f"{order}{'Q' if big else 'H'}", file.read(8 if big else 2))
        width, inline = (20, 8) if big else (12, 4)
        found = {}
        for _ in range(min(count, 4096)):
            entry = file.read(width)
            tag, kind = struct.unpack(f"{order}HH", entry[:4])
            (length,) = struct.unpack(f"{order}{'Q' if big else 'I'}", entry[4 : 12 if big else 8])
            letter = {1: "B", 3: "H", 4: "I", 16: "Q"}.get(kind)
            if tag not in wanted or letter is None or length > 64:
                continue
            size = struct.calcsize(letter) * length
            data = entry[-inline:][:size]
            if size > inline:
                here = file.tell()
                file.seek(struct.unpack(f"{order}{'Q' if big else 'I'}", entry[-inline:])[0])
                data = file.read(size)
                file.seek(here)
            found[tag] = struct.unpack(f"{order}{length}{letter}", data)
    return found


def _needs_tifffile(tags: dict[int, tuple[int, ...]]) -> bool:
    """Whether Pillow would read pixels of this kind wrong, or not at all."""
    if tags.get(274, (1,))[0] != 1:  # some of its versions take width for height in a TIFF that is to be turned
        return True
    bits, samples = set(tags.get(258, (1,))), tags.get(277, (1,))[0]
    kinds = set(tags.get(339, (1,)))
    white_is_zero, planar = tags.get(262, (1,))[0] == 0, tags.get(284, (1,))[0] == 2
    if len(bits) != 1 or len(kinds) != 1:
        return True
    (bit,), (kind,) = bits, kinds
    if samples > 1:
        return bit != 8 or kind != 1 or planar
    if kind == 3:
        return bit != 32
    if kind == 2:
        return bit not in (16, 32)
    return bit not in (1, 2, 4, 8, 16) or (white_is_zero and bit == 16)


def _tiff(path: Path, colour: bool) -> np.ndarray:
    try:
        tifffile = require("tifffile")
    except ImportError as error:
        raise ImportError(f"its pixels are of a kind that Pillow does not read: {error}") from error
    with tifffile.TiffFile(path) as file:
        if len(file.pages) != 1:
            raise _OtherKindError(f"holds {len(file.pages)} pictures, expected one")
        page = file.pages[0]
        _check_size((page.imagelength, page.imagewidth))
        photometric = int(page.photometric if page.photometric is not None else 1)
        if photometric not in (0, 1, 2):
            raise _OtherKindError(f"is a TIFF of photometric interpretation {photometric}, expected {_wanted(colour)}")
        tag = page.tags.get(274)
        orientation = int(tag.value) if tag is not None else 1
        array = np.asarray(page.asarray())
        if int(page.planarconfig or 1) == 2 and array.ndim == 3:
            array = np.moveaxis(array, 0, -1)
        if photometric == 0:  # white is zero
            if array.dtype.kind != "u":
                raise _OtherKindError(f"has 0 for white in {array.dtype}, which has no black")
            array = np.iinfo(array.dtype).max - array
    array = array.astype(array.dtype.newbyteorder("="))
    if colour:
        return _turned(rgb(array), orientation)
    if array.ndim == 3:
        flat = grey(array)
        if flat.ndim == 3:
            raise _OtherKindError(f"has {array.shape[-1]} channels, expected a grey picture")
        array = flat
    return _turned(array, orientation)


# ---------------------------------------------------------------------- as volumes of one slice


def _read(path: Path, series: str | None) -> Volume:
    array, _ = read(path)
    return Volume(array[None], format="picture", path=path, placed=False)


def read_colour(path: Path) -> Volume:
    """A colour picture, as ``read`` takes it, with the luminance that stands for it where one channel is shown."""
    array, _ = read(path, colour=True)
    channels = np.ascontiguousarray(np.moveaxis(array, -1, 0))
    kind = "numpy" if path.suffix.lower() == ".npy" else "picture"
    shown = colours.luminance(channels)[None]
    return Volume(shown, format=kind, path=path, placed=False, colour=channels[:, None])


def _write(path: Path, array: np.ndarray | Slices, like: Volume) -> None:
    from PIL import Image

    pixels = array[0]
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    elif pixels.dtype.kind == "f":  # of probabilities and bits, in [0, 1]
        pixels = np.rint(pixels * 255).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def _read_array(path: Path, series: str | None) -> Volume:
    array = grey(load_npy(path))
    return Volume(array[None] if array.ndim == 2 else array, format="numpy", path=path, placed=False)


def _write_array(path: Path, array: np.ndarray | Slices, like: Volume) -> None:
    about = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, about)
        for part in contiguous(array):
            file.write(part.data)


PICTURE = Format("picture", (".png", ".tif", ".tiff", ".jpg", ".jpeg"), _read, _write)
ARRAY = Format("numpy", (".npy",), _read_array, _write_array)
