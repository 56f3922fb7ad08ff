# SPDX-License-Identifier: Apache-2.0
"""From frames in space to a grid: what does not lie parallel and evenly stacked is refused, by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

#: Positions that were rounded to 0.1 mm are off by half of it; and a float's noise.
_ROUNDED = 0.0505


@dataclass(frozen=True, eq=False)
class Frame:
    """A frame of a file and its place.

    Attributes:
        file, number, of: the file, which of its frames (from 0), and of how many.
        rows, columns: its size.
        spacing: (between rows, between columns) in mm.
        thickness, between: how thick a slice is, and how far it is to the next, in mm, as the header says.
        position: where the first pixel lies, (3,) in mm.
        orientation: the directions of a row and a column, (6,).
    """

    file: Path
    number: int
    of: int
    rows: int
    columns: int
    spacing: np.ndarray | None
    thickness: float | None
    between: float | None
    position: np.ndarray | None
    orientation: np.ndarray | None

    @property
    def name(self) -> str:
        return f"{self.file.name} frame {self.number + 1}" if self.of > 1 else self.file.name

    @property
    def is_placed(self) -> bool:
        return self.position is not None and self.orientation is not None


@dataclass(frozen=True)
class Stack:
    """A grid, and which frame is which slice of it."""

    order: list[int]
    spacing: tuple[float, float, float] | None
    origin: tuple[float, float, float]
    direction: np.ndarray
    placed: bool
    notes: list[str] = field(default_factory=list)


def functional_groups(header: Any, frame: int) -> list[Any]:
    """What a file says of one frame (from 0): its own functional groups, then those that all share; perhaps none."""
    per_frame = header.get("PerFrameFunctionalGroupsSequence") or []
    shared = header.get("SharedFunctionalGroupsSequence") or []
    return [*per_frame[frame : frame + 1], *shared[:1]]


def group_item(groups: Sequence[Any], name: str, header: Any) -> Any:
    """The item of a functional group: of the first of ``groups`` that has it, else the file's header itself."""
    for group in groups:
        items = group.get(name)
        if items:
            return items[0]
    return header


def stack(frames: Sequence[Frame], *, keep: bool) -> Stack:
    """The grid of some frames.

    Args:
        frames: in any order.
        keep: leave their order where it goes steadily through space, whichever way; else slices go along the normal.

    Raises:
        ValueError: they differ in size or spacing, are not parallel, lie at one place, or are not evenly spaced.
    """
    _check_sizes(frames)
    first = frames[0]
    if len(frames) == 1:
        if first.orientation is not None:
            _check_orientation(first)
        return _single(first)
    if not any(frame.is_placed for frame in frames) and first.of == len(frames):
        # Frames of one file that lie nowhere, such as a film; their order is all there is.
        return Stack([*range(len(frames))], None, (0.0, 0.0, 0.0), np.eye(3), False)
    heights, normal = heights_of(frames)
    assert first.orientation is not None
    steps = np.diff(heights)
    steady = keep and ((steps > 1e-6).all() or (steps < -1e-6).all())
    order = [*range(len(frames))] if steady else [int(i) for i in np.argsort(heights, kind="stable")]
    positions = np.array([frames[i].position for i in order])
    notes = _check_even([frames[i] for i in order], positions, normal)
    step = positions[-1] - positions[0]
    between = float(np.linalg.norm(step)) / (len(frames) - 1)
    axis = normal if step @ normal > 0 else -normal
    direction = np.stack([first.orientation[:3], first.orientation[3:], axis], axis=1) + 0.0
    spacing = None
    if first.spacing is not None:
        spacing = (float(first.spacing[1]), float(first.spacing[0]), between)
    x, y, z = positions[0]
    return Stack(order, spacing, (float(x), float(y), float(z)), direction, True, notes)


def heights_of(frames: Sequence[Frame]) -> tuple[np.ndarray, np.ndarray]:
    """How far frames lie along their normal, in mm, and the normal, (3,), evenly spaced or not.

    Raises:
        ValueError: they differ in size or spacing, have no position, or are not parallel.
    """
    _check_sizes(frames)
    missing = [frame.name for frame in frames if not frame.is_placed]
    if missing:
        raise ValueError(f"has slices without a position: {missing[0]} and {len(missing) - 1} more")
    _check_parallel(frames)
    first = frames[0]
    assert first.orientation is not None
    _check_orientation(first)
    normal = np.cross(first.orientation[:3], first.orientation[3:])
    return np.array([frame.position @ normal for frame in frames]), normal


