# SPDX-License-Identifier: Apache-2.0
"""Headers of NRRD and MetaImage, which are lines of text: judged before ITK, which trusts them, opens the file.

What is refused: sizes that no file holds, dimensions beyond four, data in files outside the header's folder, and a grid
that is told twice in different words, since readers differ in which they believe.
"""

from __future__ import annotations

import os
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from berdiff_fast.io import claims
from berdiff_fast.io.volume import warn

_MOST = 2**20  # bytes of a header

#: A name of numbered files: one number, and nothing else that C's printf would look at.
_NUMBERED = re.compile(r"[^%]*%0?\d{0,2}d[^%]*")


@dataclass
class Header:
    """Fields by their names in lower case, and where the voxels are."""

    fields: dict[str, str] = field(default_factory=dict)
    length: int = 0
    names: list[str] = field(default_factory=list)  # lines behind a list of files
    ended: bool = True

    def get(self, *keys: str) -> str | None:
        return next((self.fields[key] for key in keys if key in self.fields), None)

    def numbers(self, key: str, count: int) -> list[float] | None:
        """As many numbers as there are to be; None if the field is absent."""
        if key not in self.fields:
            return None
        try:
            found = [float(word) for word in self.fields[key].split()]
        except ValueError:
            found = []
        if len(found) != count:
            raise _bad(f"{key} must be {count} numbers, got {self.fields[key][:60]!r}")
        return found

    def whole(self, key: str, low: int, high: int, default: int | None = None) -> int:
        text = self.fields.get(key)
        if text is None and default is not None:
            return default
        if text is None or not re.fullmatch(r"[+-]?\d{1,18}", text) or not low <= int(text) <= high:
            raise _bad(f"{key} must be a whole number from {low} to {high}, got {text and text[:60]!r}")
        return int(text)

    def add(self, key: str, value: str) -> None:
        key, value = " ".join(key.lower().split()), value.strip()
        if key in self.fields and self.fields[key] != value:
            raise ValueError(f"its header says {key} twice: {self.fields[key][:60]!r} and {value[:60]!r}")
        if len(value) > 4096:
            raise _bad(f"{key} is {len(value)} characters long")
        self.fields[key] = value


def _bad(words: str) -> ValueError:
    return ValueError(f"cannot be read: its header is damaged: {words}")


# ---------------------------------------------------------------------- MetaImage

_META_TYPES = {
    **{f"MET_{sign}{name}": size for name, size in (("CHAR", 1), ("SHORT", 2), ("INT", 4)) for sign in ("", "U")},
    **{"MET_LONG": 4, "MET_ULONG": 4, "MET_LONG_LONG": 8, "MET_ULONG_LONG": 8, "MET_FLOAT": 4, "MET_DOUBLE": 8},
}

#: Names of one thing.
_SAME = (("offset", "position", "origin"), ("transformmatrix", "rotation", "orientation"))


