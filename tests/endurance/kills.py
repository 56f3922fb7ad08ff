# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at random moments: the same command, given again until it ends, leaves what an undisturbed run leaves."""

from __future__ import annotations

import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from endurance import children
from endurance.jobs import JOBS, Job, Tree, same_log

#: What a command says that would overwrite results without having been told to.
_HIDDEN = re.compile(r"(^|/)\.[^/]+\.[a-z0-9_]{8}/")
_ALREADY = ("holds results already", "is not empty")


@dataclass
class Count:
    """What came of it."""

    kills: int = 0
    finished: int = 0
    longest: float = 0.0


def kill(name: str, count: int, seed: int, folder: Path) -> Count:
    """Kill a job ``count`` times at moments drawn uniformly over the time that it takes.

    After every kill the command is given again, killed or not; each time that it comes to its end, results are compared
    with those of an undisturbed run, and all begins anew.

    Raises:
        AssertionError: something is lost, half there, left over or different; the message says after how many kills.
    """
    job, draws, found = JOBS[name], random.Random(f"{seed}:{name}"), Count()
    expected, seconds = undisturbed(job, folder / "undisturbed")
    work = None
    while found.kills < count:
        if work is None:
            work = prepared(job, folder / f"run-{found.finished}")
        ended = children.run(folder / "log", job.run, work, kill_after=draws.uniform(0, 1.1 * seconds))
        found.longest = max(found.longest, ended.seconds)
        if ended.status == -9:
            found.kills += 1
            continue
        _compare(job, work, expected, ended, found)
        shutil.rmtree(work)
        work, found.finished = None, found.finished + 1
    if work is not None:
        _compare(job, work, expected, children.run(folder / "log", job.run, work), found)
        found.finished += 1
    return found


def undisturbed(job: Job, folder: Path) -> tuple[Tree, float]:
    """Results of a run that nobody disturbs, and how many seconds it takes."""
    work = prepared(job, folder)
    ended = children.run(folder.parent / "log", job.run, work)
    assert ended.status == 0, ended.said
    return job.results(work), ended.seconds


def prepared(job: Job, folder: Path) -> Path:
    """A folder with a job's inputs, and results of an earlier run if it is to replace such."""

    def work() -> int:
        job.prepare(folder)
        if job.former is not None:
            job.former(folder)
        return 0

    folder.mkdir(parents=True)
    ended = children.run(folder.parent / "log", work)
    assert ended.status == 0, ended.said
    return folder


def _compare(job: Job, work: Path, expected: Tree, ended: children.Ended, found: Count) -> None:
    after = f"after {found.kills} kills"
    got = job.results(work)
    if ended.status == 1 and any(words in ended.said for words in _ALREADY):
        # Killed when all was in its place, but for what is swept up: the same command has nothing to do. A lock that
        # nobody holds stays then, until the next run that has something to do takes it over.
        left = ("out/.unfinished/", "out/.lock", ".out.lock")
        got = {name: data for name, data in got.items() if not name.startswith(left)}
    else:
        assert ended.status == 0, f"{after}: status {ended.status}: {ended.said}"
    # A run that was killed outright may leave the hidden folder that it wrote in; the docs say so.
    got = {name: data for name, data in got.items() if not _HIDDEN.search(name)}
    assert got.keys() == expected.keys(), f"{after}: files differ: {sorted(got.keys() ^ expected.keys())}"
    different = [name for name in expected if got[name] != expected[name]]
    assert not different, f"{after}: {different} differ"
    log = work / "out" / "log.jsonl"
    if log.exists():
        assert same_log(log.read_bytes(), (work.parent / "undisturbed" / "out" / "log.jsonl").read_bytes()), after
