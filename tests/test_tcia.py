# SPDX-License-Identifier: Apache-2.0
"""LIDC-IDRI as The Cancer Imaging Archive gives it: readings to masks, masks to nodules, scans to cuts."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import tcia_cases as cases
from tcia_cases import FOUR, REAL, box, non_nodule, pixels, reading, ring, tree, uid, write_xml

import berdiff_fast as bf
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.data.importers import import_tcia, lidc_nodules
from berdiff_fast.data.importers.lidc_outlines import Body, fill
from berdiff_fast.data.importers.lidc_xml import Outline, Outlined
from berdiff_fast.data.importers.tcia_cuts import Cutter
from berdiff_fast.imaging import volumes
from berdiff_fast.scans.tiling import Tiling

pytest.importorskip("pydicom", reason="pydicom is not installed")

ALL = dict(split=(100, 0, 0))
READINGS = ("259", "105", "143", "011")


def rows(output: Path, split: str = "train") -> list[dict]:
    """A file, row by row."""
    with h5py.File(output / f"{split}.h5") as file:
        read = {key: d.asstr()[()] if d.dtype == object else d[()] for key, d in file.items()}
    return [{key: values[k] for key, values in read.items()} for k in range(len(read["slice"]))]


# ---------------------------------------------------------------------- an independent way to the same masks


def around(path, place: tuple[int, int]) -> int:
    """How often a path goes around a point that is not on it: by the angles under which it sees the steps."""
    total = 0.0
    for (r0, c0), (r1, c1) in zip(path, [*path[1:], path[0]], strict=True):
        a, b = (r0 - place[0], c0 - place[1]), (r1 - place[0], c1 - place[1])
        total += math.atan2(a[0] * b[1] - a[1] * b[0], a[0] * b[0] + a[1] * b[1])
    return round(total / (2 * math.pi))


def is_on(path, place: tuple[int, int]) -> bool:
    for (r0, c0), (r1, c1) in zip(path, [*path[1:], path[0]], strict=True):
        a, b = (r0 - place[0], c0 - place[1]), (r1 - place[0], c1 - place[1])
        if a[0] * b[1] == a[1] * b[0] and a[0] * b[0] + a[1] * b[1] <= 0:
            return True
    return False


def flooded(path: list[tuple[int, int]], size: tuple[int, int]) -> np.ndarray:
    """What water around the path does not reach, flowing to neighbours by an edge, and the path is no part of."""
    places = np.array(path)
    (top, left), (bottom, right) = places.min(0) - 1, places.max(0) + 2
    wall = np.zeros((bottom - top, right - left), bool)
    for row, column in path:
        wall[row - top, column - left] = True
    wet = np.zeros_like(wall)
    todo = [(0, 0)]
    while todo:
        row, column = todo.pop()
        if 0 <= row < wall.shape[0] and 0 <= column < wall.shape[1] and not (wall | wet)[row, column]:
            wet[row, column] = True
            todo += [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
    found = np.zeros(size, bool)
    for row, column in np.argwhere(~wet & ~wall):
        found[row + top, column + left] = True
    return found


def patterns(xml: str) -> list[list[tuple[str, list[tuple[str, bool, list[tuple[int, int]]]]]]]:
    """Sessions, in them nodules with more than a point, in them regions (slice, inclusion, path): by patterns alone."""
    found = []
    for session in re.findall(r"<readingSession>(.*?)</readingSession>", xml, re.S):
        nodules = []
        for mark in re.findall(r"<unblindedReadNodule>(.*?)</unblindedReadNodule>", session, re.S):
            (name,) = re.findall(r"<noduleID>\s*(.*?)\s*</noduleID>", mark)
            regions = []
            for region in re.findall(r"<roi>(.*?)</roi>", mark, re.S):
                xs, ys = (list(map(int, re.findall(rf"<{c}Coord>\s*(\d+)", region))) for c in "xy")
                (instance,) = re.findall(r"<imageSOP_UID>\s*([0-9.]+)", region)
                regions.append((instance, "<inclusion>TRUE" in region, list(zip(ys, xs, strict=True))))
            if any(len(set(path)) > 1 for *_, path in regions):
                nodules.append((name, regions))
        found.append(nodules)
    return found


def by_hand(regions, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """A reader's nodule in each slice, by flooding: enclosed, less what is excluded, less every outline."""
    found: dict[str, np.ndarray] = {}
    for instance in {one for one, *_ in regions}:
        mask = np.zeros(size, bool)
        for _, inclusion, path in sorted((r for r in regions if r[0] == instance), key=lambda r: not r[1]):
            inside = flooded(path, size)
            mask = mask | inside if inclusion else mask & ~inside
        for one, _, path in regions:
            if one == instance:
                for row, column in path:
                    mask[row, column] = False
        found[instance] = mask
    return found


