# SPDX-License-Identifier: Apache-2.0
"""What GED is made of: chance, existence and shape; and whether "is there anything" is calibrated. See docs/metrics.md.

GED of finite sets is never 0, not even for samples from the raters' own distribution: ``ged_floor`` is what those
reach. The rest is fault, and splits exactly into how often a mask is empty and what the masks look like that are not.

As in ``functional``, ``raters`` is (N, R, *shape) and ``samples`` (N, n, *shape), and results are (N,) float64 on the
device of the raters. What a single mask cannot tell, the distance between two of its kind, is NaN where R or n is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from berdiff_fast import checks
from berdiff_fast.metrics import from_counts, functional
from berdiff_fast.metrics.readers import of_readers

#: What ``decompose_ged`` tells of each image.
DECOMPOSITION: tuple[str, ...] = (
    "ged_floor",
    "ged_unbiased",
    "ged_existence",
    "ged_shape",
    "existence_unbiased",
    "shape_unbiased",
    "empty_raters",
    "empty_samples",
)


def decompose_ged(raters: Any, samples: Any, *, rater_valid: Any = None) -> dict[str, torch.Tensor]:
    """GED^2 taken apart, from one pass over the masks.

    With r and e the shares of empty masks among raters and samples, D_Y and D_S the mean distance of two *different*
    raters and samples:

    * ``ged_floor`` = D_Y (1/R + 1/n): the mean GED^2 of n independent draws from the raters' own distribution;
    * ``ged_unbiased`` = 2 E d(Y, S) - D_Y - D_S = GED^2 - D_Y/R - D_S/n: 0 on average for such draws, so below 0 too;
    * ``ged_existence`` = 2 (r - e)^2 and ``ged_shape`` = GED^2 - 2 (r - e)^2: exact, see docs/metrics.md;
    * ``existence_unbiased`` = 2 [(r - e)^2 - r (1 - r)/(R - 1) - e (1 - e)/(n - 1)] and ``shape_unbiased``, the rest of
      ``ged_unbiased``;
    * ``empty_raters`` = r and ``empty_samples`` = e.

    Args:
        raters: (N, R, *shape) masks.
        samples: (N, n, *shape) masks of the same shape, drawn independently for what is unbiased to be so.
        rater_valid: (N, R), who read which image; see ``evaluate``. R is the number of an image's readers then.

    Returns:
        (N,) float64 for each name of ``DECOMPOSITION``; NaN in the floor where R = 1, in all that is unbiased where R
        or n is 1.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    raters, samples = functional._same_images("raters", raters, "samples", samples)
    return of_readers(raters, samples, rater_valid, _decompose)


def _decompose(raters: torch.Tensor, samples: torch.Tensor) -> dict[str, torch.Tensor]:
    count, n = raters.shape[1], samples.shape[1]
    iou = from_counts.iou_of(raters, samples)
    ged = from_counts.ged_of(iou, count)
    of_raters = _between(iou[:, :count, :count])
    of_samples = _between(iou[:, count:, count:])
    r, e = _empty(raters), _empty(samples)
    existence = 2 * (r - e) ** 2
    unbiased = ged - of_raters / count - of_samples / n
    of_existence = existence - 2 * (_variance(r, count) / count + _variance(e, n) / n)
    found = {
        "ged_floor": of_raters * (1 / count + 1 / n),
        "ged_unbiased": unbiased,
        "ged_existence": existence,
        "ged_shape": ged - existence,
        "existence_unbiased": of_existence,
        "shape_unbiased": unbiased - of_existence,
        "empty_raters": r,
        "empty_samples": e,
    }
    return {name: functional._tensor(values, raters) for name, values in found.items()}


