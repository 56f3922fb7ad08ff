# SPDX-License-Identifier: Apache-2.0
"""HDF5 files of slices, written one slice at a time, and folders written whole or not at all."""

from __future__ import annotations

import io
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from berdiff_fast import locks
from berdiff_fast.data.importers.trees import Slice
from berdiff_fast.files import keep_mode, sync


@dataclass(frozen=True)
class SplitReport:
    """What is in one of the files.

    Attributes:
        patients, slices: how many.
        empty_masks: for each rater, the slices that the rater read and marked nothing in; (R,).
        missing_masks: for each rater, those of them that had no file; (R,). Where such are absent, the rater did not
            read these slices, and they are not among the empty ones.
    """

    patients: int
    slices: int
    empty_masks: tuple[int, ...]
    missing_masks: tuple[int, ...]


class Writer:
    """One HDF5 file in the layout of docs/data.md: room for ``count`` slices, cut to those that came.

    Args:
        path: the file, which is replaced.
        count: the most slices.
        image_shape: (H, W) or (C, H, W).
        mask_shape: (R, H, W) or (R, K, H, W).
        attributes: what the file says of itself.
        dtype: of the images.
        statistics: whether slices come with those of their volumes.

    Every method raises the OSError of the disk. Call ``close`` whatever happens.
    """

    def __init__(
        self,
        path: Path,
        count: int,
        image_shape: tuple[int, ...],
        mask_shape: tuple[int, ...],
        attributes: dict[str, Any],
        dtype: Any = np.uint8,
        statistics: bool = False,
    ) -> None:
        import h5py

        self.raters = raters = mask_shape[0]
        self.rows: list[tuple[int, int, int, str, str]] = []
        self.empty = np.zeros(raters, np.int64)
        self.missing = np.zeros(raters, np.int64)
        self.valid: list[np.ndarray] = []
        self._disk = _Disk(path, "w+")
        with self._writing():
            self._file = h5py.File(self._disk, "w")
            self._file.attrs.update(attributes)
            self._image = self._pixels("image", count, image_shape, dtype)
            self._mask = self._pixels("mask", count, mask_shape, np.uint8)
        self._statistics: list[np.ndarray] | None = [] if statistics else None

    def append(
        self,
        image: np.ndarray,
        masks: np.ndarray,
        patient_id: int,
        nodule: int,
        one: Slice,
        valid: np.ndarray | None = None,
        statistics: np.ndarray | None = None,
    ) -> None:
        """Write a slice: image ([C,] H, W), masks (R, [K,] H, W), who read it, (R,) bool, everybody by default, and the
        statistics (C, 4) of its volume."""
        valid = np.ones(self.raters, bool) if valid is None else valid
        with self._writing():
            self._image[len(self.rows)] = image
            self._mask[len(self.rows)] = masks
        self.rows.append((patient_id, nodule, one.number, one.patient, one.image))
        self.valid.append(valid)
        self.empty += ~masks.reshape(self.raters, -1).any(axis=1) & valid
        if self._statistics is not None:
            assert statistics is not None
            self._statistics.append(statistics)
        self.missing += [rater not in one.masks for rater in range(self.raters)]

    def tell(self, name: str, value: Any) -> None:
        """What the file says of itself, known only now."""
        with self._writing():
            self._file.attrs[name] = value

    def finish(self) -> SplitReport:
        """Write what there is of each slice besides pixels, and close the file."""
        import h5py

        columns = list(zip(*self.rows, strict=True))
        with self._writing():
            for dataset in (self._image, self._mask):
                dataset.resize(len(self.rows), axis=0)
            for name, column in zip(("patient_id", "nodule", "slice"), columns[:3], strict=True):
                self._file.create_dataset(name, data=np.array(column, np.int32))
            self._file.create_dataset("rater_valid", data=np.stack(self.valid).astype(np.uint8))
            if self._statistics is not None:
                self._file.create_dataset("statistics", data=np.stack(self._statistics))
            for name, column in zip(("patient", "path"), columns[3:], strict=True):
                self._file.create_dataset(name, data=list(column), dtype=h5py.string_dtype())
            self._file.close()
        return SplitReport(
            patients=len(set(columns[0])),
            slices=len(self.rows),
            empty_masks=tuple(self.empty.tolist()),
            missing_masks=tuple(self.missing.tolist()),
        )

    def close(self) -> None:
        """Give up, if the file is not finished; nobody will read it."""
        with _undisturbed():
            if self._file:
                self._disk.error = self._disk.error or OSError("given up")
                self._file.close()
            self._disk.close()

    def _pixels(self, name: str, count: int, shape: tuple[int, ...], dtype: Any) -> Any:
        # A chunk per slice: a reader of single slices in any order decompresses nothing in vain.
        full, chunk = (count, *shape), (1, *shape)
        return self._file.create_dataset(name, full, dtype, maxshape=full, chunks=chunk, compression="gzip")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with _undisturbed():
            yield
        if self._disk.error:
            raise self._disk.error


@contextmanager
def whole(output: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which becomes ``output`` if all goes well and vanishes if not.

    What it replaces leaves it its permissions. Nobody else replaces ``output`` at the same time.

    Raises:
        BusyError: another run is about to.
    """
    output = output.resolve()  # the folder behind a link is replaced, not the link
    made = [path for path in output.parents if not path.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.callback(_remove_empty, made)
        stack.enter_context(locks.exclusive(output, output.parent / f".{output.name}.lock"))
        temporary = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        new = temporary / "new"
        new.mkdir()  # with the permissions that people expect; mkdtemp's is private
        yield new
        for path in new.iterdir():
            keep_mode(path, output / path.name)
        if output.is_dir():
            new.chmod(output.stat().st_mode & 0o777)
        for path in [*new.iterdir(), new]:
            sync(path)
        old = temporary / "old"
        try:
            if output.exists() and overwrite:
                os.rename(output, old)
            elif output.exists():
                output.rmdir()  # fails if another import was faster
            os.rename(new, output)
        except BaseException:
            if old.exists() and not output.exists():
                os.rename(old, output)
            raise
        sync(output.parent)


def _remove_empty(folders: list[Path]) -> None:
    for path in folders:
        with suppress(OSError):  # there is something in it
            path.rmdir()


class _Disk(io.FileIO):
    """A file whose writing never fails as HDF5 sees it; the first error is kept for those who ask.

    HDF5 cannot close a file that it could not write, for want of space say, and crashes on reading back what is not
    there. So what no longer reaches the disk stays in memory, where it is found again: not much, since a writer asks
    for the error after every step. (HDF5 reads by ``readinto``.)
    """

    error: OSError | None = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._kept: list[tuple[int, bytes]] = []  # where, what

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size, at = len(left), self.tell()
        end = at + size
        try:
            while left and self.error is None:
                left = left[super().write(left) :]
        except OSError as error:
            self.error = OSError(error.errno, error.strerror, str(self.name))
        if left:
            self._kept.append((end - len(left), bytes(left)))
            self.seek(end)
        return size

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        start = self.tell()
        found = super().readinto(view) or 0
        if self.error is None:
            return found
        view[found:] = bytes(len(view) - found)
        for at, data in self._kept:
            low, high = max(at, start), min(at + len(data), start + len(view))
            if low < high:
                view[low - start : high - start] = data[low - at : high - at]
        self.seek(start + len(view))
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            return self.tell() if self.error else super().truncate(size)
        except OSError as error:
            self.error = error
            return self.tell()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: HDF5 calls ``_Disk``, where an exception would be a failed write."""
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():  # it is not ours to handle
        yield
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        signal.raise_signal(signal.SIGINT)