# ---------------------------------------------------------------------- outlines


def inside_of(path) -> set[tuple[int, int]]:
    """Pixels that a path encloses, by the package."""
    points = np.array(path)
    (top, left), (height, width) = points.min(0), np.ptp(points, axis=0) + 1
    inside, on = fill(points, (top, left, height, width))
    assert not (inside & on).any() and {(r - top, c - left) for r, c in path} <= {*map(tuple, np.argwhere(on).tolist())}
    return {(int(r + top), int(c + left)) for r, c in np.argwhere(inside)}


@pytest.mark.parametrize(
    ("path", "inside"),
    [
        (ring(3, 4, 1, 1), {(3, 4)}),
        (ring(3, 4, 2, 3), {(r, c) for r in (3, 4) for c in (4, 5, 6)}),
        ([(0, 1), (1, 2), (2, 1), (1, 0), (0, 1)], {(1, 1)}),  # corners alone
        ([(0, 1), (1, 2), (2, 1), (1, 0)], {(1, 1)}),  # the last step is one pixel: closed all the same
        (ring(3, 4, 2, 3)[::-1], {(r, c) for r in (3, 4) for c in (4, 5, 6)}),
        (ring(3, 4, 2, 2) + ring(3, 4, 2, 2), {(r, c) for r in (3, 4) for c in (4, 5)}),  # twice around
        ([(0, 0), (0, 1)], set()),
        ([(0, 0), (1, 1), (2, 2), (1, 1), (0, 0)], set()),  # there and back
        ([(0, 0), (0, 4), (4, 4), (4, 0)], {(r, c) for r in (1, 2, 3) for c in (1, 2, 3)}),  # steps of four
        ([(0, 0), (0, 1), (0, 2), (0, 3), (1, 3), (2, 3), (3, 3)], {(1, 2)}),  # open: (1, 1) and (2, 2) lie on the line
        # A ring of two loops that meet in a pixel.
        ([(1, 0), (0, 1), (1, 2), (2, 3), (1, 4), (0, 3), (1, 2), (2, 1), (1, 0)], {(1, 1), (1, 3)}),
    ],
)
def test_what_a_path_encloses(path, inside):
    assert inside_of(path) == inside


def test_a_bay_that_the_path_closes_lies_outside():
    """A slit of two columns leads to a bay of two pixels. Water does not reach it; the path goes around it."""
    path = [(0, c) for c in range(5)] + [(1, 4), (2, 4), (3, 4), (4, 3), (5, 4), (5, 5), (4, 6), (3, 5), (2, 5), (1, 5)]
    path += [(0, c) for c in range(5, 9)] + [(r, 8) for r in range(1, 9)]
    path += [(8, c) for c in range(7, -1, -1)] + [(r, 0) for r in range(7, -1, -1)]
    bay = {(4, 4), (4, 5)}
    dry = {*map(tuple, np.argwhere(flooded(path, (9, 9))).tolist())}
    assert bay < dry and inside_of(path) == dry - bay


