# SPDX-License-Identifier: Apache-2.0
"""Sizes of masks, in voxels and, where a file tells its spacing, in mm3 and mL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from berdiff_fast import metrics
from berdiff_fast.imaging.summary import spread
from berdiff_fast.io.volume import Volume


def sizes_of(voxels: list[int], volume: Volume, *, spreads: bool = True) -> dict[str, Any]:
    """Of each mask, and how they spread."""
    found: dict[str, Any] = {"voxels": voxels}
    if spreads:
        found["spread_voxels"] = spread(voxels)
    if volume.voxel_mm3 is not None:
        mm3 = [v * volume.voxel_mm3 for v in voxels]
        found |= {"mm3": mm3, "mL": [v / 1000 for v in mm3]}
        if spreads:
            found["spread_mm3"] = spread(mm3)
            found["spread_mL"] = {k: v / 1000 for k, v in found["spread_mm3"].items()}
    return found


def against(masks: np.ndarray, raters: np.ndarray) -> dict[str, float]:
    """GED and HM-IoU, all that was sampled being one mask: of the slices that were sampled, since others are empty."""
    theirs, ours = (torch.from_numpy(x)[None].flatten(3, -1) for x in (raters, masks))
    found = metrics.evaluate(theirs, ours, ("ged", "hm_iou"))
    return {"count": len(raters), **{name: float(value[0]) for name, value in found.items()}}


def elsewhere(outside: Sequence[int], volume: Volume) -> list[str]:
    """What raters marked where nothing was sampled, for people."""
    if not any(outside):
        return []
    found = sizes_of([*outside], volume, spreads=False)
    unit = "mL" if "mL" in found else "voxels"
    each = ", ".join(f"{size:.4g}" for size in found[unit])
    return [f"Raters marked more elsewhere, where nothing was sampled, and that is not counted here: {each} {unit}."]
