# SPDX-License-Identifier: Apache-2.0
"""How HDF5 files are cut into chunks: what reading a slice unpacks, and a warning where that is much.

HDF5 unpacks a compressed chunk whole, whatever is asked of it, and keeps only a few MB of what it has unpacked.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

logger = logging.getLogger("berdiff_fast")

#: From how many slices unpacked for one on a warning is due: 4.5 times as slow (benchmarks/chunking.py).
_MANY = 8

_warned: set[tuple[str, int]] = set()


def slices_unpacked(dataset: Any) -> float:
    """How many slices' worth of pixels are unpacked where one is read; 1 for what is not compressed."""
    if not dataset.chunks or not dataset.id.get_create_plist().get_nfilters():
        return 1.0
    touched = math.prod(-(-size // chunk) for size, chunk in zip(dataset.shape[1:], dataset.chunks[1:], strict=True))
    return touched * math.prod(dataset.chunks) / math.prod(dataset.shape[1:])


def warn_of_chunks(path: Path, *datasets: Any) -> None:
    """Say, once of a file, that reading it slice by slice will be slow, and what helps."""
    slow = {d.name.strip("/"): many for d in datasets if (many := slices_unpacked(d)) >= _MANY}
    found = path.stat()
    if not slow or (key := (str(path.resolve()), found.st_mtime_ns)) in _warned:
        return
    _warned.add(key)
    logger.warning(
        "%s: each slice that is read unpacks %s, since a chunk holds many, which makes reading slow; "
        "berdiff_fast.data.rechunking.rechunk(path, output) writes a file with a chunk a slice, as berdiff-fast import "
        "does, and what is read at once (train --in-memory) is as fast as ever",
        path,
        " and ".join(f"{many:.0f} of {name!r}" for name, many in slow.items()),
    )
