# SPDX-License-Identifier: Apache-2.0
"""Slices with several raters' masks in one HDF5 file, read lazily or at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch.utils.data import Dataset

#: Datasets beside ``image`` and ``mask`` that say where a slice comes from; each (N,) and optional.
PROVENANCE = ("patient_id", "nodule", "slice")


class RaterDataset(Dataset):
    """Images and the masks that R raters drew on each.

    The file holds ``image``, (N, H, W) or (N, C, H, W) of any real dtype, ``mask``, (N, R, H, W) or (N, R, K, H, W) of
    0 and 1, and may hold ``patient_id``, ``nodule`` and ``slice``, (N,) each (docs/data.md).

    Args:
        path: the HDF5 file.
        in_memory: read all of it now. Else slices are read when asked for; every worker process opens the file anew.

    Attributes:
        raters, mask_channels, img_channels: R, K and C.
        image_size: (H, W).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not HDF5, truncated, empty, datasets that are missing or do not fit each other; masks that are not
            0 and 1 or images that are not finite: of the whole file if ``in_memory``, else when such a slice is read.
    """

    def __init__(self, path: str | os.PathLike[str], *, in_memory: bool = False) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"path: there is no file {str(self.path)!r}")
        self._file: h5py.File | None = None
        self._owner = -1
        with self._open() as file:
            image, mask = self._datasets(file)
            self._length = len(image)
            self.image_size: tuple[int, int] = (image.shape[-2], image.shape[-1])
            self.img_channels: int = 1 if image.ndim == 3 else image.shape[1]
            self.raters: int = mask.shape[1]
            self.mask_channels: int = 1 if mask.ndim == 4 else mask.shape[2]
            self.provenance: dict[str, np.ndarray] = {}
            for name in PROVENANCE:
                if name in file:
                    if file[name].shape != (self._length,):
                        raise ValueError(
                            f"{self.path}: {name} must have shape ({self._length},), got {file[name].shape}"
                        )
                    if file[name].dtype.kind not in "iu":
                        raise ValueError(f"{self.path}: {name} must hold integers, got {file[name].dtype}")
                    self.provenance[name] = file[name][()]
            self._memory: tuple[np.ndarray, np.ndarray] | None = None
            if in_memory:
                self._memory = self._read_all(image, mask)

    def _open(self) -> h5py.File:
        try:
            return h5py.File(self.path, "r")
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read as HDF5 (truncated or damaged?): {error}") from error

    def _datasets(self, file: h5py.File) -> tuple[h5py.Dataset, h5py.Dataset]:
        for name in ("image", "mask"):
            if not isinstance(file.get(name), h5py.Dataset):
                raise ValueError(f"{self.path} has no dataset {name!r}; it has {sorted(file)}")
        image, mask = file["image"], file["mask"]
        if image.ndim not in (3, 4) or image.dtype.kind not in "uif":
            raise ValueError(
                f"{self.path}: image must be (N, H, W) or (N, C, H, W) real numbers, got {image.dtype} {image.shape}"
            )
        if mask.ndim not in (4, 5) or mask.dtype.kind not in "buif":
            raise ValueError(
                f"{self.path}: mask must be (N, R, H, W) or (N, R, K, H, W) of 0 and 1, got {mask.dtype} {mask.shape}"
            )
        if mask.shape[0] != image.shape[0] or mask.shape[-2:] != image.shape[-2:]:
            raise ValueError(f"{self.path}: mask {mask.shape} does not fit image {image.shape}")
        if 0 in image.shape or 0 in mask.shape:
            raise ValueError(f"{self.path} is empty: image {image.shape}, mask {mask.shape}")
        return image, mask

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
        images, masks = image[()], mask[()]
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
                self._file, self._owner = self._open(), os.getpid()
            image, mask = self._file["image"][index], self._file["mask"][index, raters]
            self._check(image[None], mask[None], index)
        height, width = self.image_size
        native = np.ascontiguousarray(image, dtype=image.dtype.newbyteorder("="))
        return (
            torch.from_numpy(native.copy()).reshape(self.img_channels, height, width),
            torch.from_numpy(mask.astype(bool)).reshape(-1, self.mask_channels, height, width),
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
            with self._open() as file:
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
        return {**self.__dict__, "_file": None}

    def batch(self, indices: range | list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, C, H, W) and masks (B, R, K, H, W) of some slices."""
        images, masks = self.rows(indices)
        return torch.from_numpy(images), torch.from_numpy(masks)

    def describe(self, index: int) -> dict[str, int]:
        """Where a slice comes from: its index and what of patient_id, nodule and slice the file tells."""
        return {"index": index} | {name: int(values[index]) for name, values in self.provenance.items()}


def check_disjoint(first: RaterDataset, second: RaterDataset) -> None:
    """Raise ValueError if a patient is in both, where the files name patients."""
    if "patient_id" in first.provenance and "patient_id" in second.provenance:
        shared = np.intersect1d(first.provenance["patient_id"], second.provenance["patient_id"])
        if len(shared):
            raise ValueError(
                f"{len(shared)} patients are in both {first.path} and {second.path}, the first is {shared[0]}; "
                "split by patient"
            )