@pytest.mark.parametrize("longest", [1, 4])
def test_any_path_against_angles(longest):
    """Paths that cross themselves, run twice around, and take long steps."""
    random = np.random.default_rng(longest)
    for _ in range(60):
        steps = random.integers(-longest, longest + 1, (24, 2))
        path = [tuple(place) for place in np.cumsum(steps, axis=0).tolist()]
        if longest == 1:  # back home, pixel by pixel
            while path[-1] != path[0]:
                path.append(tuple(int(a + np.sign(b - a)) for a, b in zip(path[-1], path[0], strict=True)))
        low, high = np.min(path, axis=0), np.max(path, axis=0)
        places = [(r, c) for r in range(low[0], high[0] + 1) for c in range(low[1], high[1] + 1)]
        assert inside_of(path) == {p for p in places if not is_on(path, p) and around(path, p)}


def body(*outlines: tuple[int, list[tuple[int, int]], bool], session: int = 0) -> Body:
    regions = tuple(Outline(str(k), 2.5 * k, inclusion, np.array(path)) for k, path, inclusion in outlines)
    return Body.of(Outlined("n", regions), session)


def test_exclusions_and_several_parts():
    """A cavity goes with its outline; two parts are one mask; what is excluded in one slice is not in another."""
    drawn = body(
        (0, ring(2, 2, 8, 8), True),
        (0, ring(4, 4, 2, 2), False),
        (0, ring(2, 20, 3, 3), True),
        (1, ring(2, 2, 8, 8), True),
    )
    want = np.zeros((30, 30), bool)
    want[2:10, 2:10] = want[2:5, 20:23] = True
    want[3:7, 3:7] = False  # 2 x 2 and the path around it
    whole = (0, 0, 30, 30)
    assert np.array_equal(drawn.window(drawn.masks["0"], whole), want)
    assert drawn.masks["1"].sum() == 64 and drawn.areas["0"].sum() == 64 + 9


def test_an_outline_in_another_is_no_nodule():
    """The pixels of an outline belong to no nodule, whatever encloses them."""
    drawn = body((0, ring(2, 2, 8, 8), True), (0, ring(4, 4, 2, 2), True))
    assert drawn.masks["0"].sum() == 64 - 12


# ---------------------------------------------------------------------- nodules


def square(session: int, left: int, slices=(0,), side: int = 4) -> Body:
    return body(*((k, ring(5, left, side, side), True) for k in slices), session=session)


@pytest.mark.parametrize(
    ("bodies", "groups"),
    [
        ([square(0, 5), square(1, 8)], [[0, 1]]),  # a quarter in common
        ([square(0, 5), square(1, 9)], [[0], [1]]),
        ([square(0, 5, range(9)), square(1, 5, [4])], [[0, 1]]),  # of the smaller one
        ([square(0, 5, [0]), square(1, 5, [1])], [[0], [1]]),  # in three dimensions
        ([square(0, 5), square(0, 6)], [[0], [1]]),  # one reader saw two
        ([square(0, 5), square(0, 11), square(1, 5, side=10)], [[0, 1, 2]]),  # ... where another saw one
        # A chain in which nobody saw the two of reader 0 as one: the weaker link is not followed.
        ([square(0, 5), square(1, 7), square(2, 9), square(0, 12)], [[0, 1, 2], [3]]),
        ([square(k, 5 + k % 2) for k in range(5)], [[0, 1, 2, 3, 4]]),
        # Nothing enclosed: the outlines themselves are compared.
        ([body((0, [(5, 5), (5, 6), (5, 7)], True)), body((0, [(5, 6), (5, 7)], True), session=1)], [[0, 1]]),
    ],
)
def test_which_readings_are_of_one_nodule(bodies, groups):
    assert lidc_nodules.grouped(bodies) == groups
    order = np.random.default_rng(0).permutation(len(bodies))
    again = lidc_nodules.grouped([bodies[k] for k in order])
    assert sorted(sorted(int(order[k]) for k in group) for group in again) == groups


