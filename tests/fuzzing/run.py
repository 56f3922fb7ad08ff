# SPDX-License-Identifier: Apache-2.0
"""Mutants, each read in a process of its own, and what is judged wrong with what came of it.

A mutant is named SEED:READER:NUMBER, and that name is all it takes to make it again. Its process is a fork of one that
has all libraries loaded; it ends by itself or is killed, at a gigabyte or a minute.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzzing.corpus import FOLDER
from fuzzing.readers import READERS, Reader

#: What a mutant may take, beyond what its process had: bytes, seconds of a processor, and of a clock.
MEMORY, PROCESSOR, CLOCK = 2**30, 10.0, 60.0

#: Characters of a message.
LONGEST = 2500


@dataclass(frozen=True)
class Mutant:
    name: str
    reader: str
    seed: Path
    data: bytes


@dataclass(frozen=True)
class Outcome:
    """What came of a mutant.

    Attributes:
        kind: "read", "refused" or "wrong".
        fault: of the last, what is wrong; the first line is short.
        seconds: of a processor.
        memory: bytes beyond what the process had.
    """

    kind: str
    fault: str
    seconds: float
    memory: int


def make(seed: int, reader: str, number: int) -> Mutant:
    rng = random.Random(f"{seed}:{reader}:{number}")
    kind = READERS[reader]
    file = rng.choice(kind.files())
    data = file.read_bytes()
    changed = data
    for _ in range(20):  # some mutations change nothing
        mutator = rng.choice(kind.mutators)
        try:
            changed = mutator(data, rng)
        except (ValueError, KeyError, IndexError):  # it meets a format that it does not know
            continue
        if changed != data:
            break
    return Mutant(f"{seed}:{reader}:{number}", reader, file, changed)


def sound(reader: str) -> Iterator[Mutant]:
    """Seeds themselves, which have to be read."""
    for file in READERS[reader].files():
        yield Mutant(f"{reader}:{file.name}", reader, file, file.read_bytes())


# ---------------------------------------------------------------------- processes


def load_libraries() -> None:
    """All that readers import on their way, before a process is forked; one thread, as forks can have."""
    import accelerate  # noqa: F401
    import highdicom  # noqa: F401
    import matplotlib
    import nibabel  # noqa: F401
    import pydicom.encoders
    import pydicom.pixels  # noqa: F401
    import SimpleITK  # noqa: F401
    import tifffile  # noqa: F401
    import torch
    import yaml  # noqa: F401
    from PIL import Image

    from berdiff_fast import cli, scans  # noqa: F401
    from berdiff_fast.bench import report  # noqa: F401
    from berdiff_fast.data import hdf5, importers  # noqa: F401
    from berdiff_fast.imaging import figures, volumes  # noqa: F401
    from berdiff_fast.imaging import report as report_  # noqa: F401
    from berdiff_fast.scans import results  # noqa: F401
    from berdiff_fast.training import checkpoints, config, loop  # noqa: F401

    matplotlib.use("agg")
    Image.init()
    torch.set_num_threads(1)


def judge(mutant: Mutant) -> Outcome:
    """Read a mutant in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        place = Path(folder) / mutant.seed.parent.name
        shutil.copytree(mutant.seed.parent, place)
        path = place / mutant.seed.name
        path.write_bytes(mutant.data)
        said, log = Path(folder) / "said", Path(folder) / "log"
        child = os.fork()
        if child == 0:
            _child(READERS[mutant.reader], path, said, log)
        status, usage, killed = _wait(child)
        words = said.read_text(errors="replace") if said.exists() else ""
        chatter = log.read_text(errors="replace")
    seconds, memory = usage.ru_utime + usage.ru_stime, int(words.partition("\n")[0] or 0)
    kind, _, text = words.partition("\n")[2].partition("\n")
    fault = killed or _fault(mutant, kind, text, chatter, os.waitstatus_to_exitcode(status))
    if not fault and memory > MEMORY:
        fault = f"took {memory / 1e6:.0f} MB"
    if not fault and seconds > PROCESSOR:
        fault = f"took {seconds:.0f} s"
    return Outcome("wrong" if fault else "refused" if kind == "raised" else "read", fault, seconds, memory)


