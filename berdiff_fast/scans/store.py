# SPDX-License-Identifier: Apache-2.0
"""Masks of the slices that are done, in memory or in a folder that survives an interruption, each with its checksum."""

from __future__ import annotations

import logging
import math
import os
import re
from pathlib import Path

import numpy as np

from berdiff_fast import digests
from berdiff_fast.files import append_text, open_own, write_text
from berdiff_fast.scans.sampled import let_go

logger = logging.getLogger("berdiff_fast")

#: A line of ``done``: a slice, and the checksum of its bits.
_ENTRY = re.compile(rb"(\d{1,9}) ([0-9a-f]{24})")


class Store:
    """The bits of n masks of a volume, slice by slice, in a folder.

    The folder holds ``plan.json``, what is drawn; ``bits.npy``; and ``done``, a line for each slice whose bits are on
    the disk. Whatever is not as it was left, a file of another size, shape or kind, a line that is damaged, bits that
    do not have their checksum, counts as not done, so that it is drawn again.

    Args:
        folder: there already, and locked by the caller.
        identity: text that says all that the bits depend on; a folder of another identity starts anew.
        shape: of the bits, (ceil(n / 8), S, H, W), uint8.
        axis: of the volume, along which its slices are stacked: 0, 1 or 2.

    Attributes:
        bits: all of them, zero where nothing is done.
        done: slices whose bits are there.

    Raises:
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, identity: str, shape: tuple[int, ...], axis: int) -> None:
        self.axis = axis
        self.done: set[int] = set()
        self._log: Path | None = folder / "done"
        file, what = folder / "bits.npy", folder / "plan.json"
        if not (_is(what, identity) and _is_array(file, shape)):
            # New files, never the old ones written over: others may still look at those, or be behind a link.
            for path in (self._log, what, file):
                path.unlink(missing_ok=True)
            os.close(open_own(file, os.O_RDWR))
            np.lib.format.open_memmap(file, "w+", np.uint8, shape).flush()
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here; later, it would end the process
                with file.open("r+b") as opened:
                    os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
            write_text(what, identity, follow=False)
            self.bits: np.ndarray = np.lib.format.open_memmap(file, "r+")
        else:
            self.bits = np.lib.format.open_memmap(file, "r+")
            self._read_log(self._log)

    @classmethod
    def in_memory(cls, shape: tuple[int, ...], axis: int) -> Store:
        """One that is gone with the process."""
        store = cls.__new__(cls)
        store.axis, store.done, store._log, store.bits = axis, set(), None, np.zeros(shape, np.uint8)
        return store

    def put(self, index: int, bits: np.ndarray) -> None:
        """Keep the bits (ceil(n / 8), h, w) of slice ``index``."""
        self._slice(index)[...] = bits
        if self._log is not None:
            assert isinstance(self.bits, np.memmap)
            self.bits.flush()
            append_text(self._log, self._entry(index))  # after the bits: what is listed is there
            let_go(self.bits)
        self.done.add(index)

    def _slice(self, index: int) -> np.ndarray:
        where: list[slice | int] = [slice(None)] * 4
        where[self.axis + 1] = index
        return self.bits[tuple(where)]

    def _marked(self) -> set[int]:
        """Slices in which any bit is set, found in one pass through the file."""
        found = np.zeros(self.bits.shape[self.axis + 1], bool)
        for s in range(self.bits.shape[1]):
            marked = np.asarray(self.bits[:, s].any(axis=0))  # (H, W)
            if self.axis == 0:
                found[s] = marked.any()
            else:
                found |= marked.any(axis=2 - self.axis)
            let_go(self.bits)
        return set(np.flatnonzero(found).tolist())

    def _entry(self, index: int) -> str:
        return f"{index} {digests.of_bytes(str(index).encode(), np.ascontiguousarray(self._slice(index)).data)}\n"

    def _read_log(self, log: Path) -> None:
        if log.is_symlink():
            log.unlink()
        text = log.read_bytes() if log.is_file() else b""
        whole, _, torn = text.rpartition(b"\n")  # an interruption may have cut the last line short
        damaged = 0
        for line in whole.split(b"\n") if whole else []:
            found = _ENTRY.fullmatch(line)
            index = int(found[1]) if found else -1
            good = 0 <= index < self.bits.shape[self.axis + 1] and self._entry(index).encode() == line + b"\n"
            damaged += not good
            if good:
                self.done.add(index)
            let_go(self.bits)
        for index in sorted(self._marked() - self.done):  # of a slice that was cut short, or damage
            self._slice(index)[...] = 0
            let_go(self.bits)
        if damaged:
            logger.warning("%s: %d slices are not as they were left, and are drawn again", log.parent, damaged)
        if damaged or torn:
            write_text(log, "".join(self._entry(i) for i in sorted(self.done)), follow=False)


def _is(path: Path, text: str) -> bool:
    return path.is_file() and not path.is_symlink() and path.read_bytes() == text.encode()


def _is_array(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether it is a file of its own with an array of bytes of this shape, and nothing else."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                return False
            header = np.lib.format.read_array_header_1_0(file)
            return header == (shape, False, np.dtype(np.uint8)) and path.stat().st_size == file.tell() + math.prod(
                shape
            )
    except Exception:  # the header is a Python literal: damaged, it is anything
        return False
