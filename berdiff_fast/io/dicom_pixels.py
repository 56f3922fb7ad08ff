# SPDX-License-Identifier: Apache-2.0
"""Stored values of a DICOM file: judged by its header, decoded by pydicom, or where they are compressed by GDCM.

GDCM believes what it is told, and takes gigabytes for a damaged file of a kilobyte. So it is handed a data set that has
nothing but the description of the pixels, after this has been judged.
"""

from __future__ import annotations

import io
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from berdiff_fast._optional import require
from berdiff_fast.io import claims
from berdiff_fast.io.quiet import without_stderr

_RLE = "1.2.840.10008.1.2.5"
_DEFLATED = "1.2.840.10008.1.2.1.99"

#: How many times as large as its compressed form a picture may be: JPEG-LS and JPEG 2000 of a constant reach this.
_RATIO = 5000
_SMALL = 64 * 2**20  # and what is always allowed, in bytes


def open_file(path: Path, **options: Any) -> Any:
    """A data set by pydicom, without its warnings, and without inflating a bomb.

    Raises:
        ValueError: it is not DICOM, or holds far too much.
    """
    pydicom = require("pydicom")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _judge_deflated(path)
        return pydicom.dcmread(path, force=True, **options)


def _judge_deflated(path: Path) -> None:
    """Data sets may be deflated as a whole, and are inflated as a whole."""
    from pydicom.filereader import read_file_meta_info

    with path.open("rb") as file:
        if file.read(132)[128:] != b"DICM" or _DEFLATED.encode() not in file.read(1024):
            return
    meta = read_file_meta_info(path)
    length = 132 + 12 + int(meta.get("FileMetaInformationGroupLength", 0))
    most = 2 * int(claims.MAX_VOXELS)
    with path.open("rb") as file:
        file.seek(length)
        try:
            found = claims.inflated(file, most, -zlib.MAX_WBITS)
        except (zlib.error, EOFError):
            return  # told by who reads it
    if found > most:
        raise ValueError(f"holds more than {most >> 20} MB, deflated to {path.stat().st_size >> 10} kB")


def whole(dataset: Any, keyword: str, low: int, high: int, default: int | None = None) -> int:
    """A whole number of the header.

    Raises:
        ValueError: it is absent and has no default, or it is not one number between the two.
    """
    value = dataset.get(keyword)
    if value is None or value == "":
        if default is None:
            raise ValueError(f"cannot be read: it has no {keyword}")
        return default
    try:
        number = int(value)
    except (TypeError, ValueError):
        raise ValueError(f"cannot be read: {keyword} must be a whole number, got {str(value)[:40]!r}") from None
    if not low <= number <= high:
        raise ValueError(f"cannot be read: {keyword} must be from {low} to {high}, got {number}")
    return number


