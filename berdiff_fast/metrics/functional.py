# SPDX-License-Identifier: Apache-2.0
"""Metrics of sets of masks, one number per image; docs/metrics.md has the formulas and their sources.

``raters`` is (N, R, *shape) and ``samples`` (N, n, *shape), of the same N images: tensors or arrays of any real type,
in which anything but zero is one. So a map of probabilities has to be thresholded first. Results are (N,) float64 on
the device of the raters.

Two small tables of an image say all that any metric needs of its masks: the *overlaps* of any two of them
(``ops.overlap``), and the *histogram of votes*, which counts the pixels that r raters and s samples mark. ``evaluate``
makes each of them once. What follows is arithmetic on a few hundred numbers, for which NumPy has the least overhead.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from berdiff_fast import checks, ops

#: Thresholds of the published soft Dice: 0.1, 0.3, 0.5, 0.7, 0.9. In tenths, so that comparisons are exact.
_SOFT_DICE_TENTHS = (1, 3, 5, 7, 9)
_MAJORITY_TENTHS = (5,)
#: Keeps the published soft Dice of two empty maps at 1.
_SMOOTH = 1e-6
#: Added to every overlap, and so to every area and union, it changes no count but zero, and makes 0 / 0 one.
_ALMOST_NOTHING = 1e-300

# ---------------------------------------------------------------------- one metric


def iou_distance(a: Any, b: Any) -> torch.Tensor:
    """d = 1 - IoU of every mask of a with every mask of b; two empty masks have d = 0.

    Args:
        a, b: (N, R, *shape) and (N, n, *shape) masks.

    Returns:
        (N, R, n) float64.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    a, b = _same_images("a", a, "b", b)
    count = a.shape[1]
    return _tensor(1 - _iou(a, b)[:, :count, count:], a)


def generalized_energy_distance(raters: Any, samples: Any) -> torch.Tensor:
    """GED^2 = 2 E d(Y, S) - E d(Y, Y') - E d(S, S') over all ordered pairs, i = j included; lower is better.

    The published evaluation (Kohl et al., arXiv 1806.05034, with the raters and samples at hand as the distributions).

    Args:
        raters: (N, R, *shape) masks.
        samples: (N, n, *shape) masks of the same shape.

    Returns:
        (N,) float64, in [0, 2].

    Raises:
        ValueError, TypeError: naming the argument.
    """
    return evaluate(raters, samples, ("ged",))["ged"]


def hm_iou(raters: Any, samples: Any) -> torch.Tensor:
    """Hungarian-matched IoU: the mean IoU of pairs under the best one-to-one matching; higher is better.

    The raters are repeated to n masks (Kohl et al., arXiv 1905.13077; BerDiff's evaluation has n = 16 and R = 4). If n
    is not a multiple of R, *both* sets are repeated, to their least common multiple: every rater and every sample keeps
    its weight, so the value depends neither on their order nor on which set is called which. This is the optimal
    transport between the two sets.

    Args:
        raters: (N, R, *shape) masks.
        samples: (N, n, *shape) masks of the same shape. The matching takes time with the cube of lcm(R, n).

    Returns:
        (N,) float64, in [0, 1].

    Raises:
        ValueError, TypeError: naming the argument.
    """
    return evaluate(raters, samples, ("hm_iou",))["hm_iou"]


def sample_diversity(raters: Any, samples: Any) -> torch.Tensor:
    """E d(S, S') over all ordered pairs of samples, i = j included: the last term of GED^2.

    Neither high nor low is good; it should equal that of the raters, ``sample_diversity(samples, raters)``.

    Args:
        raters: (N, R, *shape) masks; only their number of images matters here.
        samples: (N, n, *shape) masks.

    Returns:
        (N,) float64, in [0, 1).

    Raises:
        ValueError, TypeError: naming the argument.
    """
    return evaluate(raters, samples, ("sample_diversity",))["sample_diversity"]