def judge_metaimage(path: Path) -> bool:
    """Raise ValueError if it is not to be read; returns whether it tells its spacing."""
    header = _metaimage(path)
    if header.fields.get("objecttype", "Image").lower() != "image":
        raise _bad(f"objecttype must be Image, got {header.fields['objecttype'][:40]!r}")
    dims = header.whole("ndims", 1, 4)
    shape = [int(x) for x in header.numbers("dimsize", dims) or [] if x == int(x) > 0]
    if len(shape) != dims:
        raise _bad(f"dimsize must be {dims} positive numbers, got {str(header.get('dimsize'))[:60]!r}")
    if header.whole("elementnumberofchannels", 1, 2**15, 1) != 1:
        channels = header.fields["elementnumberofchannels"]
        raise ValueError(f"must hold one number for each voxel, got {channels} (colour, or vectors)")
    kind = header.fields.get("elementtype", "")
    if kind not in _META_TYPES:
        raise _bad(f"elementtype {kind[:40]!r} is not known")
    spacing, size = header.numbers("elementspacing", dims), header.numbers("elementsize", dims)
    for name, values in (("elementspacing", spacing), ("elementsize", size)):
        if values is not None and not all(np.isfinite(values)):
            raise _bad(f"{name} is not finite")
    if spacing and size and not np.allclose(spacing, size, rtol=1e-3, atol=0):
        warn(path, f"ElementSpacing is {spacing}, ElementSize {size}; the spacing is taken")
    for synonyms in _SAME:
        told = [(name, header.numbers(name, dims if name in _SAME[0] else dims**2)) for name in synonyms]
        there = [(name, values) for name, values in told if values is not None]
        for name, values in there[1:]:
            if not np.allclose(values, there[0][1], rtol=0, atol=1e-6):
                raise ValueError(f"its header says the same twice: {there[0][0]} {there[0][1]} and {name} {values}")
        if there and not np.isfinite(there[0][1]).all():
            raise _bad(f"{there[0][0]} is not finite")
    header.numbers("centerofrotation", dims)
    unit = header.fields.get("distanceunits", "mm")
    if unit.lower() not in ("mm", "?"):
        raise ValueError(f"its DistanceUnits are {unit[:20]!r}; convert it to mm")
    _compare_letters(path, header, dims)
    _meta_order(header)
    wanted = claims.check_voxels(shape, _META_TYPES[kind])
    compressed = header.fields.get("compresseddata", "False").lower()[:1] == "t"
    ascii_ = header.fields.get("binarydata", "True").lower()[:1] == "f"
    skip = header.whole("headersize", -1, claims.MAX_BESIDE, 0)
    if compressed and header.fields["elementdatafile"].upper() == "LOCAL":  # ITK makes up voxels without it
        header.whole("compresseddatasize", 1, path.stat().st_size - header.length)
    _judge_data(path, header, _meta_files(path, header, shape), wanted, compressed, ascii_, max(skip, 0))
    known = spacing if spacing is not None else size
    return known is not None and not np.isnan(known).any()


def _metaimage(path: Path) -> Header:
    header = Header()
    with path.open("rb") as file:
        start = file.read(_MOST)
    place = 0
    while place < len(start):
        end = start.find(b"\n", place)
        end = len(start) if end < 0 else end
        text = start[place:end].decode("latin-1").strip()
        place = end + 1
        if not text:
            continue
        key, sign, value = text.partition("=")
        if not sign or not text.isprintable():
            raise _bad(f"a line is not KEY = VALUE: {text[:40]!a}")
        header.add(key, value)
        if key.strip().lower() == "elementdatafile":
            header.length = min(place, len(start))
            if value.strip().upper().startswith("LIST"):
                header.names = start[place:].decode("latin-1").split()
                header.ended = start.endswith(b"\n")
            return header
    raise _bad("it has no ElementDataFile")


def _meta_order(header: Header) -> None:
    orders = {
        header.fields[key].lower()[:1]
        for key in ("elementbyteordermsb", "binarydatabyteordermsb")
        if key in header.fields
    }
    if len(orders) > 1:
        raise ValueError("its header says the order of bytes twice, and differently")


def _meta_files(path: Path, header: Header, shape: list[int]) -> list[str]:
    name = header.fields["elementdatafile"]
    words = name.split()
    if name.upper() == "LOCAL":
        return []
    if words and words[0].upper() == "LIST":
        if len(words) > 1:
            raise ValueError("its data are a list of files of other dimensions than slices, which is not supported")
        if not header.ended:  # ITK passes over the last name, and puts zeros for its voxels
            raise _bad("its list of files does not end with a line's end")
        return _as_many(header.names, shape[-1])
    if "%" in name:
        if not (
            len(words) == 4 and _NUMBERED.fullmatch(words[0]) and all(re.fullmatch(r"\d{1,6}", w) for w in words[1:])
        ):
            raise _bad(f"elementdatafile {name[:60]!r} is no pattern of names")
        first, last, step = map(int, words[1:])
        found = [words[0] % number for number in range(first, min(last, first + 10**5) + 1, max(step, 1))]
        return _as_many(found, shape[-1])
    return [name]


def _as_many(names: list[str], slices: int) -> list[str]:
    if len(names) != slices:
        raise ValueError(f"cannot be read: it names {len(names)} files for {slices} slices")
    return names


def _compare_letters(path: Path, header: Header, dims: int) -> None:
    """Warn where AnatomicalOrientation is another than the matrix's, which is what readers take."""
    letters = header.fields.get("anatomicalorientation", "")
    matrix = next((m for key in _SAME[1] if (m := header.numbers(key, dims**2))), None)
    if dims != 3 or matrix is None or not re.fullmatch(r"[RLAPIS]{3}", letters):
        return
    found = ""
    for axis in np.array(matrix).reshape(3, 3):
        at = int(np.abs(axis).argmax())
        found += ("RAI" if axis[at] > 0 else "LPS")[at]
    if found != letters:
        warn(path, f"AnatomicalOrientation is {letters}, its TransformMatrix {found}; the matrix is taken")


