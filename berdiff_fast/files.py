# SPDX-License-Identifier: Apache-2.0
"""Writing files so that none is ever half there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write one file at, beside its place, which becomes ``path`` if all goes well and vanishes if not.

    It has the same name in a folder of its own, for libraries that look at the ending of a name.

    Raises:
        OSError: it cannot be written; what was there before is as it was.
    """
    path = Path(path).resolve()  # the file behind a link is replaced, not the link
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        new = Path(folder) / path.name
        yield new
        # A rename may reach the disk before the data does; a crash in between would leave an empty file.
        sync(new)
        os.replace(new, path)
    sync(path.parent)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file as ``whole_file`` does."""
    with whole_file(path) as new:
        new.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """``write_bytes`` of UTF-8."""
    write_bytes(path, text.encode())


def sync(path: Path) -> None:
    """Bring a file, or where the system can the names in a folder, to the disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
