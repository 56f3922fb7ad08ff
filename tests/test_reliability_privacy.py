# SPDX-License-Identifier: Apache-2.0
"""What results tell of a patient, and to whom: no folders, nothing that the standard does not ask for, no escapes."""

from __future__ import annotations

import json
import logging
import os
import stat

import numpy as np
import pytest
from PIL import Image
from scans import scan, small_model, write_series
from support import threads

import berdiff_fast as bf
from berdiff_fast import cli, words
from berdiff_fast.data import importers
from berdiff_fast.files import write_text

SECRET = "Mustermann"


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("model") / "small.safetensors", size=(16, 16))


def sample(path, model_path, output, *more):
    fixed = ["--model", model_path, "-n", 2, "--steps", 2, "--spacing", "trailing", "--quiet"]
    return cli.main(["sample", *map(str, (path, *fixed, "--output", output, *more))])


@pytest.fixture
def named_after_patients(tmp_path, model_path):
    """A scan, a rater's mask and a model in folders that are."""
    folder = tmp_path / SECRET
    folder.mkdir()
    array = np.random.default_rng(3).integers(0, 255, (2, 16, 16), dtype=np.uint8)
    np.save(folder / "ct.npy", array)
    np.save(folder / "reader.npy", array > 99)
    (folder / "m.safetensors").write_bytes(model_path.read_bytes())
    return folder


# ---------------------------------------------------------------------- names


def test_results_name_files_without_folders(tmp_path, named_after_patients, capsys):
    folder, out = named_after_patients, tmp_path / "out"
    arguments = (folder / "ct.npy", folder / "m.safetensors", out, "--report", "--raters", folder / "reader.npy")
    assert sample(*arguments) == 0
    for _ in range(2):
        for path in out.iterdir():
            assert SECRET.encode() not in path.read_bytes(), path
        summary = json.loads((out / "summary.json").read_text())
        assert (summary["input"], summary["model"], summary["rater_files"]) == (
            "ct.npy",
            "m.safetensors",
            ["reader.npy"],
        )
        page = (out / "report.html").read_text()
        assert "ct.npy" in page and "reader.npy" in page
        # And made again, from where the scan is; by itself it is found beside the folder and in it alone.
        assert cli.main(["report", str(out)]) == 1
        assert "name it as --input" in capsys.readouterr().err
        again = ["--input", str(folder / "ct.npy"), "--raters", str(folder / "reader.npy")]
        assert cli.main(["report", str(out), *again]) == 0
    (folder / "ct.npy").rename(tmp_path / "ct.npy")
    assert cli.main(["report", str(out)]) == 0


def test_anonymized_results_name_no_file(tmp_path, named_after_patients, capsys):
    folder, out = named_after_patients, tmp_path / "out"
    folder.joinpath("ct.npy").rename(folder / f"{SECRET}.npy")
    folder.joinpath("reader.npy").rename(folder / "DrWho.npy")
    raters = ["--raters", folder / "DrWho.npy"]
    assert sample(folder / f"{SECRET}.npy", folder / "m.safetensors", out, "--report", "--anonymize", *raters) == 0
    again = ["--input", str(folder / f"{SECRET}.npy"), *map(str, raters)]
    for _ in range(2):
        for path in out.iterdir():
            assert SECRET.encode() not in path.read_bytes() and b"DrWho" not in path.read_bytes(), path
        page, digest = (out / "report.html").read_text(), json.loads((out / "summary.json").read_text())["input_sha256"]
        assert digest not in page, "who has the scan could tell whose it is"
        assert cli.main(["report", str(out), *again]) == 0  # stays so, without being told again
    # Of results that name files, a report to be passed on.
    assert sample(folder / f"{SECRET}.npy", folder / "m.safetensors", tmp_path / "plain", "--report") == 0
    assert SECRET in (tmp_path / "plain" / "report.html").read_text()
    assert cli.main(["report", str(tmp_path / "plain"), *again, "--anonymize"]) == 0
    page = (tmp_path / "plain" / "report.html").read_text()
    assert SECRET not in page and "DrWho" not in page and digest not in page


