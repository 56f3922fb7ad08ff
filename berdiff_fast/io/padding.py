# SPDX-License-Identifier: Apache-2.0
"""Values that scanners write where they did not scan: outside the bore's circle, beyond a detector.

DICOM can say which they are. Most files cannot, or do not, and in Hounsfield units such values are then told by what
they are: one value far below air (-1000), as -2000 and -3024 are, held by many voxels and with next to nothing between
it and -1024, the lowest value that Hounsfield units of 12 bits have. Resampling smears the border, so a few voxels may
lie between.
"""

from __future__ import annotations

import numpy as np

from berdiff_fast.io.slices import blocks

#: Below is no tissue and no air; padding that is found by itself lies from ``_FARTHEST`` to ``_FAR``.
_LOWEST = -1024.0
_FAR, _FARTHEST = -1500.0, -70_000.0

#: Of the voxels, this share at least holds the value; and these many.
_SHARE, _COUNT = 1e-4, 8


def guess(array: np.ndarray) -> tuple[float, float] | None:
    """The padding, (low, high), of an array in Hounsfield units that does not say so; None if it has none."""
    if array.dtype.kind not in "if" or array.size == 0 or (array.dtype.kind == "i" and array.dtype.itemsize < 2):
        return None
    low = float(array.min())
    if not _FARTHEST <= low <= _FAR or not float(array.max()) > _LOWEST:
        return None
    # Some slices at a time: maps of the whole would take as much as half the array.
    plateau = sum(int((part == array.dtype.type(low)).sum()) for part in blocks(array))
    below = sum(int((part < _LOWEST).sum()) for part in blocks(array))
    if plateau < max(_COUNT, _SHARE * array.size) or below - plateau > plateau / 2:
        return None
    return low, _LOWEST - (1 if array.dtype.kind == "i" else 1e-3)


def lowest_tissue(array: np.ndarray, outside: np.ndarray | None) -> float:
    """The minimum of what is not outside; of everything, where all of it is."""
    inside = array if outside is None else array[~outside]
    return float((inside if inside.size else array).min())
