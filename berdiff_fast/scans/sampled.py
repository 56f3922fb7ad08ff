# SPDX-License-Identifier: Apache-2.0
"""n masks of a volume, as bits: looked at slice by slice, so that memory follows what was drawn."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from berdiff_fast.imaging.summary import disagreement
from berdiff_fast.io.slices import Slices
from berdiff_fast.io.volume import Volume
from berdiff_fast.regions import Regions
from berdiff_fast.scans.tiling import Tiling

_POPCOUNT = np.array([i.bit_count() for i in range(256)], np.uint8)


@dataclass(frozen=True)
class SampledVolume:
    """n masks of a volume, on its grid.

    Attributes:
        volume: what they are of.
        n: how many masks.
        bits: uint8 (ceil(n / 8), S, H, W): mask k is bit k % 8 of the k // 8-th. It may lie in a file.
        plan: what was done, JSON-able: options, seed, slices, tiles.
        channels: the volumes that they were drawn from, ``volume`` first; none: that one alone.
    """

    volume: Volume
    n: int
    bits: np.ndarray
    plan: dict[str, Any]
    channels: tuple[Volume, ...] = ()

    def mask(self, k: int) -> np.ndarray:
        """Mask k: bool (S, H, W)."""
        return self._fill(np.zeros(self.volume.array.shape, bool), self.mask_slices(k))

    @property
    def masks(self) -> np.ndarray:
        """All of them: bool (n, S, H, W). The system gives memory to the slices that were sampled alone."""
        found = np.zeros((self.n, *self.volume.array.shape), bool)
        for k in range(self.n):
            self._fill(found[k], self.mask_slices(k))
        return found

    @property
    def mean(self) -> np.ndarray:
        """The share of masks that mark a voxel: float32 (S, H, W)."""
        return self._fill(np.zeros(self.volume.array.shape, np.float32), self.mean_slices())

    def drawn(self) -> np.ndarray:
        """All masks in the slices that were sampled and no others: bool (n, slices, h, w), along ``plan["axis"]``."""
        axis, (first, last) = self.plan["axis"], self.plan["slices"]
        shape = np.delete(self.volume.array.shape, axis)
        found = np.empty((self.n, last - first, *shape), bool)
        for i in range(first, last):
            bits = self.bits.take(i, axis + 1)
            for k in range(self.n):
                found[k, i - first] = bits[k // 8] >> (k % 8) & 1
            let_go(self.bits)
        return found

    def voxels(self) -> list[int]:
        """How many voxels each mask marks."""
        total = np.zeros(self.n, np.int64)
        axis, (first, last) = self.plan["axis"], self.plan["slices"]
        for i in range(first, last):
            bits = self.bits.take(i, axis + 1)
            total += [np.count_nonzero(bits[k // 8] >> (k % 8) & 1) for k in range(self.n)]
            let_go(self.bits)
        return total.tolist()

    def mask_slices(self, k: int) -> Slices:
        """Mask k, bool (S, H, W), slice by slice."""
        if not 0 <= k < self.n:
            raise IndexError(f"k must be from 0 to {self.n - 1}, got {k}")

        def make(s: int) -> np.ndarray:
            found = (self.bits[k // 8, s] >> (k % 8) & 1).astype(bool)
            let_go(self.bits)
            return found

        return Slices(self.volume.array.shape, np.dtype(bool), make)

    def mean_slices(self) -> Slices:
        """``mean``, slice by slice."""

        def make(s: int) -> np.ndarray:
            total = np.zeros(self.volume.array.shape[1:], np.uint32)
            for byte in self.bits[:, s]:
                total += np.bitwise_count(byte) if hasattr(np, "bitwise_count") else _POPCOUNT[byte]
            let_go(self.bits)
            return (total / self.n).astype(np.float32)

        return Slices(self.volume.array.shape, np.dtype(np.float32), make)

    def entropy_slices(self) -> Slices:
        """Where masks disagree: the entropy of their mean in bits, float32 (S, H, W), slice by slice."""
        mean = self.mean_slices()
        return Slices(mean.shape, mean.dtype, lambda s: disagreement(mean[s]).numpy())

    def _fill(self, array: np.ndarray, slices: Slices) -> np.ndarray:
        """An array of zeros with the slices that were sampled; the system gives no memory to what is not written."""
        for s in range(len(array)):
            if self._is_sampled(s):
                array[s] = slices[s]
        return array

    def _is_sampled(self, s: int) -> bool:
        """Whether anything was drawn in slice s of the array, along its first axis."""
        if self.plan.get("axis") != 0 or "slices" not in self.plan:
            return True
        first, last = self.plan["slices"]
        return first <= s < last


@dataclass(frozen=True)
class SampledRegions:
    """n masks of each region of a volume, on its grid.

    Attributes:
        volume: what they are of, the first of its channels.
        n: how many masks.
        of_region: name of a region to its masks; mask k of each belongs to mask k of the others.
        regions: what they stand for, or None where the model does not say.
        plan: what was done, JSON-able.
        channels: the volumes that they were drawn from, ``volume`` first; none: that one alone.
    """

    volume: Volume
    n: int
    of_region: dict[str, SampledVolume]
    regions: Regions | None
    plan: dict[str, Any]
    channels: tuple[Volume, ...] = ()

    def __getitem__(self, name: str) -> SampledVolume:
        return self.of_region[name]

    def joint(self) -> SampledVolume:
        """What any region marks. The system gives memory to the slices that were sampled alone."""
        parts = [part.bits for part in self.of_region.values()]
        bits = np.zeros(parts[0].shape, np.uint8)
        axis, (first, last) = self.plan["axis"], self.plan["slices"]
        for i in range(first, last):
            here = (slice(None),) * (axis + 1) + (i,)
            for part in parts:
                bits[here] |= part[here]
            let_go(parts[0])
        return SampledVolume(self.volume, self.n, bits, self.plan, self.channels)

    def label_map_slices(self, k: int) -> Slices:
        """Mask k as labels, uint8 or uint16 (S, H, W), slice by slice.

        Raises:
            ValueError: the model does not say what its regions stand for.
        """
        if self.regions is None:
            raise ValueError("the model does not say which labels its regions have")
        regions, parts = self.regions, [one.mask_slices(k) for one in self.of_region.values()]
        dtype = np.dtype(np.uint8 if max(regions.own_labels) < 256 else np.uint16)
        return Slices(self.volume.array.shape, dtype, lambda s: regions.labels_of(np.stack([p[s] for p in parts])))


def let_go(bits: np.ndarray) -> None:
    """Give back memory that shows a file; what is in it stays, and is read again when it is looked at."""
    file = file_behind(bits)
    if file is not None and hasattr(file, "madvise"):  # not on Windows
        file.madvise(mmap.MADV_DONTNEED)


def file_behind(bits: np.ndarray) -> mmap.mmap | None:
    """The file that an array, or what it is a part of, shows."""
    found: Any = bits
    while isinstance(found, np.ndarray):
        found = found.base
    return found if isinstance(found, mmap.mmap) else None


def sampled_region(plan: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    """Where a ``SampledVolume.plan`` has masks drawn of a volume (S, H, W): bool of that shape."""
    axis, (first, last) = checked_slices(plan, shape)
    _check_tiles(plan)
    original = tuple(np.delete(shape, axis).tolist())
    tiling = Tiling(
        original,
        tuple(plan["resampled_to"]),
        tuple(plan["tile_pixels"]),
        [(row, column) for row, column in plan["tiles"]],
        tuple(plan["inside"]),
        tuple(plan.get("tile_window", plan["tile_pixels"])),
    )
    everywhere = torch.zeros(len(tiling.tiles), 1, *tiling.size, dtype=torch.bool)
    (top, left), (height, width) = tiling.margin, tiling.marked
    everywhere[..., top : top + height, left : left + width] = True
    region = np.zeros(shape, bool)
    np.moveaxis(region, axis, 0)[first:last] = tiling.join(everywhere)[0].numpy()
    return region


def checked_slices(plan: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[int, tuple[int, int]]:
    """The axis and the (first, last + 1) slices of a plan, which may come from a file.

    Raises:
        ValueError: a volume of that shape does not have them.
    """
    axis, (first, last) = plan["axis"], plan["slices"]
    if type(axis) is not int or not 0 <= axis <= 2:
        raise ValueError(f"axis must be 0, 1 or 2, got {axis!r:.40}")
    if not (type(first) is int and type(last) is int and 0 <= first < last <= shape[axis]):
        raise ValueError(
            f"slices must be some of the {shape[axis]} along axis {axis}, got {first!r:.40} to {last!r:.40}"
        )
    return axis, (first, last)


#: More pixels than a slice, or all tiles of it, may have in a plan.
_MOST_SIDE, _MOST_PIXELS = 2**15, 2**28


def _check_tiles(plan: Mapping[str, Any]) -> None:
    """Raise a ValueError for tiles that no slice has, before memory is taken for them."""
    for name in ("resampled_to", "tile_pixels", "inside", "tile_window", "tiles"):
        for side in np.array(plan.get(name, []), dtype=object).flatten():
            if type(side) is not int or abs(side) > _MOST_SIDE:
                raise ValueError(f"{name} must be whole numbers of at most {_MOST_SIDE}, got {side!r:.40}")
    height, width = plan["tile_pixels"]
    if height * width * len(plan["tiles"]) > _MOST_PIXELS:
        raise ValueError(f"{len(plan['tiles'])} tiles of {height} x {width} are more than a slice can be cut into")
