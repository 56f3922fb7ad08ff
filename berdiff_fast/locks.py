# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a folder: a lock of the operating system's, which is gone with the process that held it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from berdiff_fast.files import open_own

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("berdiff_fast")

#: The name of the file in a folder whose lock is the folder's.
NAME = ".lock"

#: What this process holds: the file to its descriptor, the thread that holds it, and how many times.
_held: dict[tuple[int, int], tuple[int, int, int]] = {}
_guard = threading.Lock()


def _forget() -> None:
    """In a forked child: it holds nothing, and must not keep what its parent holds from ending with that."""
    global _guard
    _guard = threading.Lock()
    for descriptor, _, _ in _held.values():
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_forget)


class BusyError(RuntimeError):
    """Another run is at work in the folder."""


@contextmanager
def exclusive(folder: Path, file: Path | None = None) -> Iterator[None]:
    """Nobody else works in a folder while the block runs; the thread that holds it may ask again.

    The lock is on a file, ``.lock`` in the folder, which is removed at the end. If the process is killed it stays, and
    nobody holds it: the next run takes it over. It is a lock by ``flock``, and holds across machines where the file
    system does that (NFS does). Processes that were forked do not share it.

    Args:
        folder: there already.
        file: another file for the lock, where the folder itself is replaced.

    Raises:
        BusyError: who holds it, since when.
        OSError: the file cannot be made, or is no file of its own.
    """
    path = folder / NAME if file is None else file
    if fcntl is None:
        yield
        return
    key = _acquire(folder, path)
    try:
        yield
    finally:
        with _guard:
            if key in _held:  # not in a process that was forked meanwhile
                descriptor, thread, count = _held.pop(key)
                if count > 1:
                    _held[key] = (descriptor, thread, count - 1)
                else:
                    # While it is held: who opens the name from now on makes a new file, and who has the old one open
                    # finds that the name is no longer its own.
                    if key == _key(path):
                        with contextlib.suppress(OSError):
                            path.unlink()
                    os.close(descriptor)


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder, with its parents, and lock it; those that are empty in the end are gone again.

    Raises:
        BusyError, OSError: as ``exclusive``.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive(folder):
            yield
    finally:
        for path in new:
            with contextlib.suppress(OSError):
                path.rmdir()


def _acquire(folder: Path, path: Path) -> tuple[int, int]:
    while True:
        with _guard:
            key = _key(path)
            if key in _held:
                descriptor, thread, count = _held[key]
                if thread != threading.get_ident():
                    raise BusyError(_words(folder, "another thread of this process"))
                _held[key] = (descriptor, thread, count + 1)
                return key
            descriptor = open_own(path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(descriptor)
                os.close(descriptor)
                raise BusyError(_words(folder, holder)) from None
            except OSError as error:  # a file system without locks
                logger.warning("%s cannot be locked (%s): take care that no other run works there", folder, error)
            found = os.fstat(descriptor)
            key = (found.st_dev, found.st_ino)
            if key != _key(path):  # removed by the run before, which has just ended
                os.close(descriptor)
                continue
            about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
            with contextlib.suppress(OSError):  # a full disk: it is locked all the same
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(about).encode(), 0)
            _held[key] = (descriptor, threading.get_ident(), 1)
            return key


def _key(path: Path) -> tuple[int, int]:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return (-1, -1)
    return (found.st_dev, found.st_ino)


def _holder(descriptor: int) -> str:
    try:
        about = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {int(about['pid'])} on {str(about['host'])[:80]}, since {str(about['since'])[:30]}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "a process that has not said who it is"


def _words(folder: Path, holder: str) -> str:
    return f"another run is at work in {folder} ({holder}); wait for it, end it, or choose another folder"
