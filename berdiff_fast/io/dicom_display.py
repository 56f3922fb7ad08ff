# SPDX-License-Identifier: Apache-2.0
"""What DICOM headers say of showing a scan: numbers of its slices, its window, whether it is in Hounsfield units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from berdiff_fast.io.dicom_stack import functional_groups, group_item

#: Tags that are looked at here.
TAGS = ("InstanceNumber", "WindowCenter", "WindowWidth")


def settings(headers: Sequence[Any], frames: Sequence[int], *, inverted: bool = False) -> dict[str, Any]:
    """Return ``instance_numbers``, ``window`` and ``hounsfield`` of a ``Volume``.

    Args:
        headers: the header of each slice's file, in the order of slices.
        frames: which frame of that file (from 0) each slice is.
        inverted: stored values were inverted, and a window of them is none of the array's.
    """
    middle = len(headers) // 2
    return {
        "instance_numbers": tuple(map(_instance_number, headers)),
        "window": None if inverted else _window(headers[middle], frames[middle]),
        "hounsfield": _hounsfield(headers[0], frames[0]),
    }


def _instance_number(header: Any) -> int | None:
    try:
        return int(str(header.get("InstanceNumber")))
    except ValueError:
        return None


def _window(header: Any, frame: int) -> tuple[float, float] | None:
    """The first of the windows that a header offers, from its centre and width."""
    item = group_item(functional_groups(header, frame), "FrameVOILUTSequence", header)
    center, width = (_first(item.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if not (math.isfinite(center) and math.isfinite(width) and width > 0):
        return None
    return center - width / 2, center + width / 2


def _first(value: Any) -> float:
    """A number, or the first of several; NaN if there is none."""
    if not isinstance(value, str) and isinstance(value, Sequence):
        value = value[0] if len(value) else None
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _hounsfield(header: Any, frame: int) -> bool | None:
    """CT with a rescale that names no other unit; a CT without a rescale does not say."""
    if str(header.get("Modality", "")) != "CT":
        return False
    rescale = group_item(functional_groups(header, frame), "PixelValueTransformationSequence", header)
    if rescale.get("RescaleSlope") is None or rescale.get("RescaleIntercept") is None:
        return None
    return str(rescale.get("RescaleType") or "HU").strip().upper() in ("HU", "US", "")  # US: unspecified
