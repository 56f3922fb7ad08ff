# SPDX-License-Identifier: Apache-2.0
"""Colour pictures where one channel is shown: their luminance."""

from __future__ import annotations

import numpy as np

#: How much of red, green and blue is in it (ITU-R BT.601, which Pillow's mode "L" takes too).
_WEIGHTS = (0.299, 0.587, 0.114)


def luminance(channels: np.ndarray) -> np.ndarray:
    """(*shape) of red, green and blue (3, *shape), in their type; integers are rounded."""
    mixed = sum(w * x.astype(np.float64) for w, x in zip(_WEIGHTS, channels, strict=True))
    return (np.rint(mixed) if channels.dtype.kind in "iu" else np.asarray(mixed)).astype(channels.dtype)