# ---------------------------------------------------------------------- a scan of one's own


def test_a_scan(tmp_path):
    """Hounsfield units, masks, who read what, and where it is from."""
    tree(tmp_path / "tree")
    report = import_tcia(tmp_path / "tree", tmp_path / "out", **ALL, size=(32, 24))
    found = rows(tmp_path / "out")
    # The nodule of three readers in slices 2 to 4, then that of one; its box is rows 20 to 26, columns 30 to 35.
    assert [(int(one["nodule"]), int(one["slice"])) for one in found] == [(0, 2), (0, 3), (0, 4), (1, 5), (1, 6)]
    top, left = round(23.5 - 16), 33 - 12
    boxes = {2: {0: (20, 30, 6, 5)}, 3: {0: (20, 30, 6, 5), 1: (21, 30, 6, 5), 2: (20, 31, 5, 5)}}
    boxes[4] = {k: boxes[3][k] for k in (0, 1)}
    for one in found[:3]:
        k = int(one["slice"])
        assert one["image"].dtype == np.int16
        assert np.array_equal(one["image"], pixels(k)[top : top + 32, left : left + 24])
        want = np.zeros((4, 64, 80), np.uint8)
        for rater, (r, c, h, w) in boxes[k].items():
            want[rater, r : r + h, c : c + w] = 1
        assert np.array_equal(one["mask"], want[:, top : top + 32, left : left + 24])
    assert [one["path"] for one in found[:1]] == [f"LIDC-IDRI-0001/1.2.3/{cases.SERIES}/1-006.dcm"]
    assert all(one["rater_valid"].tolist() == [1, 1, 1, 1] and one["patient_id"] == 1 for one in found)
    slices = RaterDataset(tmp_path / "out" / "train.h5")
    assert slices.pixel_spacing == (0.75, 0.75) and slices.image_size == (32, 24) and slices.names_patients
    told = json.loads((tmp_path / "out" / "import.json").read_text())["readings"]
    assert told == report.readings
    assert (told["nodules"], told["readings"], told["small_nodules"], told["non_nodules"]) == (2, 4, 2, 3)
    assert told["readings_per_nodule"] == {"1": 1, "3": 1} and told["sessions_per_scan"] == {"4": 1}
    assert report.problems == () and "2 nodules of 3 mm or more" in report.to_text()
    assert (tmp_path / "out" / "preview.png").stat().st_size > 500


def other_scan(root: Path, *sessions, series: str = "1.2.826.7", patient: str = "LIDC-IDRI-0002", **changes) -> Path:
    """A second scan: the folder of its series."""
    folder = cases.write_series(root / patient / "1.2.4" / series, 8, series, PatientID=patient, **changes)
    write_xml(folder / "070.xml", reading(*sessions, series=series))
    return folder


def test_scans_of_three_and_eight_sessions(tmp_path):
    """Whoever read the scan and did not outline the nodule saw none; who did not read it counts nowhere."""
    tree(tmp_path / "tree", FOUR[:3])
    other_scan(tmp_path / "tree", *FOUR[:3], *FOUR[:3], [], [])
    report = import_tcia(tmp_path / "tree", tmp_path / "out", **ALL, size=(32, 32))
    found = rows(tmp_path / "out")
    valid = {int(one["patient_id"]): one["rater_valid"].tolist() for one in found}
    assert valid == {1: [1] * 3 + [0] * 5, 2: [1] * 8}
    assert report.raters == 8 and report.readings["sessions_per_scan"] == {"3": 1, "8": 1}
    assert report.readings["nodules_of_more_than_four_readings"] == 1
    assert "1 of 3, 1 of 8" in report.to_text() and "1 nodule of more than four readings" in report.to_text()
    (masks,) = (one["mask"] for one in found if one["patient_id"] == 2 and one["slice"] == 3)
    assert masks.any((1, 2)).tolist() == [True] * 6 + [False] * 2
    assert RaterDataset(tmp_path / "out" / "train.h5").rater_valid.sum() == 5 * 3 + 5 * 8