# ---------------------------------------------------------------------- NRRD

_NRRD_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
_NRRD_SIZES = {name: int(kind[1]) for kind, names in _NRRD_TYPES.items() for name in names}

_ANATOMICAL = {"left-posterior-superior", "right-anterior-superior", "left-anterior-superior", "lps", "ras", "las"}


def judge_nrrd(path: Path) -> bool:
    """Raise ValueError if it is not to be read; returns whether it tells its spacing."""
    header = _nrrd(path)
    dims = header.whole("dimension", 1, 16)
    shape = [int(x) for x in header.numbers("sizes", dims) or [] if x == int(x) > 0]
    if len(shape) != dims:
        raise _bad(f"sizes must be {dims} positive numbers, got {str(header.get('sizes'))[:60]!r}")
    kind = " ".join(header.fields.get("type", "").lower().split())
    if kind not in _NRRD_SIZES:
        raise _bad(f"type {kind[:40]!r} is not known")
    wanted = claims.check_voxels(shape, _NRRD_SIZES[kind])
    encoding = header.fields.get("encoding", "").lower()
    if encoding not in ("raw", "gzip", "gz", "ascii", "text", "txt", "hex"):
        raise ValueError(f"cannot be read: the encoding {encoding[:20]!r} is not known or not supported")
    known = _nrrd_grid(path, header, dims)
    for key in ("byteskip", "lineskip"):  # as they were written before
        if key in header.fields:
            header.fields.setdefault(key.replace("skip", " skip"), header.fields[key])
    skip = header.whole("byte skip", -1, claims.MAX_BESIDE, 0)
    header.whole("line skip", 0, 10**4, 0)
    packed, text = encoding in ("gzip", "gz"), encoding not in ("raw", "gzip", "gz")
    _judge_data(path, header, _nrrd_files(header), wanted, packed, text, max(skip, 0), gz=True)
    return known


def _nrrd(path: Path) -> Header:
    header = Header()
    with path.open("rb") as file:
        start = file.read(_MOST)
    lines = start.split(b"\n")
    if not re.fullmatch(rb"NRRD000\d\r?", lines[0]):
        raise ValueError("cannot be read: is not an NRRD file")
    place = len(lines[0]) + 1
    for index, raw in enumerate(lines[1:], start=1):
        place += len(raw) + 1
        text = raw.decode("latin-1").strip()
        if not text:
            break
        if text.startswith("#"):
            continue
        if ":=" in text and (": " not in text or text.index(":=") < text.index(": ")):
            continue  # a note of a program, which says nothing of the grid
        key, sign, value = text.partition(":")
        if not sign:
            raise _bad(f"a line is not FIELD: VALUE: {text[:40]!a}")
        header.add(key, value)
        if header.fields.get("data file", header.fields.get("datafile", "")).split()[:1] == ["LIST"]:
            header.names = [name.decode("latin-1").strip() for name in lines[index + 1 :] if name.strip()]
            break
    header.length = min(place, len(start))
    return header


def _nrrd_grid(path: Path, header: Header, dims: int) -> bool:
    for one, other in (("spacings", "space directions"), ("axis mins", "space origin"), ("axismins", "space origin")):
        if one in header.fields and other in header.fields and "nan" not in header.fields[one].lower():
            raise ValueError(f"its header says {one} and {other}; keep the one that is right")
    space = header.fields.get("space", "").lower()
    if space and space.removesuffix("-time").removesuffix("t") not in _ANATOMICAL and space not in _ANATOMICAL:
        warn(path, f"its space is {space[:40]!r}, which names no anatomy: taken as left-posterior-superior")
    for key in ("space units", "units"):
        for unit in re.findall(r'"([^"]*)"', header.fields.get(key, "")):
            if unit.strip().lower() not in (
                "",
                "mm",
                "millimeter",
                "millimeters",
                "millimetre",
                "millimetres",
                "s",
                "ms",
            ):
                raise ValueError(f"its {key} are {unit[:20]!r}; convert it to mm")
    told = header.fields.get("space directions", header.fields.get("spacings"))
    if "space directions" in header.fields:
        vectors = re.findall(r"\(([^)]*)\)", header.fields["space directions"])
        try:
            matrix = np.array([[float(x) for x in vector.split(",")] for vector in vectors])
        except ValueError:
            raise _bad(f"space directions {header.fields['space directions'][:60]!r} are not vectors") from None
        check_right_angles(matrix, "space directions")
    return told is not None and "nan" not in told.lower()


