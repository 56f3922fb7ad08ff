# SPDX-License-Identifier: Apache-2.0
"""Every n-th write fails once, for n = 1, 2, 3, ... until none is left, as SQLite tests itself.

A write is whatever changes a file or the names in a folder (``faults.c``). After each failure the command has said so
in one line, what was there before is whole, and the same command then ends as if nothing had been.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from endurance import children
from endurance.jobs import JOBS, Job, Tree
from endurance.kills import prepared, undisturbed

ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}


def compiler() -> str | None:
    """The C compiler that makes the library of faults, if this is a system that it works on."""
    return shutil.which("cc") if sys.platform == "linux" else None


def library(folder: Path) -> Path:
    """The library of faults, compiled."""
    built = folder / "faults.so"
    command = [compiler() or "cc", "-O1", "-shared", "-fPIC", "-o", str(built)]
    subprocess.run([*command, str(Path(__file__).with_name("faults.c")), "-ldl"], check=True)
    return built


def loaded() -> bool:
    """Whether this process was started with the library of faults."""
    return "faults.so" in os.environ.get("LD_PRELOAD", "")


@dataclass
class Count:
    """What came of it: failures that ended a run in one line, and those that it got over, by what failed."""

    failures: int = 0
    survived: list[str] = field(default_factory=list)


def fail(name: str, error: str, folder: Path) -> Count:
    """Let every write of a job fail once.

    Raises:
        AssertionError: a promise is broken; the message says by which write.
    """
    job, found = JOBS[name], Count()
    expected, _ = undisturbed(job, folder / "undisturbed")
    for n in itertools.count(1):
        work = prepared(job, folder / f"run-{n}")
        before = job.results(work)
        told = folder / "failed"
        ended = children.run(folder / "log", _armed, job, work, n, ERRORS[error], told)
        what = told.read_text()
        if not what:  # fewer than n writes: all have had their turn
            assert ended.status == 0 and job.results(work) == expected, ended.said
            shutil.rmtree(work)
            return found
        which = f"{name}, write {n} ({what}, {error})"
        if ended.status == 0:
            assert job.results(work) == expected, f"{which}: status 0, and results are not what they should be"
            assert "sync" not in what, f"{which}: was got over, and results may not be on the disk"
            found.survived.append(what)
        else:
            found.failures += 1
            if _check_end(job, work, before, expected, ended, which):
                shutil.rmtree(work)
                continue
            again = children.run(folder / "log", job.run, work)
            assert again.status == 0, f"{which}: the same command then ends with {again.status}: {again.said}"
            assert job.results(work) == expected, f"{which}: the same command then makes other results"
        shutil.rmtree(work)
    raise AssertionError("unreachable")


def _armed(job: Job, work: Path, n: int, number: int, told: Path) -> int:
    """Run a job whose n-th write fails."""
    faults = ctypes.CDLL(None)
    faults.faults_failed.restype = ctypes.c_char_p
    faults.faults_arm(os.fsencode(work), ctypes.c_long(n), number)
    try:
        return job.run(work)
    except OSError as error:  # of what is called in Python
        print(f"{error}")
        return 1
    finally:
        told.write_bytes(faults.faults_failed())


def _check_end(job: Job, work: Path, before: Tree, expected: Tree, ended: children.Ended, which: str) -> bool:
    """Judge what a failure left; whether the results are there all the same, as where the last fsync fails."""
    lines = ended.said.strip().splitlines()
    assert ended.status == 1, f"{which}: status {ended.status}: {ended.said}"
    assert len(lines) == 1 and "Traceback" not in ended.said, f"{which}: says {ended.said!r}"
    after = {name: data for name, data in job.results(work).items() if "/." not in f"/{name}"}
    if after == expected != before:
        return True
    if after != before and "out/summary.json" in expected:
        # Results were being put into place: then there is no summary, without which nobody takes them for whole.
        assert "out/summary.json" not in after, f"{which}: results are half there"
    elif after != before:
        # Files that are whole by themselves, each the former or the new one.
        half = [name for name in after if after[name] not in (before.get(name), expected.get(name))]
        assert not half and after.keys() >= before.keys(), f"{which}: {half or before.keys() - after.keys()}"
    return False
