# SPDX-License-Identifier: Apache-2.0
"""What an HDF5 file of slices or volumes says of itself beside pixels, judged.

Every function takes the path, which begins the message of its ValueError, and the open file.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from berdiff_fast import limits
from berdiff_fast.io import contained
from berdiff_fast.regions import Regions, check_names

#: Where a slice comes from; each (N,) and optional.
PROVENANCE = ("patient_id", "nodule", "slice")


@dataclass(frozen=True)
class Shapes:
    """What ``image`` and ``mask`` are, by their shapes.

    Attributes:
        length: N.
        size: (H, W), or (D, H, W).
        img_channels, raters, mask_channels: C, R and K.
    """

    length: int
    size: tuple[int, ...]
    img_channels: int
    raters: int
    mask_channels: int


def datasets(path: Path, file: h5py.File, spatial_dims: int | None) -> tuple[h5py.Dataset, h5py.Dataset, Shapes]:
    """``image``, ``mask``, and what their shapes mean: slices unless it cannot be, the file says ``spatial_dims`` 3, or
    that is asked for.

    Raises:
        ValueError: one is missing, or they do not fit each other, or what the file says.
    """
    found: dict[str, h5py.Dataset] = {}
    for name in ("image", "mask"):
        with contained.reading(path, name):
            dataset = contained.dataset(file, name)
        if dataset is None:
            raise ValueError(f"{path} has no dataset {name!r}; it has {sorted(file)}")
        found[name] = dataset
    image, mask = found["image"], found["mask"]
    dims = _dims(path, file, image.ndim, mask.ndim, spatial_dims)
    spatial = "D, H, W" if dims == 3 else "H, W"
    if image.ndim not in (dims + 1, dims + 2) or image.dtype.kind not in "uif":
        raise ValueError(
            f"{path}: image must be (N, {spatial}) or (N, C, {spatial}) real numbers, got {image.dtype} {image.shape}"
        )
    if mask.ndim not in (dims + 2, dims + 3) or mask.dtype.kind not in "buif":
        raise ValueError(
            f"{path}: mask must be (N, R, {spatial}) or (N, R, K, {spatial}) of 0 and 1, got {mask.dtype} {mask.shape}"
        )
    if mask.shape[0] != image.shape[0] or mask.shape[-dims:] != image.shape[-dims:]:
        raise ValueError(f"{path}: mask {mask.shape} does not fit image {image.shape}")
    if 0 in image.shape or 0 in mask.shape:
        raise ValueError(f"{path} is empty: image {image.shape}, mask {mask.shape}")
    for name, data in found.items():
        one = math.prod(data.shape[1:]) * data.dtype.itemsize
        what = f"{path}: a {'volume' if dims == 3 else 'slice'} of {name!r}"
        limits.plausible(what, one, data.id.get_storage_size())
        limits.room(what, one)
    channels = 1 if image.ndim == dims + 1 else image.shape[1]
    regions = 1 if mask.ndim == dims + 2 else mask.shape[2]
    return image, mask, Shapes(len(image), image.shape[-dims:], channels, mask.shape[1], regions)


def _dims(path: Path, file: h5py.File, of_image: int, of_mask: int, wanted: int | None) -> int:
    told = file.attrs.get("spatial_dims")
    if told is not None and (np.shape(told) != () or told not in (2, 3)):
        raise ValueError(f"{path}: spatial_dims must be 2 or 3, got {told!r:.80}")
    if told is not None and wanted is not None and told != wanted:
        kinds = {2: "slices", 3: "volumes"}
        raise ValueError(f"{path}: holds {kinds[int(told)]} by its attribute spatial_dims, expected {kinds[wanted]}")
    if wanted is not None or told is not None:
        return int(told if wanted is None else wanted)
    return 3 if of_image == 5 or of_mask == 6 else 2


def provenance(path: Path, file: h5py.File, length: int) -> dict[str, np.ndarray]:
    """What the file has of ``PROVENANCE``."""
    known = {}
    for name in PROVENANCE:
        with contained.reading(path, name):
            found = contained.dataset(file, name)
            if found is None:
                continue
            if found.shape != (length,):
                raise ValueError(f"{path}: {name} must have shape ({length},), got {found.shape}")
            if found.dtype.kind not in "iu":
                raise ValueError(f"{path}: {name} must hold integers, got {found.dtype}")
            known[name] = contained.whole(found)
    return known


def rater_valid(path: Path, file: h5py.File, shape: tuple[int, int]) -> np.ndarray:
    """Who read which slice (N, R): everybody, where the file does not say."""
    with contained.reading(path, "rater_valid"):
        found = contained.dataset(file, "rater_valid")
        if found is None:
            return np.ones(shape, bool)
        if found.shape != shape or found.dtype.kind not in "bui":
            raise ValueError(
                f"{path}: rater_valid must be (N, R) = {shape} of 0 and 1, got {found.dtype} {found.shape}"
            )
        valid = contained.whole(found)
    if ((valid != 0) & (valid != 1)).any():
        raise ValueError(f"{path}: rater_valid must be 0 and 1, got {np.unique(valid)[:5].tolist()}")
    alone = np.flatnonzero(~valid.astype(bool).any(1))
    if len(alone):
        raise ValueError(f"{path}: rater_valid says that nobody read slice {alone[0]}")
    return valid.astype(bool)


def statistics(path: Path, file: h5py.File, length: int, img_channels: int) -> np.ndarray | None:
    """(N, C, 4) of the volumes that slices are of; None where the file does not say."""
    shape = (length, img_channels, 4)
    with contained.reading(path, "statistics"):
        found = contained.dataset(file, "statistics")
        if found is None:
            return None
        if found.shape != shape or found.dtype.kind != "f":
            raise ValueError(f"{path}: statistics must be (N, C, 4) = {shape} floats, got {found.dtype} {found.shape}")
        values = contained.whole(found).astype(np.float64)
    if not np.isfinite(values).all() or (values[..., 3] <= 0).any():
        raise ValueError(f"{path}: statistics must be finite, with deviations above 0")
    return values


def names(path: Path, file: h5py.File, shapes: Shapes) -> tuple[tuple[str, ...] | None, Regions | None]:
    """Of the image's channels, and what the mask's channels stand for; None where the file does not say."""
    channels, regions = (file.attrs.get(name) for name in ("channels", "regions"))
    try:
        named = None if channels is None else check_names("channels", json.loads(channels), placed=True)
        several = None if regions is None else Regions(tuple((n, tuple(x)) for n, x in json.loads(regions)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if named is not None and len(named) != shapes.img_channels:
        raise ValueError(f"{path}: channels must name {shapes.img_channels} channels, got {list(named)}")
    if several is not None and len(several.table) != shapes.mask_channels:
        raise ValueError(f"{path}: regions must be those of {shapes.mask_channels} mask channels, got {several}")
    return named, several


def pixel_spacing(path: Path, file: h5py.File, dims: int) -> tuple[float, ...] | None:
    """(row, column), or (slice, row, column) of volumes, in mm; None where the file does not say."""
    found = file.attrs.get("pixel_spacing")
    if found is None:
        return None
    sides = np.asarray(found)
    if sides.shape != (dims,) or sides.dtype.kind != "f" or not (np.isfinite(sides) & (sides > 0)).all():
        count = "three" if dims == 3 else "two"
        raise ValueError(f"{path}: pixel_spacing must be {count} positive numbers of mm, got {found!r:.80}")
    return tuple(float(side) for side in sides)


def context_slices(path: Path, file: h5py.File, shapes: Shapes) -> int:
    """How many neighbours of a slice on either side are channels beside it."""
    told = file.attrs.get("context_slices", 0)
    if np.shape(told) != () or not isinstance(told, (int, np.integer)) or told < 0:
        raise ValueError(f"{path}: context_slices must be a number of slices, got {told!r:.80}")
    if shapes.img_channels % (2 * int(told) + 1) or (told and len(shapes.size) == 3):
        raise ValueError(
            f"{path}: with {told} context_slices on either side, slices must have a multiple of {2 * int(told) + 1} "
            f"channels, got {shapes.img_channels} of {len(shapes.size)} dimensions"
        )
    return int(told)
