# SPDX-License-Identifier: Apache-2.0
"""LIDC-IDRI with faults: each is one line that names the file, costs its scan alone, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tcia_cases as cases
from tcia_cases import FOUR, OTHER, SERIES, box, nodule, reading, ring, roi, tree, uid, write_slice, write_xml

import berdiff_fast as bf
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.data.importers import import_tcia, lidc_xml, writing
from berdiff_fast.training import evaluate
from berdiff_fast.training.config import TrainConfig
from berdiff_fast.training.loop import train

pytest.importorskip("pydicom", reason="pydicom is not installed")

ALL = dict(split=(100, 0, 0))
GOOD = box("a", (2, 3), 20, 30, 6, 5)


def marks(*told: str) -> Callable[[Path], object]:
    """Another reading: one session with some marks."""
    return lambda folder: write_xml(folder / "069.xml", reading(told))


def text(change: Callable[[str], str]) -> Callable[[Path], object]:
    """A change of the reading's text."""

    def write(folder: Path) -> None:
        path = folder / "069.xml"
        path.write_text(change(path.read_text()))

    return write


def tags(**changes: Any) -> Callable[[Path], object]:
    """A change of slice 3."""
    return lambda folder: write_slice(folder / "1-005.dcm", uid(3), -92.5, 3, **changes)


def file(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def moved(folder: Path) -> None:
    """The whole series once more, elsewhere, without a reading."""
    shutil.copytree(folder, folder.parent / "copy", ignore=shutil.ignore_patterns("*.xml"))


def cut_short(folder: Path) -> None:
    path = folder / "1-005.dcm"
    path.write_bytes(path.read_bytes()[:-100])


def unknown_kind(folder: Path) -> None:
    """Rows of a kind that DICOM does not have: pydicom finds out when it is asked for them."""
    path = folder / "1-005.dcm"
    data = path.read_bytes()
    assert data.count(b"\x28\0\x10\0US") == 1
    path.write_bytes(data.replace(b"\x28\0\x10\0US", b"\x28\0\x10\0UW"))


def lonely(folder: Path) -> None:
    """A reading without a CT."""
    write_xml(folder.parent.parent / "readings" / "100.xml", reading(*FOUR, series="1.7"))


DOCTYPE = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>'

BAD: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "torn XML": (text(lambda x: x[:900]), "069.xml", "cannot be read as XML"),
    "empty XML": (file("069.xml", b""), "069.xml", "cannot be read as XML"),
    "unknown encoding": (text(lambda x: x.replace("UTF-8", "klingon")), "069.xml", "encoding"),
    "entities": (lambda f: write_xml(f / "069.xml", reading(*FOUR, head=DOCTYPE)), "069.xml", "a document type"),
    "another root": (text(lambda x: x.replace("LidcReadMessage", "Book")), "069.xml", "its root must be LidcRead"),
    "no series": (text(lambda x: x.replace(f"<SeriesInstanceUid>{SERIES}<", "<SeriesInstanceUid> <")), "069.xml",
                  "names no series"),
    "no sessions": (lambda f: write_xml(f / "069.xml", reading()), "069.xml", "1 to 100 reading sessions, got 0"),
    "too many sessions": (lambda f: write_xml(f / "069.xml", reading(*[[]] * 101)), "069.xml", "got 101"),
    "too many nodules": (marks(*[GOOD] * 1001), "069.xml", "outlines 1001 nodules"),
    "another series": (text(lambda x: x.replace(f">{SERIES}<", ">1.7<")), "069.xml",
                       f"reads series 1.7, and lies beside series {SERIES}"),
    "no CT": (lonely, "readings/100.xml", "reads series 1.7, of which there is no CT"),
    "no XML": (lambda f: (f / "069.xml").unlink(), SERIES, f"there is no XML that reads its series {SERIES}"),
    "two XML": (lambda f: shutil.copy(f / "069.xml", f / "070.xml"), "070.xml", "069.xml reads the same series"),
    "outside": (marks(GOOD, nodule("out", roi(3, ring(60, 30, 6, 5)))), "069.xml",
                "session 1, nodule 'out': an outline at z = -92.5 reaches row 64, column 35, outside the image of"),
    "negative": (marks(nodule("out", roi(3, [(-1, 3), (2, 3)]))), "069.xml", "reaches row -1, column 3"),
    "no number": (text(lambda x: x.replace("<xCoord>29<", "<xCoord>29.5<")), "069.xml",
                  "session 1, nodule 'a': xCoord must be the number of a pixel, got '29.5'"),
    "a huge number": (text(lambda x: x.replace("<xCoord>29<", f"<xCoord>{'9' * 5000}<")), "069.xml", "xCoord must be"),
    "inclusion": (marks(nodule("i", roi(3, ring(9, 9, 3, 3), "MAYBE"))), "069.xml", "TRUE or FALSE, got 'MAYBE'"),
    "no inclusion": (marks(nodule("i", roi(3, ring(9, 9, 3, 3), ""))), "069.xml", "inclusion is missing in a roi"),
    "no slice": (marks(nodule("i", roi(3, ring(9, 9, 3, 3), uid=""))), "069.xml", "imageSOP_UID is missing in a roi"),
    "z": (marks(nodule("i", roi(3, ring(9, 9, 3, 3), z="nan"))), "069.xml", "imageZposition must be a number of mm"),
    "no edges": (marks(nodule("i", roi(3, []))), "069.xml", "a roi at z = -92.5 has no edgeMap"),
    "no roi": (marks(nodule("i")), "069.xml", "session 1, nodule 'i' has no roi"),
    "a slice that is missing": (lambda f: (f / "1-005.dcm").unlink(), "069.xml", f"misses its slice {uid(3)}"),
    "another scan": (text(lambda x: x.replace(f"<imageSOP_UID>{SERIES}.", f"<imageSOP_UID>{OTHER}.")), "069.xml",
                     "names no slice of series"),
    "another place": (marks(nodule("i", roi(3, ring(9, 9, 3, 3), z="-90.0"))), "069.xml",
                      "an outline at z = -90 names the slice 1-005.dcm, which lies at z = -92.5"),
    "larger than the cut": (marks(box("a", (3,), 20, 20, 20, 40)), "069.xml", "beyond the 32 x 32 pixels that are cut"),
    "no DICOM": (file("1-005.dcm", b"not at all" * 99), "1-005.dcm", "cannot be read"),
    "cut short": (cut_short, "1-005.dcm", "cut short"),
    "an unknown kind": (unknown_kind, "1-005.dcm", "cannot be read: Unknown Value Representation"),
    "twice": (moved, "copy", f"duplicate: series {SERIES} is also in"),
    "two series": (tags(series="1.7"), "1-005.dcm", f"is of series 1.7, where others are of {SERIES}"),
    "a copy": (lambda f: shutil.copy(f / "1-005.dcm", f / "1-005 (1).dcm"), "1-005.dcm", "is the same slice"),
    "another size": (tags(Rows=32, PixelData=bytes(32 * 80 * 2)), SERIES, "slices of different sizes"),
    "another spacing": (tags(PixelSpacing=["0.8", "0.8"]), SERIES, "slices of different pixel spacing"),
    "no position": (tags(ImagePositionPatient=None), SERIES, "slices without a position: 1-005.dcm"),
    "a localizer": (tags(ImageOrientationPatient=[1, 0, 0, 0, 0, -1]), SERIES, "1-005.dcm lies across the others"),
    "another patient": (tags(PatientID="LIDC-IDRI-0007"), "1-005.dcm", "is of patient 'LIDC-IDRI-0007'"),
    "no UID": (tags(SOPInstanceUID=""), "1-005.dcm", "has no SOPInstanceUID"),
    "colour": (tags(SamplesPerPixel=3), "1-005.dcm", "one number for each voxel"),
    "many frames": (tags(NumberOfFrames=2), "1-005.dcm", "holds 2 frames"),
    "no Hounsfield units": (tags(RescaleType="OD"), "1-005.dcm", "is not in Hounsfield units"),
    "values": (tags(RescaleSlope="100"), "1-005.dcm", "which are no Hounsfield units"),
}  # fmt: skip


