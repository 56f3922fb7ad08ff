# SPDX-License-Identifier: Apache-2.0
"""Whole batches of training examples at once, on the device that trains, equal to ``TrainingExamples``' items.

Mirroring, quarter turns and cutting are one table of pixel numbers, so that an image's pixels are fetched once, where
they end up. On a CPU every batch has the bits of its items; on a GPU rotation and zoom (``grid_sample``) may round in
another way, and all else is equal too. Of volumes, for which such tables are too large, a batch is its items stacked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from berdiff_fast.data.examples import Augmentation, TrainingExamples
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.data.streams import Streams
from berdiff_fast.network.prior import size_class
from berdiff_fast.network.window import middle
from berdiff_fast.preprocessing import Preprocessing, Statistics

#: Positions whose random numbers are drawn together: a stream of a thousand costs a hundredth of one alone.
_TOGETHER = 4096


@dataclass
class Slices:
    """Images (N, C, H, W), masks (N, R, K, H, W) bool, who read them (N, R) bool, what images are scaled by, two (N, C
    or 1, 1, 1), and what does not count, (N, 1, H, W) bool."""

    images: torch.Tensor
    masks: torch.Tensor
    valid: torch.Tensor
    statistics: Statistics | None
    ignore: torch.Tensor | None

    @classmethod
    def of(
        cls,
        images: np.ndarray,
        masks: np.ndarray,
        valid: np.ndarray,
        preprocessing: Preprocessing,
        device: torch.device,
        statistics: Statistics | None = None,
        ignore: np.ndarray | None = None,
    ) -> Slices:
        """On a device; on the CPU they share the arrays' memory."""
        if images.dtype in (np.uint16, np.uint32, np.uint64):  # which torch can hardly do anything with
            images = images.astype(np.float32)
        x = torch.from_numpy(images).to(device)
        if statistics is None and preprocessing.window is None:
            # In pieces, since each is widened.
            parts = [s for part in x.split(256) if (s := preprocessing.statistics(part)) is not None]
            first, second = zip(*parts, strict=True)
            statistics = torch.cat(first), torch.cat(second)
        if statistics is not None:
            statistics = statistics[0].to(device), statistics[1].to(device)
        y, who = torch.from_numpy(masks).to(device), torch.from_numpy(valid).to(device)
        return cls(x, y, who, statistics, None if ignore is None else torch.from_numpy(ignore).to(device))


@dataclass
class _Numbers:
    """What is random about examples, (B,) each: int64 on the device; ``theta`` (B, 2, 3) float32, or None."""

    index: torch.Tensor
    rater: torch.Tensor
    t: torch.Tensor
    noise_seed: torch.Tensor
    symmetry: torch.Tensor
    theta: torch.Tensor | None

    def __getitem__(self, part: slice) -> _Numbers:
        theta = None if self.theta is None else self.theta[part]
        return _Numbers(
            self.index[part], self.rater[part], self.t[part], self.noise_seed[part], self.symmetry[part], theta
        )


