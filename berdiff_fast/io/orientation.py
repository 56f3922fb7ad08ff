# SPDX-License-Identifier: Apache-2.0
"""Which way round a slice is shown: the convention of radiology, and the letters at the edges of the picture."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from berdiff_fast.io.volume import PLANES, Volume

#: Of each plane: what lies to the right on the screen, what lies down on it (left, posterior, superior), and from where
#: it is seen.
_SCREENS = {
    "axial": ((1, 0, 0), (0, 1, 0), "seen from the feet: the patient's right is on the left of the picture"),
    "coronal": ((1, 0, 0), (0, 0, -1), "seen from the front: the patient's right is on the left of the picture"),
    "sagittal": ((0, 1, 0), (0, 0, -1), "seen from the patient's left: the front is on the left of the picture"),
}

#: Letters of the negative and the positive end of left, posterior and superior, as DICOM has them.
_LETTERS = (("R", "L"), ("A", "P"), ("F", "H"))

#: A direction is named by every axis along which it has at least this component: 0.1 is 6 degrees off.
_NAMED = 0.1


@dataclass(frozen=True)
class View:
    """How slices are shown: transposed or not, then flipped.

    Attributes:
        transpose: rows and columns change places.
        flip_rows, flip_columns: the picture, after that, is turned upside down or left to right.
        plane: the anatomical plane that the slices are nearest to; None where the file does not say how they lie.
        tilt: degrees between the slices and that plane.
        edges: letters at the left, top, right and bottom edge, such as ("R", "A", "L", "P"); several letters where the
            direction lies between axes, the nearest axis first. None where it is not known how slices lie.
    """

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False
    plane: str | None = None
    tilt: float = 0.0
    edges: tuple[str, str, str, str] | None = None

    @staticmethod
    def of(volume: Volume, axis: int) -> View:
        """The radiological view of the slices along an axis (0, 1, 2) of a volume's array.

        Axial slices are seen from the feet, coronal ones from the front, sagittal ones from the patient's left. The
        picture is turned by quarters and mirrored, never interpolated, so an oblique slice is shown by the nearest
        axes. It is never the mirror image of what is seen from that side.

        Returns:
            A view without ``plane`` and ``edges``, and as stored, if the volume does not say how it lies.
        """
        if not volume.is_placed:
            return View()
        row_axis, column_axis = (a for a in (0, 1, 2) if a != axis)
        normal, down, right = (volume.direction[:, 2 - a] for a in (axis, row_axis, column_axis))
        plane = next(name for name, k in PLANES.items() if k == int(np.abs(normal).argmax()))
        to_right, to_bottom = (np.array(end, float) for end in _SCREENS[plane][:2])
        into = np.cross(to_right, to_bottom)
        best, found = -math.inf, View()
        for transpose in (False, True):
            first, second = (down, right) if transpose else (right, down)
            for flip_rows in (False, True):
                for flip_columns in (False, True):
                    x, y = first * (1 - 2 * flip_columns), second * (1 - 2 * flip_rows)
                    if np.cross(x, y) @ into <= 0:  # a mirror image
                        continue
                    fit = float(x @ to_right + y @ to_bottom)
                    if fit > best + 1e-9:
                        edges = (_letters(-x), _letters(-y), _letters(x), _letters(y))
                        tilt = math.degrees(math.acos(min(1.0, abs(float(normal @ into)))))
                        best, found = fit, View(transpose, flip_rows, flip_columns, plane, tilt, edges)
        return found

    def turn(self, array: np.ndarray) -> np.ndarray:
        """Slices (..., H, W) as they are shown; a view of the array."""
        if self.transpose:
            array = array.swapaxes(-1, -2)
        return array[..., :: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]

    def turn_spacing(self, row: float, column: float) -> tuple[float, float]:
        """Distances from row to row and from column to column, as shown, of those that are stored."""
        return (column, row) if self.transpose else (row, column)

    def __str__(self) -> str:
        if self.plane is None:
            return "Shown as stored, without letters: the file does not say how it lies in the patient."
        side = _SCREENS[self.plane][2]
        if self.tilt < 1 and self.edges is not None and all(len(letters) == 1 for letters in self.edges):
            return f"{self.plane.capitalize()}, {side}."
        off = f" ({self.tilt:.0f}° off)" if self.tilt >= 1 else ""
        return (
            f"Oblique, nearest to {self.plane}{off}, {side}. Of several letters at an edge the first names the nearest "
            "direction."
        )


def _letters(direction: np.ndarray) -> str:
    """The patient's directions that a vector (left, posterior, superior) points to, the nearest first."""
    order = sorted((0, 1, 2), key=lambda k: -abs(round(float(direction[k]), 6)))
    return "".join(_LETTERS[k][int(direction[k] > 0)] for k in order if abs(direction[k]) >= _NAMED)