def two_scans(root: Path) -> Path:
    """The folder of the one that is to have a fault."""
    folder = tree(root)
    good = cases.write_series(
        root / "LIDC-IDRI-0002" / "1.2.4" / "1.2.826.7", 8, "1.2.826.7", PatientID="LIDC-IDRI-0002"
    )
    write_xml(good / "069.xml", reading(*FOUR, series="1.2.826.7"))
    return folder


@pytest.mark.parametrize("name", BAD)
def test_bad_scans(tmp_path, name):
    change, path, words = BAD[name]
    change(two_scans(tmp_path / "tree"))
    with pytest.raises(ValueError, match="LIDC-IDRI-0001") as error:
        import_tcia(tmp_path / "tree", tmp_path / "out", **ALL, size=(32, 32))
    told = str(error.value)
    assert words in told and "\n" not in told and len(told) < 600
    assert told.startswith("LIDC-IDRI-0001/") and path in told.partition(": ")[0]
    assert [p.name for p in tmp_path.iterdir()] == ["tree"]
    report = import_tcia(tmp_path / "tree", tmp_path / "out", **ALL, size=(32, 32), on_error="skip")
    assert any(words in one.reason and path in one.path for one in report.problems)
    patients = RaterDataset(tmp_path / "out" / "train.h5").provenance["patient_id"].tolist()
    # What is there once too often harms nothing.
    assert set(patients) == ({1, 2} if name in ("no CT", "two XML", "twice") else {2})
    assert patients.count(2) == 5 and len(report.readings["of_scans"]) == len(set(patients))


