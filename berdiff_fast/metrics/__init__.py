# SPDX-License-Identifier: Apache-2.0
"""How well a set of sampled masks agrees with a set of raters' masks; definitions and sources in docs/metrics.md.

``torchmetrics.py`` beside this file accumulates the same numbers over a data set; it is imported only when asked for.
"""

from berdiff_fast.metrics.decomposition import (
    DECOMPOSITION,
    ExistenceCalibration,
    calibration_of_sums,
    decompose_ged,
    existence_bins,
    existence_calibration,
    existence_sums,
    existence_table,
    ged_floor,
    unbiased_energy_distance,
)
from berdiff_fast.metrics.from_counts import HIGHER_IS_BETTER, METRICS, calibration_error
from berdiff_fast.metrics.functional import (
    calibration_bins,
    dice_majority,
    evaluate,
    evaluate_counts,
    expected_calibration_error,
    generalized_energy_distance,
    hm_iou,
    iou_distance,
    iou_majority,
    sample_diversity,
    soft_dice,
    vote_histogram,
)

__all__ = [
    "DECOMPOSITION",
    "HIGHER_IS_BETTER",
    "METRICS",
    "ExistenceCalibration",
    "calibration_bins",
    "calibration_error",
    "calibration_of_sums",
    "decompose_ged",
    "dice_majority",
    "evaluate",
    "evaluate_counts",
    "existence_bins",
    "existence_calibration",
    "existence_sums",
    "existence_table",
    "expected_calibration_error",
    "ged_floor",
    "generalized_energy_distance",
    "hm_iou",
    "iou_distance",
    "iou_majority",
    "sample_diversity",
    "soft_dice",
    "unbiased_energy_distance",
    "vote_histogram",
]
