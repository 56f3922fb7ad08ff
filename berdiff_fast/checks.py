# SPDX-License-Identifier: Apache-2.0
"""Arguments as users give them: what is accepted, and errors that name the argument, what came, what was expected."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch


def integer(name: str, value: Any, minimum: int | None = None) -> int:
    """``value`` as an int; NumPy's integers are welcome, bools and floats are not.

    Raises:
        TypeError: not an integer.
        ValueError: below ``minimum``.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return operator.index(value)


def tensor(name: str, value: Any) -> torch.Tensor:
    """``value`` as a tensor; an array may be flipped, of either byte order, or read-only, as image readers give them.

    Raises:
        TypeError: neither a tensor nor an array of numbers.
    """
    if isinstance(value, torch.Tensor):
        return value
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a torch.Tensor or a numpy.ndarray, got {type(value).__name__}")
    if value.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be an array of real numbers, got dtype {value.dtype}")
    native = np.ascontiguousarray(value).astype(value.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(native if native.flags.writeable else native.copy())


def increasing_pair(name: str, value: Any) -> tuple[float, float]:
    """``value`` as (low, high), finite and low < high.

    Raises:
        ValueError: anything else.
    """
    try:
        low, high = (float(x) for x in value)
        good = -float("inf") < low < high < float("inf")
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(f"{name} must be (low, high), finite with low < high, got {value!r:.200}")
    return low, high