def test_a_reading_that_is_too_long(tmp_path, monkeypatch):
    tree(tmp_path / "tree")
    monkeypatch.setattr(lidc_xml, "_MOST_BYTES", 2**10)
    with pytest.raises(ValueError, match=r"069.xml: has more than 0 MB"):
        import_tcia(tmp_path / "tree", tmp_path / "out")


def empty(root: Path) -> None:
    (root / "LIDC-IDRI-0001").mkdir(parents=True)


def points_alone(root: Path) -> None:
    tree(root, [[nodule("s", roi(6, [(9, 9)]))]])


def chest_alone(root: Path) -> None:
    write_slice(root / "P" / "1.dcm", "1.9.1", 0.0, series="1.9", Modality="CR")
    write_xml(root / "P" / "1.xml", cases.CHEST_XRAY)


def nobody(root: Path) -> None:
    """No patient, neither in a tag nor by a folder."""
    folder = cases.write_series(root, PatientID=None)
    write_xml(folder / "069.xml", reading(*FOUR))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (empty, "no CT scan with a reading of LIDC-IDRI"),
        (points_alone, "no reader outlined a nodule of 3 mm or more in the 1 scans"),
        (chest_alone, "no CT scan with a reading of LIDC-IDRI"),
        (nobody, "has no PatientID"),
    ],
)
def test_trees_without_nodules(tmp_path, make, words):
    make(tmp_path / "tree")
    with pytest.raises(ValueError, match=words):
        import_tcia(tmp_path / "tree", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["tree"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(size=(0, 5)), "size must be"),
        (dict(pixel_spacing=0), "pixel_spacing must be one or two numbers of mm"),
        (dict(pixel_spacing=float("nan")), "pixel_spacing must be"),
        (dict(pixel_spacing=(0.7, 0.7, 2.5)), "pixel_spacing must be"),
        (dict(pixel_spacing="fine"), "pixel_spacing must be"),
        (dict(pixel_spacing=True), "pixel_spacing must be"),
        (dict(pixel_spacing=1e-9), "pixel_spacing must be"),
        (dict(on_error="ignore"), "on_error must be one of"),
        (dict(split="70/20"), "split must be"),
        (dict(seed=-1), "seed must be at least 0"),
        (dict(split="70/10/20", split_file="x.json"), "split and split_file cannot both"),
    ],
)
def test_bad_arguments(tmp_path, options, words):
    tree(tmp_path / "tree")
    with pytest.raises((ValueError, TypeError), match=words):
        import_tcia(tmp_path / "tree", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_scan_without_spacing_cannot_be_resampled(tmp_path):
    tree(tmp_path / "tree", PixelSpacing=None)
    with pytest.raises(ValueError, match="has no PixelSpacing, and is to be resampled"):
        import_tcia(tmp_path / "tree", tmp_path / "out", **ALL, pixel_spacing=0.5)
    import_tcia(tmp_path / "tree", tmp_path / "out", **ALL)
    assert RaterDataset(tmp_path / "out" / "train.h5").pixel_spacing is None


def test_a_split_file_without_a_patient(tmp_path):
    two_scans(tmp_path / "tree")
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["LIDC-IDRI-0002"]}))
    options = dict(split_file=tmp_path / "splits.json", size=(32, 32))
    with pytest.raises(ValueError, match="its patient 'LIDC-IDRI-0001' is not in the split file"):
        import_tcia(tmp_path / "tree", tmp_path / "out", **options)
    report = import_tcia(tmp_path / "tree", tmp_path / "out", on_error="skip", **options)
    assert report.splits["train"].patients == 1 and len(report.problems) == 1


def test_what_else_lies_in_the_tree(tmp_path):
    """Files of other kinds are listed as ignored; files without an ending are read if they are DICOM."""
    folder = tree(tmp_path / "tree")
    (folder / "LICENSE").write_text("CC BY 3.0")
    (tmp_path / "tree" / "metadata.csv").write_text("a,b")
    (folder / "._1-001.dcm").write_bytes(b"clutter")
    for path in folder.glob("1-*.dcm"):
        path.rename(path.with_suffix(""))
    write_xml(folder.parent / "cxr" / "145.xml", cases.CHEST_XRAY)
    report = import_tcia(tmp_path / "tree", tmp_path / "out", **ALL)
    assert [Path(path).name for path in report.ignored] == ["metadata.csv", "LICENSE"]
    assert report.splits["train"].slices == 5 and report.readings["chest_xray_readings"] == 1


