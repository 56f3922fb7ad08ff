# SPDX-License-Identifier: Apache-2.0
"""Children of a process that has all libraries already: a run of a job takes its own time alone."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def load_libraries() -> None:
    """Import what jobs import, so that no child has to. Nothing is computed: threads do not survive forks."""
    import accelerate  # noqa: F401
    import h5py  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import nibabel  # noqa: F401
    import torch
    import tyro  # noqa: F401

    import berdiff_fast.cli.import_tree
    import berdiff_fast.cli.sample
    import berdiff_fast.cli.train
    import berdiff_fast.imaging.report
    import berdiff_fast.ops
    import berdiff_fast.scans.results
    import berdiff_fast.training.loop  # noqa: F401

    torch.set_num_threads(1)


@dataclass(frozen=True)
class Ended:
    """How a child ended: its status (less than 0: the signal), what it printed, and after how many seconds."""

    status: int
    said: str
    seconds: float


def run(log: Path, work: Callable[..., int], *arguments: Any, kill_after: float | None = None) -> Ended:
    """Run ``work`` in a child, which is killed (SIGKILL) after so many seconds; what it prints goes to ``log``."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(log, work, *arguments)
    if kill_after is not None:
        while time.monotonic() - started < kill_after:
            time.sleep(0.001)
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                return _ended(status, log, started)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return _ended(status, log, started)


def _ended(status: int, log: Path, started: float) -> Ended:
    said = log.read_text(errors="replace") if log.exists() else ""
    return Ended(os.waitstatus_to_exitcode(status), said, time.monotonic() - started)


def _child(log: Path, work: Callable[..., int], *arguments: Any) -> None:
    """Work, with what is printed in a file, and end. Never returns."""
    status = 70
    try:
        faulthandler.disable()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = work(*arguments)
    except Exception:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)
