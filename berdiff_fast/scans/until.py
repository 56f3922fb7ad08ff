# SPDX-License-Identifier: Apache-2.0
"""As many masks as it takes: until their mean is known well enough."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from berdiff_fast import checks
from berdiff_fast.sampling import sample


def sample_until(
    model: Any,
    img: torch.Tensor | np.ndarray,
    tolerance: float = 0.05,
    max_n: int = 256,
    *,
    batch: int = 16,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw masks until their mean is known well enough: the same masks that a larger n would have given.

    The standard error of the mean map at a pixel is sqrt(p (1 - p) / n), with p = (marked + 1) / (n + 2), so that a
    few masks that agree are not taken for certainty (Laplace's rule of succession). That is for independent masks;
    those of a model with a mode prior are spread evenly over their classes, and their mean is off by less.

    Args:
        model, img: as in ``sample``.
        tolerance: the largest standard error, at any pixel of any image, to be content with.
        max_n: masks per image at most.
        batch: masks per image that are drawn before looking again.
        **options: of ``sample``, but n and first_sample.

    Returns:
        bool (B, n, K, *spatial) and the standard error (B, K, *spatial).

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if not 0 < float(tolerance) < 1:
        raise ValueError(f"tolerance must be between 0 and 1, got {tolerance!r}")
    max_n, batch = checks.integer("max_n", max_n, 1), checks.integer("batch", batch, 1)
    for name in ("n", "first_sample", "return_probability"):
        if name in options:
            raise TypeError(f"{name} is not an option of sample_until, which chooses it")
    if options.get("seed") is None:  # drawn once: the batches are parts of one sequence
        options["seed"] = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
    parts: list[torch.Tensor] = []
    n, marked = 0, torch.zeros(())
    while True:
        more = min(batch, max_n - n)
        drawn = sample(model, img, more, first_sample=n, **options)
        assert isinstance(drawn, torch.Tensor)
        parts.append(drawn)
        n, marked = n + more, marked.to(drawn.device) + drawn.sum(1)
        p = (marked + 1) / (n + 2)
        error = (p * (1 - p) / n).sqrt()
        if n >= max_n or float(error.max()) <= tolerance:
            return torch.cat(parts, 1), error
