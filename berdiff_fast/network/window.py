# SPDX-License-Identifier: Apache-2.0
"""Where to look: masks that are denoised in the middle of the image only, and what a network is shown of the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from berdiff_fast import checks

#: The logit of "no", and minus it: exp(-z) of the draw contract counts larger ones as this.
CERTAIN = 64.0


def middle(x: torch.Tensor, size: int, off: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """The middle ``size`` x ``size`` pixels of (..., H, W), a view; moved by ``off`` as far as the image goes."""
    top, left = (
        min(max((length - size) // 2 + by, 0), length - size) for length, by in zip(x.shape[-2:], off, strict=True)
    )
    return x[..., top : top + size, left : left + size]


def surroundings(img: torch.Tensor, size: int, off: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """The middle 2 size x 2 size pixels of (N, C, H, W) at half the resolution; beyond its edge an image goes on."""
    pads = []
    for length in reversed(img.shape[-2:]):
        missing = max(2 * size - length, 0)
        pads += [missing // 2 + missing % 2, missing // 2]
    if any(pads):
        img = F.pad(img, pads, mode="replicate")
    return F.avg_pool2d(middle(img, 2 * size, off), 2)


def center_distance(x: torch.Tensor) -> torch.Tensor:
    """(1, 1, H, W) for x (..., H, W): each pixel's distance from the middle, in halves of the shorter side."""
    height, width = x.shape[-2:]
    unit = min(height, width) / 2
    y = (torch.arange(height, device=x.device, dtype=torch.float32) - (height - 1) / 2) / unit
    z = (torch.arange(width, device=x.device, dtype=torch.float32) - (width - 1) / 2) / unit
    return (y[:, None].square() + z.square()).sqrt().to(x.dtype)[None, None]


@dataclass(frozen=True)
class Window:
    """What the network is shown of images and masks, and what its logits are outside.

    Args:
        size: of the middle square in which masks are denoised, in pixels; 0: all of the image.
        context: the network is also shown the surroundings: the middle 2 size x 2 size pixels of each channel at half
            the resolution, as channels of their own.
        distance: it is also shown each pixel's distance from the middle, as one more channel.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    size: int = 0
    context: bool = False
    distance: bool = False

    def __post_init__(self) -> None:
        checks.integer("output_crop", self.size, 0)
        for name in ("context", "distance"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.context and not self.size:
            raise ValueError("context needs an output_crop: without one all of the image is seen anyway")

    @property
    def plain(self) -> bool:
        """Whether the network is shown images and masks as they are."""
        return not (self.size or self.distance)

    def channels(self, img_channels: int) -> int:
        """How many channels the network is shown of an image with so many."""
        return img_channels * (2 if self.context else 1) + int(self.distance)

    def img_channels(self, channels: int) -> int:
        """The inverse of ``channels``.

        Raises:
            ValueError: no number of image channels gives this.
        """
        found, rest = divmod(channels - int(self.distance), 2 if self.context else 1)
        if rest or found < 1:
            raise ValueError(
                f"network must have one image channel for each of the image's{' and its surroundings' * self.context}"
                f"{', and one for the distance' * self.distance}, got {channels}"
            )
        return found

    def check(self, name: str, size: tuple[int, ...] | torch.Size) -> None:
        """Raise ValueError for images (..., H, W) that are smaller than the window."""
        if min(size[-2:]) < self.size:
            raise ValueError(
                f"{name} must be at least {self.size} x {self.size} pixels, the window that masks are denoised in, got "
                f"{size[-2]} x {size[-1]}"
            )

    def cut(self, y: torch.Tensor) -> torch.Tensor:
        """The window of masks (..., H, W)."""
        return middle(y, self.size) if self.size else y

    def view(self, img: torch.Tensor) -> torch.Tensor:
        """What the network is shown of images: (N, C, H, W) to (N, ``channels(C)``, h, w)."""
        if self.plain:
            return img
        parts = [self.cut(img)]
        if self.context:
            parts.append(surroundings(img, self.size))
        if self.distance:
            parts.append(center_distance(parts[0]).expand(len(img), 1, *parts[0].shape[2:]))
        return torch.cat(parts, dim=1)

    def fill(self, logits: torch.Tensor, y_t: torch.Tensor, prediction: str) -> torch.Tensor:
        """Logits of the window, and around it a certain no: those of all masks y_t (N, K, H, W)."""
        if not self.size:
            return logits
        if prediction == "y_0":
            full = torch.full_like(y_t, -CERTAIN, dtype=logits.dtype)
        else:  # epsilon: what is marked there is noise
            full = (y_t.to(logits.dtype) - 0.5) * (2 * CERTAIN)
        self.cut(full).copy_(logits)
        return full
