# SPDX-License-Identifier: Apache-2.0
"""From raw intensities to what a network was trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from berdiff_fast import checks


@dataclass(frozen=True)
class Preprocessing:
    """From raw intensities to what the network was trained on.

    Args:
        mode: "min-max": each image's own minimum and maximum become the ends of ``output_range`` (a constant image
            becomes its lower end). "window": intensities are clipped to ``window`` first.
        window: (low, high) in raw units, Hounsfield units for CT; for "window" only.
        output_range: (low, high) of the result.
        size: (H, W) of the images trained on, in pixels; None: any size is accepted.
        pixel_spacing: (row, column) of these pixels in mm; None: any spacing is accepted. Calling this neither cuts nor
            resamples: ``sample_volume`` does, by these two.

    Raises:
        ValueError: an unknown mode, or a window, range, size or spacing that is missing, superfluous or makes no sense.
    """

    mode: str = "min-max"
    window: tuple[float, float] | None = None
    output_range: tuple[float, float] = (-1.0, 1.0)
    size: tuple[int, int] | None = None
    pixel_spacing: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("min-max", "window"):
            raise ValueError(f"mode must be 'min-max' or 'window', got {self.mode!r}")
        if (self.window is None) != (self.mode == "min-max"):
            raise ValueError(f"window must be given exactly when mode is 'window', got window={self.window}")
        if self.window is not None:
            object.__setattr__(self, "window", checks.increasing_pair("window", self.window))
        object.__setattr__(self, "output_range", checks.increasing_pair("output_range", self.output_range))
        for name, kind in (("size", int), ("pixel_spacing", float)):
            pair = getattr(self, name)
            if pair is not None:
                if len(pair) != 2 or not all(0 < x < float("inf") and kind(x) == x for x in pair):
                    raise ValueError(f"{name} must be two positive numbers, along rows and columns, got {pair!r}")
                object.__setattr__(self, name, (kind(pair[0]), kind(pair[1])))

    def __call__(self, raw: torch.Tensor, limits: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """(B, C, *spatial) of any real dtype to float32 of the same shape.

        Args:
            limits: what ``limits`` says of the whole images, where ``raw`` is a part of them.
        """
        x = _floating(raw)
        if self.window is not None:
            low, high = self.window
            unit = (x.clamp(low, high) - low) / (high - low)
        else:
            low_, high_ = self.limits(raw) if limits is None else limits
            unit = torch.where(high_ > low_, (x - low_) / (high_ - low_).clamp(min=1e-30), 0.0)
        start, end = self.output_range
        return (start + (end - start) * unit).float()

    @staticmethod
    def limits(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Minimum and maximum of each image, (B, 1, ..., 1) both, for "min-max"."""
        x = _floating(raw)
        axes = tuple(range(1, x.ndim))
        return x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)


def _floating(raw: torch.Tensor) -> torch.Tensor:
    return raw.to(torch.float32 if raw.dtype != torch.float64 else torch.float64)
