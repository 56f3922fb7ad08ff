# SPDX-License-Identifier: Apache-2.0
"""The metrics as functions of counts: of overlaps between masks, and of votes of pixels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from berdiff_fast import ops

#: Thresholds of the published soft Dice: 0.1, 0.3, 0.5, 0.7, 0.9. In tenths, so that comparisons are exact.
_SOFT_DICE_TENTHS = (1, 3, 5, 7, 9)
_MAJORITY_TENTHS = (5,)
#: Keeps the published soft Dice of two empty maps at 1.
_SMOOTH = 1e-6
#: Added to every overlap, and so to every area and union, it changes no count but zero, and makes 0 / 0 one.
_ALMOST_NOTHING = 1e-300

# ---------------------------------------------------------------------- from the overlaps: (N, R + n, R + n), and R


def iou_of(raters: torch.Tensor, samples: torch.Tensor) -> np.ndarray:
    """IoU of any two masks of an image, those of the raters first."""
    shared = ops.overlap(raters, samples).cpu().numpy() + _ALMOST_NOTHING
    area = shared.diagonal(0, 1, 2)
    union = area[:, :, None] + area[:, None, :]
    union -= shared
    return np.divide(shared, union, out=union)


def ged_of(iou: np.ndarray, raters: int) -> np.ndarray:
    weights = _ged_weights(raters, iou.shape[1] - raters)
    return iou.dot(weights).dot(weights)


@functools.lru_cache
def _ged_weights(raters: int, samples: int) -> np.ndarray:
    # With weights 1/R and -1/n the three means are one quadratic form; they sum to zero, so the 1 of 1 - IoU drops out.
    return np.repeat([1 / raters, -1 / samples], [raters, samples])


def _hm_iou(iou: np.ndarray, raters: int) -> np.ndarray:
    best_pairs = _linear_sum_assignment()
    n = iou.shape[1] - raters
    size = math.lcm(raters, n)
    costs = (1 - iou[:, :raters, raters:]).repeat(size // raters, axis=1)
    if size > n:
        costs = costs.repeat(size // n, axis=2)
    # Adding up a list takes less time than calling NumPy for it.
    return np.array([1 - sum(image[best_pairs(image)].tolist()) / size for image in costs])


@functools.cache
def _linear_sum_assignment() -> Callable[..., Any]:
    from scipy.optimize import linear_sum_assignment  # here, because importing it takes longer than all of this package

    return linear_sum_assignment


def _sample_diversity(iou: np.ndarray, raters: int) -> np.ndarray:
    return 1 - iou[:, raters:, raters:].mean((1, 2))


# ---------------------------------------------------------------------- from the votes: (N, R + 1, n + 1)


def votes_of(masks: torch.Tensor) -> torch.Tensor:
    # Comparing bool with a number, and adding bool up, take several times as long as the same with bytes.
    marks = (masks if masks.dtype is torch.bool else masks != 0).view(torch.uint8)
    return marks.flatten(2).sum(1, dtype=torch.int64)


def _regions(votes: np.ndarray, tenths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels that more than this share of the raters marks, of the samples, and of both: (N, shares) each."""
    shares = np.array(tenths)[:, None]
    rows, columns = (10 * np.arange(size) > shares * (size - 1) for size in votes.shape[1:])
    of_both = ((rows @ votes) * columns).sum(2)
    return votes.sum(2) @ rows.T, votes.sum(1) @ columns.T, of_both


def _soft_dice(votes: np.ndarray) -> np.ndarray:
    a, b, both = _regions(votes, _SOFT_DICE_TENTHS)
    return ((2 * both + _SMOOTH) / (a + b + _SMOOTH)).mean(1)


def _dice_majority(votes: np.ndarray) -> np.ndarray:
    a, b, both = (region[:, 0] for region in _regions(votes, _MAJORITY_TENTHS))
    empty = a + b == 0
    return (2 * both + empty) / (a + b + empty)


def _iou_majority(votes: np.ndarray) -> np.ndarray:
    a, b, both = (region[:, 0] for region in _regions(votes, _MAJORITY_TENTHS))
    empty = a + b == 0
    return (both + empty) / (a + b - both + empty)


def bins_of_votes(votes: np.ndarray, bins: int) -> np.ndarray:
    raters, n = votes.shape[1] - 1, votes.shape[2] - 1
    marked = np.arange(n + 1)
    pixels = votes.sum(1)
    # (k-1)/bins < marked/n <= k/bins, in integers.
    bin_of = np.maximum((marked * bins - 1) // n, 0)
    of_counts = np.stack([pixels, pixels * marked / n, np.arange(raters + 1) @ votes / raters], axis=2)
    return (bin_of == np.arange(bins)[:, None]).astype(np.float64) @ of_counts


def calibration_error(bins: torch.Tensor) -> torch.Tensor:
    """The expected calibration error of (..., bins, 3), as ``calibration_bins`` gives it or summed over images."""
    pixels, predicted, observed = bins.unbind(-1)
    return (predicted - observed).abs().sum(-1) / pixels.sum(-1)


def _ece(votes: np.ndarray) -> np.ndarray:
    return calibration_error(torch.from_numpy(bins_of_votes(votes, 10))).numpy()


OF_IOU: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "ged": ged_of,
    "hm_iou": _hm_iou,
    "sample_diversity": _sample_diversity,
}
OF_VOTES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "soft_dice": _soft_dice,
    "dice_majority": _dice_majority,
    "iou_majority": _iou_majority,
    "ece": _ece,
}

#: Names that ``evaluate`` knows.
METRICS: tuple[str, ...] = (*OF_IOU, *OF_VOTES)

#: Which way is better, for tools that keep the best. Of the diversity neither is, where the raters' is known; papers
#: that rank by it alone take the higher.
HIGHER_IS_BETTER: dict[str, bool] = {name: name not in ("ged", "ece") for name in METRICS}
