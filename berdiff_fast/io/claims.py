# SPDX-License-Identifier: Apache-2.0
"""How much a file may ask for: judged by its header and its size on disk, before memory is taken.

A header of a few bytes can claim any size, and a compressed file can hold a thousand times what it weighs. So a claim
is compared with what the file can hold at most, and with a limit of its own.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Sequence
from typing import BinaryIO

#: Voxels of a volume, unless BERDIFF_FAST_MAX_VOXELS says otherwise: a CT of 512 x 512 has 4096 slices then.
MAX_VOXELS = 2**30

#: Pixels of a picture; the largest detectors of mammography have a quarter of it.
MAX_PIXELS = 10**8

#: Deflate, which gzip, PNG, NRRD and MetaImage use, expands no byte into more.
DEFLATE = 1032

#: What may lie before or behind the voxels of a file (extensions of a header, padding of an archive), in bytes.
MAX_BESIDE = 64 * 2**20

_CHUNK = 2**20


def check_voxels(shape: Sequence[int], itemsize: int, stored: int | None = None, ratio: float = 1) -> int:
    """Bytes of an array, if they may be taken.

    Args:
        shape, itemsize: what a header claims.
        stored: the bytes on disk that are to hold it; None where that is checked elsewhere.
        ratio: how many times as many these can become.

    Raises:
        ValueError: a size below 0, more voxels than the limit, or more than ``stored`` bytes can hold.
    """
    if any(size < 0 for size in shape):
        raise ValueError(f"cannot be read: its header claims the size {by(shape)}")
    voxels = math.prod(shape)
    limit = int(os.environ.get("BERDIFF_FAST_MAX_VOXELS", MAX_VOXELS))
    if voxels > limit:
        raise ValueError(
            f"claims {by(shape)} voxels, more than the {limit} that are read (BERDIFF_FAST_MAX_VOXELS sets the limit)"
        )
    wanted = voxels * itemsize
    if wanted > 4 * limit:
        raise ValueError(f"claims {wanted >> 20} MB, more than the {4 * limit >> 20} that are read")
    if stored is not None and wanted > ratio * stored + _CHUNK * (ratio > 1):
        raise ValueError(f"is cut short: it has {stored} of {wanted} bytes")
    return wanted


def skip(file: BinaryIO, count: int) -> None:
    """Read past ``count`` bytes, which are kept nowhere, or to the end.

    Raises:
        ValueError: it is more than what may lie before voxels.
    """
    if not 0 <= count <= MAX_BESIDE:
        raise ValueError(f"cannot be read: its voxels are said to begin {count} bytes behind the header")
    while count and (passed := len(file.read(min(count, _CHUNK)))):
        count -= passed


def take(file: BinaryIO, wanted: int) -> bytearray:
    """``wanted`` bytes from here, and no memory for others; fewer where the file ends."""
    found = bytearray()
    while len(found) < wanted:
        more = file.read(min(wanted - len(found), 16 * _CHUNK))
        if not more:
            break
        found += more
    return found


def to_the_end(file: BinaryIO) -> None:
    """Read what lies behind the voxels, so that a checksum at the end is verified; it is kept nowhere.

    Raises:
        ValueError: there is more than ``MAX_BESIDE``.
    """
    beyond = 0
    while more := file.read(_CHUNK):
        beyond += len(more)
        if beyond > MAX_BESIDE:
            raise ValueError(f"has more than {MAX_BESIDE >> 20} MB behind its voxels")


def inflated(file: BinaryIO, at_most: int, wbits: int = zlib.MAX_WBITS) -> int:
    """Bytes that a compressed stream holds, counted without keeping them; ``at_most`` + 1 where there are more.

    Raises:
        zlib.error, EOFError: it is damaged, or ends early.
    """
    inflater, found = zlib.decompressobj(wbits), 0
    rest = b""
    while not inflater.eof:
        data = rest or file.read(2**16)
        if not data:
            raise EOFError("compressed data ended before the end-of-stream marker was reached")
        found += len(inflater.decompress(data, _CHUNK))
        rest = inflater.unconsumed_tail
        if found > at_most:
            return at_most + 1
    return found


def by(shape: Sequence[int]) -> str:
    """A size for people."""
    return " x ".join(map(str, shape))
