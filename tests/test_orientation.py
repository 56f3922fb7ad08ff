# SPDX-License-Identifier: Apache-2.0
"""Slices as radiologists have them: a point of the patient lands in the same corner of the screen, stored as it may."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scans import GEOMETRIES, OBLIQUE, scan, stored_as, write_enhanced, write_series

from berdiff_fast.imaging import volumes
from berdiff_fast.imaging.volumes import Volume
from berdiff_fast.io.orientation import View
from berdiff_fast.io.stack import SliceStack

#: Of each plane what lies at the left, top, right and bottom of the screen, and the corner (row, column) of the screen
#: in which the patient's right, front and foot end lies, given the slice that holds it.
SCREENS = {
    "axial": (("R", "A", "L", "P"), (0, 0)),
    "coronal": (("R", "H", "L", "F"), (-1, 0)),
    "sagittal": (("A", "H", "P", "F"), (-1, 0)),
}

#: Every way to store a volume with its axes along the patient's.
WAYS = [(order, flips) for order in itertools.permutations(range(3)) for flips in itertools.product((0, 1), repeat=3)]


def marked(direction=None) -> Volume:
    """Noise, brightest in the corner at the patient's right, front and foot end; stored to the left, back and head."""
    array = np.random.default_rng(0).integers(0, 1000, (4, 6, 8)).astype(np.int16)
    array[0, 0, 0] = 2000
    return Volume(array, (0.5, 0.75, 3.0), (-10.0, 20.0, -30.0), np.eye(3) if direction is None else direction)


def screen(volume: Volume, plane: str) -> np.ndarray:
    """(S, H, W) as shown."""
    axis = volume.axis(plane)
    return View.of(volume, axis).turn(np.moveaxis(volume.array, axis, 0))


@pytest.mark.parametrize("plane", SCREENS)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_same_picture_however_it_is_stored(way, plane):
    volume = marked()
    other = stored_as(volume, *way)
    assert other.array.max() == 2000 and other.array.shape == tuple(volume.array.shape[a] for a in way[0])
    expected, found = screen(volume, plane), screen(other, plane)
    view = View.of(other, other.axis(plane))
    assert (view.plane, view.edges, view.tilt) == (plane, SCREENS[plane][0], 0)
    # Slices may come in the other order; each is the same picture, with the bright corner where it belongs.
    backwards = not np.array_equal(found, expected)
    assert np.array_equal(found[::-1] if backwards else found, expected)
    row, column = SCREENS[plane][1]
    assert 2000 in (found[0, row, column], found[-1, row, column])
    # And so are the places of slices, and the proportions of pixels.
    here, there = (SliceStack.of(v, v.axis(plane)) for v in (volume, other))
    assert here.z is not None
    assert there.z is not None
    np.testing.assert_allclose(there.z[::-1] if backwards else there.z, here.z, atol=1e-9)
    assert there.view.turn_spacing(*there.spacing[1:]) == here.view.turn_spacing(*here.spacing[1:])


@pytest.mark.parametrize("plane", SCREENS)
def test_voxels_land_where_their_place_in_the_patient_says(plane):
    """Of real-world directions: going to the right on the screen is going along the letter at the right edge."""
    toward = {"R": (0, -1), "L": (0, 1), "A": (1, -1), "P": (1, 1), "F": (2, -1), "H": (2, 1)}
    for name in GEOMETRIES:
        volume = scan(name)
        axis = volume.axis(plane)
        places = np.moveaxis(np.stack(np.indices(volume.array.shape)[::-1]) * 1.0, axis + 1, 1)  # x, y, z indices
        world = np.einsum("ij,j...->i...", volume.direction * volume.spacing, places)
        shown = View.of(volume, axis).turn(world)
        view = View.of(volume, axis)
        assert view.edges is not None
        right, down = shown[:, 0, 0, 1] - shown[:, 0, 0, 0], shown[:, 0, 1, 0] - shown[:, 0, 0, 0]
        for step, letters, other in ((right, view.edges[2], view.edges[0]), (down, view.edges[3], view.edges[1])):
            direction = step / np.linalg.norm(step)
            named = [k for k in (0, 1, 2) if abs(direction[k]) >= 0.1]
            assert len(letters) == len(other) == len(named)
            sizes = []
            for letter, opposite in zip(letters, other, strict=True):
                k, sign = toward[letter]
                assert direction[k] * sign > 0 and toward[opposite] == (k, -sign)
                sizes.append(abs(direction[k]))
            assert sizes == sorted(sizes, reverse=True), "the nearest first"


