# SPDX-License-Identifier: Apache-2.0
"""Metrics of sets of masks, one number per image; docs/metrics.md has the formulas and their sources.

``raters`` is (N, R, *shape) and ``samples`` (N, n, *shape), of the same N images: tensors or arrays of any real type,
in which anything but zero is one. So a map of probabilities has to be thresholded first. Results are (N,) float64 on
the device of the raters. Where not everybody read every image, ``rater_valid`` (N, R) says who did: an image's metrics
are of its readers alone, and what the others' masks hold plays no part.

Two small tables of an image say all that any metric needs of its masks: the *overlaps* of any two of them
(``ops.overlap``), and the *histogram of votes*, which counts the pixels that r raters and s samples mark. ``evaluate``
makes each of them once. What follows is arithmetic on a few hundred numbers, for which NumPy has the least overhead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from berdiff_fast import checks, ops
from berdiff_fast.metrics.from_counts import (
    METRICS,
    OF_IOU,
    OF_VOTES,
    bins_of_votes,
    calibration_error,
    iou_of,
    votes_of,
)
from berdiff_fast.metrics.readers import of_readers

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
    return _tensor(1 - iou_of(a, b)[:, :count, count:], a)


def generalized_energy_distance(raters: Any, samples: Any, *, rater_valid: Any = None) -> torch.Tensor:
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
    return evaluate(raters, samples, ("ged",), rater_valid=rater_valid)["ged"]


def hm_iou(raters: Any, samples: Any, *, rater_valid: Any = None) -> torch.Tensor:
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
    return evaluate(raters, samples, ("hm_iou",), rater_valid=rater_valid)["hm_iou"]


def sample_diversity(raters: Any, samples: Any, *, rater_valid: Any = None) -> torch.Tensor:
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
    return evaluate(raters, samples, ("sample_diversity",), rater_valid=rater_valid)["sample_diversity"]


def soft_dice(raters: Any, samples: Any, *, rater_valid: Any = None) -> torch.Tensor:
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
    return evaluate(raters, samples, ("soft_dice",), rater_valid=rater_valid)["soft_dice"]


def dice_majority(raters: Any, samples: Any, *, rater_valid: Any = None) -> torch.Tensor:
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
    return evaluate(raters, samples, ("dice_majority",), rater_valid=rater_valid)["dice_majority"]


def iou_majority(raters: Any, samples: Any, *, rater_valid: Any = None) -> torch.Tensor:
    """IoU of the samples' majority vote with the raters', with ties and empty votes as in ``dice_majority``.

    Args:
        raters: (N, R, *shape) masks.
        samples: (N, n, *shape) masks of the same shape.

    Returns:
        (N,) float64, in [0, 1]; higher is better.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    return evaluate(raters, samples, ("iou_majority",), rater_valid=rater_valid)["iou_majority"]


def expected_calibration_error(raters: Any, samples: Any, bins: int = 10, *, rater_valid: Any = None) -> torch.Tensor:
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
    return calibration_error(calibration_bins(raters, samples, bins, rater_valid=rater_valid))


def calibration_bins(raters: Any, samples: Any, bins: int = 10, *, rater_valid: Any = None) -> torch.Tensor:
    """What ``expected_calibration_error`` needs of each image. Sums over images give the error of all their pixels.

    Returns:
        (N, bins, 3) float64: of each bin the number of pixels, the sum of the samples' means and that of the raters'.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    raters, samples = _same_images("raters", raters, "samples", samples)
    checks.integer("bins", bins, 1)

    def of(raters: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
        return _tensor(bins_of_votes(vote_histogram(raters, samples).cpu().numpy(), bins), raters)

    return of_readers(raters, samples, rater_valid, of)


# ---------------------------------------------------------------------- several at once


def evaluate(
    raters: Any, samples: Any, names: Sequence[str] | None = None, *, rater_valid: Any = None
) -> dict[str, torch.Tensor]:
    """Several metrics from one pass over the masks.

    Args:
        raters: (N, R, *shape) masks.
        samples: (N, n, *shape) masks of the same shape.
        names: which, of ``METRICS``; all by default.
        rater_valid: (N, R) of bool, or 0 and 1: who read which image; everybody everything by default.

    Returns:
        (N,) float64 for each name.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    raters, samples = _same_images("raters", raters, "samples", samples)
    n = samples.shape[1]
    return of_readers(raters, samples, rater_valid, lambda r, s: _evaluate(r, s, (n,), names))[n]


def evaluate_counts(
    raters: Any, samples: Any, counts: Iterable[int], names: Sequence[str] | None = None, *, rater_valid: Any = None
) -> dict[int, dict[str, torch.Tensor]]:
    """``evaluate`` for the first ``n`` samples, for several n: how the metrics change with their number.

    Args:
        raters: (N, R, *shape) masks.
        samples: (N, n, *shape) masks of the same shape. Overlaps are counted once, for all of them.
        counts: numbers of samples, each from 1 to n.
        names: which, of ``METRICS``; all by default.
        rater_valid: as in ``evaluate``.

    Returns:
        What ``evaluate`` gives, for each count.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    raters, samples = _same_images("raters", raters, "samples", samples)
    counts = tuple(checks.integer("counts", count, 1) for count in counts)
    if counts and max(counts) > samples.shape[1]:
        raise ValueError(f"counts must be at most the {samples.shape[1]} samples, got {max(counts)}")
    return of_readers(raters, samples, rater_valid, lambda r, s: _evaluate(r, s, counts, names))


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
    at = first + votes_of(raters) * columns + votes_of(samples)
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
    if of_iou := [name for name in names if name in OF_IOU]:
        iou = iou_of(raters, samples)
        for count, found in results.items():
            of_count = iou[:, : total + count, : total + count]
            for name in of_iou:
                found[name] = _tensor(OF_IOU[name](of_count, total), raters)
    if of_votes := [name for name in names if name in OF_VOTES]:
        for count, found in results.items():
            votes = vote_histogram(raters, samples[:, :count]).cpu().numpy()
            for name in of_votes:
                found[name] = _tensor(OF_VOTES[name](votes), raters)
    return results


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