# ---------------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("method", ["append", "finish"])
@pytest.mark.parametrize("earlier", [False, True])
def test_interrupted(tmp_path, monkeypatch, error, method, earlier):
    two_scans(tmp_path / "tree")
    out = tmp_path / "out"
    if earlier:
        import_tcia(tmp_path / "tree", out, **ALL, size=(48, 48))
    before = {path.name: path.read_bytes() for path in out.iterdir()} if earlier else None
    original, calls = getattr(writing.Writer, method), []

    def fail(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 4 or method == "finish":
            raise error
        return original(*arguments)

    monkeypatch.setattr(writing.Writer, method, fail)
    with pytest.raises(type(error)):
        import_tcia(tmp_path / "tree", out, **ALL, size=(32, 32), overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == (["out", "tree"] if earlier else ["tree"])
    assert before is None or {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_same_bytes_again(tmp_path):
    two_scans(tmp_path / "tree")
    for name in ("a", "b"):
        import_tcia(tmp_path / "tree", tmp_path / name, size=(32, 32), seed=3)
    files = sorted(p.name for p in (tmp_path / "a").iterdir() if p.name != "import.json")
    assert [(tmp_path / "a" / f).read_bytes() for f in files] == [(tmp_path / "b" / f).read_bytes() for f in files]


# ---------------------------------------------------------------------- the command


def run(*words: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "berdiff_fast.cli", "import", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command(tmp_path):
    two_scans(tmp_path / "tree")
    done = run(
        tmp_path / "tree",
        tmp_path / "out",
        "--split",
        "100/0/0",
        "--pixel-spacing",
        "0.7",
        "--size",
        "48",
        "48",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["layout"] == "tcia" and told["parameters"]["pixel_spacing"] == [0.7, 0.7] and told["size"] == [48, 48]
    assert told["readings"]["nodules"] == 4
    for options, words in (
        (["--window", "-1000", "400"], "window is for trees of pictures, and this is one of CT scans (tcia)"),
        (["--channels", "t1"], "channels is for trees of volumes"),
        (["--missing-mask", "empty"], "missing_mask is for trees of volumes"),
        (["--empty-share", "0.2"], "empty_share is for trees of volumes"),
        (["--plane", "coronal"], "plane is for trees of volumes"),
        (["--other-labels", "background"], "other_labels is for trees of volumes"),
        (["--foreground", "true"], "foreground is for trees of volumes"),
        (["--depth", "16"], "depth is for trees of volumes"),
        (["--colour"], "colour is for trees of pictures"),
        (["--rater-count", "4"], "rater_count is for trees of pictures"),
        (["--pixel-spacing", "0.7", "0.7", "0.7"], "pixel_spacing must be one or two numbers"),
        (["--layout", "slices", "--pixel-spacing", "0.7"], "pixel_spacing is for trees of CT scans (tcia)"),
        (["--layout", "brats", "--pixel-spacing", "0.7"], "pixel_spacing is for trees of CT scans (tcia)"),
    ):
        done = run(tmp_path / "tree", tmp_path / "no", "--quiet", *options)
        assert done.returncode != 0 and words in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
        assert not (tmp_path / "no").exists()


def test_from_the_archive_to_masks(tmp_path):
    """Import, training on Hounsfield units, evaluation, and masks of the scan itself around a nodule."""
    folder = two_scans(tmp_path / "tree")
    import_tcia(tmp_path / "tree", tmp_path / "data", **ALL, size=(32, 32), pixel_spacing=0.75)
    path = train(
        TrainConfig(
            output=str(tmp_path / "run"),
            train_data=str(tmp_path / "data" / "train.h5"),
            window=(-1000.0, 400.0),
            model_channels=32,
            channel_mult=(1,),
            attention_resolutions=(),
            steps=2,
            batch_size=2,
            rotate90=False,
            tensorboard=False,
            quiet=True,
        )
    )
    model = bf.load(path)
    assert model.preprocessing is not None
    assert (model.preprocessing.mode, model.preprocessing.pixel_spacing) == ("window", (0.75, 0.75))
    summary = evaluate.evaluate(
        model, RaterDataset(tmp_path / "data" / "train.h5"), tmp_path / "e", n=2, steps=2, progress=False
    )
    assert summary["model"]["ged"] > 0
    scan = bf.imaging.volumes.read(folder)
    sampled = bf.sample_volume(model, scan, n=2, steps=2, center=(23.5, 33.0), slices=(2, 5))
    assert sampled.masks.shape == (2, *scan.array.shape)
    # The scan is cut for sampling as it was for training.
    (image,) = (one for one, k in zip(*_images(tmp_path / "data" / "train.h5"), strict=True) if k == (1, 0, 3))
    assert np.array_equal(image, scan.array[3, 8:40, 17:49])


def _images(path: Path) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    slices = RaterDataset(path)
    columns = [slices.provenance[name].tolist() for name in ("patient_id", "nodule", "slice")]
    return slices.whole()[0][:, 0], [*zip(*columns, strict=True)]
