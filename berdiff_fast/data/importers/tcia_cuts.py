# SPDX-License-Identifier: Apache-2.0
"""Slices of a CT scan, resampled in plane and cut, as ``sample_volume`` resamples and cuts them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from berdiff_fast.io import cuts
from berdiff_fast.io.volume import Volume


@dataclass(frozen=True)
class Cutter:
    """Cuts of one size and pixel spacing around a point.

    Attributes:
        size: (H, W) of a cut.
        original, shape: (h, w) of a slice, as it is and resampled.
        scale: by how much rows and columns become more.
    """

    size: tuple[int, int]
    original: tuple[int, int]
    shape: tuple[int, int]
    scale: tuple[float, float]

    @classmethod
    def of(
        cls,
        size: tuple[int, int],
        original: tuple[int, int],
        spacing: tuple[float, float] | None,
        wanted: tuple[float, float] | None,
    ) -> Cutter:
        """For slices of a spacing (row, column) in mm that are to have the ``wanted`` one; None leaves it as it is."""
        scale = (1.0, 1.0)
        if wanted is not None:
            assert spacing is not None
            scale = (spacing[0] / wanted[0], spacing[1] / wanted[1])
        shape = (max(1, round(original[0] * scale[0])), max(1, round(original[1] * scale[1])))
        return cls(size, original, shape, scale)

    def image(self, volume: Volume, middle: tuple[float, float]) -> np.ndarray:
        """The cut (H, W) float32 of a volume of one slice; what is no tissue has the lowest value of the rest."""
        array = volume.array[0]
        outside = volume.outside(array)
        x = self._resampled(cuts.tissue(array, outside))
        if outside is not None:
            outside = self._resampled(outside.astype(np.float32)) > 0
        return cuts.cut(x, self._begin(middle), self.size, outside)

    def masks(self, masks: np.ndarray, middle: tuple[float, float]) -> tuple[np.ndarray, bool]:
        """The cuts (..., H, W) bool of masks (..., h, w), and whether they hold all that is marked."""
        if self.shape != self.original:
            x = torch.from_numpy(masks.reshape(1, -1, *self.original)).float()
            x = F.interpolate(x, self.shape, mode="nearest-exact")
            masks = x.numpy().reshape(*masks.shape[:-2], *self.shape) > 0.5
        found = cuts.cut_masks(masks, self._begin(middle), self.size)
        return found, bool(found.sum() == masks.sum())

    def _begin(self, middle: tuple[float, float]) -> list[int]:
        """First row and column of the cut around a point of the slice as it is."""
        points = [m * scale for m, scale in zip(middle, self.scale, strict=True)]
        return cuts.starts(self.shape, self.size, [(point, point) for point in points])

    def _resampled(self, x: np.ndarray) -> np.ndarray:
        if self.shape == self.original:
            return x
        smaller = any(a < b for a, b in zip(self.shape, self.original, strict=True))
        found = F.interpolate(torch.from_numpy(x)[None, None], self.shape, mode="bilinear", antialias=smaller)
        return found[0, 0].numpy()
