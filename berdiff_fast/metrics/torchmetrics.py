# SPDX-License-Identifier: Apache-2.0
"""The metrics over a data set, as ``torchmetrics.Metric``: in Lightning, across processes, in a ``MetricCollection``.

    pip install "berdiff_fast[train]"

>>> from berdiff_fast.metrics.torchmetrics import Evaluation
>>> evaluation = Evaluation()
>>> for images, raters in loader:
...     evaluation.update(raters, bf.sample(model, images, n=16))
>>> evaluation.compute()  # {"ged": tensor(...), "hm_iou": ...}

``update`` takes raters (N, R, *shape) and samples (N, n, *shape), of a size that may change from call to call. All
states are sums over images, so however images are spread over processes, the result is that of one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError(
        f"berdiff_fast.metrics.torchmetrics needs torchmetrics: pip install torchmetrics ({error})"
    ) from None

from berdiff_fast import checks
from berdiff_fast.metrics import functional

__all__ = [
    "DiceMajority",
    "Evaluation",
    "ExpectedCalibrationError",
    "GeneralizedEnergyDistance",
    "HungarianMatchedIoU",
    "IoUMajority",
    "SampleDiversity",
    "SoftDice",
]


class _MeansOverImages(Metric):
    full_state_update = False
    is_differentiable = False
    totals: torch.Tensor
    images: torch.Tensor

    def __init__(self, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = tuple(names)
        self.add_state("totals", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, raters: Any, samples: Any) -> None:
        values = functional.evaluate(raters, samples, self.names)
        self.totals += torch.stack([values[name].sum() for name in self.names]).to(self.totals.device)
        self.images += len(raters)

    def _means(self) -> torch.Tensor:
        return self.totals / self.images


class Evaluation(_MeansOverImages):
    """Means over all images of several metrics, from one pass over the masks.

    Args:
        names: which, of ``metrics.METRICS``; all by default. "ece" is the mean of the images' errors here;
            ``ExpectedCalibrationError`` is that of all their pixels.
        kwargs: of ``torchmetrics.Metric``.

    Raises:
        ValueError: there is no metric of a name.
    """

    def __init__(self, names: Sequence[str] = functional.METRICS, **kwargs: Any) -> None:
        for name in names:
            if name not in functional.METRICS:
                raise ValueError(f"names must be of {list(functional.METRICS)}, got {name!r}")
        super().__init__(names, **kwargs)

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
    """Mean over images of ``metrics.sample_diversity``."""

    name = "sample_diversity"


class ExpectedCalibrationError(Metric):
    """``metrics.expected_calibration_error`` of all pixels of all images together.

    Args:
        bins: at least 1.
        kwargs: of ``torchmetrics.Metric``.

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

    def update(self, raters: Any, samples: Any) -> None:
        self.counts += functional.calibration_bins(raters, samples, self.bins).sum(0).to(self.counts.device)

    def compute(self) -> torch.Tensor:
        return functional.calibration_error(self.counts)