class Batches(Dataset):
    """Batches of a sequence of examples.

    Args:
        examples: what an example is.
        device: where the batches are made.
        resident: keep all slices on the device; else the slices of a batch are read for it.
    """

    def __init__(self, examples: TrainingExamples, device: torch.device | str = "cpu", *, resident: bool) -> None:
        self.examples, self.device = examples, torch.device(device)
        self._maps: dict[int, torch.Tensor] = {}
        self._resident: Slices | None = None
        self._marked: np.ndarray | None = None
        self._volumes = examples.slices.spatial_dims == 3
        if resident and not self._volumes:
            slices = examples.slices
            images, masks = slices.whole()
            self._resident = self._slices(images, masks, np.arange(len(slices)))
            if examples.mode_edges is not None:
                valid = slices.rater_valid
                parts = [self._who_marked(masks[i : i + 256], valid[i : i + 256]) for i in range(0, len(masks), 256)]
                self._marked = np.concatenate(parts)
            elif not slices.rater_valid.all():
                self._marked = slices.rater_valid

    def _slices(self, images: np.ndarray, masks: np.ndarray, index: np.ndarray) -> Slices:
        """Slices of the file, with what it says of them."""
        slices, preprocessing = self.examples.slices, self.examples.preprocessing
        return Slices.of(
            images,
            masks,
            slices.rater_valid[index],
            preprocessing,
            self.device,
            slices.statistics_for(preprocessing, index),
            slices.ignored(index),
        )

    def __call__(self, positions: range | list[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """img (B, C, H, W) and y_0 (B, K, H, W) float32, t and noise_seed (B,) int64: the examples, stacked.

        With ``mode_edges`` also mode (B,) int64 and mode_target (B, classes) float32; of a file that says what does not
        count also ignore (B, K, H, W) float32.

        Raises:
            ValueError: some of the positions are cropped and others are not.
        """
        positions = np.asarray(positions, np.int64)
        if self._volumes:
            items = [self.examples[int(position)] for position in positions]
            return {name: torch.stack([item[name] for item in items]).to(self.device) for name in items[0]}
        if self._resident is not None:
            return self._make(positions, self._numbers(positions, self._marked), self._resident)
        slices, marked = self.examples.slices, None
        index = self.examples.slice_indices(positions)
        if self.examples.mode_edges is not None:  # which asks for all raters
            images, masks = slices.rows(index)
            marked = self._who_marked(masks, slices.rater_valid[index])
            numbers = self._numbers(positions, marked, np.arange(len(positions)))
        else:
            numbers = self._numbers(positions, None if slices.rater_valid.all() else slices.rater_valid)
            images, masks = slices.rows(index, numbers.rater.numpy())
            numbers.rater = torch.zeros_like(numbers.rater)
        numbers.index = torch.arange(len(positions))
        return self._make(positions, numbers, self._slices(images, masks, index))

    # DataLoader asks for a whole batch where it finds this.
    __getitems__ = __call__

    def stream(self, batches: Iterable[range]) -> Iterator[dict[str, torch.Tensor]]:
        """One batch after another, of resident slices, whose random numbers are drawn for many batches at once."""
        if self._volumes:
            yield from map(self, batches)
            return
        waiting: list[np.ndarray] = []
        for positions in batches:
            waiting.append(np.asarray(positions, np.int64))
            if sum(map(len, waiting)) >= _TOGETHER:
                yield from self._several(waiting)
                waiting = []
        yield from self._several(waiting)

    def _several(self, batches: list[np.ndarray]) -> Iterator[dict[str, torch.Tensor]]:
        if not batches or self._resident is None:
            return
        numbers, start = self._numbers(np.concatenate(batches), self._marked), 0
        for positions in batches:
            yield self._make(positions, numbers[start : start + len(positions)], self._resident)
            start += len(positions)

    def _numbers(
        self, positions: np.ndarray, marked: np.ndarray | None = None, rows: np.ndarray | None = None
    ) -> _Numbers:
        """Of positions, and of whom one is drawn in slices (N, R), where not all are alike; ``rows`` of it, if not
        those of the file."""
        examples = self.examples
        index = examples.slice_indices(positions)
        # In the order of TrainingExamples.__getitem__ and Augmentation.__call__.
        random = Streams([examples.seed, 1], positions)
        if marked is None:
            rater = random.integers(examples.slices.raters)
        else:
            marked = marked[index if rows is None else rows]
            number = random.integers(marked.sum(1))
            # Those of whom one is drawn first, each group in its order.
            rater = np.argsort(~marked, axis=1, kind="stable")[np.arange(len(marked)), number]
        noise_seed = random.bits63()
        mirror = [random.random() < 0.5 for _ in range(2)]
        turns = random.integers(4)
        angle, zoom = (random.uniform(-1, 1) for _ in range(2))
        options = examples.augmentation
        symmetry = options.flip * (mirror[0] + 2 * mirror[1]) + options.rotate90 * 4 * turns
        numbers = np.stack([index, rater, examples.timestep(positions), noise_seed, symmetry.astype(np.int64)])
        theta = None
        if options.rotate or options.scale:
            height, width = examples.slices.image_size[-2:]
            # By Python's own functions: NumPy's, many at once, may differ in the last bit.
            pairs = zip((angle * options.rotate).tolist(), zoom.tolist(), strict=True)
            each = [options.theta(a, (1 + options.scale) ** z, height, width) for a, z in pairs]
            theta = self._on_device(np.array(each, np.float32))
        i, r, t, n, s = self._on_device(numbers).unbind()
        return _Numbers(i, r, t, n, s, theta)

    def _who_marked(self, masks: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Raters (B, R) of whom one is drawn: of those who read it, who marked something where it counts, or all."""
        counted = self._counted(torch.from_numpy(masks)).flatten(2).any(2).numpy() & valid
        return np.where(counted.any(1, keepdims=True), counted, valid)

    def _counted(self, masks: torch.Tensor) -> torch.Tensor:
        return middle(masks, self.examples.mode_window) if self.examples.mode_window else masks

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        # From pinned memory the host need not wait for the copy.
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _make(self, positions: np.ndarray, numbers: _Numbers, slices: Slices) -> dict[str, torch.Tensor]:
        examples = self.examples
        crops = {examples.crop_at(int(p)) for p in (positions.min(), positions.max())}
        if len(crops) > 1:
            raise ValueError(f"positions must be before crop_before, {examples.crop_before}, or from it on, got both")
        crop, index = crops.pop(), numbers.index
        height, width = size = examples.slices.image_size[-2:]
        shape = (crop, crop) if crop else (height, width)
        pixels = self._map(crop).index_select(0, numbers.symmetry)
        of = slices.statistics
        statistics = None if of is None else (of[0].index_select(0, index), of[1].index_select(0, index))
        raters, mask_channels = slices.masks.shape[1:3]
        grid = None
        if numbers.theta is None:
            img = examples.preprocessing(_gather(slices.images, index, pixels, shape), statistics)
        else:
            # Normalised coordinates of where each pixel comes from.
            grid = F.affine_grid(numbers.theta, [len(index), 1, *size], align_corners=False).flatten(1, 2)
            grid = grid.gather(1, pixels[..., None].expand(-1, -1, 2)).unflatten(1, shape)
            whole = examples.preprocessing(slices.images.index_select(0, index), statistics)
            img = Augmentation.sample_image(whole, grid)

        def masks(
            source: torch.Tensor, rows: torch.Tensor, pixels: torch.Tensor, shape: tuple[int, int]
        ) -> torch.Tensor:
            if grid is None:
                return _gather(source, rows, pixels, shape)
            return Augmentation.sample_mask(source.index_select(0, rows).float(), grid)

        batch = {"img": img, "t": numbers.t, "noise_seed": numbers.noise_seed}
        batch["y_0"] = masks(slices.masks.flatten(0, 1), index * raters + numbers.rater, pixels, shape).float()
        if slices.ignore is not None:
            batch["ignore"] = masks(slices.ignore, index, pixels, shape).float().expand(-1, mask_channels, -1, -1)
        if examples.mode_edges is not None:
            if grid is None and examples.mode_window:  # no more than what counts
                pixels = middle(pixels.unflatten(1, shape), examples.mode_window).flatten(1)
                shape = (examples.mode_window, examples.mode_window)
            seen = masks(slices.masks.flatten(1, 2), index, pixels, shape).unflatten(1, (raters, mask_channels))
            classes = size_class(self._counted(seen), examples.mode_edges)
            batch["mode"] = classes.gather(1, numbers.rater[:, None])[:, 0]
            which = torch.arange(len(examples.mode_edges) + 2, device=classes.device)
            read = slices.valid.index_select(0, index)
            shares = (classes[..., None] == which).float() * read[..., None]
            batch["mode_target"] = shares.sum(1) / read.sum(1, keepdim=True)
        return batch

    def _map(self, crop: int) -> torch.Tensor:
        """Of which pixel each pixel of the result is a copy: (symmetries, pixels) int64."""
        if crop not in self._maps:
            height, width = self.examples.slices.image_size[-2:]
            grid = np.arange(height * width).reshape(height, width)
            maps = []
            for symmetry in range(16 if self.examples.augmentation.rotate90 else 4):
                turned = grid[:: -1 if symmetry & 1 else 1, :: -1 if symmetry & 2 else 1]
                turned = np.rot90(turned, symmetry >> 2)
                if crop:
                    y, x = ((size - crop) // 2 for size in turned.shape)
                    turned = turned[y : y + crop, x : x + crop]
                maps.append(turned.ravel())
            self._maps[crop] = torch.from_numpy(np.stack(maps)).to(self.device)
        return self._maps[crop]


def _gather(source: torch.Tensor, rows: torch.Tensor, pixels: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """(B, C, *shape): of each row of (N, C, H, W) the pixels (B, h * w), given by their numbers."""
    channels, count = source.shape[1], source[0, 0].numel()
    planes = rows[:, None] * channels + torch.arange(channels, device=rows.device)
    index = planes[:, :, None] * count + pixels[:, None, :]
    return source.reshape(-1).index_select(0, index.reshape(-1)).view(len(rows), channels, *shape)


def fits(slices: RaterDataset, device: torch.device) -> bool:
    """Whether all slices may stay on a device: a quarter of a GPU's free memory at the most; on the CPU, those that
    are in memory anyway. Volumes are made ready on the CPU."""
    if not slices.in_memory:
        return False
    if device.type != "cuda" or slices.spatial_dims == 3:
        return device.type == "cpu"
    needed = sum(array.nbytes for array in slices.whole())
    return 4 * needed <= torch.cuda.mem_get_info(device)[0]
