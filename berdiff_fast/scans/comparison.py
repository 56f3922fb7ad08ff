# SPDX-License-Identifier: Apache-2.0
"""Raters' masks beside sampled ones: brought onto the scan's grid, cut to what was sampled, compared with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from berdiff_fast.imaging.volumes import Volume
from berdiff_fast.io import raters as raters_io
from berdiff_fast.regions import Regions
from berdiff_fast.scans.sampled import sampled_region

logger = logging.getLogger("berdiff_fast")


def check_raters(raters: Sequence[Volume], volume: Volume, regions: Regions | None = None) -> np.ndarray | None:
    """Raters' masks on the volume's grid; None if there are none.

    Args:
        raters: volumes; of a model with regions they hold labels.
        volume: the scan.
        regions: those of the model.

    Returns:
        (R, S, H, W) bool, or labels (uint8 or uint16) where there are regions.

    Raises:
        ValueError: another grid; values that are not those of a mask, or labels that no region has.
    """
    if not raters:
        return None
    largest = 0 if regions is None else max(regions.labels)
    kind = bool if regions is None else np.uint8 if largest < 256 else np.uint16
    found = np.zeros((len(raters), *volume.array.shape), kind)
    for mask, rater in zip(found, raters, strict=True):
        rater = raters_io.onto(rater, volume)
        values: set[float] = set()
        # Slice by slice, and what is empty is not written to: memory follows what they marked.
        for s, part in enumerate(rater.array):
            if not part.any():
                continue
            values |= set(np.unique(part).tolist()) - {0}
            if regions is None and len(values) > 1:
                raise ValueError(f"raters: {rater.path} must hold a mask, of 0 and one other value")
            if regions is not None and (unknown := sorted(values - regions.labels)):
                raise ValueError(
                    f"raters: {rater.path} has the label {unknown[0]:g}, which no region of the model has ({regions})"
                )
            mask[s] = part if regions is not None else part != 0
    return found


def where_sampled(raters: np.ndarray, plan: Mapping[str, Any]) -> tuple[np.ndarray, list[int]]:
    """Raters' masks in the slices that were sampled, (R, slices, h, w), and how many voxels each marked elsewhere."""
    region = sampled_slices(sampled_region(plan, raters.shape[1:]), plan)
    inside = np.stack([np.where(region, sampled_slices(mask, plan), 0) for mask in raters]).astype(raters.dtype)
    outside = [int(np.count_nonzero(a)) - int(np.count_nonzero(b)) for a, b in zip(raters, inside, strict=True)]
    if any(outside):
        logger.warning("raters: %d voxels that they marked lie where nothing was sampled; not compared", sum(outside))
    return inside, outside


def sampled_slices(array: np.ndarray, plan: Mapping[str, Any]) -> np.ndarray:
    """Of (S, H, W) the slices that were sampled, stacked along their axis: (slices, h, w)."""
    first, last = plan["slices"]
    return np.moveaxis(array, plan["axis"], 0)[first:last]