def test_sessions_of_another_scan(tmp_path):
    """A file of eight sessions, four of which name slices of another series only: they read something else."""
    folder = tree(tmp_path / "tree")
    both = reading(*FOUR, *([non_nodule(k, cases.OTHER)] for k in range(4)))
    write_xml(folder / "069.xml", both)
    report = import_tcia(tmp_path / "tree", tmp_path / "out", **ALL)
    assert report.raters == 4 and report.readings["sessions_of_another_scan"] == 4
    assert report.readings["non_nodules"] == 3 and "4 sessions of another scan" in report.to_text()


def test_a_reader_who_saw_two_where_another_saw_one(tmp_path):
    wide, left, right = box("w", (3,), 20, 20, 8, 30), box("l", (3,), 21, 21, 6, 8), box("r", (3,), 21, 40, 6, 8)
    tree(tmp_path / "tree", [[wide], [left, right]])
    report = import_tcia(tmp_path / "tree", tmp_path / "out", **ALL, size=(48, 48))
    (one,) = rows(tmp_path / "out")
    assert one["mask"].sum((1, 2)).tolist() == [240, 96]
    assert report.readings["nodules_with_two_outlines_of_a_reader"] == 1
    tree(tmp_path / "two", [[left, right], [left]])
    report = import_tcia(tmp_path / "two", tmp_path / "out2", **ALL, size=(48, 48))
    assert report.readings["readings_per_nodule"] == {"1": 1, "2": 1}
    assert report.readings["slices_that_show_another_nodule"] == 2


def test_a_patient_with_two_scans(tmp_path):
    """Nodules are numbered on, and both scans go into one split."""
    tree(tmp_path / "tree")
    other_scan(tmp_path / "tree", *FOUR, patient="LIDC-IDRI-0001")
    import_tcia(tmp_path / "tree", tmp_path / "out", size=(32, 32))
    (name,) = (path.stem for path in (tmp_path / "out").glob("*.h5"))
    assert name == "train" == bf.data.importers.split_of("LIDC-IDRI-0001")
    assert Counter(int(one["nodule"]) for one in rows(tmp_path / "out")) == {0: 3, 1: 2, 2: 3, 3: 2}


def test_series_that_are_uneven_are_told_of(tmp_path):
    """As some of the archive are: a slice is missing, another one is there twice under two UIDs."""
    folder = tree(tmp_path / "tree")
    (folder / "1-001.dcm").unlink()
    (folder / "1-007.dcm").unlink()
    cases.write_slice(folder / "1-100.dcm", uid(50), -100.0, 0)
    report = import_tcia(tmp_path / "tree", tmp_path / "out", **ALL, size=(32, 32))
    assert "1 series unevenly spaced" in report.to_text()
    assert "two slices at one position" in report.readings["of_scans"][0]["unevenly_spaced"]
    assert [int(one["slice"]) for one in rows(tmp_path / "out")] == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("wanted", [None, 0.5, (0.9, 1.2)])
@pytest.mark.parametrize("padded", [False, True])
def test_cuts_are_those_of_sample_volume(tmp_path, wanted, padded):
    """At the border, too, and where a scanner wrote values that are no tissue."""
    values = pixels(0)
    if padded:
        values[:12] = -2000
    changes = dict(PixelData=(values.astype(np.int32) + 2024).astype(np.uint16).tobytes(), RescaleIntercept="-2024")
    cases.write_slice(tmp_path / "1.dcm", "1.2", 0.0, **changes)
    volume = volumes.read(tmp_path / "1.dcm")
    spacing = wanted if isinstance(wanted, tuple) or wanted is None else (wanted, wanted)
    cutter = Cutter.of((32, 32), (64, 80), (0.75, 0.75), spacing)
    preprocessing = bf.Preprocessing(size=(32, 32), pixel_spacing=spacing)
    network = bf.UNet(model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=())
    model = bf.BerDiff(network, preprocessing=preprocessing)
    for middle in ((33.5, 40.0), (3.0, 78.5), (12.0, 5.0)):
        tiling = Tiling.of(model, volume, 0, (64, 80), middle, None, 0.25)
        want = tiling.cut(volume.array[0], volume.outside(volume.array[0]))[0].numpy()
        assert np.array_equal(cutter.image(volume, middle), want)
        assert want.min() >= -1000 - 1e-3


