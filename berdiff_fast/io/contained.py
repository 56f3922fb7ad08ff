# SPDX-License-Identifier: Apache-2.0
"""Data sets of HDF5 files that lie in the file itself, and take no more memory than what is there can unpack to.

HDF5 may keep a data set in other files: as external storage of raw bytes, behind an external link, or put together as a
virtual data set. A file from elsewhere would then read whatever file its author names. None of them is followed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from berdiff_fast import limits
from berdiff_fast.words import line

_MOST_LINKS = 16


class ElsewhereError(ValueError):
    """A data set that is not in the file."""


@contextmanager
def reading(path: Path, what: str = "") -> Iterator[None]:
    """Whatever HDF5 raises on a damaged file becomes a ValueError of one line that begins with the path."""
    try:
        yield
    except (
        ValueError,
        OSError,
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
        MemoryError,
        OverflowError,
    ) as error:
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        if isinstance(error, (ElsewhereError, limits.LimitError)):
            raise ValueError(f"{path}: {error}") from None
        name = f"{what} " if what else ""
        raise ValueError(f"{path}: {name}cannot be read (damaged?): {line(error)}") from error


def dataset(file: h5py.File, name: str) -> h5py.Dataset | None:
    """A data set of the file itself; None if there is no data set of that name.

    Raises:
        ValueError: it lies in another file, or would take more memory in parts than is plausible.
    """
    found = _follow(file, name, _MOST_LINKS)
    if not isinstance(found, h5py.Dataset):
        return None
    settings = found.id.get_create_plist()
    if settings.get_external_count():
        where = settings.get_external(0)[0].decode(errors="replace")
        raise ElsewhereError(f"{name!r} is stored in another file ({where!r:.200}), which is not read")
    if settings.get_layout() == h5py.h5d.VIRTUAL:
        raise ElsewhereError(f"{name!r} is put together of other files (a virtual data set), which are not read")
    if found.chunks:  # unpacked whole, whatever is asked of it
        chunk = math.prod(found.chunks) * found.dtype.itemsize
        limits.plausible(f"a chunk of {name!r}", chunk, found.id.get_storage_size())
        limits.room(f"a chunk of {name!r}", chunk)
    return found


def whole(found: h5py.Dataset, advice: str = "") -> np.ndarray:
    """All of a data set, once what it declares has been compared with what is there, and with the memory.

    Raises:
        ValueError: it declares more than that.
    """
    wanted = math.prod(found.shape) * found.dtype.itemsize
    limits.plausible(repr(found.name), wanted, found.id.get_storage_size(), advice)
    limits.room(repr(found.name), wanted, advice)
    return found[()]


def _follow(group: Any, name: str, links: int) -> Any:
    """The object of a path in the file, by links within the file; None if there is none."""
    if name.startswith("/"):
        group = group.file
    for part in filter(None, name.split("/")):
        if not isinstance(group, h5py.Group):
            return None
        link = group.get(part, getlink=True)
        if link is None:
            return None
        if isinstance(link, h5py.ExternalLink):
            raise ElsewhereError(f"{part!r} is a link into another file ({link.filename!r:.200}), which is not read")
        if isinstance(link, h5py.SoftLink):
            if not links:
                raise ElsewhereError(f"{part!r} is behind more than {_MOST_LINKS} links")
            group = _follow(group, link.path, links - 1)
        else:
            group = group.get(part)
    return group
