# SPDX-License-Identifier: Apache-2.0
"""What a picture shows of an image of several channels, and of a volume: one grey slice, and the masks in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from berdiff_fast.channels import COLOUR
from berdiff_fast.io import colours


def of_images(images: torch.Tensor, channels: Sequence[str] | None = None, context_slices: int = 0) -> torch.Tensor:
    """(B, H, W) float32 of images (B, C, *spatial) of any real dtype.

    Shown is the luminance of a colour picture, else the first channel: with ``context_slices`` above and below, the
    slice between them. Of volumes (D, H, W) it is the slice in the middle.

    Args:
        images: of a file.
        channels: their names, if they have any.
        context_slices: how many neighbours on either side stand beside each slice as channels.
    """
    if channels is not None and tuple(channels) == COLOUR:
        found = torch.from_numpy(colours.luminance(images.float().movedim(1, 0).numpy()))
    else:
        found = images[:, context_slices].float()
    return _middle(found, 1)


def of_masks(masks: torch.Tensor) -> torch.Tensor:
    """(B, n, H, W) of masks (B, n, K, *spatial): the first region; of volumes the slice in the middle."""
    return _middle(masks[:, :, 0], 2)


def _middle(x: torch.Tensor, before: int) -> torch.Tensor:
    """Of (..., D, H, W), with ``before`` dimensions in front, the slice D // 2; (..., H, W) as it is."""
    return x if x.ndim == before + 2 else x.select(before, x.shape[before] // 2)
