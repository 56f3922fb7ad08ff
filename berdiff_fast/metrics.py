# SPDX-License-Identifier: Apache-2.0
"""How well a set of sampled masks agrees with a set of raters' masks."""

from __future__ import annotations

import torch


def iou_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """d = 1 - IoU of every mask of a with every mask of b; two empty masks have d = 0.

    Args:
        a, b: (N, R, *shape) and (N, n, *shape) masks, bool or 0/1.

    Returns:
        (N, R, n) float64.
    """
    a, b = a.flatten(2).double(), b.flatten(2).double()
    both = a @ b.mT
    either = a.sum(-1)[:, :, None] + b.sum(-1)[:, None] - both
    return torch.where(either > 0, 1 - both / either.clamp(min=1), 0.0)


def generalized_energy_distance(raters: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """GED^2 = 2 E d(Y, S) - E d(Y, Y') - E d(S, S') over all ordered pairs, i = j included; lower is better.

    The published evaluation (Kohl et al., arXiv 1806.05034, with the raters and samples at hand as the distributions).

    Args:
        raters: (N, R, *shape) masks.
        samples: (N, n, *shape) masks of the same shape.

    Returns:
        (N,) float64.

    Raises:
        ValueError: the images or the shapes of the masks differ.
    """
    if raters.shape[0] != samples.shape[0] or raters.shape[2:] != samples.shape[2:] or raters.ndim < 3:
        raise ValueError(
            "raters and samples must be (N, R, *shape) and (N, n, *shape) with the same N and shape, got "
            f"{tuple(raters.shape)} and {tuple(samples.shape)}"
        )

    def mean(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return iou_distance(a, b).mean((1, 2))

    return 2 * mean(raters, samples) - mean(raters, raters) - mean(samples, samples)