def test_spacing(tmp_path):
    """Masks go with the image, and the file tells the spacing that all of it has."""
    tree(tmp_path / "tree")
    other_scan(tmp_path / "tree", *FOUR, PixelSpacing=["0.5", "0.6"])
    report = import_tcia(tmp_path / "tree", tmp_path / "own", **ALL)
    assert "scans differ in pixel spacing (2 kinds)" in report.to_text()
    assert RaterDataset(tmp_path / "own" / "train.h5").pixel_spacing is None
    tree(tmp_path / "alone", PixelSpacing=["0.6640625", "0.6640625"])
    import_tcia(tmp_path / "alone", tmp_path / "all", **ALL)
    assert RaterDataset(tmp_path / "all" / "train.h5").pixel_spacing == (0.6640625, 0.6640625)
    import_tcia(tmp_path / "tree", tmp_path / "one", **ALL, pixel_spacing=0.375)
    assert RaterDataset(tmp_path / "one" / "train.h5").pixel_spacing == (0.375, 0.375)
    first, second = (
        next(one for one in rows(tmp_path / "one") if one["patient_id"] == patient and one["slice"] == 2)
        for patient in (1, 2)
    )
    assert first["mask"].sum((1, 2)).tolist() == [4 * 30, 0, 0, 0]  # twice as fine
    # Rows 40 to 51 and columns 60 to 69 of the finer slice, in a cut of 128 pixels around (47, 66).
    assert first["mask"][0, 57:69, 58:68].all()
    assert second["mask"].sum() == round(6 * 0.5 / 0.375) * round(5 * 0.6 / 0.375)


# ---------------------------------------------------------------------- real readings

#: Which outlines are of one nodule, by their noduleID, as a person sees it in the files.
GROUPS = {
    "259": [{"15416", "10561", "2449"}, {"15425", "10565", "2453"}],
    "105": [{"IL057_166246", "Nodule 001", "3669", "68637"}],
    "143": [{"38539"}, {"38544", "19365", "8473", "7"}],
    "011": [{"Nodule 002", "13212", "1326", "0"}],
}

#: Sessions, nodules that are outlined, smaller ones, non-nodules, regions with an outline, exclusions among them. By
#: hand of 259: ``grep -c`` gives 4 <readingSession>, 12 <unblindedReadNodule> (6 of them with several <edgeMap> in a
#: <roi>), 7 <nonNodule>, and 16 <roi>, 6 of which are points and 1 of which has <inclusion>FALSE.
COUNTS = {
    "259": (4, 6, 6, 7, 10, 1),
    "105": (4, 4, 0, 11, 24, 1),
    "143": (4, 5, 7, 27, 20, 2),
    "011": (8, 4, 16, 64, 11, 0),
}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """All real readings with a CT made for each, imported: the tree, what was written, and the z of its slices."""
    if not all((REAL / f"{name}.xml").is_file() for name in READINGS):
        pytest.skip("the readings of LIDC-IDRI are not here")
    root = tmp_path_factory.mktemp("tcia")
    z = {}
    for number, name in enumerate(READINGS, start=1):
        z[name] = cases.series_for(root / "tree", REAL / f"{name}.xml", f"LIDC-IDRI-{number:04d}")
    folder = root / "tree" / "LIDC-IDRI-0009" / "study" / "1.9"
    cases.write_slice(folder / "1-1.dcm", "1.9.1", 0.0, series="1.9", Modality="DX", PatientID="LIDC-IDRI-0009")
    (folder / "145.xml").write_bytes((REAL / "145-chest-xray.xml").read_bytes())
    report = import_tcia(root / "tree", root / "out", **ALL)
    return root / "out", report, z


