# SPDX-License-Identifier: Apache-2.0
"""Slices of a tree as arrays of one size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from berdiff_fast.data import pixels
from berdiff_fast.data.importers.depth import Depth
from berdiff_fast.data.importers.trees import Problems, Slice


class Reader:
    """Reads slices, all of one size; None for one with a problem.

    With ``colour`` images have three channels; with a ``depth`` they keep their values, else they become 8 bits.
    """

    def __init__(
        self,
        root: Path,
        raters: int,
        size: tuple[int, int] | None,
        fit: str,
        missing: str,
        threshold: float | None,
        window: tuple[float, float] | None,
        problems: Problems,
        colour: bool = False,
        depth: Depth | None = None,
    ) -> None:
        self.root = root
        self.raters = raters
        self.size = size
        self.fit = fit
        self.missing = missing
        self.threshold = threshold
        self.window = window
        self.problems = problems
        self.colour = colour
        self.depth = depth
        self.windowless = 0
        self._sized_by = "size"  # who decided

    def __call__(self, one: Slice) -> tuple[np.ndarray, np.ndarray] | None:
        """image (H, W), or the colours (3, H, W), masks (R, H, W) uint8 of 0 and 1."""
        before = len(self.problems.found)
        raw = self._try(one.image, lambda: self._raw(one.image))
        masks = [self._mask(one, rater, raw) for rater in range(self.raters)]
        if self.missing == "absent" and not one.masks:
            self.problems.add(one.image, "nobody read it: there is no mask of any rater")
        if len(self.problems.found) > before or raw is None:
            return None
        if self.size is None:
            self.size, self._sized_by = (raw.shape[0], raw.shape[1]), one.image
        size = self.size
        if raw.shape[:2] != size and self.fit == "exact":
            here = pixels.by(raw.shape[:2])
            self.problems.add(one.image, f"is {here}, expected {pixels.by(size)} as {self._sized_by}")
            return None
        image = self._try(one.image, lambda: self._image(self._fitted(raw, size)))
        if image is None:
            return None
        self.windowless += self.window is not None and raw.dtype == np.uint8
        empty = np.zeros(raw.shape[:2], np.uint8)
        fitted = [self._fitted(empty if mask is None else mask, size, nearest=True) for mask in masks]
        return image, np.stack(fitted)

    def _raw(self, path: str) -> np.ndarray:
        """The picture (H, W), or (H, W, 3), as it was stored, if it can be kept so."""
        raw, _ = pixels.read(self.root / path, colour=self.colour)
        if self.depth is not None:
            self.depth.check(raw, path)
        return raw

    def _image(self, fitted: np.ndarray) -> np.ndarray:
        """What is stored of it, channels first."""
        if self.depth is None:
            image = pixels.to_image(fitted, self.window)
        else:
            image = self.depth(pixels.without_padding(fitted))
        return np.moveaxis(image, -1, 0) if self.colour else image

    def valid(self, one: Slice) -> np.ndarray:
        """Who read a slice, (R,) bool."""
        return np.array([self.missing != "absent" or rater in one.masks for rater in range(self.raters)])

    def _mask(self, one: Slice, rater: int, image: np.ndarray | None) -> np.ndarray | None:
        if rater not in one.masks:
            if self.missing == "error":
                self.problems.add(one.image, f"the mask of rater {rater} is missing")
            return None

        def load() -> np.ndarray:
            x, lossy = pixels.read(self.root / one.masks[rater])
            if image is not None and x.shape != image.shape[:2]:
                raise ValueError(f"is {pixels.by(x.shape)}, its image {pixels.by(image.shape[:2])}")
            return pixels.to_mask(x, lossy, self.threshold)

        return self._try(one.masks[rater], load)

    def _try(self, path: str, load: Callable[[], np.ndarray]) -> np.ndarray | None:
        try:
            return load()
        except ValueError as error:
            reason = str(error)
        self.problems.add(path, reason)
        return None

    def _fitted(self, x: np.ndarray, size: tuple[int, int], *, nearest: bool = False) -> np.ndarray:
        return pixels.crop(x, size) if self.fit == "crop" else pixels.resize(x, size, nearest=nearest)
