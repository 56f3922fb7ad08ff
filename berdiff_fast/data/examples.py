# SPDX-License-Identifier: Apache-2.0
"""The endless sequence of training examples: each is a function of the seed and its position alone.

So a run that was stopped goes on with the example it would have come to, and two processes that share a batch see what
one process would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.network.prior import size_class
from berdiff_fast.network.window import middle
from berdiff_fast.preprocessing import Preprocessing

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Augmentation:
    """Random changes, the same for an image and its mask.

    Volumes are turned in the plane of their slices, and mirrored and scaled along all three axes.

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
        """Image (C, *spatial) float and mask (K, *spatial) of 0 and 1, float."""
        # All numbers are drawn whatever is switched on, so that options do not change each other's.
        mirror, turns = (random.random(2) < 0.5).tolist(), int(random.integers(4))
        angle, zoom = random.uniform(-1, 1, 2)
        if img.ndim == 4:
            mirror.append(random.random() < 0.5)
        if self.rotate or self.scale:
            img, mask = self._affine(img, mask, angle * self.rotate, (1 + self.scale) ** zoom)
        axes = [axis for axis, m in zip((-2, -1, -3), mirror, strict=False) if m and self.flip]
        if axes:
            img, mask = img.flip(axes), mask.flip(axes)
        if self.rotate90 and turns:
            img, mask = img.rot90(turns, (-2, -1)), mask.rot90(turns, (-2, -1))
        return img, mask

    @classmethod
    def _affine(
        cls, img: torch.Tensor, mask: torch.Tensor, degrees: float, zoom: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = cls.theta(degrees, zoom, *img.shape[-2:])
        if img.ndim == 4:  # normalised coordinates are x, y, z
            rows = [[*row[:2], 0, row[2]] for row in rows] + [[0, 0, 1 / zoom, 0]]
        theta = torch.tensor([rows], dtype=torch.float32)
        grid = F.affine_grid(theta, [1, 1, *img.shape[1:]], align_corners=False)
        return cls.sample_image(img[None], grid)[0], cls.sample_mask(mask[None], grid)[0]

    @staticmethod
    def theta(degrees: float, zoom: float, height: int, width: int) -> list[list[float]]:
        """The 2 x 3 matrix of ``affine_grid`` for images of a height and width."""
        cos, sin = math.cos(math.radians(degrees)) / zoom, math.sin(math.radians(degrees)) / zoom
        # Normalised coordinates stretch with the shorter side; a rotation must not.
        return [[cos, -sin * height / width, 0], [sin * width / height, cos, 0]]

    @staticmethod
    def sample_image(img: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) at a grid (B, H', W', 2) of normalised coordinates; or volumes."""
        return F.grid_sample(img, grid, mode="bilinear", padding_mode="border", align_corners=False)

    @staticmethod
    def sample_mask(mask: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """Masks (B, K, H, W), float, at such a grid: 0 and 1 still, and nothing outside."""
        return F.grid_sample(mask, grid, mode="nearest", padding_mode="zeros", align_corners=False)


class TrainingExamples(Dataset):
    """Position p of the endless sequence: an image, one rater's mask, a timestep, and the seed of its noise.

    Every pass over the slices is in an order of its own; the rater is drawn per access. Timesteps of neighbours are
    spread evenly (a low-discrepancy sequence, after Kingma et al., arXiv 2107.00630, appendix I.1): each is uniform in
    [0, T), and the loss of a batch varies less than with independent ones.

    Args:
        slices: images and masks.
        preprocessing: from the file's intensities to ``img``.
        timesteps: T.
        seed: fixes everything random.
        augmentation: random changes.
        crop: show only the middle square of this many pixels (of every slice of a volume); 0: all of the image.
        crop_before: the first position that shows all of the image again; none: there is no such position.
        mode_edges: areas at which the size classes of a mode prior begin. An example then has ``mode``, the class of
            y_0, which is that of a rater who marked something (if any did), and ``mode_target``, the share of all
            raters in each class.
        mode_window: classes are counted in the middle square of this many pixels; 0: everywhere.
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
        mode_edges: Sequence[int] | None = None,
        mode_window: int = 0,
    ) -> None:
        self.slices = slices
        self.preprocessing = preprocessing
        self.timesteps = timesteps
        self.seed = seed
        self.augmentation = Augmentation() if augmentation is None else augmentation
        self.crop = crop
        self.crop_before = crop_before
        self.mode_edges, self.mode_window = mode_edges, mode_window
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
        """img (C, H, W) float32, y_0 (K, H, W) float32 of 0 and 1, t and noise_seed, int64 scalars; of volumes (C, D,
        H, W) and (K, D, H, W).

        With ``mode_edges`` also mode, an int64 scalar, and mode_target (classes,) float32; of a file that says what
        does not count also ignore (K, H, W) float32 of 0 and 1.
        """
        random = np.random.default_rng([self.seed, 1, position])
        if self.mode_edges is not None:
            return self._with_mode(position, self.mode_edges, random)
        index = self.slice_index(position)
        who = np.flatnonzero(self.slices.rater_valid[index])
        rater = int(who[int(random.integers(len(who)))])
        image, mask = self.slices.one_rater(index, rater)
        t = int(self.timesteps * ((self._phase + position * _GOLDEN) % 1.0))
        noise_seed = int(random.integers(2**63))
        img, y_0 = self.augmentation(self._scaled(image, index), self._with_ignored(mask, index), random)
        return self._example(position, img, y_0, t, noise_seed)

    def _scaled(self, image: torch.Tensor, index: int) -> torch.Tensor:
        return self.preprocessing(image[None], self.slices.statistics_for(self.preprocessing, [index]))[0]

    def _with_ignored(self, masks: torch.Tensor, index: int) -> torch.Tensor:
        """Masks (.., H, W), float, and behind them what does not count, if the file has such: augmented alike."""
        ignored = self.slices.ignored([index])
        return masks.float() if ignored is None else torch.cat([masks.float(), torch.from_numpy(ignored[0]).float()])

    def _with_mode(self, position: int, edges: Sequence[int], random: np.random.Generator) -> dict[str, torch.Tensor]:
        """An example for a mode prior: all raters are augmented alike, and the classes are those of what is seen."""
        index = self.slice_index(position)
        image, masks = self.slices[index]
        valid = self.slices.rater_valid[index]
        seen = self._counted(masks).flatten(1).any(1).numpy() & valid
        marked = np.flatnonzero(seen if seen.any() else valid).tolist()
        rater = marked[int(random.integers(len(marked)))]
        t = int(self.timesteps * ((self._phase + position * _GOLDEN) % 1.0))
        noise_seed = int(random.integers(2**63))
        flat = self._with_ignored(masks.flatten(0, 1), index)
        img, flat = self.augmentation(self._scaled(image, index), flat, random)
        example = self._example(position, img, flat, t, noise_seed)
        y_0 = example["y_0"].unflatten(0, masks.shape[:2])
        classes = size_class(self._counted(y_0), edges)
        # Over those who read it: the others say nothing of what there is.
        target = F.one_hot(classes[torch.from_numpy(valid)], len(edges) + 2).float().mean(0)
        return {**example, "y_0": y_0[rater].contiguous(), "mode": classes[rater], "mode_target": target}

    def _counted(self, masks: torch.Tensor) -> torch.Tensor:
        return middle(masks, self.mode_window) if self.mode_window else masks

    def _example(
        self, position: int, img: torch.Tensor, y_0: torch.Tensor, t: int, noise_seed: int
    ) -> dict[str, torch.Tensor]:
        if crop := self.crop_at(position):
            y, x = ((size - crop) // 2 for size in img.shape[-2:])
            img, y_0 = (a[..., y : y + crop, x : x + crop] for a in (img, y_0))
        ignored = {}
        if self.slices.ignores:
            y_0, last = y_0[:-1], y_0[-1:]
            ignored["ignore"] = last.expand(self.slices.mask_channels, *last.shape[1:]).contiguous()
        return {
            "img": img.contiguous(),
            "y_0": y_0.contiguous(),
            "t": torch.tensor(t),
            "noise_seed": torch.tensor(noise_seed),
            **ignored,
        }
