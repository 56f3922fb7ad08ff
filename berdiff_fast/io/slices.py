# SPDX-License-Identifier: Apache-2.0
"""Volumes that are never in memory as a whole: made slice by slice, and compressed as they come."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

_LEVEL = 6

#: Bytes of a part of zeros below which it is compressed as any other, and of slices that are looked at together.
_LEAST, _TOGETHER = 4096, 2**20


@dataclass(frozen=True)
class Slices:
    """A volume whose slices are made one by one, each when it is asked for; writers take it as they take an array.

    Attributes:
        shape: (S, H, W).
        dtype: the type of the voxels.
        make: slice s, (H, W).
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    make: Callable[[int], np.ndarray]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, s: int) -> np.ndarray:
        return self.make(s)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.make(s) for s in range(len(self)))


def blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array along its first axis, some slices at a time: views of about a megabyte, at least one slice each."""
    step = max(1, _TOGETHER // max(1, array[:1].nbytes))
    return (array[start : start + step] for start in range(0, len(array), step))


def contiguous(volume: np.ndarray | Slices, kind: Any = None) -> Iterator[np.ndarray]:
    """Slices (H, W) of a volume, in C order and of a type, for what writes bytes."""
    return (np.ascontiguousarray(volume[s], kind) for s in range(len(volume)))


def deflate(file: BinaryIO, parts: Iterable[np.ndarray | bytes], *, gzip: bool) -> int:
    """Compress parts into one gzip or zlib stream, without name or time: equal parts make equal streams.

    A part of zeros alone, as most slices of a mask are, is compressed once. Its bytes refer to nothing before them
    (``Z_FULL_FLUSH``), so they are repeated where the next such part comes.

    Returns:
        Bytes written.
    """
    checksum, value = (zlib.crc32, 0) if gzip else (zlib.adler32, 1)
    written = file.write(b"\x1f\x8b\x08\0\0\0\0\0\0\xff" if gzip else b"\x78\x9c")
    packer, zeros, length, clean = _packer(), dict[int, bytes](), 0, True
    for part in parts:
        data = np.frombuffer(part, np.uint8) if isinstance(part, bytes) else part.reshape(-1).view(np.uint8)
        value, length = checksum(data.data, value), length + data.size
        if data.size < _LEAST or data.any():
            written += file.write(packer.compress(data.data))
            clean = False
            continue
        if not clean:
            written += file.write(packer.flush(zlib.Z_FULL_FLUSH))
            clean = True
        if data.size not in zeros:
            alone = _packer()
            zeros[data.size] = alone.compress(data.data) + alone.flush(zlib.Z_FULL_FLUSH)
        written += file.write(zeros[data.size])
    written += file.write(packer.flush())
    return written + file.write(struct.pack("<II", value, length % 2**32) if gzip else struct.pack(">I", value))


def _packer() -> Any:
    return zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