def _single(frame: Frame) -> Stack:
    """A slice as thick as it says, else as far from the next as it says; 1 mm, as ITK has it, where it says nothing."""
    direction, origin = np.eye(3), (0.0, 0.0, 0.0)
    if frame.orientation is not None:
        along, down = frame.orientation[:3], frame.orientation[3:]
        direction = np.stack([along, down, np.cross(along, down)], axis=1)
    if frame.position is not None:
        x, y, z = frame.position
        origin = (float(x), float(y), float(z))
    spacing = None
    if frame.spacing is not None:
        told = [x for x in (frame.thickness, abs(frame.between or 0)) if x is not None and x > 0]
        thickness = told[0] if told else 1.0
        spacing = (float(frame.spacing[1]), float(frame.spacing[0]), float(thickness))
    return Stack([0], spacing, origin, direction, frame.is_placed)


def _odd(frames: Sequence[Frame], keys: Sequence[object]) -> Frame:
    """The first frame that is not like most."""
    usual = Counter(keys).most_common(1)[0][0]
    return next(frame for frame, key in zip(frames, keys, strict=True) if key != usual)


def _check_sizes(frames: Sequence[Frame]) -> None:
    sizes = [(frame.rows, frame.columns) for frame in frames]
    if len(set(sizes)) > 1:
        odd = _odd(frames, sizes)
        raise ValueError(
            f"has slices of different sizes: {sorted(set(sizes))}; {odd.name} is unlike most (a localizer?): move it "
            "out of the folder"
        )
    spacings = [() if frame.spacing is None else tuple(frame.spacing.tolist()) for frame in frames]
    if len(set(spacings)) > 1:
        if all(spacings) and np.ptp(np.array(spacings), axis=0).max() <= 1e-4 * np.array(spacings).min():
            return
        odd = _odd(frames, spacings)
        raise ValueError(f"has slices of different pixel spacing: {sorted(set(spacings))}; {odd.name} is unlike most")


def _check_orientation(frame: Frame) -> None:
    assert frame.orientation is not None
    along, down = frame.orientation[:3], frame.orientation[3:]
    lengths = np.array([np.linalg.norm(along), np.linalg.norm(down)])
    if np.abs(lengths - 1).max() > 1e-3 or abs(float(along @ down)) > 1e-3:
        raise ValueError(
            f"{frame.name}: ImageOrientationPatient must be two unit vectors at right angles, got "
            f"{frame.orientation.round(4).tolist()}"
        )


def _check_parallel(frames: Sequence[Frame]) -> None:
    orientations = np.array([frame.orientation for frame in frames])
    usual = Counter(tuple(row) for row in orientations.round(2).tolist()).most_common(1)[0][0]
    near = np.flatnonzero(np.abs(orientations - usual).max(axis=1) <= 0.011)
    off = np.flatnonzero(np.abs(orientations - orientations[near[0]]).max(axis=1) > 1e-3)
    if len(off):
        raise ValueError(
            f"has slices that are not parallel: {frames[int(off[0])].name} lies across the others (a localizer?), "
            f"{len(off)} of {len(frames)} do; move what is not of the scan out of the folder"
        )


def _check_even(frames: Sequence[Frame], positions: np.ndarray, normal: np.ndarray) -> list[str]:
    """Whether slices, in their order, are evenly stacked at right angles; what is odd with them all the same."""
    steps = np.diff(positions, axis=0)
    gaps = steps @ normal
    usual = float(np.median(gaps))
    if abs(usual) < 1e-6 or np.abs(gaps).min() < 1e-6:
        at = int(np.abs(gaps).argmin())
        raise ValueError(f"has two slices at one position: {frames[at].name} and {frames[at + 1].name}")
    tilted = np.abs(steps - gaps[:, None] * normal).max() > 0.01 * np.abs(gaps).max()
    uneven = np.flatnonzero(np.abs(gaps - usual) > max(0.01 * abs(usual), 0.01))
    if not tilted and not len(uneven):
        return []
    if _only_rounded(positions, normal):
        return [f"positions of slices are rounded to 0.1 mm; taken as evenly spaced, {abs(np.mean(gaps)):.4g} mm apart"]
    if tilted:
        raise ValueError("has slices that are not stacked at right angles (a tilted gantry); resample it first")
    at = int(uneven[np.abs(gaps[uneven] - usual).argmax()])
    between = f"{frames[at].name} and {frames[at + 1].name}"
    raise ValueError(
        f"misses slices, or is not evenly spaced: {abs(gaps[at]):.3f} mm between {between}, else {abs(usual):.3f}"
    )


def _only_rounded(positions: np.ndarray, normal: np.ndarray) -> bool:
    """Whether all positions are multiples of 0.1 mm and lie on an even grid along the normal to within half of that."""
    if len(positions) < 3 or np.abs(positions * 10 - np.rint(positions * 10)).max() > 1e-3:
        return False
    k = np.arange(len(positions)) - (len(positions) - 1) / 2
    step = (k @ positions) / (k @ k)
    residual = positions - positions.mean(axis=0) - k[:, None] * step
    across = np.linalg.norm(step - (step @ normal) * normal)
    spacing = abs(float(step @ normal))
    return bool(np.abs(residual).max() <= _ROUNDED * 1.2 and across <= 0.01 * spacing and spacing > 4 * _ROUNDED)