def soft_dice(raters: Any, samples: Any) -> torch.Tensor:
    """The Dice of the two mean maps thresholded alike, averaged over the thresholds 0.1, 0.3, 0.5, 0.7 and 0.9.

    BerDiff's evaluation (after Ji et al., CVPR 2021): a pixel is marked where the mean is *above* the threshold, and
    1e-6 is added to numerator and denominator. Means are compared as fractions, without rounding.

    Args:
        raters: (N, R, *shape) masks.
        samples: (N, n, *shape) masks of the same shape.

    Returns:
        (N,) float64, in (0, 1]; higher is better.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    return evaluate(raters, samples, ("soft_dice",))["soft_dice"]


def dice_majority(raters: Any, samples: Any) -> torch.Tensor:
    """Dice of the samples' majority vote with the raters'; higher is better.

    A pixel is marked where *more* than half of the masks mark it: a tie counts as background, as for a mean thresholded
    with > 0.5. Two empty votes have Dice 1.

    Args:
        raters: (N, R, *shape) masks.
        samples: (N, n, *shape) masks of the same shape.

    Returns:
        (N,) float64, in [0, 1].

    Raises:
        ValueError, TypeError: naming the argument.
    """
    return evaluate(raters, samples, ("dice_majority",))["dice_majority"]


def iou_majority(raters: Any, samples: Any) -> torch.Tensor:
    """IoU of the samples' majority vote with the raters', with ties and empty votes as in ``dice_majority``.

    Args:
        raters: (N, R, *shape) masks.
        samples: (N, n, *shape) masks of the same shape.

    Returns:
        (N,) float64, in [0, 1]; higher is better.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    return evaluate(raters, samples, ("iou_majority",))["iou_majority"]


def expected_calibration_error(raters: Any, samples: Any, bins: int = 10) -> torch.Tensor:
    """ECE of the mean of the samples, as a probability of foreground, against the mean of the raters; per image.

    The pixels of an image are put into equal bins by the mean p of the samples: ((k-1)/bins, k/bins], p = 0 in the
    first. The error is the mean over pixels of the difference between mean p and the raters' mean in the pixel's bin
    (Guo et al., arXiv 1706.04599, with the share of raters in place of correctness). Background that all agree on
    counts as well calibrated, so small structures make small errors. For a data set, add up ``calibration_bins``.

    Args:
        raters: (N, R, *shape) masks.
        samples: (N, n, *shape) masks of the same shape.
        bins: at least 1.

    Returns:
        (N,) float64, in [0, 1]; lower is better.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    return calibration_error(calibration_bins(raters, samples, bins))


def calibration_bins(raters: Any, samples: Any, bins: int = 10) -> torch.Tensor:
    """What ``expected_calibration_error`` needs of each image. Sums over images give the error of all their pixels.

    Returns:
        (N, bins, 3) float64: of each bin the number of pixels, the sum of the samples' means and that of the raters'.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    raters, samples = _same_images("raters", raters, "samples", samples)
    checks.integer("bins", bins, 1)
    return _tensor(_calibration_bins(vote_histogram(raters, samples).cpu().numpy(), bins), raters)


def calibration_error(bins: torch.Tensor) -> torch.Tensor:
    """The expected calibration error of (..., bins, 3), as ``calibration_bins`` gives it or summed over images."""
    pixels, predicted, observed = bins.unbind(-1)
    return (predicted - observed).abs().sum(-1) / pixels.sum(-1)


# ---------------------------------------------------------------------- several at once


