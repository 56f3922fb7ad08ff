# SPDX-License-Identifier: Apache-2.0
"""The metrics over a data set, as ``torchmetrics.Metric``: in Lightning, across processes, in a ``MetricCollection``.

    pip install "berdiff_fast[train]"

>>> from berdiff_fast.metrics.torchmetrics import Evaluation
>>> evaluation = Evaluation()
>>> for images, raters in loader:
...     evaluation.update(raters, bf.sample(model, images, n=16))
>>> evaluation.compute()  # {"ged": tensor(...), "hm_iou": ...}

``update`` takes raters (N, R, *shape) and samples (N, n, *shape), of a size that may change from call to call, and may
be told who read which image, ``rater_valid`` (N, R). All states are sums over images, so however images are spread over
processes, the result is that of one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from berdiff_fast import checks
from berdiff_fast._optional import require
from berdiff_fast.metrics import decomposition, from_counts, functional

Metric: Any = require("torchmetrics", "train").Metric

__all__ = [
    "DiceMajority",
    "Evaluation",
    "ExistenceError",
    "ExpectedCalibrationError",
    "GEDDecomposition",
    "GeneralizedEnergyDistance",
    "HungarianMatchedIoU",
    "IoUMajority",
    "SampleDiversity",
    "SoftDice",
    "UnbiasedEnergyDistance",
]


class _MeansOverImages(Metric):
    full_state_update = False
    is_differentiable = False
    images: torch.Tensor

    def __init__(self, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = tuple(names)
        # A name of its own: a MetricCollection takes metrics whose states have equal names and, after the first batch,
        # equal values for one and the same, and Dice and IoU of masks that never meet are both 0.
        self._totals = "totals_of_" + "_".join(self.names)
        self.add_state(self._totals, torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, raters: Any, samples: Any, rater_valid: Any = None) -> None:
        values = self._values(raters, samples, rater_valid)
        totals = getattr(self, self._totals)
        totals += torch.stack([values[name].sum() for name in self.names]).to(totals.device)
        self.images += len(raters)

    def _values(self, raters: Any, samples: Any, rater_valid: Any) -> dict[str, torch.Tensor]:
        return functional.evaluate(raters, samples, self.names, rater_valid=rater_valid)

    def _means(self) -> torch.Tensor:
        return getattr(self, self._totals) / self.images


class Evaluation(_MeansOverImages):
    """Means over all images of several metrics, from one pass over the masks.

    Args:
        names: which, of ``metrics.METRICS``; all by default. "ece" is the mean of the images' errors here;
            ``ExpectedCalibrationError`` is that of all their pixels.
        kwargs: passed on to ``torchmetrics.Metric``.

    Attributes:
        higher_is_better: True or False where that holds for all the names, None where they differ.

    Raises:
        ValueError: there is no metric of a name.
    """

    def __init__(self, names: Sequence[str] = functional.METRICS, **kwargs: Any) -> None:
        for name in names:
            if name not in functional.METRICS:
                raise ValueError(f"names must be of {list(functional.METRICS)}, got {name!r}")
        super().__init__(names, **kwargs)

    @property
    def higher_is_better(self) -> bool | None:
        ways = {from_counts.HIGHER_IS_BETTER[name] for name in self.names}
        return ways.pop() if len(ways) == 1 else None

    def compute(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.names, self._means(), strict=True))


class GEDDecomposition(_MeansOverImages):
    """Means over all images of what ``metrics.decompose_ged`` tells: chance, existence and shape.

    Args:
        kwargs: passed on to ``torchmetrics.Metric``.
    """

    higher_is_better = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(decomposition.DECOMPOSITION, **kwargs)

    def _values(self, raters: Any, samples: Any, rater_valid: Any) -> dict[str, torch.Tensor]:
        return decomposition.decompose_ged(raters, samples, rater_valid=rater_valid)

    def compute(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.names, self._means(), strict=True))


class _MeanOverImages(_MeansOverImages):
    name = ""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__((self.name,), **kwargs)

    def compute(self) -> torch.Tensor:
        return self._means()[0]


class GeneralizedEnergyDistance(_MeanOverImages):
    """Mean over images of ``metrics.generalized_energy_distance``."""

    name = "ged"
    higher_is_better = False


class HungarianMatchedIoU(_MeanOverImages):
    """Mean over images of ``metrics.hm_iou``."""

    name = "hm_iou"
    higher_is_better = True


class SoftDice(_MeanOverImages):
    """Mean over images of ``metrics.soft_dice``."""

    name = "soft_dice"
    higher_is_better = True


class DiceMajority(_MeanOverImages):
    """Mean over images of ``metrics.dice_majority``."""

    name = "dice_majority"
    higher_is_better = True


class IoUMajority(_MeanOverImages):
    """Mean over images of ``metrics.iou_majority``."""

    name = "iou_majority"
    higher_is_better = True


class SampleDiversity(_MeanOverImages):
    """Mean over images of ``metrics.sample_diversity``.

    It should equal the raters'; ``higher_is_better`` is for tools that must have it, see ``metrics.HIGHER_IS_BETTER``.
    """

    name = "sample_diversity"
    higher_is_better = True


class UnbiasedEnergyDistance(_MeanOverImages):
    """Mean over images of ``metrics.unbiased_energy_distance``; NaN as soon as an image had one rater or sample."""

    name = "ged_unbiased"
    higher_is_better = False

    def _values(self, raters: Any, samples: Any, rater_valid: Any) -> dict[str, torch.Tensor]:
        return decomposition.decompose_ged(raters, samples, rater_valid=rater_valid)


class ExistenceError(Metric):
    """The root mean square over images of P(empty) of the samples against the raters' share.

    Args:
        kwargs: passed on to ``torchmetrics.Metric``.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    sums: torch.Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(6, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, raters: Any, samples: Any, rater_valid: Any = None) -> None:
        sums = decomposition.existence_sums(raters, samples, rater_valid=rater_valid)
        self.sums += sums.sum(0).to(self.sums.device)

    def compute(self) -> torch.Tensor:
        return (self.sums[1] / self.sums[0]).sqrt()

    def calibration(self) -> decomposition.ExistenceCalibration:
        """The error beside its binomial floors and a constant's, of this process's images."""
        return decomposition.calibration_of_sums(self.sums)


class ExpectedCalibrationError(Metric):
    """``metrics.expected_calibration_error`` of all pixels of all images together.

    Args:
        bins: at least 1.
        kwargs: passed on to ``torchmetrics.Metric``.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    counts: torch.Tensor

    def __init__(self, bins: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bins = checks.integer("bins", bins, 1)
        self.add_state("counts", torch.zeros(self.bins, 3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, raters: Any, samples: Any, rater_valid: Any = None) -> None:
        bins = functional.calibration_bins(raters, samples, self.bins, rater_valid=rater_valid)
        self.counts += bins.sum(0).to(self.counts.device)

    def compute(self) -> torch.Tensor:
        return functional.calibration_error(self.counts)
