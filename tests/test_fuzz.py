# SPDX-License-Identifier: Apache-2.0
"""A short fuzz of every reader with a fixed seed, and faults that fuzzing found. ``make fuzz`` goes on for longer."""

# ruff: noqa: E402
from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from support import ENVIRONMENT

for name in ("accelerate", "highdicom", "nibabel", "pydicom", "SimpleITK", "tifffile", "yaml"):
    pytest.importorskip(name, reason=f"{name} is not installed")
if not os.path.isdir("/proc/self"):
    pytest.skip("processes are watched through /proc", allow_module_level=True)

from fuzzing.corpus import FOLDER
from fuzzing.readers import READERS, Reader
from fuzzing.run import Mutant, found_before, judge, load_libraries, make, sound

from berdiff_fast.bench import report as bench_report
from berdiff_fast.imaging import volumes
from berdiff_fast.scans.results import report_again


@pytest.fixture(scope="module", autouse=True)
def _libraries():
    load_libraries()


@pytest.mark.parametrize("reader", READERS)
def test_sound_files_and_some_mutants(reader):
    """Each is read or refused in one line that names it, in a process that does not die."""
    for mutant in sound(reader):
        assert judge(mutant).kind == READERS[reader].known, mutant.name
    for number in range(8):
        outcome = judge(make(20, reader, number))
        assert outcome.kind != "wrong", (f"20:{reader}:{number}", outcome.fault)


def test_a_mutant_is_made_again_by_its_name():
    assert make(5, "nifti", 3) == make(5, "nifti", 3) != make(5, "nifti", 4)


def _raise(error):
    raise error


@pytest.mark.parametrize(
    "read, fault",
    [
        (lambda path: os.abort(), "killed by SIGABRT"),
        (lambda path: os._exit(0), "ended the process"),
        (lambda path: _raise(KeyError("x")), "raised KeyError"),
        (lambda path: _raise(ValueError("it is damaged somewhere")), "did not name the file"),
        (lambda path: _raise(ValueError(f"{path}: two\nlines of words")), "said more than a line"),
        (lambda path: os.write(2, b"a warning of a library"), "printed"),
        (lambda path: _raise(AssertionError("other voxels")), "raised AssertionError"),
        (lambda path: np.ones(2**28).sum(), "took more than 1074 MB"),
    ],
)
def test_each_fault_is_seen(monkeypatch, read, fault):
    """The judge itself: what it never finds fault with would tell nothing."""
    monkeypatch.setitem(READERS, "nifti", Reader(READERS["nifti"].seeds, read, ()))
    outcome = judge(Mutant("it", "nifti", FOLDER / "nifti" / "scan.nii", b"x"))
    assert outcome.kind == "wrong"
    assert outcome.fault.startswith(fault)


# ---------------------------------------------------------------------- what was found


@pytest.mark.parametrize("name, mutant", found_before(), ids=lambda x: x if isinstance(x, str) else "")
def test_mutants_that_something_was_wrong_with(name, mutant):
    """``20-dicom-5``: a JPEG whose item is said to be longer than the file took GDCM more than a gigabyte.
    ``10-nifti-2-89``: a code of 32 bits that became 0 in one of 16 left masks at the origin. ``10-metaimage-148``,
    ``10-nrrd-190``: a spacing that the scan does not tell was 1 mm in its masks. ``10-hdf5-scan-215``: voxels in the
    order of bytes of the file. ``10-report-163``, ``10-report-292``: a forged summary took a gigabyte, or overflowed.
    ``10-tiff-23``: Pillow's log was printed."""
    outcome = judge(mutant)
    assert outcome.kind != "wrong", outcome.fault


@pytest.mark.parametrize("text", ["stepq: 3\n", "steps: 0\n", "flip: [1]\n", "window: [5, 4]\n"])
def test_a_config_file_is_named(tmp_path, text):
    from berdiff_fast import cli

    path = tmp_path / "mine.yaml"
    path.write_text(text)
    words = ["--config", str(path), "--train-data", "data.h5", "--output", "run"]
    with pytest.raises((ValueError, TypeError)) as caught:
        cli.command("train").parse("berdiff-fast train", words).checked()
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"machine": 3}', "\xff"])
def test_what_bench_did_not_write_is_named(tmp_path, text):
    path = tmp_path / "bench.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError) as caught:
        bench_report.read(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    "key, value", [("slices", [0, -1]), ("slices", [1, 1]), ("slices", [0, 9]), ("axis", -1), ("axis", 2**70)]
)
def test_a_report_of_slices_that_are_not_there(tmp_path, key, value):
    for file in (FOLDER / "results").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    summary = json.loads((tmp_path / "summary.json").read_bytes())
    (tmp_path / "summary.json").write_text(json.dumps({**summary, key: value}))
    with pytest.raises(ValueError, match="slices must be some of|axis must be 0, 1 or 2") as caught:
        report_again(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "summary.json"))
    assert not (tmp_path / "report.html").exists()


def test_libtiff_prints_nothing(tmp_path, capfd):
    data = (FOLDER / "pictures" / "packed.tif").read_bytes()
    path = tmp_path / "cut.tif"
    path.write_bytes(data[:8] + b"\x80\x10" + bytes(60) + data[70:])
    with pytest.raises(ValueError, match="cannot be read"):
        volumes.read(path)
    assert capfd.readouterr().err == ""


def test_loggers_below_a_library_print_nothing():
    """``PIL.TiffImagePlugin`` has a logger of its own. In a process of its own: here pytest takes what is logged."""
    program = """
import logging
from berdiff_fast.io.quiet import without_chatter
with without_chatter():
    logging.getLogger("PIL.TiffImagePlugin").error("not said")
    logging.getLogger("pydicom").warning("not said")
logging.getLogger("PIL.TiffImagePlugin").error("said")
"""
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "said\n")
