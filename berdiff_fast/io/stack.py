# SPDX-License-Identifier: Apache-2.0
"""Slices of a volume as all outputs count them: from 0, in the order of the array, each with its place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from berdiff_fast.io.orientation import View
from berdiff_fast.io.volume import Volume


@dataclass(frozen=True)
class SliceStack:
    """Some slices of a volume, next to each other: which they are, where they lie, and which way round they are shown.

    Attributes:
        first: the number of the first one: slices are counted from 0 along the axis of the array.
        count: how many there are here.
        total: how many the volume has.
        view: how they are shown.
        z: mm along the normal of the slices, of each; None where the volume does not say. The normal points to the
            patient's left, back or head, whichever is nearest: z of an axial slice grows towards the head.
        instances: the InstanceNumber of each slice of a DICOM series (None where it has none); else empty.
        frames: the number of each frame of a DICOM file of many, from 1 as in DICOM; else empty.
        spacing: mm from slice to slice, row to row and column to column, as stored; None where it is not known.
    """

    first: int
    count: int
    total: int
    view: View = field(default_factory=View)
    z: tuple[float, ...] | None = None
    instances: tuple[int | None, ...] = ()
    frames: tuple[int, ...] = ()
    spacing: tuple[float, float, float] | None = None

    @staticmethod
    def of(volume: Volume, axis: int = 0, first: int = 0, end: int | None = None) -> SliceStack:
        """Slices ``first`` to before ``end`` (all by default) along an axis of a volume's array."""
        total = volume.array.shape[axis]
        end = total if end is None else end
        others = tuple(2 - a for a in (0, 1, 2) if a != axis)
        spacing = None
        if volume.spacing is not None:
            spacing = (volume.spacing[2 - axis], volume.spacing[others[0]], volume.spacing[others[1]])
        z = None
        if volume.is_placed and spacing is not None:
            along = volume.direction[:, 2 - axis]
            normal = along if along[np.abs(along).argmax()] > 0 else -along
            start, step = float(np.array(volume.origin) @ normal), spacing[0] * float(along @ normal)
            z = tuple(start + k * step for k in range(first, end))
        across = axis == 0  # else a slice is made of a row or a column of each file
        return SliceStack(
            first,
            end - first,
            total,
            View.of(volume, axis),
            z,
            volume.instance_numbers[first:end] if across else (),
            tuple(k + 1 for k in volume.frames[first:end]) if across else (),
            spacing,
        )

    @property
    def numbers(self) -> range:
        """The number of each slice."""
        return range(self.first, self.first + self.count)

    @property
    def is_whole(self) -> bool:
        """Whether these are all slices of the volume."""
        return self.count == self.total

    def place(self, k: int) -> str:
        """Where the k-th of these slices lies, in words: "z -112.5 mm, instance 82"; perhaps empty."""
        words = [] if self.z is None else [f"z {mm(self.z[k])} mm"]
        if self.frames:
            words.append(f"frame {self.frames[k]}")
        elif self.instances and self.instances[k] is not None:
            words.append(f"instance {self.instances[k]}")
        return ", ".join(words)

    def __str__(self) -> str:
        """Such as "slices 80 to 95 (16 of 120), z -112.5 to -75 mm"."""
        last = self.first + self.count - 1
        which = f"slice {self.first}" if self.count == 1 else f"slices {self.first} to {last}"
        many = f"{self.count} of {self.total}" if not self.is_whole else "all" if self.count > 1 else "the only one"
        where = ""
        if self.z is not None:
            ends = [self.z[0]] if self.count == 1 else [self.z[0], self.z[-1]]
            where = f", z {' to '.join(map(mm, ends))} mm"
        return f"{which} ({many}){where}"

    def as_json(self) -> dict[str, Any]:
        """Lists with an entry for each slice: index, z_mm, instance_number and frame_number, where they are known."""
        found: dict[str, Any] = {"index": [*self.numbers]}
        if self.z is not None:
            found["z_mm"] = [round(z, 4) + 0.0 for z in self.z]
        if any(number is not None for number in self.instances):
            found["instance_number"] = [*self.instances]
        if self.frames:
            found["frame_number"] = [*self.frames]
        return found


def mm(value: float) -> str:
    """Millimetres with at most two decimals."""
    return f"{round(value, 2) + 0.0:.2f}".rstrip("0").rstrip(".")
