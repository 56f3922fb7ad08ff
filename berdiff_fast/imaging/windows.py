# SPDX-License-Identifier: Apache-2.0
"""Which intensities are shown black and white: windows by name, as viewers of scans offer them."""

from __future__ import annotations

import numpy as np

from berdiff_fast.io.volume import Volume

#: Windows for CT, (low, high) in Hounsfield units: width 1500 at level -600, 400 at 40, 1800 at 400.
CT = {"lung": (-1350.0, 150.0), "soft tissue": (-160.0, 240.0), "bone": (-500.0, 1300.0)}

#: Names of the window that the file itself records, and of the one that is made of the values.
RECORDED, PERCENTILE = "recorded in the file", "0.5 to 99.5 percentile"

#: Air, and the share of voxels it has at least in a scan that is taken to be CT by its values.
_AIR, _SHARE = (-1100.0, -850.0), 0.01


def percentile(image: np.ndarray) -> tuple[float, float]:
    """The 0.5th and 99.5th percentile; minimum and maximum where these are equal."""
    low, high = (float(x) for x in np.percentile(image, (0.5, 99.5)))
    if low == high:  # a bright spot on nothing, or nothing
        low, high = float(image.min()), float(image.max())
    return low, high


def of(volume: Volume, image: np.ndarray) -> tuple[dict[str, tuple[float, float]], str]:
    """Windows for slices of a volume, and a word on their unit.

    Args:
        volume: what the slices are of.
        image: the slices, whose percentiles are taken; what is outside the scan (padding) has no part in them.

    Returns:
        (low, high) by name, the one to begin with first: the recorded one, else the percentiles; for CT also lung, soft
        tissue and bone. And the unit: "HU", "HU, to judge by the values", or nothing.
    """
    outside = volume.outside(image)
    tissue = image if outside is None or outside.all() else image[~outside]
    unit = ""
    if volume.hounsfield:
        unit = "HU"
    elif volume.hounsfield is None and _may_be_hounsfield(volume, tissue):
        unit = "HU, to judge by the values"
    found = {} if volume.window is None else {RECORDED: volume.window}
    by_value = {PERCENTILE: percentile(tissue)}
    if by_value[PERCENTILE][0] == by_value[PERCENTILE][1] and found:
        by_value = {}
    if unit:
        found = {**found, **CT, **by_value} if found else {**by_value, **CT}
    else:
        found |= by_value
    return found, unit


def _may_be_hounsfield(volume: Volume, tissue: np.ndarray) -> bool:
    """Whether values that nobody gave a unit begin at air and reach beyond water, as those of a CT do."""
    kind = volume.array.dtype
    if volume.format == "picture" or kind.kind not in "if" or kind.itemsize < 2:
        return False
    low, high = float(tissue.min()), float(tissue.max())
    if not (_AIR[0] <= low <= _AIR[1] and 0 < high < 40_000):
        return False
    return float(((tissue >= _AIR[0]) & (tissue <= _AIR[1])).mean()) >= _SHARE
