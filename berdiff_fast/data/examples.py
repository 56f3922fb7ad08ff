# SPDX-License-Identifier: Apache-2.0
"""The endless sequence of training examples: each is a function of the seed and its position alone.

So a run that was stopped goes on with the example it would have come to, and two processes that share a batch see what
one process would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.model import Preprocessing

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Augmentation:
    """Random changes, the same for an image and its mask.

    Args:
        flip: mirror each axis with probability 1/2.
        rotate90: turn by a random multiple of 90 degrees (square images).
        rotate: turn by up to this many degrees either way.
        scale: enlarge or shrink by up to this fraction, uniform in the logarithm.
    """

    flip: bool = False
    rotate90: bool = False
    rotate: float = 0.0
    scale: float = 0.0

    def __call__(
        self, img: torch.Tensor, mask: torch.Tensor, random: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image (C, H, W) float and mask (K, H, W) of 0 and 1, float."""
        # All numbers are drawn whatever is switched on, so that options do not change each other's.
        mirror, turns = random.random(2) < 0.5, int(random.integers(4))
        angle, zoom = random.uniform(-1, 1, 2)
        if self.rotate or self.scale:
            height, width = img.shape[-2:]
            theta = torch.tensor([self.theta(angle, zoom, height, width)], dtype=torch.float32)
            grid = F.affine_grid(theta, [1, 1, height, width], align_corners=False)
            img, mask = (x[0] for x in self.sample(img[None], mask[None], grid))
        axes = [axis for axis, m in zip((-2, -1), mirror, strict=True) if m and self.flip]
        if axes:
            img, mask = img.flip(axes), mask.flip(axes)
        if self.rotate90 and turns:
            img, mask = img.rot90(turns, (-2, -1)), mask.rot90(turns, (-2, -1))
        return img, mask

    def theta(self, angle: float, zoom: float, height: int, width: int) -> list[list[float]]:
        """The 2 x 3 matrix of ``affine_grid`` for an angle and a zoom in [-1, 1], parts of the largest ones."""
        degrees, factor = float(angle) * self.rotate, (1 + self.scale) ** float(zoom)
        cos, sin = math.cos(math.radians(degrees)) / factor, math.sin(math.radians(degrees)) / factor
        # Normalised coordinates stretch with the shorter side; a rotation must not.
        return [[cos, -sin * height / width, 0], [sin * width / height, cos, 0]]

    @staticmethod
    def sample(img: torch.Tensor, mask: torch.Tensor, grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, C, H, W) and masks (B, K, H, W) at a grid (B, H', W', 2) of normalised coordinates."""
        img = F.grid_sample(img, grid, mode="bilinear", padding_mode="border", align_corners=False)
        # Nearest: a mask stays 0 and 1; outside there is nothing to find.
        return img, F.grid_sample(mask, grid, mode="nearest", padding_mode="zeros", align_corners=False)


class TrainingExamples(Dataset):
    """Position p of the endless sequence: an image, one rater's mask, a timestep, and the seed of its noise.

    Every pass over the slices is in an order of its own; the rater is drawn per access. Timesteps of neighbours are
    spread evenly (a low-discrepancy sequence, after Kingma et al., arXiv 2107.00630, appendix I.1): each is uniform in
    [0, T), and the loss of a batch varies less than with independent ones.

    Args:
        slices: images and masks.
        preprocessing: from the file's intensities to ``img``.
        timesteps: T.
        seed: of everything random.
        augmentation: random changes.
        crop: show only the middle square of this many pixels; 0: all of the image.
        crop_before: the first position that shows all of the image again; none: there is no such position.
    """

    def __init__(
        self,
        slices: RaterDataset,
        preprocessing: Preprocessing,
        timesteps: int,
        seed: int,
        augmentation: Augmentation | None = None,
        crop: int = 0,
        crop_before: int | None = None,
    ) -> None:
        self.slices = slices
        self.preprocessing = preprocessing
        self.timesteps = timesteps
        self.seed = seed
        self.augmentation = Augmentation() if augmentation is None else augmentation
        self.crop = crop
        self.crop_before = crop_before
        self._phase = float(np.random.default_rng([seed, 2]).random())
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def slice_index(self, position: int) -> int:
        """Which slice the example at a position shows."""
        epoch, place = divmod(position, len(self.slices))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.slices))
        return int(self._order[1][place])

    def slice_indices(self, positions: np.ndarray) -> np.ndarray:
        """``slice_index`` of many positions: (B,) int64."""
        epochs, places = np.divmod(positions, len(self.slices))
        result = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            self.slice_index(epoch * len(self.slices))  # which makes that epoch's order
            result[epochs == epoch] = self._order[1][places[epochs == epoch]]
        return result

    def timestep(self, positions: np.ndarray) -> np.ndarray:
        """The timesteps of positions, int64 both."""
        return (self.timesteps * ((self._phase + positions * _GOLDEN) % 1.0)).astype(np.int64)

    def crop_at(self, position: int) -> int:
        """The side of the square that the example at a position shows; 0: all of the image."""
        return self.crop if self.crop_before is None or position < self.crop_before else 0

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        """img (C, H, W) float32, y_0 (K, H, W) float32 of 0 and 1, t and noise_seed, int64 scalars."""
        random = np.random.default_rng([self.seed, 1, position])
        rater = int(random.integers(self.slices.raters))
        image, mask = self.slices.one_rater(self.slice_index(position), rater)
        t = int(self.timesteps * ((self._phase + position * _GOLDEN) % 1.0))
        noise_seed = int(random.integers(2**63))
        img, y_0 = self.augmentation(self.preprocessing(image[None])[0], mask.float(), random)
        if crop := self.crop_at(position):
            y, x = ((size - crop) // 2 for size in img.shape[-2:])
            img, y_0 = (a[..., y : y + crop, x : x + crop] for a in (img, y_0))
        return {
            "img": img.contiguous(),
            "y_0": y_0.contiguous(),
            "t": torch.tensor(t),
            "noise_seed": torch.tensor(noise_seed),
        }
