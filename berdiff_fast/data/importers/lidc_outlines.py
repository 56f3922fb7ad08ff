# SPDX-License-Identifier: Apache-2.0
"""From outlines of LIDC-IDRI to masks.

An outline was drawn around the nodule: its pixels are the first ones *outside*, "so that, in the opinion of the
radiologist, the outline itself did not overlap pixels belonging to the nodule", and regions of exclusion, such as a
cavity, were outlined within it (Armato et al. 2011, Med Phys 38:915). So, in a slice, a reader's nodule is

    what inclusion outlines enclose, without what exclusion outlines enclose, without the pixels of any outline.

The last is true of exclusions, too: as the first pixels outside of what is left of the nodule they are no part of it.

*Enclosed* is what lies strictly inside the polygon through the middles of the outline's pixels, in their order, by the
nonzero rule: a path that runs around a pixel in two loops encloses it, and a bay whose mouth the path closes by
touching itself stays outside. Where a path makes a step of more than one pixel, or does not end where it began, the
step is a straight line, and pixels whose middles lie on it are the path's, too. All of this is exact, in integers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from berdiff_fast.data.importers.lidc_xml import Outline, Outlined

#: Lines of a path that are looked at together: a path may be long, and so may each of its steps.
_TOGETHER = 4096


@dataclass(frozen=True)
class Body:
    """A nodule of one reader, as pixels.

    Attributes:
        session: whose, by the place in the file.
        top, left: where its box begins, a row and a column.
        masks: of each slice (by its UID) in which it is outlined, bool (h, w) of the box: what is nodule.
        areas: the same with exclusions filled, by which readings are compared; the outlines themselves where these
            enclose nothing at all.
    """

    session: int
    top: int
    left: int
    masks: dict[str, np.ndarray]
    areas: dict[str, np.ndarray]

    @classmethod
    def of(cls, outlined: Outlined, session: int) -> Body:
        """The nodule that some outlines are of."""
        points = np.concatenate([one.points for one in outlined.outlines])
        (top, left), (height, width) = points.min(0), np.ptp(points, axis=0) + 1
        box = (int(top), int(left), int(height), int(width))
        by_slice: dict[str, list[Outline]] = {}
        for one in outlined.outlines:
            by_slice.setdefault(one.slice_uid, []).append(one)
        masks, areas, paths = {}, {}, {}
        for uid, outlines in by_slice.items():
            filled = [(one.inclusion, *fill(one.points, box)) for one in outlines]
            none = np.zeros(box[2:], bool)
            areas[uid] = _any((inside for inclusion, inside, _ in filled if inclusion), none)
            paths[uid] = _any((path for inclusion, _, path in filled if inclusion), none)
            left_out = _any((inside | path if not inclusion else path for inclusion, inside, path in filled), none)
            masks[uid] = areas[uid] & ~left_out
        if not any(area.any() for area in areas.values()):
            areas = paths
        return cls(session, box[0], box[1], masks, areas)

    def window(self, layer: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
        """A layer of ``masks`` or ``areas`` in another box (top, left, height, width), False beyond."""
        top, left, height, width = box
        found = np.zeros((height, width), bool)
        rows, columns = layer.shape
        low_r, high_r = max(top, self.top), min(top + height, self.top + rows)
        low_c, high_c = max(left, self.left), min(left + width, self.left + columns)
        if low_r < high_r and low_c < high_c:
            part = layer[low_r - self.top : high_r - self.top, low_c - self.left : high_c - self.left]
            found[low_r - top : high_r - top, low_c - left : high_c - left] = part
        return found


def _any(layers: Iterable[np.ndarray], none: np.ndarray) -> np.ndarray:
    found = none.copy()
    for layer in layers:
        found |= layer
    return found


def is_bridged(points: np.ndarray) -> bool:
    """Whether a path is not closed, or makes a step of more than one pixel."""
    return bool((np.abs(np.roll(points, -1, axis=0) - points) > 1).any())


def fill(points: np.ndarray, box: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """What a closed path encloses, and the path.

    Args:
        points: (P, 2) int, the row and the column of each pixel, all in the box.
        box: (top, left, height, width).

    Returns:
        inside, path: bool (height, width) both, of which no pixel is in both.
    """
    top, left, height, width = box
    path = np.zeros((height, width), bool)
    winding = np.zeros((height, width + 1), np.int64)
    ends = np.stack([points, np.roll(points, -1, axis=0)], axis=1) - (top, left)  # (P, 2, 2): from, to
    for start in range(0, len(ends), _TOGETHER):
        some = ends[start : start + _TOGETHER]
        row, column = _on(some)
        path[row, column] = True
        row, column, turn = _crossings(some)
        np.add.at(winding, (row, column + 1), turn)
    return (winding.cumsum(axis=1)[:, :width] != 0) & ~path, path


def _crossings(ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where lines (P, 2, 2) cross rows, downwards (1) or upwards (-1): rows, columns rounded down, and the turns.

    Of a line it is the rows from its upper end to before its lower one. What lies to the right of a crossing is wound
    around once more, or once less.
    """
    turns = np.sign(ends[:, 1, 0] - ends[:, 0, 0])
    down = turns[:, None] > 0
    upper, lower = np.where(down, ends[:, 0], ends[:, 1]), np.where(down, ends[:, 1], ends[:, 0])
    fall, run = (lower - upper).T
    line, step = _steps(fall)
    column = upper[line, 1] + step * run[line] // np.maximum(fall[line], 1)
    return upper[line, 0] + step, column, turns[line]


def _on(ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels whose middles lie on lines (P, 2, 2), without the last of each."""
    delta = ends[:, 1] - ends[:, 0]
    parts = np.maximum(np.gcd(*np.abs(delta).T), 1)
    line, step = _steps(parts)
    row, column = (ends[line, 0] + step[:, None] * delta[line] // parts[line, None]).T
    return row, column


def _steps(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For counts (2, 0, 3): (0, 0, 2, 2, 2), and (0, 1, 0, 1, 2)."""
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