def test_results_of_before_are_reported_without_their_folders(tmp_path, named_after_patients):
    folder, out = named_after_patients, tmp_path / "out"
    assert sample(folder / "ct.npy", folder / "m.safetensors", out) == 0
    summary = json.loads((out / "summary.json").read_text())
    summary |= {"input": str(folder / "ct.npy"), "model": str(folder / "m.safetensors")}
    (out / "summary.json").write_text(json.dumps(summary))
    assert cli.main(["report", str(out)]) == 0
    assert SECRET not in (out / "report.html").read_text() and "ct.npy" in (out / "report.html").read_text()


# ---------------------------------------------------------------------- DICOM

TELLING = {
    "PatientComments": SECRET,
    "PatientAge": "033Y",
    "PatientAddress": SECRET,
    "OtherPatientIDs": SECRET,
    "EthnicGroup": SECRET[:16],
    "Occupation": SECRET[:16],
    "AdditionalPatientHistory": SECRET,
    "AdmittingDiagnosesDescription": SECRET,
    "StudyDescription": SECRET,
    "NameOfPhysiciansReadingStudy": SECRET,
    "InstitutionName": SECRET,
    "InstitutionAddress": SECRET,
    "StationName": SECRET[:16],
    "OperatorsName": SECRET,
    "DeviceSerialNumber": SECRET,
    "ImageComments": SECRET,
    "RequestingPhysician": SECRET,
    "ResponsiblePerson": SECRET,
}


@pytest.fixture
def series(tmp_path):
    pytest.importorskip("highdicom")
    write_series(tmp_path / SECRET, scan(), PatientName="Doe^Jane", **TELLING)
    return tmp_path / SECRET


def test_segmentations_repeat_only_what_the_standard_asks_for(tmp_path, series, model_path):
    import pydicom

    assert sample(series, model_path, tmp_path / "out", "--report") == 0
    for path in (tmp_path / "out").iterdir():
        assert SECRET.encode() not in path.read_bytes(), path
    source = pydicom.dcmread(next(series.iterdir()))
    for name in ("masks.dcm", "mean.dcm"):
        file = pydicom.dcmread(tmp_path / "out" / name)
        for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "StudyDate", "FrameOfReferenceUID"):
            assert file[keyword].value == source[keyword].value, "it has to be found beside its scan"
        # Groups 0010 (patient) and the attributes of a study, as PS3.3 lists them as required (types 1 and 2).
        patient = {e.keyword for e in file if e.tag.group == 0x0010}
        assert patient == {"PatientName", "PatientID", "PatientBirthDate", "PatientSex"}
        assert not {*TELLING, "ContributingEquipmentSequence", "InstanceCreationTime"} & {e.keyword for e in file} - {
            "DeviceSerialNumber"  # ours, "0"
        }
        assert all(keyword in file for keyword in ("StudyID", "StudyTime", "AccessionNumber", "ReferringPhysicianName"))


