# SPDX-License-Identifier: Apache-2.0
"""Killed at random moments, and every write failing once: a share of what ``make endurance`` does (``endurance/``)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from endurance import writes
from endurance.jobs import JOBS
from support import ENVIRONMENT

pytest.importorskip("nibabel", reason="needs nibabel (pip install 'berdiff_fast[imaging]')")
pytest.importorskip("accelerate", reason="needs accelerate (pip install 'berdiff_fast[train]')")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and loads a library before libc: Linux")


def endurance(*words: str) -> str:
    """What the command prints."""
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ENVIRONMENT['PYTHONPATH']}:{Path(__file__).parent}"}
    done = subprocess.run([sys.executable, "-m", "endurance", *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "jobs", [["sample", "import", "save"], ["sample-again", "import-again", "save-again"]], ids=["new", "again"]
)
def test_some_kills(jobs):
    said = endurance("kills", "--count", "4", "--seed", "1", "--only", *jobs)
    assert said.count("4 kills") == len(jobs)


@pytest.mark.slow
def test_some_kills_of_a_training():
    assert "4 kills" in endurance("kills", "--count", "4", "--seed", "1", "--only", "train")


@pytest.mark.skipif(writes.compiler() is None, reason="needs a C compiler")
@pytest.mark.parametrize(
    "jobs",
    [
        pytest.param(["save"], id="save"),
        pytest.param([j for j in JOBS if j not in ("save", "train")], id="all", marks=pytest.mark.slow),
    ],
)
def test_every_write_fails_once(jobs):
    said = endurance("writes", "--only", *jobs).splitlines()
    assert len(said) == 2 * len(jobs)
    for line in said:
        assert int(line.split(": ")[1].split()[0]) > 10, line


def test_a_fault_is_noticed(tmp_path):
    """The check itself: a job that says that all is well although a write failed, and one that leaves half a file."""
    program = """
import sys
from pathlib import Path
from endurance import children, writes
from endurance.jobs import JOBS, Job

def careless(folder):
    try:
        (folder / "out").write_text("whole")
    except OSError:
        pass
    return 0

def half(folder):
    with (folder / "out").open("w", buffering=1) as file:
        file.write("ha" + chr(10))
        file.write("lf" + chr(10))
    return 0

JOBS["job"] = Job(lambda folder: None, {"careless": careless, "half": half}[sys.argv[1]], "out")
children.load_libraries()
writes.fail("job", "EIO", Path(sys.argv[2]))
"""
    if writes.compiler() is None:
        pytest.skip("needs a C compiler")
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ENVIRONMENT['PYTHONPATH']}:{Path(__file__).parent}"}
    environment["LD_PRELOAD"] = str(writes.library(tmp_path))
    for job, says in (("careless", "status 0, and results are not what they should be"), ("half", "job, write")):
        words = [sys.executable, "-c", program, job, str(tmp_path / job)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == 1 and "AssertionError: job, write" in done.stderr and says in done.stderr
