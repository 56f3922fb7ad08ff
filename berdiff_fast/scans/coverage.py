# SPDX-License-Identifier: Apache-2.0
"""What of a scan was sampled, in numbers and in words: sizes of masks are of that, and not of the scan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from berdiff_fast.imaging.volumes import Volume
from berdiff_fast.io.stack import SliceStack
from berdiff_fast.scans.sampled import checked_slices, sampled_region


@dataclass(frozen=True)
class Coverage:
    """The part of a volume in which masks were drawn.

    Attributes:
        stack: its slices.
        rows, columns: (first, last + 1) of each slice, as stored.
        size: rows and columns that a slice has.
    """

    stack: SliceStack
    rows: tuple[int, int]
    columns: tuple[int, int]
    size: tuple[int, int]

    @staticmethod
    def of(volume: Volume, plan: Mapping[str, Any]) -> Coverage:
        """That of ``SampledVolume.plan``.

        Raises:
            ValueError: slices that the volume does not have.
        """
        axis, (first, end) = checked_slices(plan, volume.array.shape)
        shape = [*volume.array.shape]
        shape[axis] = 1
        region = sampled_region({**plan, "slices": [0, 1]}, tuple(shape)).squeeze(axis)
        ends = []
        for other in (1, 0):
            marked = np.flatnonzero(region.any(other))
            ends.append((int(marked[0]), int(marked[-1]) + 1) if marked.size else (0, 0))
        stack = SliceStack.of(volume, axis, first, end)
        return Coverage(stack, ends[0], ends[1], (region.shape[0], region.shape[1]))

    @property
    def fills_slices(self) -> bool:
        """Whether masks were drawn to the edges of slices."""
        return (self.rows, self.columns) == ((0, self.size[0]), (0, self.size[1]))

    @property
    def is_whole(self) -> bool:
        """Whether masks were drawn everywhere."""
        return self.stack.is_whole and self.fills_slices

    def __str__(self) -> str:
        """Such as "the 16 slices sampled of 120 (rows 150 to 277, columns 66 to 193)"."""
        if self.is_whole:
            return "the whole scan" if self.stack.total > 1 else "the whole slice"
        stack = self.stack
        if stack.is_whole:
            which = f"a part of all {stack.total} slices" if stack.total > 1 else "a part of the slice"
        else:
            which = f"the {stack.count} slice{'s' * (stack.count > 1)} sampled of {stack.total}"
        if self.fills_slices:
            return which
        rows, columns = (f"{a} to {b - 1}" for a, b in (self.rows, self.columns))
        return f"{which} (rows {rows}, columns {columns})"

    def as_json(self) -> dict[str, Any]:
        """For ``summary.json``: what it is in words, of which plane, and each slice with its place."""
        return {
            "in_words": str(self),
            "whole_scan": self.is_whole,
            "plane": self.stack.view.plane,
            "slices_of_scan": self.stack.total,
            "rows": [*self.rows],
            "columns": [*self.columns],
            **self.stack.as_json(),
        }