def evaluate(raters: Any, samples: Any, names: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
    """Several metrics from one pass over the masks.

    Args:
        raters: (N, R, *shape) masks.
        samples: (N, n, *shape) masks of the same shape.
        names: which, of ``METRICS``; all by default.

    Returns:
        (N,) float64 for each name.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    raters, samples = _same_images("raters", raters, "samples", samples)
    n = samples.shape[1]
    return _evaluate(raters, samples, (n,), names)[n]


def evaluate_counts(
    raters: Any, samples: Any, counts: Iterable[int], names: Sequence[str] | None = None
) -> dict[int, dict[str, torch.Tensor]]:
    """``evaluate`` for the first ``n`` samples, for several n: how the metrics change with their number.

    Args:
        raters: (N, R, *shape) masks.
        samples: (N, n, *shape) masks of the same shape. Overlaps are counted once, for all of them.
        counts: numbers of samples, each from 1 to n.
        names: which, of ``METRICS``; all by default.

    Returns:
        What ``evaluate`` gives, for each count.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    raters, samples = _same_images("raters", raters, "samples", samples)
    counts = tuple(checks.integer("counts", count, 1) for count in counts)
    if counts and max(counts) > samples.shape[1]:
        raise ValueError(f"counts must be at most the {samples.shape[1]} samples, got {max(counts)}")
    return _evaluate(raters, samples, counts, names)


def vote_histogram(raters: Any, samples: Any) -> torch.Tensor:
    """How many pixels are marked by r raters and s samples.

    Returns:
        (N, R + 1, n + 1) int64, on the device of the raters; entry (r, s) of an image counts pixels.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    raters, samples = _same_images("raters", raters, "samples", samples)
    images, rows, columns = raters.shape[0], raters.shape[1] + 1, samples.shape[1] + 1
    first = torch.arange(images, device=raters.device)[:, None] * (rows * columns)
    at = first + _votes(raters) * columns + _votes(samples)
    return torch.bincount(at.flatten(), minlength=images * rows * columns).view(images, rows, columns)


def _evaluate(
    raters: torch.Tensor, samples: torch.Tensor, counts: tuple[int, ...], names: Sequence[str] | None
) -> dict[int, dict[str, torch.Tensor]]:
    names = METRICS if names is None else (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if name not in METRICS:
            raise ValueError(f"names must be of {list(METRICS)}, got {name!r}")
    total = raters.shape[1]
    results: dict[int, dict[str, torch.Tensor]] = {count: {} for count in counts}
    if of_iou := [name for name in names if name in _OF_IOU]:
        iou = _iou(raters, samples)
        for count, found in results.items():
            of_count = iou[:, : total + count, : total + count]
            for name in of_iou:
                found[name] = _tensor(_OF_IOU[name](of_count, total), raters)
    if of_votes := [name for name in names if name in _OF_VOTES]:
        for count, found in results.items():
            votes = vote_histogram(raters, samples[:, :count]).cpu().numpy()
            for name in of_votes:
                found[name] = _tensor(_OF_VOTES[name](votes), raters)
    return results


# ---------------------------------------------------------------------- from the overlaps: (N, R + n, R + n), and R


def _iou(raters: torch.Tensor, samples: torch.Tensor) -> np.ndarray:
    """IoU of any two masks of an image, those of the raters first."""
    shared = ops.overlap(raters, samples).cpu().numpy() + _ALMOST_NOTHING
    area = shared.diagonal(0, 1, 2)
    union = area[:, :, None] + area[:, None, :]
    union -= shared
    return np.divide(shared, union, out=union)


def _ged(iou: np.ndarray, raters: int) -> np.ndarray:
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


def _votes(masks: torch.Tensor) -> torch.Tensor:
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


def _calibration_bins(votes: np.ndarray, bins: int) -> np.ndarray:
    raters, n = votes.shape[1] - 1, votes.shape[2] - 1
    marked = np.arange(n + 1)
    pixels = votes.sum(1)
    # (k-1)/bins < marked/n <= k/bins, in integers.
    bin_of = np.maximum((marked * bins - 1) // n, 0)
    of_counts = np.stack([pixels, pixels * marked / n, np.arange(raters + 1) @ votes / raters], axis=2)
    return (bin_of == np.arange(bins)[:, None]).astype(np.float64) @ of_counts


def _ece(votes: np.ndarray) -> np.ndarray:
    return calibration_error(torch.from_numpy(_calibration_bins(votes, 10))).numpy()


_OF_IOU: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "ged": _ged,
    "hm_iou": _hm_iou,
    "sample_diversity": _sample_diversity,
}
_OF_VOTES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "soft_dice": _soft_dice,
    "dice_majority": _dice_majority,
    "iou_majority": _iou_majority,
    "ece": _ece,
}

#: Names that ``evaluate`` knows.
METRICS: tuple[str, ...] = (*_OF_IOU, *_OF_VOTES)

#: Which way is better, for tools that keep the best. Of the diversity neither is, where the raters' is known; papers
#: that rank by it alone take the higher.
HIGHER_IS_BETTER: dict[str, bool] = {name: name not in ("ged", "ece") for name in METRICS}


# ---------------------------------------------------------------------- arguments and results


def _same_images(first: str, a: Any, second: str, b: Any) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = _masks(first, a), _masks(second, b)
    if a.shape[0] != b.shape[0] or a.shape[2:] != b.shape[2:]:
        raise ValueError(
            f"{first} and {second} must be (N, R, *shape) and (N, n, *shape) with the same N and shape, got "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    if not (a.is_cpu and b.is_cpu) and a.device != b.device:
        raise ValueError(f"{second} must be on {a.device} like {first}, got {b.device}")
    return a, b


def _masks(name: str, value: Any) -> torch.Tensor:
    masks = checks.tensor(name, value)
    if masks.ndim < 3:
        raise ValueError(f"{name} must be (N, masks, *shape), got shape {tuple(masks.shape)}")
    if not masks.numel() and 0 in masks.shape[1:]:
        raise ValueError(f"{name} must have at least one mask of at least one pixel, got shape {tuple(masks.shape)}")
    if masks.dtype not in ops.MASK_DTYPES:
        if masks.is_complex():
            raise TypeError(f"{name} must be masks of a real type, got {masks.dtype}")
        return masks != 0
    return masks


def _tensor(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    result = torch.from_numpy(values)
    # Asking for a device and its type takes longer than the rest of this.
    return result if like.is_cpu else result.to(like.device)
