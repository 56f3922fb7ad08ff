# SPDX-License-Identifier: Apache-2.0
"""Writing files so that none is ever half there, none is more open than it was, and no planted link is followed."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)


@contextmanager
def whole_file(path: str | os.PathLike[str], *, follow: bool = True) -> Iterator[Path]:
    """A path to write one file at, beside its place, which becomes ``path`` if all goes well and vanishes if not.

    It has the same name in a folder of its own, for libraries that look at the ending of a name. A file that is
    replaced leaves its permissions to the new one: what was private stays so.

    Args:
        path: the file.
        follow: where ``path`` is a symbolic link, replace the file behind it, not the link: right for a name that the
            user gave. Names that we make up inside a folder want False: who may write there could have put a link to
            any file of the user's in its place.

    Raises:
        OSError: it cannot be written; what was there before is as it was.
    """
    path = Path(path).resolve() if follow else Path(path).absolute()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        new = Path(folder) / path.name
        yield new
        keep_mode(new, path)
        # A rename may reach the disk before the data does; a crash in between would leave an empty file.
        sync(new)
        os.replace(new, path)
    sync(path.parent)


def write_bytes(path: str | os.PathLike[str], data: bytes, *, follow: bool = True) -> None:
    """Write a file as ``whole_file`` does."""
    with whole_file(path, follow=follow) as new:
        new.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str, *, follow: bool = True) -> None:
    """``write_bytes`` of UTF-8."""
    write_bytes(path, text.encode(), follow=follow)


def append_text(path: Path, text: str) -> None:
    """Add to a file of ours, which is made if it is not there; never through a link.

    Raises:
        OSError: it cannot be written, or is no file of its own.
    """
    descriptor = open_own(path, os.O_WRONLY | os.O_APPEND)
    with os.fdopen(descriptor, "a", encoding="utf-8") as file:
        file.write(text)


def open_own(path: Path, flags: int) -> int:
    """A descriptor of a file of ours, made if it is not there: a regular file with one name, and not behind a link.

    Raises:
        FileExistsError: it is a link, has another name elsewhere (a hard link), or is no file; nothing was changed.
        OSError: it cannot be opened.
    """
    # Without blocking: a pipe that somebody put there would wait for its other end.
    flags |= os.O_CREAT | _NO_FOLLOW | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    refuse_link(path)
    descriptor = os.open(path, flags, 0o666)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise FileExistsError(f"{path} is no file of its own (a hard link, a pipe?), and is not written to; remove it")
    return descriptor


def refuse_link(path: Path) -> None:
    """Raise FileExistsError where a symbolic link stands in the place of something of ours."""
    if path.is_symlink():
        raise FileExistsError(f"{path} is a symbolic link, and nothing is written through it; remove it")


def remove_link(path: Path) -> None:
    """Remove a symbolic link that stands in the place of a file of ours; the file behind it stays as it is."""
    if path.is_symlink():
        path.unlink()


def own_folder(path: Path, mode: int = 0o777) -> Path:
    """Make a folder of ours inside a folder of results, if it is not there.

    Raises:
        FileExistsError: a symbolic link, or a file, has its name.
        OSError: it cannot be made.
    """
    refuse_link(path)
    path.mkdir(mode=mode, parents=True, exist_ok=True)
    refuse_link(path)
    return path


def keep_mode(new: Path, old: Path) -> None:
    """Give ``new`` the permissions of the file ``old``, whose place it is to take; nothing if there is none."""
    with suppress(FileNotFoundError):
        found = os.lstat(old).st_mode
        if stat.S_ISREG(found):
            os.chmod(new, stat.S_IMODE(found) & 0o777)


def sync(path: Path) -> None:
    """Bring a file, or where the system can the names in a folder, to the disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
