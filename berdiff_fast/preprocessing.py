# SPDX-License-Identifier: Apache-2.0
"""From raw intensities to what a network was trained on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from berdiff_fast import checks

logger = logging.getLogger("berdiff_fast")

#: What an image is scaled by, see ``Preprocessing.statistics``.
Statistics = tuple[torch.Tensor, torch.Tensor]

MODES = ("min-max", "window", "z-score")

#: Arguments that there were not at first.
_LATER = ("per_channel", "by_volume", "foreground", "context_slices")

#: Channels whose ranges differ by more than this factor should not be scaled together.
_APART = 10.0


@dataclass(frozen=True, repr=False)
class Preprocessing:
    """From raw intensities to what the network was trained on.

    Args:
        mode: "min-max": each image's own minimum and maximum become the ends of ``output_range`` (a constant image
            becomes its lower end). "window": intensities are clipped to ``window`` first. "z-score": the mean of the
            foreground, of all that is not 0, becomes 0 and its standard deviation 1, as is usual for MRI without a
            skull; values outside become (0 - mean) / deviation.
        window: (low, high) in raw units, Hounsfield units for CT, for "window" only; or one such pair for each channel.
        output_range: (low, high) of the result of "min-max" and "window".
        size: (H, W) of the images trained on, in pixels, or (D, H, W) of volumes; None: any size is accepted.
        pixel_spacing: (row, column) of these pixels in mm, or (slice, row, column) of voxels; None: any spacing is
            accepted. Calling this neither cuts nor resamples: ``sample_volume`` does, by these two.
        per_channel: scale each channel by its own numbers; else all of them by the same.
        by_volume: each channel is scaled by the numbers of the volume that the image is a slice of, so that a slice
            alone gets the masks that it has in its volume. They have to be given then: ``statistics`` of the volume.
        foreground: images were cut around what is not 0, the head of an MRI; ``sample_volume`` does the same.
        context_slices: so many neighbours above and below a slice are channels beside it, scan by scan
            (``channels.in_context``). Calling this does not put them there: ``sample_volume`` and imports do.

    Raises:
        ValueError, TypeError: an unknown mode, or a window, range, size or spacing that is missing, superfluous or
            makes no sense.
    """

    mode: str = "min-max"
    window: tuple[float, float] | tuple[tuple[float, float], ...] | None = None
    output_range: tuple[float, float] = (-1.0, 1.0)
    size: tuple[int, ...] | None = None
    pixel_spacing: tuple[float, ...] | None = None
    per_channel: bool = False
    by_volume: bool = False
    foreground: bool = False
    context_slices: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be 'min-max', 'window' or 'z-score', got {self.mode!r}")
        if (self.window is None) != (self.mode != "window"):
            raise ValueError(f"window must be given exactly when mode is 'window', got window={self.window}")
        if self.window is not None:
            object.__setattr__(self, "window", _windows(self.window))
        object.__setattr__(self, "output_range", checks.increasing_pair("output_range", self.output_range))
        for name, kind in (("size", int), ("pixel_spacing", float)):
            pair = getattr(self, name)
            if pair is not None:
                if len(pair) not in (2, 3) or not all(0 < x < float("inf") and kind(x) == x for x in pair):
                    raise ValueError(
                        f"{name} must be two positive numbers, along rows and columns (three of a volume), got {pair!r}"
                    )
                object.__setattr__(self, name, tuple(kind(x) for x in pair))
        for name in ("per_channel", "by_volume", "foreground"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r:.80}")
        checks.integer("context_slices", self.context_slices, 0)
        if self.by_volume and self.mode == "window":
            raise ValueError("by_volume has no meaning for mode 'window', which asks for no statistics")

    def check_dims(self, spatial_dims: int) -> None:
        """Raise ValueError where this says of images, or of volumes, what is of the other."""
        for name in ("size", "pixel_spacing"):
            sides = getattr(self, name)
            if sides is not None and len(sides) != spatial_dims:
                raise ValueError(
                    f"{name} must be {spatial_dims} numbers for spatial_dims = {spatial_dims}, got {sides}"
                )
        if self.context_slices and spatial_dims == 3:
            raise ValueError(f"context_slices must be 0 for spatial_dims = 3, got {self.context_slices}")

    def to_config(self) -> dict[str, Any]:
        """The arguments. Later ones are named only where they are used: files of other models are what they were."""
        return {name: value for name, value in asdict(self).items() if value or name not in _LATER}

    def __repr__(self) -> str:
        return f"Preprocessing({', '.join(f'{name}={value!r}' for name, value in self.to_config().items())})"

    def __call__(self, raw: torch.Tensor, statistics: Statistics | None = None) -> torch.Tensor:
        """(B, C, *spatial) of any real dtype to float32 of the same shape.

        Args:
            statistics: what ``statistics`` says of the whole images, where ``raw`` is a part of them; of the volumes,
                if ``by_volume``.

        Raises:
            ValueError: it is needed and was not given, or the window is not one of so many channels.
        """
        x = _floating(raw)
        if self.window is not None:
            low, high = self._window_of(x)
            unit = (x.clamp(low, high) - low) / (high - low)
        else:
            if statistics is None:
                if self.by_volume:
                    raise ValueError(
                        "statistics must be given: this model scales a slice by its volume; take "
                        "model.preprocessing.statistics of the volume (1, C, S, H, W)"
                    )
                statistics = self.statistics(raw)
            assert statistics is not None  # only a window has none
            first, second = (_as_wide(s.to(x.dtype), x.ndim) for s in statistics)
            if self.mode == "z-score":
                return ((x - first) / second.clamp(min=1e-12)).float()
            unit = torch.where(second > first, (x - first) / (second - first).clamp(min=1e-30), 0.0)
        start, end = self.output_range
        return (start + (end - start) * unit).float()

    def statistics(self, raw: torch.Tensor) -> Statistics | None:
        """What images or volumes are scaled by.

        Args:
            raw: (B, C, *spatial), whole.

        Returns:
            Minimum and maximum for "min-max", mean and standard deviation of what is not 0 for "z-score", (B, C, 1,
            ..., 1) both with ``per_channel`` or ``by_volume``, else (B, 1, ..., 1). None for "window".
        """
        if self.mode == "window":
            return None
        x = _floating(raw)
        axes = tuple(range(2 if self.per_channel or self.by_volume else 1, x.ndim))
        if self.mode == "min-max":
            return x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
        x = x.double()
        some = x != 0
        count = some.sum(axes, keepdim=True).clamp(min=1)
        mean = x.sum(axes, keepdim=True) / count
        variance = torch.where(some, x - mean, 0.0).square().sum(axes, keepdim=True) / count
        # Where there is nothing but 0, or one value, it stays what it is.
        deviation = variance.sqrt()
        return mean, torch.where(deviation > 0, deviation, 1.0)

    def _window_of(self, x: torch.Tensor) -> tuple[Any, Any]:
        assert self.window is not None
        if isinstance(self.window[0], float):
            return self.window
        if len(self.window) != x.shape[1]:
            raise ValueError(f"window must be one pair or one for each of the {x.shape[1]} channels, got {self.window}")
        ends = torch.tensor(self.window, dtype=x.dtype, device=x.device)
        low, high = ends.T.reshape(2, 1, -1, *[1] * (x.ndim - 2)).unbind()
        return low, high


def statistics_of(volume: np.ndarray) -> np.ndarray:
    """(4,) float64 of a channel of a volume: minimum, maximum, mean and standard deviation of what is not 0.

    As files have them: of ``Preprocessing.statistics``, so that a slice of a file is scaled as one of its volume.
    """
    x = torch.from_numpy(np.ascontiguousarray(volume, np.float32))[None, None]
    found = [Preprocessing(mode).statistics(x) for mode in ("min-max", "z-score")]
    return np.array([float(value) for pair in found if pair is not None for value in pair], np.float64)


def _windows(window: Any) -> tuple[float, float] | tuple[tuple[float, float], ...]:
    several = isinstance(window, Sequence) and window and not isinstance(window, str)
    if several and all(isinstance(pair, Sequence) and not isinstance(pair, str) for pair in window):
        return tuple(checks.increasing_pair("window", pair) for pair in window)
    return checks.increasing_pair("window", window)


def _as_wide(statistics: torch.Tensor, dims: int) -> torch.Tensor:
    """Of volumes, for slices of them: a dimension less; or one more."""
    return statistics.reshape(*statistics.shape[:2], *[1] * (dims - 2))


def _floating(raw: torch.Tensor) -> torch.Tensor:
    return raw.to(torch.float32 if raw.dtype != torch.float64 else torch.float64)


def warn_of_ranges(low: Sequence[float], high: Sequence[float], where: str) -> None:
    """Say that channels which differ in range by more than ten are scaled together: most of them will be nearly black.

    Args:
        low, high: minimum and maximum of each channel.
        where: whose channels these are.
    """
    ranges = [b - a for a, b in zip(low, high, strict=True)]
    if min(ranges) > 0 and max(ranges) > _APART * min(ranges):
        told = ", ".join(f"{r:.4g}" for r in ranges)
        logger.warning(
            "%s: channels differ in range (%s) and are scaled together, so that some are nearly black; "
            "per_channel scales each by itself",
            where,
            told,
        )
