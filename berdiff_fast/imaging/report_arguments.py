# SPDX-License-Identifier: Apache-2.0
"""What a report is given, checked: images, masks, spacing, windows, provenance and pages beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from berdiff_fast import checks
from berdiff_fast.imaging import windows


def image_of(value: Any, channels: Sequence[str]) -> np.ndarray:
    """(C, S, H, W) float32."""
    image = checks.tensor("image", value).detach().cpu()
    if image.is_complex():
        raise TypeError(f"image must hold real numbers, got {image.dtype}")
    if isinstance(channels, str) or not all(isinstance(name, str) for name in channels):
        raise TypeError(f"channels must be names, got {channels!r:.200}")
    count, shape = max(1, len(channels)), tuple(image.shape)
    if channels and (image.ndim not in (3, 4) or len(image) != count or 0 in shape):
        raise ValueError(f"image must be ({count}, S, H, W) or ({count}, H, W), a channel each, got shape {shape}")
    if not channels and (image.ndim not in (2, 3) or 0 in shape):
        raise ValueError(f"image must be (S, H, W) or (H, W) and not empty, got shape {shape}")
    image = image.float()
    if not bool(image.isfinite().all()):
        raise ValueError("image must be finite, got NaN or infinite values")
    return image.reshape(count, -1, *image.shape[-2:]).numpy()


def masks_of(name: str, value: Any, image: np.ndarray) -> np.ndarray:
    """(n, S, H, W) bool."""
    masks = checks.tensor(name, value).detach().cpu()
    given = tuple(masks.shape)
    if masks.ndim == 3 and len(image) == 1:
        masks = masks[:, None]
    if masks.ndim != 4 or masks.shape[0] < 1 or masks.shape[1:] != image.shape:
        wanted = ", ".join(map(str, image.shape))
        raise ValueError(f"{name} must be (1 or more, {wanted}) to fit image, got shape {given}")
    if masks.dtype != torch.bool and not bool(((masks == 0) | (masks == 1)).all()):
        raise ValueError(f"{name} must be masks, bool or 0 and 1, got other values")
    return masks.bool().numpy()


def spacing_of(value: Any) -> tuple[float, ...]:
    try:
        pitch = tuple(float(x) for x in value)
        good = len(pitch) in (2, 3) and all(0 < x < math.inf for x in pitch)
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(
            f"spacing must be (slice, row, column) or (row, column) in mm, finite and above 0, got {value!r}"
        )
    return pitch


def windows_of(
    image: np.ndarray, window: tuple[float, float] | None, several: Mapping[str, tuple[float, float]] | None
) -> dict[str, tuple[float, float]]:
    if several is None:
        if window is None:
            return {windows.PERCENTILE: windows.percentile(image)}
        return {"fixed": checks.increasing_pair("window", window)}
    if window is not None:
        raise ValueError("window and windows exclude each other")
    if not isinstance(several, Mapping) or not several or not all(isinstance(name, str) for name in several):
        raise TypeError(f"windows must be a dict of (low, high) by name, not empty, got {several!r}")
    found = {}
    for name, pair in several.items():
        # Percentiles of a slice without contrast are equal; it is shown grey.
        equal = isinstance(pair, tuple) and len(pair) == 2 and pair[0] == pair[1] and math.isfinite(pair[0])
        found[name] = (float(pair[0]), float(pair[1])) if equal else checks.increasing_pair(f"windows[{name!r}]", pair)
    return found


def provenance_of(value: Mapping[str, Any] | None) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"provenance must be a dict with names as keys, got {value!r}")
    try:
        return {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in value.items()}
    except (TypeError, ValueError) as error:
        raise TypeError(f"provenance must hold values that JSON can, got {value!r}: {error}") from None


#: What a page beside this one may be called: a file in the same folder.
_PAGE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*\.html")


def pages_of(value: Mapping[str, str] | None) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(word, str) for pair in value.items() for word in pair):
        raise TypeError(f"pages must be a dict of file names by what they show, got {value!r:.200}")
    for name in value.values():
        if not _PAGE.fullmatch(name):
            raise ValueError(f"pages must be HTML files in the same folder, got {name!r:.80}")
    return dict(value)