def test_equal_runs_write_equal_segmentations(tmp_path, series, model_path, monkeypatch):
    """A day apart, too."""
    import datetime

    for name in ("a", "b"):
        assert sample(series, model_path, tmp_path / name) == 0

        class Tomorrow(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return super().now(tz) + datetime.timedelta(days=1, seconds=7)

        monkeypatch.setattr("highdicom.base.datetime.datetime", Tomorrow)
    for name in ("masks.dcm", "mean.dcm", "summary.json", "mask_000.nii.gz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert sample(series, model_path, tmp_path / "c", "--seed", 1) == 0
    assert (tmp_path / "a" / "masks.dcm").read_bytes() != (tmp_path / "c" / "masks.dcm").read_bytes()


# ---------------------------------------------------------------------- permissions


def mode(path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.fixture
def open_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path, open_umask):
    for kept in (0o600, 0o640, 0o664):
        write_text(tmp_path / "a", "old")
        os.chmod(tmp_path / "a", kept)
        write_text(tmp_path / "a", "new")
        assert mode(tmp_path / "a") == kept and (tmp_path / "a").read_text() == "new"
    write_text(tmp_path / "b", "new")
    assert mode(tmp_path / "b") == 0o644
    model = bf.BerDiff(bf.UNet(model_channels=8, norm_groups=4, channel_mult=(1,), attention_resolutions=()))
    for place in ("m.safetensors", "m"):
        model.save(tmp_path / place)
        file = tmp_path / place if place != "m" else tmp_path / "m" / "model.safetensors"
        os.chmod(file, 0o600)
        model.save(tmp_path / place)
        assert mode(file) == 0o600


def test_results_are_no_more_open_than_the_scan(tmp_path, model_path, open_umask):
    out = tmp_path / "out"
    np.save(tmp_path / "in.npy", np.zeros((1, 16, 16), np.uint8))
    os.chmod(tmp_path / "in.npy", 0o600)
    assert sample(tmp_path / "in.npy", model_path, out, "--report") == 0
    assert {mode(path) for path in out.iterdir()} == {0o600}
    os.chmod(out / "mean.npy", 0o640)  # by the user: stays
    assert sample(tmp_path / "in.npy", model_path, out, "--report", "--overwrite") == 0
    assert mode(out / "mean.npy") == 0o640 and mode(out / "summary.json") == mode(out / "report.html") == 0o600
    (out / "report.html").unlink()
    assert cli.main(["report", str(out)]) == 0 and mode(out / "report.html") == 0o600
    os.chmod(tmp_path / "in.npy", 0o644)
    assert sample(tmp_path / "in.npy", model_path, tmp_path / "open") == 0
    assert {mode(path) for path in (tmp_path / "open").iterdir()} == {0o644}


def test_an_import_that_is_replaced_keeps_its_permissions(tmp_path, open_umask):
    for kind in ("images", "masks_0"):
        (tmp_path / "tree" / kind).mkdir(parents=True)
        for k in range(2):
            Image.fromarray(np.full((8, 8), 255 * (k % 2), np.uint8)).save(tmp_path / "tree" / kind / f"p{k}_1.png")
    out = tmp_path / "out"
    importers.import_tree(tmp_path / "tree", out, split=(100, 0, 0), preview=False)
    os.chmod(out, 0o700)
    os.chmod(out / "train.h5", 0o600)
    importers.import_tree(tmp_path / "tree", out, split=(100, 0, 0), preview=False, overwrite=True)
    assert mode(out) == 0o700 and mode(out / "train.h5") == 0o600


# ---------------------------------------------------------------------- terminals

HOSTILE = "a\x1b]0;owned\x07\x1b[2J\rb\u202ec\x9b31m\nd"


def test_what_a_terminal_would_obey_is_written_out():
    assert words.shown(HOSTILE) == r"a\x1b]0;owned\x07\x1b[2J\x0db\u202ec\x9b31m\x0ad"
    assert words.shown("a\nb\x1b", lines=True) == "a\nb\\x1b"
    assert words.shown(os.fsdecode(b"\xff\xfe")) == r"\xff\xfe" and words.shown("Prüfung 肺") == "Prüfung 肺"
    assert words.line(ValueError("a\n b\x1b")) == r"a b\x1b" and words.line(ValueError()) == "ValueError"
    assert len(words.line("x" * 10**7)) < words.LONGEST + 10


def test_hostile_names_are_shown_not_sent(tmp_path, model_path, capfd):
    """In errors, in results, in an import's report and in the log."""
    folder = tmp_path / HOSTILE
    folder.mkdir()
    np.save(folder / "in.npy", np.zeros((1, 16, 16), np.uint8))
    (folder / "bad.npy").write_bytes(b"x")
    assert cli.main(["sample", str(folder / "bad.npy"), "--output", str(tmp_path / "o")]) == 1
    fixed = ["--model", str(model_path), "-n", "2", "--steps", "2", "--output", str(folder / "out"), "--report"]
    assert cli.main(["sample", str(folder / "in.npy"), *fixed]) == 0
    assert cli.main(["report", str(folder / "out"), "--input", str(folder / "in.npy")]) == 0
    for kind in ("images", "masks_0"):
        (folder / "tree" / kind).mkdir(parents=True)
        for k in range(2):
            Image.fromarray(np.full((8, 8), k, np.uint8)).save(folder / "tree" / kind / f"p{k}_1.png")
    (folder / "tree" / "images" / "q\x1b[31m_1.png").write_bytes(b"x")
    imported = ["import", str(folder / "tree"), str(folder / "data"), "--on-error", "skip", "--split", "100/0/0"]
    assert cli.main(imported) == 0
    logging.getLogger("berdiff_fast").warning("no report of %s", folder)
    out, err = capfd.readouterr()
    for text in (out, err):
        assert r"\x1b" in text and not any(c in text for c in "\x1b\x07\x9b\u202e")
    assert r"q\x1b[31m_1.png" in out