def ged_floor(raters: Any, n: int) -> torch.Tensor:
    """D_Y (1/R + 1/n): the mean GED^2 of n independent draws from the distribution that the raters are drawn from.

    Args:
        raters: (N, R, *shape) masks.
        n: number of samples.

    Returns:
        (N,) float64; NaN where R is 1, since one rater says nothing about two.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    masks = functional._masks("raters", raters)
    checks.integer("n", n, 1)
    count = masks.shape[1]
    return functional._tensor(
        _between(from_counts.iou_of(masks, masks)[:, :count, :count]) * (1 / count + 1 / n), masks
    )


def unbiased_energy_distance(raters: Any, samples: Any, *, rater_valid: Any = None) -> torch.Tensor:
    """GED^2 over pairs of different masks only, i = j left out; its expectation does not depend on R and n.

    Args:
        raters: (N, R, *shape) masks, R >= 2.
        samples: (N, n, *shape) masks of the same shape, n >= 2, drawn independently.

    Returns:
        (N,) float64; lower is better, 0 is the mean of a perfect model, and values below 0 are chance. NaN where R or n
        is 1.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    return decompose_ged(raters, samples, rater_valid=rater_valid)["ged_unbiased"]


# ---------------------------------------------------------------------- is there anything?


class ExistenceCalibration(NamedTuple):
    """How far P(empty) of the samples is from the raters', over images; root mean squares, lower is better."""

    #: sqrt(mean (e - r)^2).
    rmse: float
    #: The same of the true probabilities: R raters are a sample too. NaN where R is 1.
    floor: float
    #: The same of n independent draws from the true probabilities. NaN where R is 1.
    floor_of_draws: float
    #: The same of the best constant, the raters' mean over all images: what knowing nothing of an image reaches.
    constant: float