def test_real_readings_are_counted(real):
    _, report, _ = real
    assert report.raters == 8 and not report.problems and not report.ignored
    names = ("sessions", "readings", "small_nodules", "non_nodules", "outlines", "exclusions")
    for name, one in zip(READINGS, report.readings["of_scans"], strict=True):
        assert one["xml"].endswith(f"{name}.xml")
        sessions, nodules, small, others, outlines, exclusions = COUNTS[name]
        assert tuple(one[key] for key in names) == (sessions, nodules, small, others, outlines - exclusions, exclusions)
        text = (REAL / f"{name}.xml").read_text()
        assert text.count("<readingSession>") == sessions and text.count("<nonNodule>") == others
        assert text.count("<unblindedReadNodule>") == nodules + small
        points = sum(part.count("<edgeMap>") == 1 for part in text.split("<roi>")[1:])
        assert text.count("<roi>") == outlines + points and text.count("<inclusion>FALSE") == exclusions
    assert report.readings["chest_xray_readings"] == 1 and report.readings["other_series"] == {"DX": 1}
    assert report.readings["readings_per_nodule"] == {"1": 1, "3": 2, "4": 3}
    assert report.readings["sessions_per_scan"] == {"4": 3, "8": 1}


@pytest.mark.parametrize("name", READINGS)
def test_real_readings_voxel_by_voxel(real, name):
    """Every mask and every Hounsfield unit of every slice, and none besides."""
    output, _, z = real
    sessions = patterns((REAL / f"{name}.xml").read_text())
    masks = [
        (session, title, by_hand(regions, (512, 512)))
        for session, nodules in enumerate(sessions)
        for title, regions in nodules
    ]
    # The series was written from above; its slices are numbered from below.
    order = {instance: k for k, instance in enumerate(sorted(z[name], key=lambda uid: z[name][uid]))}
    want = []
    for group in GROUPS[name]:
        slices: dict[str, np.ndarray] = {}
        for session, title, of_reader in masks:
            if title in group:
                for instance, mask in of_reader.items():
                    slices.setdefault(instance, np.zeros((8, 512, 512), bool))[session] |= mask
        slices = {instance: m for instance, m in slices.items() if m.any()}
        seen = np.any([m.any(0) for m in slices.values()], axis=0)
        middle = [(np.flatnonzero(seen.any(a)).min() + np.flatnonzero(seen.any(a)).max() + 1) / 2 for a in (1, 0)]
        top, left = (round(m - 64) + 128 for m in middle)
        for instance in slices:
            k = order[instance]
            image = np.pad(pixels(len(order) - 1 - k, (512, 512)), 128, constant_values=-1000)
            found = np.pad(slices[instance], ((0, 0), (128, 128), (128, 128)))
            want.append((k, image[top : top + 128, left : left + 128], found[:, top : top + 128, left : left + 128]))
    got = [one for one in rows(output) if one["patient_id"] == READINGS.index(name) + 1]
    assert len(got) == len(want)
    voxels = 0
    for k, image, found in want:
        (one,) = (g for g in got if g["slice"] == k and np.array_equal(g["image"], image))
        assert np.array_equal(one["mask"], found)
        assert one["rater_valid"].sum() == COUNTS[name][0]
        voxels += int(found.sum())
    assert voxels > 100


def test_real_outlines_by_both_ways(real):
    """Every region by itself, also those that exclude."""
    count = 0
    for name in READINGS:
        for nodules in patterns((REAL / f"{name}.xml").read_text()):
            for _, regions in nodules:
                for _, _, path in regions:
                    assert inside_of(path) == {*map(tuple, np.argwhere(flooded(path, (512, 512))).tolist())}
                    count += 1
    assert count == sum(COUNTS[name][4] for name in READINGS)
