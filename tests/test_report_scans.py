# SPDX-License-Identifier: Apache-2.0
"""Reports of scans: turned as radiologists have them, windows, numbers of slices, what was sampled, and --center-mm."""

from __future__ import annotations

import base64
import json
import logging
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from pages import Open, colors, data_of, decode, layers, png, press, slide, status
from scans import GEOMETRIES, bright, scan, small_model, stored_as, write_enhanced, write_series
from support import threads

from berdiff_fast import cli, scans, words
from berdiff_fast.imaging import encoding, volumes, windows, write_report
from berdiff_fast.imaging.volumes import Volume
from berdiff_fast.io.stack import SliceStack

OPTIONS = ("-n", 2, "--steps", 2, "--spacing", "trailing")


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("model") / "small.safetensors", size=(16, 16))


def sample(path, model_path, output, *more):
    return cli.main(["sample", *map(str, (path, "--model", model_path, *OPTIONS, "--output", output, *more))])


def levels_of(data: dict, index: int) -> np.ndarray:
    """Intensities (H, W) of a slice, decoded as the docstring of ``encoding.packed`` says."""
    raw = np.frombuffer(zlib.decompress(base64.b64decode(data["values"][index])), np.uint8).astype(np.int64)
    numbers = raw[: len(raw) // 2] + 256 * raw[len(raw) // 2 :]
    differences = np.where(numbers % 2, -(numbers + 1) // 2, numbers // 2).reshape(data["height"], data["width"])
    return data["lowest"] + data["step"] * (np.cumsum(differences, axis=1) % 65536)


# ---------------------------------------------------------------------- turned


def corner() -> tuple[Volume, np.ndarray]:
    """A CT-like scan whose brightest voxels are at the patient's right, front and foot end, and a mask of them."""
    array = np.random.default_rng(0).integers(-1000, 200, (4, 12, 10)).astype(np.int16)
    array[:2, :3, :2] = 1500
    return Volume(array, (0.5, 1.0, 2.0), (-10.0, 20.0, -30.0)), array > 1000


#: Ways of storing it: DICOM's, NIfTI's usual one (RAS), sagittal and coronal ones, one upside down.
STORED = {
    "LPS": ((0, 1, 2), (0, 0, 0)),
    "RAS": ((0, 1, 2), (0, 1, 1)),
    "sagittal": ((2, 0, 1), (0, 1, 0)),
    "coronal": ((1, 0, 2), (1, 1, 0)),
    "feet last": ((0, 2, 1), (1, 0, 1)),
}


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("stored", STORED)
def test_image_masks_and_raters_turn_together(tmp_path, stored, plane):
    """Whatever the file: the patient's right front foot end is at the left, at the top in axial slices, else below."""
    volume, mask = corner()
    way = STORED[stored]
    turned = stored_as(volume, *way)
    marked = stored_as(Volume(mask, volume.spacing, volume.origin), *way).array
    axis = turned.axis(plane)
    image, masks = np.moveaxis(turned.array, axis, 0), np.moveaxis(marked, axis, 0)[None]
    stack = SliceStack.of(turned, axis)
    several, unit = windows.of(turned, image)
    path = tmp_path / "report.html"
    write_report(path, image, masks, raters=masks, stack=stack, windows=several, intensity=unit)
    data, text = data_of(path), path.read_text("utf-8")
    start = data["start"]
    shape = (data["height"], data["width"])
    shown = levels_of(data, start)
    where = decode(data["masks"][start], shape)
    assert np.array_equal(where, shown > 1000), "the mask lies on the bright corner"
    assert np.array_equal(decode(data["raters"][start], shape), where)
    rows, columns = np.nonzero(where)
    assert columns.min() == 0
    assert rows.min() == 0 if plane == "axial" else rows.max() == shape[0] - 1
    left, top, right, bottom = {"axial": "RALP", "coronal": "RHLF", "sagittal": "AHPF"}[plane]
    for side, letter in (("left", left), ("top", top), ("right", right), ("bottom", bottom)):
        # Over the viewer, over three pictures without scripts, and over four in print.
        assert text.count(f'<span class="edge {side}">{letter}</span>') == 8
    assert f"{plane.capitalize()}, seen from the" in text
    # In mm: 10 columns of 0.5, 12 rows of 1, 4 slices of 2.
    extent = {"axial": (5, 12), "coronal": (5, 8), "sagittal": (12, 8)}[plane]
    assert data["aspect"] == pytest.approx(extent[0] / extent[1])


@pytest.mark.parametrize("stored", STORED)
def test_the_corner_is_in_the_same_corner_of_the_screen(show: Open, stored):
    """In a browser: the bright corner, its contour, and the row and column that the pointer reads."""
    volume, mask = corner()
    turned = stored_as(volume, *STORED[stored])
    marked = stored_as(Volume(mask, volume.spacing, volume.origin), *STORED[stored]).array
    axis = turned.axis("axial")
    image, masks = np.moveaxis(turned.array, axis, 0), np.moveaxis(marked, axis, 0)[None]
    page = show(image, masks, stack=SliceStack.of(turned, axis), windows={"a": (-1000.0, 1500.0), "b": (0.0, 1.0)})
    page.locator("#smooth").click()
    layers(page)
    drawn = colors(page, height=12, width=10)[..., 0]
    assert (drawn[:3, :2] == 255).all() and (drawn[3:] < 255).all() and (drawn[:, 2:] < 255).all()
    box = page.locator("#canvas").bounding_box()
    assert box["width"] / box["height"] == pytest.approx(5 / 12, rel=0.01)
    edges = {side: page.locator(f".stage .edge.{side}").inner_text() for side in ("left", "top", "right", "bottom")}
    assert edges == {"left": "R", "top": "A", "right": "L", "bottom": "P"}
    # Row 7, column 4 of the screen is 7 mm from the front and 2 mm from the right.
    page.mouse.move(box["x"] + box["width"] * 4.5 / 10, box["y"] + box["height"] * 7.5 / 12)
    found = re.match(r"Row (\d+), column (\d+), (-?[\d,]+):", page.locator("#readout").inner_text())
    assert found
    row, column, value = (int(group.replace(",", "")) for group in found.groups())
    index = data_of(Path(page.url.removeprefix("file://")))["slices"][page.locator("#slice").evaluate("e => +e.value")]
    assert image[index, row, column] == value
    place = np.insert([row, column], axis, index)[::-1]
    x, y, _ = turned.direction @ (place * turned.spacing) + turned.origin
    assert (x, y) == pytest.approx((-10 + 4 * 0.5, 20 + 7 * 1.0))


def test_without_a_direction_no_letters_and_why(tmp_path):
    write_report(tmp_path / "a.html", np.zeros((4, 4)), np.ones((1, 4, 4)))
    text = (tmp_path / "a.html").read_text("utf-8")
    assert 'class="edge' not in text and "without letters: the file does not say how it lies in the patient" in text


# ---------------------------------------------------------------------- windows


def test_windows_of_ct(tmp_path):
    pytest.importorskip("pydicom")
    write_series(tmp_path / "ct", scan())
    several, unit = windows.of(volumes.read(tmp_path / "ct"), scan().array)
    assert unit == "HU" and [*several] == [windows.PERCENTILE, "lung", "soft tissue", "bone"]
    assert (several["lung"], several["soft tissue"], several["bone"]) == ((-1350, 150), (-160, 240), (-500, 1300))
    assert several[windows.PERCENTILE] == tuple(np.percentile(scan().array, (0.5, 99.5)))
    # What the file records comes first, of several the first.
    for number, (center, width) in enumerate(((40, 350), ([40, -600], [350, 1500]), ("40.0", "350.0"))):
        write_series(tmp_path / f"{number}", scan(), WindowCenter=center, WindowWidth=width)
        several, _ = windows.of(volumes.read(tmp_path / f"{number}"), scan().array)
        assert next(iter(several.items())) == (windows.RECORDED, (-135.0, 215.0)) and len(several) == 5
    for changes in ({"Modality": "MR"}, {"RescaleType": "OD"}):
        write_series(tmp_path / "mr", scan(), **changes)
        assert windows.of(volumes.read(tmp_path / "mr"), scan().array)[1] == ""
    write_enhanced(tmp_path / "e.dcm", scan())
    assert volumes.read(tmp_path / "e.dcm").hounsfield
    # Settings of a broken header are none, and no reason not to read the scan.
    write_series(tmp_path / "odd", scan(), WindowCenter=None, WindowWidth=0)
    assert volumes.read(tmp_path / "odd").window is None


def test_windows_of_files_that_name_no_unit():
    """CT is told by its air; a picture, MR and others have the percentile window, by its name."""
    array = scan().array
    several, unit = windows.of(Volume(array, format="nifti"), array)
    assert unit == "HU, to judge by the values" and "lung" in several
    for other in (
        Volume(array, format="nifti", hounsfield=False),
        Volume(np.abs(array), format="nifti"),
        Volume(array, format="picture"),
        Volume((array > 0).astype(np.uint8)),
        Volume(array.astype(np.float32) / 1000),
    ):
        several, unit = windows.of(other, other.array)
        assert unit == "" and [*several] == [windows.PERCENTILE]
    padded = array.copy()
    padded[:, :4] = -3024
    volume = Volume(padded, format="nifti", padding=((-3024.0, -1025.0),))
    assert windows.of(volume, padded)[0][windows.PERCENTILE][0] > -1001, "what is outside the scan has no part in it"


def test_the_window_that_a_nifti_records(tmp_path):
    nib = pytest.importorskip("nibabel")
    image = nib.Nifti1Image(scan().array.T, np.eye(4))
    image.header["cal_min"], image.header["cal_max"] = -100, 300
    nib.save(image, tmp_path / "a.nii")
    assert volumes.read(tmp_path / "a.nii").window == (-100, 300)
    image.header["cal_max"] = -100
    nib.save(image, tmp_path / "a.nii")
    assert volumes.read(tmp_path / "a.nii").window is None


@pytest.mark.parametrize(
    "image",
    [
        np.random.default_rng(0).integers(-1024, 3072, (7, 9)),
        np.array([[-32768, 32766], [0, 1]]),
        np.full((3, 4), 5),
        np.array([[0, 65534], [65534, 0]]),
        np.random.default_rng(0).random((7, 9)),
        np.random.default_rng(0).normal(0, 1e5, (7, 9)),
        np.random.default_rng(0).normal(-300, 700.5, (7, 9)),
    ],
)
def test_intensities_are_kept(image):
    """Whole numbers exactly, others to what a screen cannot show."""
    levels, lowest, step = encoding.levels(image.astype(np.float32))
    data = {"height": len(image), "width": image.shape[1], "lowest": lowest, "step": step}
    found = levels_of({**data, "values": [encoding.packed(levels)]}, 0)
    if image.dtype.kind == "i":
        assert np.array_equal(found, image)
    assert np.abs(found - image).max() <= max(0.5, np.ptp(image) / 65534) * 1.01 if np.ptp(image) >= 1024 else True
    assert np.abs(found - image).max() <= np.ptp(image) / 1024


def test_windows_in_a_browser(show: Open):
    volume = scan()
    several, unit = windows.of(volume, volume.array)
    masks = (volume.array > 0)[None]
    page = show(volume.array, masks, stack=SliceStack.of(volume), windows=several, intensity=unit)
    page.locator("#smooth").click()
    layers(page)

    def expect(low: float, high: float) -> None:
        page.wait_for_function(
            "(pair) => document.getElementById('canvas').dataset.window.split(' ')"
            ".every((x, i) => Math.abs(x - pair[i]) < 0.01)",
            arg=[low, high],
        )
        index = page.locator("#slice").evaluate("e => +e.value")
        wanted = encoding.grey(volume.array[index].astype(np.float32), low, high)
        assert np.abs(colors(page, height=17, width=23)[..., 0].astype(int) - wanted).max() <= 1

    expect(*several[windows.PERCENTILE])
    for name in ("lung", "soft tissue", "bone"):
        page.locator("#window").select_option(label=name)
        expect(*several[name])
        assert page.locator("#width").evaluate("e => +e.value") == several[name][1] - several[name][0]
    page.locator("#canvas").focus()
    press(page, "w")
    expect(*several[windows.PERCENTILE])  # after the last, the first
    press(page, "w")
    expect(*several["lung"])
    page.locator("#level").fill("-500")
    page.locator("#width").fill("800")
    expect(-900, -100)
    assert page.locator("#window").evaluate("e => e.selectedOptions[0].text") == "of your own"
    page.locator("#width").fill("")  # while it is being typed
    expect(*several[windows.PERCENTILE])
    slide(page, "slice", 0)
    page.locator("#window").select_option(label="bone")
    expect(*several["bone"])
    page.emulate_media(media="print")
    page.wait_for_function("() => [...document.querySelectorAll('#contact canvas')].every((c) => c.dataset.shows)")
    caption = page.locator("[data-caption]").inner_text()
    assert caption == "Slice 0 of 0–4, z -300.75 mm; window bone, -500 to 1,300 HU, to judge by the values"
    printed = png(page.locator("#contact canvas").first.evaluate("c => c.toDataURL()"))
    assert printed.shape[1] == 900 and printed.std() > 1


def test_one_window_has_a_name_and_no_choice(show: Open):
    image = np.random.default_rng(0).random((8, 8))
    page = show(image, image[None] > 0.5)
    assert not page.locator("#windows").is_visible()
    assert "Window: 0.5 to 99.5 percentile (0.0" in page.locator(".controls").inner_text()
    press(page, "w")


def test_a_file_that_would_be_too_large_has_one_window_and_says_so(tmp_path):
    image = np.random.default_rng(0).integers(-1000, 1000, (2, 64, 64))
    masks, path = np.zeros((1, 2, 64, 64), bool), tmp_path / "a.html"
    several = {"recorded": (-100.0, 300.0), "lung": (-1350.0, 150.0)}
    write_report(path, image, masks, windows=several)
    whole = path.stat().st_size
    write_report(path, image, masks, windows=several, max_bytes=whole - 1)
    data, text = data_of(path), path.read_text("utf-8")
    assert data["values"] == [] and np.array_equal(png(data["images"][1]), encoding.grey(image[1], -100, 300))
    assert "Of 2 windows this file holds one: with the others it would take" in text and path.stat().st_size < whole
    with pytest.raises(ValueError, match=r"max_bytes is 20000, and the report .* would take"):
        write_report(path, image, masks, windows=several, max_bytes=20_000)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"windows": {}}, TypeError, "windows must be a dict of .* not empty"),
        ({"windows": [(0, 1)]}, TypeError, "windows must be a dict"),
        ({"windows": {"a": (3, 1)}}, ValueError, r"windows\['a'\] must be \(low, high\)"),
        ({"windows": {"a": (0, 1)}, "window": (0, 1)}, ValueError, "window and windows exclude each other"),
        ({"stack": SliceStack(0, 3, 9)}, ValueError, "stack must be of the 1 slices of image, got 3"),
        ({"notes": "a"}, TypeError, "notes must be a sequence of str"),
        ({"coverage": 1}, TypeError, "coverage must be a str"),
        ({"intensity": None}, TypeError, "intensity must be a str"),
    ],
)
def test_refusals(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        write_report(tmp_path / "a.html", np.zeros((4, 4)), np.ones((1, 4, 4)), **change)
    assert [*tmp_path.iterdir()] == []


# ---------------------------------------------------------------------- one counting


def test_slices_have_one_number_everywhere(tmp_path, model_path, show, capsys):
    """The option, the bar, the summary, the words, the report and its file: 0, 1, 2, ... as stored."""
    pytest.importorskip("highdicom")
    write_series(tmp_path / "ct", scan(), InstanceNumber=lambda k: 105 - k)
    assert sample(tmp_path / "ct", model_path, tmp_path / "out", "--slices", 2, 4, "--report") == 0
    said = capsys.readouterr()
    assert "slice 3" in said.err, "the bar names the slice that is done"
    assert "2 masks of slices 2 to 3 of 0 to 4, z -295.75 to -293.25 mm, instances 103 to 102" in said.out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["slices"] == [2, 4]
    sampled = summary["sampled"]
    assert sampled["index"] == [2, 3] and sampled["z_mm"] == [-295.75, -293.25]
    assert sampled["instance_number"] == [103, 102] and sampled["slices_of_scan"] == 5
    marked = volumes.read(tmp_path / "out" / "mask_000.nii.gz").array.any((1, 2))
    assert np.flatnonzero(marked).tolist() == [2, 3]
    data = data_of(tmp_path / "out" / "report.html")
    assert data["slices"] == [2, 3] and data["places"] == ["z -295.75 mm, instance 103", "z -293.25 mm, instance 102"]
    volume = volumes.read(tmp_path / "ct")
    masks = np.stack([volumes.read(tmp_path / "out" / f"mask_00{k}.nii.gz").array > 0 for k in (0, 1)])
    page = show(volume.array[2:4], masks[:, 2:4], stack=SliceStack.of(volume, 0, 2, 4))
    slide(page, "slice", 1)
    slide(page, "sample", 1)
    area = masks[1, 3].sum() * 0.703125 * 0.8
    assert status(page).startswith("Slice 3 of 0–4, z -293.25 mm, instance 102, sample 1 of 0–1: ")
    assert float(status(page).split(": ")[1].split(" mm²")[0].replace(",", "")) == pytest.approx(area, rel=1e-3)


def test_a_report_of_results_of_before(tmp_path, model_path):
    """Whose summary says nothing of what was sampled but how."""
    np.save(tmp_path / "a.npy", scan().array)
    assert sample(tmp_path / "a.npy", model_path, tmp_path / "out", "--slices", 1, 3, "--report", "--quiet") == 0
    new = (tmp_path / "out" / "report.html").read_bytes()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    del summary["sampled"], summary["sizes"]["of"]
    (tmp_path / "out" / "summary.json").write_text(json.dumps(summary))
    assert cli.main(["report", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.html").read_bytes() == new


# ---------------------------------------------------------------------- what volumes are of


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ([], "the whole scan"),
        (["--slices", 1, 3], "the 2 slices sampled of 5"),
        (["--slices", 2, 3], "the 1 slice sampled of 5"),
        (["--roi", 2, 15, 3, 20], "a part of all 5 slices (rows 2 to 14, columns 3 to 19)"),
        (["--slices", 1, 3, "--center", 8, 12], "the 2 slices sampled of 5 (rows 0 to 15, columns 4 to 19)"),
    ],
    ids=str,
)
def test_volumes_say_what_they_are_of(tmp_path, model_path, where, words, capsys):
    """Of masks and of raters, in the summary, on the command line and in the report."""
    pytest.importorskip("nibabel")
    volume = scan()
    volumes.write(tmp_path / "ct.nii", volume.array, volume)
    everywhere = np.ones(volume.array.shape, bool)
    volumes.write(tmp_path / "reader.nii", everywhere, volume)
    out, voxel = tmp_path / "out", 0.703125 * 0.8 * 2.5
    arguments = [*where, "--raters", tmp_path / "reader.nii", "--report"]
    assert sample(tmp_path / "ct.nii", model_path, out, *arguments) == 0
    printed = capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    text = (out / "report.html").read_text("utf-8")
    assert summary["sampled"]["in_words"] == summary["sizes"]["of"] == words
    assert summary["sampled"]["whole_scan"] == (words == "the whole scan")
    region = scans.sampled_region(summary, volume.array.shape)
    theirs = summary["raters"]
    assert theirs["sizes"]["voxels"] == [region.sum()] and theirs["sizes"]["of"] == words
    assert theirs["sizes"]["mL"] == pytest.approx([region.sum() * voxel / 1000])
    assert theirs["sizes_not_compared"]["voxels"] == [theirs["voxels_not_compared"]] == [(~region).sum()]
    assert f"volume of {words}: median" in printed and f"raters, volume of {words}: " in printed
    assert f"<h2>Volume of {words}</h2>" in text and f"Volume of {words}, masks and raters alike." in text
    assert ("elsewhere, where nothing was sampled" in text) == ("elsewhere and not compared" in printed)
    assert ("elsewhere and not compared" in printed) == bool((~region).any())


# ---------------------------------------------------------------------- a centre in the patient


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_center_mm_is_the_centre_there(geometry, plane):
    volume = scan(geometry, (16, 17, 23))
    index = (9, 8, 14)
    point = volume.direction @ (np.array(index[::-1]) * volume.spacing) + volume.origin
    assert volume.index_of(point) == pytest.approx(index)
    model = bright(mode="window", window=(-500, -400), size=(8, 8))
    options = dict(n=1, steps=2, spacing="trailing", plane=plane)
    center = np.delete(index, volume.axis(plane)).tolist()
    expected = scans.sample_volume(model, volume, center=tuple(center), **options)
    found = scans.sample_volume(model, volume, center_mm=tuple(point), **options)
    assert found.plan == expected.plan and np.array_equal(found.bits, expected.bits)


def test_center_mm_outside_or_otherwise():
    model, volume = bright(size=(8, 8)), scan("flipped")  # over X 154.25 to 170.35, Y 148.95 to 160.85, Z 19.4 to 25.6

    def refused(message: str, point=(160.0, 155.0, 22.0), volume: Volume | np.ndarray = volume, **options) -> None:
        with pytest.raises(ValueError, match=message):
            scans.sample_volume(model, volume, 1, 2, spacing="trailing", center_mm=point, **options)

    reach = r"which reaches over X 154.2 to 170.3, Y 148.9 to 160.8, Z 19.4 to 25.6 mm \(LPS"
    refused(reach + r".*got \(0.0, 0.0, 0.0\), which would be slice -16.0 of 5, row 229.3 of 17", (0, 0, 0))
    refused("As RAS .* it would lie inside: give -X -Y Z", (-160, -155, 22))
    refused(reach, (160, 155, 25.7))
    assert volume.index_of((160, 155, 25.6)) == pytest.approx((4, 5.5 / 0.7, 10 / 0.7), abs=1e-3)
    refused("must be three finite numbers X Y Z in mm", (160, 155))
    refused("must be three finite numbers X Y Z in mm", (160, 155, float("nan")))
    refused("center_mm, center and roi exclude each other", center=(3, 3))
    refused("center_mm, center and roi exclude each other", roi=(3, 9, 3, 9))
    refused(r"must lie in one of the slices 3 to 4, got .*, which is in slice 2", slices=(3, 5))
    refused(r"needs a scan that says where its voxels lie, and this one \(numpy\) does not", volume=volume.array)


def test_center_mm_on_the_command_line(tmp_path, model_path, capsys):
    pytest.importorskip("nibabel")
    volume = scan("anisotropic")
    volumes.write(tmp_path / "ct.nii", volume.array, volume)
    x, y, z = np.array(volume.origin) + np.array((14, 8, 2)) * volume.spacing
    assert sample(tmp_path / "ct.nii", model_path, tmp_path / "a", "--center-mm", x, y, z, "--quiet") == 0
    assert sample(tmp_path / "ct.nii", model_path, tmp_path / "b", "--center", 8, 14, "--quiet") == 0
    assert (tmp_path / "a" / "mask_001.nii.gz").read_bytes() == (tmp_path / "b" / "mask_001.nii.gz").read_bytes()
    capsys.readouterr()
    assert sample(tmp_path / "ct.nii", model_path, tmp_path / "c", "--center-mm", -x, y, z) == 1
    assert "center_mm must lie in the scan, which reaches over X -171.7" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
    with pytest.raises(SystemExit):
        sample(tmp_path / "ct.nii", model_path, tmp_path / "c", "--center-mm", x, y, z, "--center", 8, 14)


# ---------------------------------------------------------------------- a hint, before


def test_the_hint_comes_before_the_work(caplog):
    """Where cuts are many; not with a centre, not of one cut, not of a model without a size."""
    model, array = bright(size=(8, 8)), scan().array

    def hints(volume=array, model=model, **options) -> list[str]:
        caplog.clear()
        calls = []
        handle = model.register_forward_pre_hook(lambda *_: calls.append(len(caplog.records)))
        scans.sample_volume(model, volume, 1, 2, spacing="trailing", **options)
        handle.remove()
        assert set(calls) == {len(caplog.records)}, "all is said before the first call of the network"
        return [record.getMessage() for record in caplog.records]

    (hint,) = hints()
    assert hint.startswith("the model was trained on images of 8 x 8, and each slice is cut into 12 of them.")
    assert "--center ROW COLUMN or --center-mm X Y Z" in hint
    assert len(hints(roi=(0, 17, 0, 8))) == 1
    assert hints(center=(4, 4)) == hints(roi=(0, 8, 0, 8)) == hints(scan().array[:, :8, :8]) == []
    assert hints(model=bright()) == []


def test_the_hint_on_the_command_line(tmp_path, model_path):
    """In a process of its own, where nobody but the command decides what is printed."""
    np.save(tmp_path / "a.npy", scan().array)
    said = ["sample", tmp_path / "a.npy", "--model", model_path, *OPTIONS, "--output", tmp_path / "out"]

    def err(*more: str) -> str:
        command = [sys.executable, "-m", "berdiff_fast.cli", *map(str, said), *more]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr

    loud = err()
    assert loud.index("the model was trained on images of 16 x 16") < loud.index("sampling:")
    assert err("--overwrite", "--quiet") == ""


def test_silence_ends(caplog):
    logger = logging.getLogger("berdiff_fast.hints")
    with words.muted(logger.name):
        logger.warning("not said")
    logger.warning("and it speaks again")
    assert [record.message for record in caplog.records] == ["and it speaks again"]
