# SPDX-License-Identifier: Apache-2.0
"""What n masks say together: where they agree, where not, and how large the thing may be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from berdiff_fast import checks
from berdiff_fast.regions import Regions


@dataclass(frozen=True)
class Summary:
    """Of n masks of each image; B and K are absent where the masks had none.

    Attributes:
        mean: the share of masks that mark a pixel, float32 (B, K, *spatial).
        entropy: how much masks disagree about a pixel, in bits: H(mean), 1 where half of the masks mark it; float32
            (B, K, *spatial).
        majority: what more than half of the masks mark, bool (B, K, *spatial).
        quantiles: for each level q the pixels that a share of at least q marks, bool (B, K, *spatial): Vorob'ev's
            quantiles of a random set. A small level gives the largest one.
        sizes: the size of each mask, float64 (B, n, K), in ``unit``.
        unit: "mm2" or "mm3" with a spacing, else "pixels".
        existence: the probability that a reader marks something, float64 (B,): what the prior says, if there is one,
            else the share of masks in which anything is marked.
        of_region: the share of masks in which each of the K channels marks anything, float64 (B, K).
        regions: what the channels are called; empty if nobody said.
    """

    mean: torch.Tensor
    entropy: torch.Tensor
    majority: torch.Tensor
    quantiles: dict[float, torch.Tensor]
    sizes: torch.Tensor
    unit: str
    existence: torch.Tensor
    of_region: torch.Tensor
    regions: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = []
        for p, each in zip(self.existence.reshape(-1).tolist(), self._by_region(), strict=True):
            named = ", ".join(f"{name} {q:.2f}" for name, q in zip(self.regions, each, strict=True))
            lines.append(existence_in_words(p) + (f" ({named})" if named else ""))
        return "\n".join(lines)

    def _by_region(self) -> list[list[float]]:
        """Of each image, a number for each region that has a name."""
        count = self.existence.numel()
        return self.of_region.reshape(count, -1).tolist() if self.regions else [[]] * count


def existence_in_words(probability: float) -> str:
    """How reports and summaries state it."""
    return f"probability that a reader marks something: {probability:.2f}"


def summarize(
    masks: torch.Tensor | np.ndarray,
    spacing: Sequence[float] | None = None,
    quantiles: Sequence[float] = (0.05, 0.5, 0.95),
    *,
    prior: torch.Tensor | np.ndarray | None = None,
    regions: Sequence[str] | Regions | None = None,
) -> Summary:
    """Mean, entropy, majority, quantiles and sizes of masks.

    Args:
        masks: bool (B, n, K, *spatial) as ``sample`` returns it, or (n, *spatial), with 2 or 3 spatial dimensions.
        spacing: mm between pixels along each spatial dimension.
        quantiles: levels, above 0 and up to 1.
        prior: what ``model.prior(img)`` says of these images, (B, classes) or (classes,): class 0 is the empty mask.
        regions: what the K channels are called, or ``model.regions``.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    x = checks.tensor("masks", masks)
    if x.dtype is not torch.bool:
        raise TypeError(f"masks must be bool, got {x.dtype}")
    if x.ndim not in (3, 4, 5, 6) or x.numel() == 0:
        raise ValueError(
            f"masks must be (B, n, K, *spatial) or (n, *spatial) with 2 or 3 spatial dimensions and not empty, got "
            f"shape {tuple(x.shape)}"
        )
    if any(not 0 < q <= 1 for q in quantiles):
        raise ValueError(f"quantiles must be above 0 and at most 1, got {list(quantiles)}")
    batched = x.ndim >= 5
    dims = x.ndim - (3 if batched else 1)
    axis = 1 if batched else 0
    existence = x.flatten(axis + 1).any(-1).double().mean(-1)
    of_region = x.flatten(-dims).any(-1).double().mean(axis)
    names = tuple(regions.names if isinstance(regions, Regions) else regions or ())
    if names and (not batched or len(names) != x.shape[2]):
        channels = x.shape[2] if batched else 1
        raise ValueError(f"regions must name the {channels} channels of masks, got {list(names)}")
    if prior is not None:
        p = checks.tensor("prior", prior)
        fits = p.ndim > 0 and p.is_floating_point() and p.shape[:-1] == existence.shape
        if not fits or not bool((p >= 0).all() and ((p.double().sum(-1) - 1).abs() < 1e-3).all()):
            raise ValueError(
                f"prior must be probabilities of shape {(*existence.shape, 'classes')}, as model.prior returns them, "
                f"got shape {tuple(p.shape)}"
            )
        existence = 1 - p[..., 0].double()
    marked = x.sum(axis)
    n = x.shape[axis]
    mean = (marked.double() / n).float()
    voxel, unit = 1.0, "pixels"
    if spacing is not None:
        if len(spacing) != dims or not all(0 < float(s) < float("inf") for s in spacing):
            raise ValueError(f"spacing must be {dims} positive numbers of mm, got {list(spacing)}")
        voxel, unit = math.prod(float(s) for s in spacing), f"mm{dims}"
    return Summary(
        mean=mean,
        entropy=disagreement(mean),
        majority=2 * marked > n,
        quantiles={float(q): marked >= math.ceil(q * n - 1e-9) for q in quantiles},
        sizes=x.flatten(-dims).sum(-1).double() * voxel,
        unit=unit,
        existence=existence,
        of_region=of_region,
        regions=names,
    )


def disagreement(mean: Tensor | ArrayLike) -> Tensor:
    """Return the binary entropy in bits of the share of masks that include each pixel.

    -p log2 p - (1 - p) log2 (1 - p): 0 where all masks agree, 1 where half of them include the pixel.

    Args:
        mean: probabilities of any shape, in [0, 1].

    Returns:
        The entropy, of the same shape, floating point.

    Raises:
        ValueError: ``mean`` holds NaN or a value outside [0, 1].
    """
    p = torch.as_tensor(mean).detach()
    p = p if p.is_floating_point() else p.float()
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError("mean must hold probabilities in [0, 1], got NaN or values outside")
    return (torch.special.entr(p) + torch.special.entr(1 - p)) / math.log(2)


def spread(sizes: Sequence[float]) -> Mapping[str, float]:
    """Mean, standard deviation, median and a central 90 % of sizes."""
    x = np.asarray(sizes, dtype=np.float64)
    low, median, high = np.quantile(x, [0.05, 0.5, 0.95])
    return {
        "mean": float(x.mean()),
        "standard_deviation": float(x.std(ddof=1)) if len(x) > 1 else 0.0,
        "median": float(median),
        "p05": float(low),
        "p95": float(high),
    }