def existence_calibration(
    empty_raters: Any, empty_samples: Any, raters: int | Sequence[int] | np.ndarray, n: int
) -> ExistenceCalibration:
    """How well the share of empty samples predicts the share of raters who marked nothing.

    With p the true probability of an image, the mean of (p - r)^2 is p (1 - p)/R, of which r (1 - r)/(R - 1) is an
    unbiased estimate: the binomial floor.

    Args:
        empty_raters: (N,) shares r, as ``decompose_ged`` gives them.
        empty_samples: (N,) shares e.
        raters: R, how many raters the shares are of; one number, or that of each image.
        n: how many samples.

    Returns:
        Four numbers, see ``ExistenceCalibration``.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    counts = np.asarray(raters)
    if counts.ndim == 0:
        checks.integer("raters", raters, 1)
    checks.integer("n", n, 1)
    r, e = _pair(empty_raters, empty_samples)
    if counts.ndim and (counts.shape != r.shape or counts.dtype.kind not in "iu" or counts.min() < 1):
        raise ValueError(
            f"raters must be numbers of at least 1, one for each of the {len(r)} images, got {raters!r:.80}"
        )
    sums = torch.from_numpy(_existence_sums(r, e, counts, n).sum(0))
    return calibration_of_sums(sums)


def existence_bins(raters: Any, samples: Any, bins: int = 10, *, rater_valid: Any = None) -> torch.Tensor:
    """Images by the share of their samples that are empty: what a reliability table of existence is made of.

    Bins are ((k-1)/bins, k/bins], e = 0 in the first, as those of ``calibration_bins``. The sum over images is a table.

    Args:
        raters: (N, R, *shape) masks.
        samples: (N, n, *shape) masks of the same shape.
        bins: at least 1.

    Returns:
        (N, bins, 3) float64: in each image's bin 1, its e and its r, elsewhere 0.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    raters, samples = functional._same_images("raters", raters, "samples", samples)
    checks.integer("bins", bins, 1)

    def of(raters: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
        return functional._tensor(_existence_bins(_empty(raters), _empty(samples), samples.shape[1], bins), raters)

    return of_readers(raters, samples, rater_valid, of)


def existence_table(empty_raters: Any, empty_samples: Any, n: int, bins: int = 10) -> torch.Tensor:
    """The sum over images of ``existence_bins``, from their shares of empty masks.

    Args:
        empty_raters: (N,) shares r, as ``decompose_ged`` gives them.
        empty_samples: (N,) shares e of n samples each.
        n: how many samples the shares e are of.
        bins: at least 1.

    Returns:
        (bins, 3) float64: of each bin the number of images, the sum of their e and that of their r.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    checks.integer("n", n, 1)
    checks.integer("bins", bins, 1)
    return torch.from_numpy(_existence_bins(*_pair(empty_raters, empty_samples), n, bins).sum(0))


def existence_sums(raters: Any, samples: Any, *, rater_valid: Any = None) -> torch.Tensor:
    """What ``calibration_of_sums`` needs of each image, to be added up over a data set.

    Returns:
        (N, 6) float64.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    raters, samples = functional._same_images("raters", raters, "samples", samples)

    def of(raters: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
        sums = _existence_sums(_empty(raters), _empty(samples), raters.shape[1], samples.shape[1])
        return functional._tensor(sums, raters)

    return of_readers(raters, samples, rater_valid, of)


def calibration_of_sums(sums: torch.Tensor) -> ExistenceCalibration:
    """``existence_calibration`` of (6,) sums over images of ``existence_sums``."""
    count, squares, of_raters, of_draws, first, second = sums.double().cpu().unbind(-1)
    constant = (second / count - (first / count) ** 2).clamp(min=0)  # the variance of r
    means = squares / count, of_raters / count, of_draws / count, constant
    return ExistenceCalibration(*(float(mean.sqrt()) for mean in means))


# ---------------------------------------------------------------------- arithmetic


def _existence_sums(r: np.ndarray, e: np.ndarray, raters: int | np.ndarray, n: int) -> np.ndarray:
    variance = _variance(r, raters)
    columns = np.ones_like(r), (e - r) ** 2, variance / raters, variance * (1 / raters + 1 / n), r, r**2
    return np.stack(columns, axis=1)


def _existence_bins(r: np.ndarray, e: np.ndarray, n: int, bins: int) -> np.ndarray:
    empties = np.rint(e * n).astype(np.int64)
    # (k-1)/bins < empties/n <= k/bins, in integers.
    bin_of = np.maximum((empties * bins - 1) // n, 0)
    table = np.zeros((len(r), bins, 3))
    table[np.arange(len(r)), bin_of] = np.stack([np.ones_like(r), e, r], axis=1)
    return table


def _between(iou: np.ndarray) -> np.ndarray:
    """The mean distance of two different masks of a set, from the (N, m, m) IoUs of all of them; NaN for one mask."""
    m = iou.shape[1]
    # The diagonal's distances are 0, so they matter to the number of pairs alone.
    return (1 - iou).sum((1, 2)) / (m * (m - 1)) if m > 1 else np.full(len(iou), np.nan)


def _variance(share: np.ndarray, count: int | np.ndarray) -> np.ndarray:
    """The unbiased estimate of p (1 - p) from the share of ``count`` draws; NaN for one draw."""
    return np.where(np.greater(count, 1), share * (1 - share) * count / np.maximum(np.subtract(count, 1), 1), np.nan)


def _empty(masks: torch.Tensor) -> np.ndarray:
    return (~(masks != 0).flatten(2).any(2)).double().mean(1).cpu().numpy()


def _pair(empty_raters: Any, empty_samples: Any) -> tuple[np.ndarray, np.ndarray]:
    r, e = _shares("empty_raters", empty_raters), _shares("empty_samples", empty_samples)
    if r.shape != e.shape or not r.size:
        raise ValueError(f"empty_raters and empty_samples must be (N,) of the same N >= 1, got {r.shape} and {e.shape}")
    return r, e


def _shares(name: str, value: Any) -> np.ndarray:
    shares = np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value, dtype=np.float64)
    if shares.ndim != 1 or not bool(((shares >= 0) & (shares <= 1)).all()):
        raise ValueError(f"{name} must be (N,) shares in [0, 1], got shape {shares.shape}")
    return shares
