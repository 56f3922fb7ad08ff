# SPDX-License-Identifier: Apache-2.0
"""GED and HM-IoU the way the published code computes them: the baseline of the metrics' benchmark.

One pair of masks after another, each with two reductions of a boolean array; the raters repeated to the number of
samples for HM-IoU, every pair of them anew.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment


def distance(a: np.ndarray, b: np.ndarray) -> float:
    union = np.logical_or(a, b).sum()
    return 1 - np.logical_and(a, b).sum() / union if union else 0.0


def mean_distance(a: np.ndarray, b: np.ndarray) -> float:
    total = 0.0
    for x in a:
        for y in b:
            total += distance(x, y)
    return total / (len(a) * len(b))


def ged(raters: np.ndarray, samples: np.ndarray) -> float:
    """Of bool (R, H, W) and (n, H, W)."""
    within = mean_distance(raters, raters) + mean_distance(samples, samples)
    return 2 * mean_distance(raters, samples) - within


def hm_iou(raters: np.ndarray, samples: np.ndarray) -> float:
    """Of bool (R, H, W) and (n, H, W), n a multiple of R."""
    repeated = np.repeat(raters, len(samples) // len(raters), axis=0)
    distances = np.zeros((len(repeated), len(samples)))
    for i, x in enumerate(repeated):
        for j, y in enumerate(samples):
            distances[i, j] = distance(x, y)
    return float((1 - distances)[linear_sum_assignment(distances)].mean())