@pytest.mark.parametrize("plane", SCREENS)
def test_never_a_mirror_image(plane):
    """For any rotation: seen from the feet, the front or the left, and never from behind."""
    into = {"axial": (0, 0, 1), "coronal": (0, 1, 0), "sagittal": (-1, 0, 0)}[plane]
    random = np.random.default_rng(1)
    for _ in range(200):
        rotation = np.linalg.qr(random.standard_normal((3, 3)))[0]  # with and without a flip
        volume = marked(rotation)
        axis = volume.axis(plane)
        view = View.of(volume, axis)
        if view.plane != plane:  # the nearest axis to this plane may be nearer to another
            continue
        column, row = (rotation[:, 2 - a] for a in sorted({0, 1, 2} - {axis}, reverse=True))
        x, y = (row, column) if view.transpose else (column, row)
        normal = np.cross(-x if view.flip_columns else x, -y if view.flip_rows else y)
        assert normal @ into > 0
        assert view.tilt == pytest.approx(np.degrees(np.arccos(abs(normal @ into))), abs=1e-5)


def test_oblique_slices_say_so():
    view = View.of(scan("oblique"), 0)
    assert view.plane == "axial" and view.edges == ("RA", "AFL", "LP", "PHR")
    assert "Oblique, nearest to axial (37° off), seen from the feet" in str(view)
    assert str(View.of(scan("plain"), 0)) == (
        "Axial, seen from the feet: the patient's right is on the left of the picture."
    )
    turned_within = np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])  # in the plane alone
    assert str(View.of(marked(turned_within), 0)).startswith("Oblique, nearest to axial, seen")
    slightly = np.array([[1.0, 0.0, 0.0], [0.0, 0.9986295, -0.0523360], [0.0, 0.0523360, 0.9986295]])  # 3 degrees
    assert View.of(marked(slightly), 0).edges == ("R", "A", "L", "P")
    assert "3° off" in str(View.of(marked(slightly), 0))


def test_without_a_direction_there_are_no_letters_and_it_says_why(tmp_path):
    for volume in (
        Volume(np.zeros((1, 4, 4))),
        Volume(np.zeros((2, 4, 4)), (1.0, 1.0, 1.0), placed=False),
    ):
        view = View.of(volume, 0)
        assert view == View() and "without letters: the file does not say how it lies in the patient" in str(view)
        assert np.array_equal(view.turn(np.arange(6).reshape(2, 3)), np.arange(6).reshape(2, 3))
        assert SliceStack.of(volume).z is None


# ---------------------------------------------------------------------- numbers of slices


def test_slices_are_counted_from_0_and_know_their_place():
    stack = SliceStack.of(scan("anisotropic"), 0, 1, 4)
    assert [*stack.numbers] == [1, 2, 3] and stack.total == 5 and not stack.is_whole
    assert stack.z == pytest.approx((-298.25, -295.75, -293.25))
    assert (str(stack), stack.place(0)) == ("slices 1 to 3 (3 of 5), z -298.25 to -293.25 mm", "z -298.25 mm")
    assert stack.as_json() == {"index": [1, 2, 3], "z_mm": [-298.25, -295.75, -293.25]}
    # Towards the head, whichever way slices are stored; of an oblique scan along the normal.
    assert SliceStack.of(scan("left-handed")).z == pytest.approx((3, 1, -1, -3, -5))
    volume = scan("oblique")
    normal = OBLIQUE[:, 2]
    expected = [(np.array(volume.origin) + k * 3.0 * normal) @ normal for k in range(5)]
    assert SliceStack.of(volume).z == pytest.approx(expected)
    assert str(SliceStack.of(Volume(np.zeros((1, 4, 4))))) == "slice 0 (the only one)"


def test_instance_numbers_come_from_dicom(tmp_path):
    pytest.importorskip("pydicom")
    write_series(tmp_path / "ct", scan(), InstanceNumber=lambda k: 40 - k)  # against the order in space
    volume = volumes.read(tmp_path / "ct")
    assert volume.instance_numbers == (40, 39, 38, 37, 36)
    stack = SliceStack.of(volume, 0, 1, 3)
    assert stack.as_json()["instance_number"] == [39, 38] and stack.place(1) == "z -295.75 mm, instance 38"
    # A coronal slice is made of rows of all files.
    assert "instance_number" not in SliceStack.of(volume, 1).as_json()
    write_series(tmp_path / "some", scan(), InstanceNumber=lambda k: None if k == 2 else k)
    assert volumes.read(tmp_path / "some").instance_numbers == (0, 1, None, 3, 4)


def test_frames_of_one_file_have_numbers_of_their_own(tmp_path):
    pytest.importorskip("pydicom")
    write_enhanced(tmp_path / "ct.dcm", scan(), order=[2, 0, 4, 1, 3])
    stack = SliceStack.of(volumes.read(tmp_path / "ct.dcm"))
    assert stack.as_json()["frame_number"] == [2, 4, 1, 5, 3]
    assert stack.place(0) == "z -300.75 mm, frame 2"
