# SPDX-License-Identifier: Apache-2.0
"""The layouts that are known, and which of them a tree has."""

from __future__ import annotations

import os
from pathlib import Path

from berdiff_fast.data.importers import berdiff, cimd, plain, slices
from berdiff_fast.data.importers.trees import Slice, natural

LAYOUTS = {
    "slices": slices.LAYOUT,
    "cimd": cimd.LAYOUT,
    "berdiff": berdiff.LAYOUT,
    "plain": plain.LAYOUT,
}

_MOST_RATERS = 100  # beyond, the number in a name is a date or an id


def detect(root: Path) -> tuple[str, str]:
    """The name of the one layout that ``root`` has, and what shows it.

    Raises:
        OSError: the folder cannot be listed.
        ValueError: no layout fits, or several do.
    """
    names = sorted(os.listdir(root), key=natural)
    fits = {name: why for name, layout in LAYOUTS.items() if (why := layout.evidence(root))}
    if len(fits) == 1:
        return next(iter(fits.items()))
    if fits:
        seen = "; ".join(f"{name!r} ({why})" for name, why in fits.items())
        raise ValueError(f"layout: {root} looks like several: {seen}. Name one")
    wanted = "; ".join(f"{name!r}: {layout.shape}" for name, layout in LAYOUTS.items())
    there = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"
    raise ValueError(f"layout: {root} has none that is known. Looked for {wanted}. Found {there}")


def found_raters(slices: list[Slice]) -> int:
    """R, one more than the largest rater's number in the tree.

    Raises:
        ValueError: no masks at all, or a number too large to be a rater's.
    """
    last, path = max(((rater, path) for one in slices for rater, path in one.masks.items()), default=(-1, ""))
    if last < 0:
        raise ValueError("source has images and not one mask")
    if last >= _MOST_RATERS:
        raise ValueError(f"{path}: rater {last}, where at most {_MOST_RATERS} raters are expected")
    return last + 1
