# SPDX-License-Identifier: Apache-2.0
"""Slices or volumes with several raters' masks in one HDF5 file, read lazily or at once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch.utils.data import Dataset

from berdiff_fast.data import facts
from berdiff_fast.data.chunking import warn_of_chunks
from berdiff_fast.data.facts import PROVENANCE as PROVENANCE
from berdiff_fast.io import contained
from berdiff_fast.preprocessing import Preprocessing, Statistics

#: Layouts whose ``patient_id`` tells cases apart, not patients (``data.importers.layouts``).
_CASES = ("cimd",)

#: How many slices of two files are compared at most where patients cannot be.
_COMPARED = 8192, 1024


class RaterDataset(Dataset):
    """Images and the masks that R raters drew on each.

    The file holds ``image``, (N, H, W) or (N, C, H, W) of any real dtype, ``mask``, (N, R, H, W) or (N, R, K, H, W) of
    0 and 1, and may hold ``patient_id``, ``nodule`` and ``slice``, (N,) each; ``rater_valid`` (N, R), which says who
    read a slice; ``ignore`` (N, H, W), pixels that do not count; ``statistics`` (N, C, 4), of the volume of each slice
    its minimum, maximum, and the mean and standard deviation of what is not 0 (docs/data.md). Of volumes H, W is D, H,
    W everywhere.

    Args:
        path: the HDF5 file.
        in_memory: read all of it now. Else slices are read when asked for; every worker process opens the file anew,
            and a warning says so where its chunks make that slow.
        spatial_dims: 2 for slices, 3 for volumes; by default as the file says (its attribute ``spatial_dims``), or its
            shapes: (N, x, H, W) with (N, R, x, H, W) are slices of x channels and x regions.

    Attributes:
        raters, mask_channels, img_channels: R, K and C.
        spatial_dims: 2 or 3.
        image_size: (H, W), or (D, H, W).
        provenance: what the file has of ``PROVENANCE``.
        names_patients: whether the file says which slices are of one patient.
        rater_valid: (N, R) bool: who read which slice. At least one rater reads each.
        statistics: (N, C, 4) float64, or None.
        channels, regions: names of the image's channels, and what the mask's channels stand for; None where the file
            does not say.
        foreground: whether slices were cut around what is not 0.
        pixel_spacing: (row, column) in mm of all slices, or (slice, row, column) of all volumes, or None.
        context_slices: how many neighbours of a slice, on either side, are channels beside it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not HDF5, truncated, empty, datasets that are missing or do not fit each other; masks that are not
            0 and 1 or images that are not finite: of the whole file if ``in_memory``, else when such a slice is read.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, in_memory: bool = False, spatial_dims: int | None = None
    ) -> None:
        if spatial_dims not in (None, 2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims!r}")
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"path: there is no file {str(self.path)!r}")
        self._file: h5py.File | None = None
        self._owner = -1
        self._sets: Any = None  # image and mask of that file
        self._ignore: np.ndarray | None = None
        with self._open() as file, contained.reading(self.path):
            image, mask, shapes = facts.datasets(self.path, file, spatial_dims)
            self._length = shapes.length
            self.image_size = shapes.size
            self.spatial_dims: int = len(shapes.size)
            self.raters, self.mask_channels, self.img_channels = (
                shapes.raters,
                shapes.mask_channels,
                shapes.img_channels,
            )
            self.provenance = facts.provenance(self.path, file, self._length)
            self.rater_valid = facts.rater_valid(self.path, file, (self._length, self.raters))
            self.ignores = contained.dataset(file, "ignore") is not None
            self.statistics = facts.statistics(self.path, file, self._length, self.img_channels)
            self.channels, self.regions = facts.names(self.path, file, shapes)
            self.foreground = bool(file.attrs.get("foreground", False))
            self.pixel_spacing = facts.pixel_spacing(self.path, file, self.spatial_dims)
            self.context_slices = facts.context_slices(self.path, file, shapes)
            self.names_patients = "patient_id" in self.provenance and file.attrs.get("source") not in _CASES
            self._memory: tuple[np.ndarray, np.ndarray] | None = None
            if in_memory:
                self._memory = self._read_all(image, mask)
            else:
                warn_of_chunks(self.path, image, mask)

    def _open(self) -> h5py.File:
        try:
            return h5py.File(self.path, "r")
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise ValueError(f"{self.path} cannot be read as HDF5 (truncated or damaged?): {error}") from error

    def _datasets(self, file: h5py.File) -> tuple[h5py.Dataset, h5py.Dataset]:
        return facts.datasets(self.path, file, self.spatial_dims)[:2]

    def statistics_for(self, preprocessing: Preprocessing, indices: Sequence[int] | np.ndarray) -> Statistics | None:
        """What the images of some slices are scaled by: two (B, C, 1, 1); None where the images tell that themselves.

        Raises:
            ValueError: slices are to be scaled by their volumes, and the file does not tell of those.
        """
        if not preprocessing.by_volume:
            return None
        if self.statistics is None:
            raise ValueError(f"{self.path} has no statistics, and the model scales slices by those of their volumes")
        which = slice(0, 2) if preprocessing.mode == "min-max" else slice(2, 4)
        first, second = torch.from_numpy(self.statistics[np.asarray(indices)][..., which]).unbind(-1)
        return first[..., None, None], second[..., None, None]

    def ignored(self, indices: Sequence[int] | np.ndarray) -> np.ndarray | None:
        """Pixels of some slices that do not count, bool (B, 1, H, W); None where the file says nothing of such."""
        if not self.ignores:
            return None
        if self._ignore is None:
            shape = (self._length, *self.image_size)
            with self._open() as file, contained.reading(self.path, "ignore"):
                found = contained.dataset(file, "ignore")
                if found is None or found.shape != shape or found.dtype.kind not in "bui":
                    raise ValueError(f"{self.path}: ignore must be (N, H, W) = {shape} of 0 and 1")
                self._ignore = contained.whole(found) != 0
        return self._ignore[np.asarray(indices)][:, None]

    def _check(self, images: np.ndarray, masks: np.ndarray, first: int) -> None:
        if masks.dtype != bool:
            bad = np.flatnonzero(((masks != 0) & (masks != 1)).reshape(len(masks), -1).any(1))
            if len(bad):
                values = np.unique(masks[bad[0]])[:5].tolist()
                raise ValueError(f"{self.path}: mask of slice {first + bad[0]} must be 0 and 1, got values {values}")
        if images.dtype.kind == "f":
            bad = np.flatnonzero(~np.isfinite(images).reshape(len(images), -1).all(1))
            if len(bad):
                raise ValueError(f"{self.path}: image of slice {first + bad[0]} has NaN or infinite values")

    def _read_all(self, image: h5py.Dataset, mask: h5py.Dataset) -> tuple[np.ndarray, np.ndarray]:
        advice = "in_memory=False (--no-in-memory) reads slice by slice"
        with contained.reading(self.path, "image"):
            images = contained.whole(image, advice)
        with contained.reading(self.path, "mask"):
            masks = contained.whole(mask, advice)
        # In pieces: a comparison of the whole would need as much memory again.
        for i in range(0, self._length, 1024):
            self._check(images[i : i + 1024], masks[i : i + 1024], i)
        return images, masks.astype(bool, copy=False)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Image (C, H, W) in the file's dtype, masks (R, K, H, W) bool."""
        return self._read(index, slice(None))

    def one_rater(self, index: int, rater: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Image (C, H, W) and the mask (K, H, W) of one rater, the others of whom are not read."""
        if not 0 <= rater < self.raters:
            raise IndexError(f"rater must be in [0, {self.raters}), got {rater}")
        image, masks = self._read(index, slice(rater, rater + 1))
        return image, masks[0]

    def _read(self, index: int, raters: slice) -> tuple[torch.Tensor, torch.Tensor]:
        if not -self._length <= index < self._length:
            raise IndexError(f"index must be in [0, {self._length}), got {index}")
        index = int(index) % self._length
        if self._memory is not None:
            image, mask = self._memory[0][index], self._memory[1][index, raters]
        else:
            # An HDF5 handle must not be shared with a forked worker.
            if self._file is None or self._owner != os.getpid():
                file = self._open()
                with contained.reading(self.path):
                    self._sets = self._datasets(file)
                self._file, self._owner = file, os.getpid()
            of_images, of_masks = self._sets
            with contained.reading(self.path, f"slice {index}"):
                image, mask = of_images[index], of_masks[index, raters]
            self._check(image[None], mask[None], index)
        native = np.ascontiguousarray(image, dtype=image.dtype.newbyteorder("="))
        return (
            torch.from_numpy(native.copy()).reshape(self.img_channels, *self.image_size),
            torch.from_numpy(mask.astype(bool)).reshape(-1, self.mask_channels, *self.image_size),
        )

    def rows(
        self, indices: Sequence[int] | np.ndarray, raters: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images (B, C, H, W) in the file's dtype and masks (B, R, K, H, W) bool of some slices.

        Args:
            indices: B of them, in [0, N).
            raters: (B,), the one rater of each slice whose mask is wanted: masks are (B, 1, K, H, W) then.
        """
        if self._memory is None:
            if raters is None:
                read = [self[int(i)] for i in indices]
            else:
                one = [self.one_rater(int(i), int(r)) for i, r in zip(indices, raters, strict=True)]
                read = [(image, mask[None]) for image, mask in one]
            return np.stack([image.numpy() for image, _ in read]), np.stack([mask.numpy() for _, mask in read])
        images, masks = self._memory
        masks = masks[indices] if raters is None else masks[indices, raters][:, None]
        return self._shaped(images[indices], masks)

    def whole(self) -> tuple[np.ndarray, np.ndarray]:
        """All images (N, C, H, W) and masks (N, R, K, H, W) bool; without a copy if the file is in memory."""
        if self._memory is None:
            with self._open() as file, contained.reading(self.path):
                return self._shaped(*self._read_all(*self._datasets(file)))
        return self._shaped(*self._memory)

    @property
    def in_memory(self) -> bool:
        """Whether the file was read at once."""
        return self._memory is not None

    def _shaped(self, images: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        native = np.ascontiguousarray(images, dtype=images.dtype.newbyteorder("="))
        return (
            native.reshape(len(images), self.img_channels, *self.image_size),
            masks.reshape(len(masks), -1, self.mask_channels, *self.image_size),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_sets": None}

    def batch(self, indices: range | list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, C, H, W) and masks (B, R, K, H, W) of some slices."""
        images, masks = self.rows(indices)
        return torch.from_numpy(images), torch.from_numpy(masks)

    def images(self, indices: list[int]) -> np.ndarray:
        """Images of some slices, of ascending indices, as they are in the file; no masks are read."""
        first, last = indices[0], indices[-1]
        chosen: Any = slice(first, last + 1) if last - first + 1 == len(indices) else indices
        if self._memory is not None:
            return self._memory[0][chosen]
        with self._open() as file, contained.reading(self.path, "image"):
            return self._datasets(file)[0][chosen]

    def describe(self, index: int) -> dict[str, int]:
        """Where a slice comes from: its index and what of patient_id, nodule and slice the file tells."""
        return {"index": index} | {name: int(values[index]) for name, values in self.provenance.items()}


def check_disjoint(first: RaterDataset, second: RaterDataset) -> None:
    """Raise ValueError if a patient is in both; where the files do not name patients, if a slice is.

    Slices are one where their images are. Blank ones do not count, and of large files a part is compared, evenly
    spread: a copy is found whatever its size, a few shared slices among many thousands need not be.
    """
    if "patient_id" in first.provenance and "patient_id" in second.provenance:
        shared = np.intersect1d(first.provenance["patient_id"], second.provenance["patient_id"])
        if len(shared):
            raise ValueError(
                f"{len(shared)} patients are in both {first.path} and {second.path}, the first is {shared[0]}; "
                "split by patient"
            )
    if first.path.samefile(second.path):
        raise ValueError(f"{first.path} and {second.path} are one file; train and validate on different patients")
    if first.names_patients and second.names_patients:
        return
    known = {digest: index for index, digest in _digests(first, _COMPARED[0])}
    same = [(known[digest], index) for index, digest in _digests(second, _COMPARED[1]) if digest in known]
    if same:
        raise ValueError(
            f"{len(same)} slices are in both {first.path} and {second.path}, the first are slices {same[0][0]} and "
            f"{same[0][1]}; split by patient"
        )


def _digests(data: RaterDataset, at_most: int) -> list[tuple[int, bytes]]:
    """Index and digest of images that are not of one value."""
    count = min(at_most, len(data))
    indices = [k * len(data) // count for k in range(count)]
    found = []
    for start in range(0, count, 256):  # many at a time, since a chunk of the file may hold many
        some = indices[start : start + 256]
        for index, image in zip(some, data.images(some), strict=True):
            values = image.astype(np.float64)  # equal numbers, whatever type they are stored in
            if values.min() < values.max():
                found.append((index, hashlib.blake2b(np.ascontiguousarray(values).tobytes(), digest_size=16).digest()))
    return found
