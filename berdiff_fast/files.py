# SPDX-License-Identifier: Apache-2.0
"""Writing files so that none is ever half there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file beside its place, make it last, and rename it.

    Raises:
        OSError: it cannot be written; what was there before is as it was.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            # A rename may reach the disk before the data does; a crash in between would leave an empty file.
            os.fsync(file.fileno())
        # mkstemp is private to its user; a result is an ordinary file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """``write_bytes`` of UTF-8."""
    write_bytes(path, text.encode())
