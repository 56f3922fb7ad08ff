# SPDX-License-Identifier: Apache-2.0
"""Limits, asked before the memory is taken: what a file or an argument wants, against what can be meant or had."""

from __future__ import annotations

import ctypes
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

#: Below this no file is suspected: 256 MiB.
HARMLESS = 2**28

#: Deflate, the tightest packing that our formats use, makes 1032 bytes of one at most.
PACKED = 1100


class LimitError(ValueError):
    """More is asked for than can be meant, or had."""


def room(what: str, wanted: int, advice: str = "") -> None:
    """Raise LimitError if ``what`` would take more bytes than the memory that is free.

    Args:
        what: names the argument or the file.
        wanted: bytes.
        advice: what to do about it.
    """
    if wanted <= HARMLESS:
        return
    free = available()
    if wanted > free:
        remedy = f"; {advice}" if advice else ""
        raise LimitError(f"{what} would take {size(wanted)} of memory, and {size(free)} are free{remedy}")


def plausible(what: str, declared: int, stored: int, advice: str = "") -> None:
    """Raise LimitError if ``what`` says that it holds far more bytes than what is stored can be unpacked to."""
    if declared > HARMLESS and declared > PACKED * stored:
        remedy = f"; {advice}" if advice else ""
        raise LimitError(f"{what} declares {size(declared)}, and only {size(stored)} of it are there{remedy}")


def size(count: int) -> str:
    """Bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count} bytes"
        count /= 1000  # type: ignore[assignment]
    return f"{count:,.3g} TB"


def available() -> int:
    """Bytes of memory that this process may still take; very many where the system does not say."""
    found = [2**62]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError):
        with suppress(OSError, ValueError, AttributeError):
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):  # of a container
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    with suppress(ImportError, OSError, ValueError):
        import resource

        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
        if soft != resource.RLIM_INFINITY:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            found.append(max(soft - used, 0))
    return min(found)


def count(value: Any, known: dict[int, float]) -> float:
    """How many values are in one, each alias counted as often as it stands there; without end if it holds itself."""
    if not isinstance(value, (list, tuple, set, dict)):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf  # until it is counted
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(count(part, known) for part in parts)
    return known[id(value)]


def give_back() -> None:
    """Give the system the memory that was freed: glibc keeps what a network worked in."""
    with suppress(OSError, AttributeError):  # another library
        ctypes.CDLL(None).malloc_trim(0)