def _child(reader: Reader, path: Path, said: Path, log: Path) -> None:
    """Read, say what came of it in a file, and end. Never returns."""
    import resource

    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        faulthandler.disable()  # the signal that ends it says enough
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(path.parent.parent)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            reader.read(path)
            words = "read\n"
        except (ValueError, OSError, *reader.raises) as error:
            words = f"raised\n{error}"
        except BaseException as error:
            words = f"other\n{type(error).__name__}: {error}\n{traceback.format_exc()}"
        taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        said.write_text(f"{taken}\n{words}", errors="replace")
    finally:
        os._exit(0)


def _wait(child: int) -> tuple[int, Any, str]:
    """Its status, what it used, and why it was killed, if it was."""
    started, pause, killed = time.monotonic(), 0.001, ""
    page, first = os.sysconf("SC_PAGE_SIZE"), 0
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            return status, usage, killed
        with contextlib.suppress(OSError, ValueError, IndexError):
            resident = int(Path(f"/proc/{child}/statm").read_text().split()[1]) * page
            first = first or resident
            if resident - first > MEMORY:
                killed = f"took more than {MEMORY / 1e6:.0f} MB"
        if time.monotonic() - started > CLOCK:
            killed = f"did not end in {CLOCK:.0f} s"
        if killed:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            return status, usage, killed
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)


def _fault(mutant: Mutant, kind: str, text: str, chatter: str, status: int) -> str:
    """What is wrong, in a line and more; empty if nothing is."""
    names = (mutant.seed.name, mutant.seed.parent.name)
    if status < 0:
        return f"killed by {signal.Signals(-status).name}\n{chatter[-2000:]}"
    if not kind:
        return f"ended the process\n{chatter[-2000:]}"
    if kind == "other":
        return f"raised {text}"
    if "Traceback" in chatter:
        return f"printed a traceback\n{chatter[-2000:]}"
    noise = [line for line in chatter.splitlines() if line.strip() and not any(name in line for name in names)]
    if (noise and kind == "raised") or any("warning" in line.lower() or "error" in line.lower() for line in noise):
        return f"printed: {noise[0][:200]}"
    if kind == "raised":
        if "\n" in text.strip():
            return f"said more than a line: {text[:300]!r}"
        if len(text) > LONGEST:
            return f"said {len(text)} characters: {text[:200]!r}"
        if READERS[mutant.reader].named and not any(name in text for name in names):
            return f"did not name the file: {text[:300]!r}"
        if len(text.strip()) < 12:
            return f"said hardly anything: {text!r}"
    return ""


# ---------------------------------------------------------------------- smaller mutants


def shrink(mutant: Mutant, outcome: Outcome, attempts: int = 60) -> Mutant:
    """A mutant with the same fault that is shorter, or nearer to its seed."""
    kind, seed, best = outcome.fault.split("\n")[0][:40], mutant.seed.read_bytes(), mutant.data

    def still(data: bytes) -> bool:
        nonlocal attempts
        attempts -= 1
        found = judge(Mutant(mutant.name, mutant.reader, mutant.seed, data))
        return found.fault.split("\n")[0][:40] == kind

    if len(best) == len(seed):  # bytes that need not differ become the seed's again
        differ = [i for i in range(len(seed)) if seed[i] != best[i]]
        step = max(1, len(differ) // 2)
        while step and attempts > 0:
            for start in range(0, len(differ), step):
                if attempts <= 0:
                    break
                part, trial = differ[start : start + step], bytearray(best)
                for i in part:
                    trial[i] = seed[i]
                if bytes(trial) not in (best, seed) and still(bytes(trial)):
                    best = bytes(trial)
            differ = [i for i in range(len(seed)) if seed[i] != best[i]]
            step //= 2
    length = len(best) // 2
    while length and attempts > 0:  # what is behind the fault goes
        if len(best) > length and still(best[:-length]):
            best = best[:-length]
        else:
            length //= 2
    return Mutant(mutant.name, mutant.reader, mutant.seed, best)


def found_before() -> Iterator[tuple[str, Mutant]]:
    """Mutants that something was wrong with, kept in the corpus as READER/SEED/NAME."""
    for file in sorted((FOLDER / "found").rglob("*")):
        if file.is_file():
            reader, seed = file.parts[-3:-1]
            (origin,) = (path for path in READERS[reader].files() if path.name == seed)
            yield f"{reader}-{file.name}", Mutant(file.name, reader, origin, file.read_bytes())
