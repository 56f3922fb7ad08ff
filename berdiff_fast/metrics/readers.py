# SPDX-License-Identifier: Apache-2.0
"""Images that were not read by all raters: every metric is of those who read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch

Result = TypeVar("Result")


def check_valid(rater_valid: Any, raters: torch.Tensor) -> np.ndarray:
    """``rater_valid`` as bool (N, R), with at least one reader of each image.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    valid = np.asarray(rater_valid.detach().cpu() if isinstance(rater_valid, torch.Tensor) else rater_valid)
    if valid.shape != tuple(raters.shape[:2]):
        raise ValueError(f"rater_valid must be (N, R) = {tuple(raters.shape[:2])}, got shape {valid.shape}")
    if valid.dtype.kind not in "bui" or not ((valid == 0) | (valid == 1)).all():
        raise TypeError(f"rater_valid must be bool, or 0 and 1, got {valid.dtype}")
    valid = valid != 0
    alone = np.flatnonzero(~valid.any(1))
    if len(alone):
        raise ValueError(f"rater_valid must have a reader of each image, got none of image {alone[0]}")
    return valid


def of_readers(
    raters: torch.Tensor,
    samples: torch.Tensor,
    rater_valid: Any,
    function: Callable[[torch.Tensor, torch.Tensor], Result],
) -> Result:
    """``function(raters, samples)`` of images, each with the raters who read it, all of one number at a time.

    Args:
        raters, samples: (N, R, *shape) and (N, n, *shape).
        rater_valid: (N, R), or None: everybody read everything.
        function: returns tensors (N, ...), or dictionaries of them.
    """
    if rater_valid is None:
        return function(raters, samples)
    valid = check_valid(rater_valid, raters)
    if valid.all():
        return function(raters, samples)
    counts, first = valid.sum(1), np.argsort(~valid, axis=1, kind="stable")
    rows, found = [], []
    for count in np.unique(counts).tolist():
        chosen = np.flatnonzero(counts == count)
        at = torch.from_numpy(chosen).to(raters.device)
        who = torch.from_numpy(first[chosen, :count]).to(raters.device)
        found.append(function(raters[at[:, None], who], samples[at.to(samples.device)]))
        rows.append(chosen)
    back = torch.from_numpy(np.argsort(np.concatenate(rows)))
    return _joined(found, back)


def _joined(parts: list[Any], order: torch.Tensor) -> Any:
    if isinstance(parts[0], Mapping):
        return {key: _joined([part[key] for part in parts], order) for key in parts[0]}
    return torch.cat(parts)[order.to(parts[0].device)]
