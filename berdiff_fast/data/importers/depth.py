# SPDX-License-Identifier: Apache-2.0
"""The type of images in a file: 8 bits, 16 bits with a sign or without, or floating point, if it holds their values."""

from __future__ import annotations

import numpy as np

#: What ``--depth`` takes.
DEPTHS = ("8", "16", "float16", "float32")


class Depth:
    """A type for all images of an import, which keeps their values.

    Args:
        name: one of ``DEPTHS``. With 16 bits the first image decides whether there is a sign: not if it is unsigned
            itself, or has values above 32767.

    Attributes:
        dtype: the type; None before the first image of 16 bits that it holds.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.dtype: np.dtype | None = None if name == "16" else np.dtype("uint8" if name == "8" else name)
        self._first = ""

    def check(self, x: np.ndarray, path: str) -> None:
        """Raise ValueError if the type does not hold the values of an image, which is named by its path."""
        low, high = float(x.min()), float(x.max())
        dtype = self.dtype
        if dtype is None:
            unsigned = x.dtype.kind in "bu" or high > np.iinfo(np.int16).max
            dtype = np.dtype(np.uint16 if unsigned else np.int16)
        whole = dtype.kind in "iu"
        if whole and x.dtype.kind == "f" and (x != np.rint(x)).any():
            broken = float(x[x != np.rint(x)].flat[0])
            raise ValueError(f"has values that are not whole, as {broken:g}, and depth {self.name} keeps whole numbers")
        info = np.iinfo(dtype) if whole else np.finfo(dtype)
        least, most = float(info.min), float(info.max)
        if low < least or high > most:
            told = f" ({dtype}, as {self._first})" if self._first else ""
            raise ValueError(
                f"has values from {low:g} to {high:g}, and depth {self.name}{told} holds {least:g} to {most:g}"
            )
        if self.dtype is None:
            self.dtype, self._first = dtype, path

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """``x`` in the type; between whole numbers, as resizing makes values, it is rounded."""
        assert self.dtype is not None
        return (np.rint(x) if self.dtype.kind in "iu" and x.dtype.kind == "f" else x).astype(self.dtype)