def check_right_angles(axes: np.ndarray, name: str) -> None:
    """Raise ValueError where the rows of a matrix are not at right angles to each other (cosine over 1e-3)."""
    if axes.ndim != 2 or not np.isfinite(axes).all():
        return
    lengths = np.linalg.norm(axes, axis=1)
    if not (lengths > 0).all():
        raise _bad(f"{name} has a vector of no length")
    unit = axes / lengths[:, None]
    shear = float(np.abs(unit @ unit.T - np.eye(len(unit))).max())
    if shear > 1.001e-3:
        raise ValueError(
            f"its {name} are sheared: axes are {shear:.2g} (cosine) off right angles; resample it to a grid with right "
            "angles first"
        )


def _nrrd_files(header: Header) -> list[str]:
    name = header.get("data file", "datafile")
    if name is None:
        return []
    words = name.split()
    if words and words[0] == "LIST":
        return header.names
    if "%" in name:
        if len(words) not in (4, 5) or not _NUMBERED.fullmatch(words[0]):
            raise _bad(f"data file {name[:60]!r} is no pattern of names")
        if not all(re.fullmatch(r"-?\d{1,6}", word) for word in words[1:]):
            raise _bad(f"data file {name[:60]!r} is no pattern of names")
        first, last, step = map(int, words[1:4])
        count = min(10**5, max(0, (last - first) // (step or 1)) + 1)
        return [words[0] % (first + k * step) for k in range(count)]
    return [name]


# ---------------------------------------------------------------------- both


def _judge_data(
    path: Path, header: Header, names: list[str], wanted: int, packed: bool, text: bool, skip: int, *, gz: bool = False
) -> None:
    """That the data lie in the header's folder and are all there."""
    folder = path.parent.resolve()
    files = []
    for name in names:
        if not name or not name.isprintable():
            raise _bad(f"the name of its data is {name[:40]!a}")
        file = Path(os.path.normpath(folder / name))
        if folder not in file.parents or folder not in file.resolve().parents:
            raise ValueError(f"its header points to data outside its folder: {name[:80]!a}; nothing is read there")
        if not file.is_file():
            raise ValueError(f"cannot be read: its data are missing: {name[:80]!a}")
        files.append(file)
    if packed and len(files) <= 1:
        _judge_packed(files[0] if files else path, 0 if files else header.length, wanted, skip, gz)
        return
    if len(files) > 1 and not packed and not text and min(file.stat().st_size for file in files) < wanted // len(files):
        raise ValueError("cannot be read: it is cut short: one of its files is smaller than a slice")
    stored = sum(file.stat().st_size - skip for file in files) if files else path.stat().st_size - header.length - skip
    if packed:
        stored *= claims.DEFLATE
    if stored < (wanted // 8 if text else wanted):  # a number of text takes two bytes at least, and it at most eight
        raise ValueError(f"cannot be read: it is cut short: it has {max(stored, 0)} of {wanted} bytes")


def _judge_packed(path: Path, start: int, wanted: int, skip: int, gz: bool) -> None:
    with path.open("rb") as file:
        file.seek(start + (0 if gz else skip))
        try:
            found = claims.inflated(file, wanted + claims.MAX_BESIDE, 32 + zlib.MAX_WBITS)  # of zlib or gzip
        except (zlib.error, EOFError) as error:
            raise ValueError(f"cannot be read: its voxels are damaged: {error}") from None
    if found < wanted:
        raise ValueError(f"cannot be read: it is cut short: it has {found} of {wanted} bytes")
    if found > wanted + claims.MAX_BESIDE:
        raise ValueError(f"has more than {claims.MAX_BESIDE >> 20} MB behind its voxels")


def judged(path: Path, kind: str) -> Any:
    """Judge a file of a kind; whether it tells its spacing."""
    return (judge_nrrd if kind == "nrrd" else judge_metaimage)(path)