def judge(dataset: Any) -> tuple[int, int, int]:
    """Frames, rows and columns that a header tells of, in grey.

    Raises:
        ValueError: a damaged header, colour, or a size beyond all claims.
    """
    rows, columns = whole(dataset, "Rows", 1, 2**16 - 1), whole(dataset, "Columns", 1, 2**16 - 1)
    frames = whole(dataset, "NumberOfFrames", 0, 2**31 - 1, 1) or 1
    samples = whole(dataset, "SamplesPerPixel", 1, 2**16 - 1, 1)
    photometric = str(dataset.get("PhotometricInterpretation", "MONOCHROME2")).strip()
    if samples != 1 or photometric == "PALETTE COLOR":
        raise ValueError(f"must hold one number for each voxel, got {max(samples, 3)} (colour, or vectors)")
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"cannot be read: PhotometricInterpretation is {photometric[:30]!r}")
    allocated = whole(dataset, "BitsAllocated", 1, 64)
    if allocated not in (1, 8, 16, 32, 64):
        raise ValueError(f"cannot be read: BitsAllocated must be 8, 16 or 32, got {allocated}")
    stored = whole(dataset, "BitsStored", 1, allocated, allocated)
    whole(dataset, "HighBit", stored - 1, stored - 1, stored - 1)
    whole(dataset, "PixelRepresentation", 0, 1, 0)
    if "ModalityLUTSequence" in dataset:
        raise ValueError("has a table of its own for values (ModalityLUTSequence), which is not supported")
    claims.check_voxels((frames, rows, columns), max(1, allocated // 8))
    return frames, rows, columns


def stored_values(path: Path) -> tuple[Any, np.ndarray]:
    """The data set and its stored values (frames, rows, columns), before any rescale; MONOCHROME1 as it is.

    Raises:
        ValueError: damaged, cut short, or larger than it can be.
    """
    dataset = open_file(path)
    shape = judge(dataset)
    syntax = _syntax(dataset)
    keyword = next((k for k in ("PixelData", "FloatPixelData", "DoubleFloatPixelData") if k in dataset), None)
    if keyword is None:
        raise ValueError("cannot be read: it holds no pixels")
    data = dataset[keyword].value
    length = len(data) if isinstance(data, (bytes, bytearray)) else 0
    allocated = int(dataset.BitsAllocated)
    wanted = -(-int(np.prod(shape, dtype=object)) * allocated // 8)
    if not syntax.is_compressed or syntax == _DEFLATED:
        if length < wanted:
            raise ValueError(f"cannot be read: it is cut short: its pixels have {length} of {wanted} bytes")
        array = _plain(dataset, data, keyword, shape, syntax)
    else:
        if wanted > (128 * length if syntax == _RLE else max(_SMALL, _RATIO * length)):
            raise ValueError(f"cannot be read: {length} bytes of pixels are said to become {wanted}")
        array = _unpacked(dataset, shape, syntax)
    if array.size != np.prod(shape, dtype=object):
        raise ValueError(f"cannot be read: its pixels have the shape {array.shape}, its header says {shape}")
    return dataset, _fitted(array.reshape(shape), dataset)


def _syntax(dataset: Any) -> Any:
    from pydicom.uid import UID, ImplicitVRLittleEndian

    meta = getattr(dataset, "file_meta", None)
    syntax = UID(str(meta.get("TransferSyntaxUID") or ImplicitVRLittleEndian)) if meta else ImplicitVRLittleEndian
    if not syntax.is_transfer_syntax:
        raise ValueError(f"cannot be read: its transfer syntax {str(syntax)[:40]!r} is not known")
    return syntax


def _plain(dataset: Any, data: bytes, keyword: str, shape: tuple[int, int, int], syntax: Any) -> np.ndarray:
    if int(dataset.BitsAllocated) == 1:
        bits = np.unpackbits(np.frombuffer(data, np.uint8), count=int(np.prod(shape)), bitorder="little")
        return bits.reshape(shape)
    size = int(dataset.BitsAllocated) // 8
    kind = "f" if keyword != "PixelData" else "i" if int(dataset.get("PixelRepresentation") or 0) else "u"
    order = "<" if syntax.is_little_endian else ">"
    if size == 1 and not syntax.is_little_endian and dataset[keyword].VR == "OW":
        data = np.frombuffer(data[: len(data) // 2 * 2], ">u2").astype("<u2").tobytes()
    array = np.frombuffer(data, f"{order}{kind}{size}", count=int(np.prod(shape))).reshape(shape)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _unpacked(dataset: Any, shape: tuple[int, int, int], syntax: Any) -> np.ndarray:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.encaps import encapsulate, generate_frames
    from pydicom.uid import UID

    if syntax == _RLE:
        dataset.NumberOfFrames = shape[0]
        return np.asarray(dataset.pixel_array)
    frames = [*generate_frames(dataset.PixelData, number_of_frames=shape[0])]
    for frame in frames:
        size = _size_within(frame)
        if size is not None and size != shape[1:]:
            raise ValueError(f"cannot be read: a compressed frame is {claims.by(size)}, not {claims.by(shape[1:])}")
    sitk = require("SimpleITK")
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.7" + (".3" if shape[0] > 1 else ""))
    meta.MediaStorageSOPInstanceUID = UID("1.2.3")
    bare = FileDataset(io.BytesIO(), {}, file_meta=meta, preamble=bytes(128))
    bare.SOPClassUID, bare.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    bare.StudyInstanceUID = bare.SeriesInstanceUID = "1.2.4"
    bare.Modality, bare.SamplesPerPixel, bare.PhotometricInterpretation = "OT", 1, "MONOCHROME2"
    _, bare.Rows, bare.Columns = shape
    if shape[0] > 1:
        bare.NumberOfFrames = shape[0]
    bare.BitsAllocated = int(dataset.BitsAllocated)
    bare.BitsStored = int(dataset.get("BitsStored") or dataset.BitsAllocated)
    bare.HighBit = bare.BitsStored - 1
    bare.PixelRepresentation = int(dataset.get("PixelRepresentation") or 0)
    # As they were found, not as the file says: an item that is said to be longer than it is takes GDCM gigabytes.
    bare.PixelData = encapsulate(frames)
    bare["PixelData"].is_undefined_length = True
    with tempfile.TemporaryDirectory() as folder, without_stderr():
        path = Path(folder) / "pixels.dcm"
        bare.save_as(path, enforce_file_format=True)
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(path))
        return np.asarray(sitk.GetArrayFromImage(reader.Execute()))


def _size_within(frame: bytes) -> tuple[int, int] | None:
    """(rows, columns) as a JPEG, JPEG-LS or JPEG 2000 stream itself says; None if it does not say."""
    if frame[:4] == b"\xff\x4f\xff\x51" and len(frame) >= 24:  # JPEG 2000: SIZ comes first
        x, y, left, top = (int.from_bytes(frame[k : k + 4], "big") for k in (8, 12, 16, 20))
        return y - top, x - left
    if frame[:2] != b"\xff\xd8":
        return None
    place = 2
    while place + 9 <= len(frame) and frame[place] == 0xFF:
        marker = frame[place + 1]
        if marker == 0xFF:
            place += 1
        elif marker in (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7):
            return int.from_bytes(frame[place + 5 : place + 7], "big"), int.from_bytes(
                frame[place + 7 : place + 9], "big"
            )
        else:
            place += 2 + int.from_bytes(frame[place + 2 : place + 4], "big")
    return None


def _fitted(array: np.ndarray, dataset: Any) -> np.ndarray:
    """Without what overlays and sloppy writers leave in bits that are not stored."""
    stored = int(dataset.get("BitsStored") or dataset.BitsAllocated)
    if array.dtype.kind not in "iu" or stored >= array.dtype.itemsize * 8:
        return array
    signed = array.dtype.kind == "i"
    low, high = (-(1 << stored - 1), (1 << stored - 1) - 1) if signed else (0, (1 << stored) - 1)
    if low <= int(array.min()) and int(array.max()) <= high:
        return array
    overlays = any(0x6000 <= element.tag.group <= 0x60FF and element.tag.elem == 0x0102 for element in dataset)
    extended = int(array.min()) < 0  # then the sign fills the upper bits already, and values are what they are
    if overlays or (signed and not extended):
        shift = array.dtype.itemsize * 8 - stored
        array = (array << shift) >> shift
    return array
