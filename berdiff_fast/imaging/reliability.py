# SPDX-License-Identifier: Apache-2.0
"""Whether probabilities mean what they say: of pixels, and of there being anything at all."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from berdiff_fast import checks, metrics
from berdiff_fast.imaging import canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike


def reliability_diagram(
    probability: Tensor | ArrayLike,
    raters: Tensor | ArrayLike,
    bins: int = 10,
    *,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw the share of raters who mark a pixel against the probability given to it, and how many pixels there are.

    Pixels are sorted by probability p into bins (k - 1)/bins < p <= k/bins, 0 into the first, as for the expected
    calibration error (docs/metrics.md), which the figure names. On the diagonal, probabilities are right.

    Args:
        probability: any shape, in [0, 1]: the mean of samples.
        raters: (R, *shape) masks, bool or 0 and 1.
        bins: how many, at least 1.
        title, path: as in ``overlay``.

    Returns:
        The figure: above, the diagram; below, the pixels in each bin on a logarithmic scale.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        ImportError: matplotlib is not installed.
        TypeError: ``bins`` is not an int.
        ValueError: shapes do not fit, or values are no probabilities or masks.
    """
    checks.integer("bins", bins, 1)
    p, rated = torch.as_tensor(probability).detach().cpu(), torch.as_tensor(raters).detach().cpu()
    p = p if p.is_floating_point() else p.double()
    if not p.numel() or not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError("probability must hold probabilities in [0, 1], got none, NaN or values outside")
    if rated.ndim != p.ndim + 1 or rated.shape[1:] != p.shape or len(rated) < 1:
        raise ValueError(f"raters must be (1 or more, *{tuple(p.shape)}) to fit probability, got {tuple(rated.shape)}")
    if not bool(((rated == 0) | (rated == 1)).all()):
        raise ValueError("raters must be masks, bool or 0 and 1, got other values")
    target = canvas.target(path)

    # Edges in the type of p: k / bins, rounded, is what a mean of samples at that edge is, too.
    edges = torch.arange(1, bins).to(p) / bins
    of_bin = torch.bucketize(p.flatten(), edges)
    weights = torch.stack([torch.ones(p.numel()), p.flatten(), rated.double().mean(0).flatten()], 1).double()
    table = torch.zeros(bins, 3, dtype=torch.float64).index_add_(0, of_bin, weights)
    error = float(metrics.calibration_error(table[None]))
    return canvas.done(_drawn(table, f"Calibration error {error:.4f}", title), target)


def existence_diagram(
    empty_samples: Tensor | ArrayLike,
    empty_raters: Tensor | ArrayLike,
    n: int,
    bins: int = 10,
    *,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw the share of raters who marked nothing against the share of a model's samples that are empty, over images.

    Images are sorted by their share of empty samples, as in ``metrics.existence_table``. On the diagonal, "there is
    nothing" is said as often as raters say it. The figure names the root mean square over images, not over bins.

    Args:
        empty_samples: (N,) of each image the share of its samples that are empty.
        empty_raters: (N,) the share of its raters.
        n: how many samples the shares are of.
        bins: how many, at least 1.
        title, path: as in ``overlay``.

    Returns:
        The figure: above, the diagram; below, the images in each bin on a logarithmic scale.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        ImportError: matplotlib is not installed.
        TypeError, ValueError: naming the argument.
    """
    table = metrics.existence_table(empty_raters, empty_samples, n, bins)
    rmse = metrics.existence_calibration(empty_raters, empty_samples, 1, n).rmse
    target = canvas.target(path)
    words = "Share of raters who marked nothing", "Images", "Share of empty samples"
    return canvas.done(_drawn(table, f"RMSE over images {rmse:.3f}", title, *words), target)


def _drawn(
    table: Tensor,
    note: str,
    title: str | None,
    observed: str = "Share of raters",
    counted: str = "Pixels",
    given: str = "Probability",
) -> Figure:
    """A (bins, 3) table of counts, sums of what was said and sums of what was seen."""
    some, bins = table[:, 0] > 0, len(table)
    said, seen = (table[some, column] / table[some, 0] for column in (1, 2))
    figure = canvas.figure(4.6, 5.4)
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (4, 1)})
    above.plot((0, 1), (0, 1), color=canvas.INK, linewidth=0.8, linestyle="dotted")
    style = dict(color=canvas.SAMPLE, linewidth=1.5, marker="o", markersize=4, clip_on=False)
    above.plot(said.numpy(), seen.numpy(), **style)
    above.set(xlim=(0, 1), ylim=(0, 1), box_aspect=1)
    above.set_ylabel(observed, fontsize=8, color=canvas.INK)
    above.text(0.03, 0.94, note, fontsize=8, color=canvas.INK)
    centres = (torch.arange(bins) + 0.5) / bins
    below.bar(centres.numpy(), table[:, 0].numpy(), 0.9 / bins, color=canvas.SAMPLE)
    below.set(yscale="log", box_aspect=1 / 4)
    below.set_ylim(bottom=0.5)  # so that a single one has a bar
    below.set_ylabel(counted, fontsize=8, color=canvas.INK)
    below.set_xlabel(given, fontsize=8, color=canvas.INK)
    for axes in (above, below):
        canvas.quiet(axes)
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        above.set_title(title, fontsize=11, color=canvas.INK, loc="left")
    return figure
