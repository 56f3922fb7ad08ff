# SPDX-License-Identifier: Apache-2.0
"""The command: ``PYTHONPATH=tests python -m endurance kills --count 50``, or ``writes``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from endurance import children, kills, writes
from endurance.jobs import JOBS


def main() -> int:
    parser = argparse.ArgumentParser(prog="endurance", description="Runs that are killed, and writes that fail.")
    parser.add_argument("what", choices=["kills", "writes"])
    parser.add_argument("--only", nargs="+", choices=JOBS, metavar="JOB", help=", ".join(JOBS))
    parser.add_argument("--count", type=int, default=50, help="kills of each job (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        if options.what == "writes" and not writes.loaded():
            environment = {**os.environ, "LD_PRELOAD": str(writes.library(folder))}
            return subprocess.run([sys.executable, "-m", "endurance", *sys.argv[1:]], env=environment).returncode
        children.load_libraries()
        return _kills(options, folder) if options.what == "kills" else _writes(options, folder)


def _kills(options: argparse.Namespace, folder: Path) -> int:
    for job in options.only or JOBS:
        started = time.monotonic()
        found = kills.kill(job, options.count, options.seed, folder / job)
        print(
            f"{job}: {found.kills} kills, {found.finished} runs that came to their end, all as an undisturbed one; "
            f"{time.monotonic() - started:.0f} s",
            flush=True,
        )
    return 0


def _writes(options: argparse.Namespace, folder: Path) -> int:
    for job in options.only or [job for job in JOBS if job != "train"]:
        for error in writes.ERRORS:
            started = time.monotonic()
            found = writes.fail(job, error, folder / job / error)
            print(
                f"{job}, {error}: {found.failures} writes failed, each in one line; {len(found.survived)} were got "
                f"over {sorted(set(found.survived))}; {time.monotonic() - started:.0f} s",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
