# SPDX-License-Identifier: Apache-2.0
"""Cases, contenders, gates, and times taken in turns."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm


@dataclass
class Contender:
    """One way to do a case's work.

    Attributes:
        name: as tables show it.
        run: does the work once.
        gate: raises AssertionError if what this way computes is wrong; returns what there is to say of it, a dict for
            the JSON. It may compute something smaller than ``run`` does, or with known random numbers.
        ours: whether it is this package's.
        context: makes what the gate and every run are inside of: an instruction set, say.
    """

    name: str
    run: Callable[[], Any]
    gate: Callable[[], dict[str, Any] | None]
    ours: bool = False
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


#: What a case's ``contenders`` yields: contenders, or a name and the reason why that one cannot run here.
Made = Iterator[Contender | tuple[str, str]]


@dataclass
class Case:
    """A piece of work.

    Attributes:
        name, group: as tables show it: "kernel", "loss", "metrics", "call", "training" or "ops" (one by one, on a CPU).
        contenders: a function, so that nothing is built before its turn comes.
        baseline: the contender that the others are compared with.
        unit, amount: what is done per run, for rates: ("masks", 16).
        flops, bytes: floating-point operations and bytes moved per run, where they are the same for all; else 0.
        threads: how many of torch's threads it may use; 0: as they are set.
        calls: runs that are timed together, of what takes microseconds.
    """

    name: str
    group: str
    contenders: Callable[[], Made]
    baseline: str
    unit: str = ""
    amount: float = 0
    flops: float = 0
    bytes: float = 0
    threads: int = 0
    calls: int = 1

    @contextmanager
    def on_its_threads(self) -> Iterator[None]:
        """Its number of threads, for the length of a ``with`` block."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@dataclass
class Settings:
    """How long to measure.

    Attributes:
        device: "cpu" or "cuda".
        rounds: turns at most.
        seconds: a case stops taking turns when this much time has gone into it, after five.
        contenders: only those with one of these words in their names, and baselines; all if empty.
    """

    device: str = "cpu"
    rounds: int = 15
    seconds: float = 20.0
    contenders: list[str] = field(default_factory=list)


@dataclass
class Result:
    """What was measured of a case: JSON-able."""

    case: str
    group: str
    unit: str
    amount: float
    flops: float
    bytes: float
    baseline: str
    contenders: list[dict[str, Any]] = field(default_factory=list)


def run(
    case: Case, settings: Settings, progress: bool = True, timed: Callable[[Result], None] = lambda result: None
) -> Result:
    """Gate all contenders of a case, then time those that passed, in turns.

    ``timed`` is told the result when all is timed; what a profiler adds on a GPU, which may take long, comes after it.
    """
    with case.on_its_threads():
        return _run(case, settings, progress, timed)


def _run(case: Case, settings: Settings, progress: bool, timed: Callable[[Result], None]) -> Result:
    result = Result(case.name, case.group, case.unit, case.amount, case.flops, case.bytes, case.baseline)
    ready: list[tuple[Contender, dict[str, Any]]] = []
    with tqdm(desc=case.name, unit="turn", disable=not progress, leave=False) as bar:
        for contender in case.contenders():
            name = contender[0] if isinstance(contender, tuple) else contender.name
            if settings.contenders and name != case.baseline and not any(w in name for w in settings.contenders):
                continue
            if isinstance(contender, tuple):
                result.contenders.append({"name": contender[0], "why_not": contender[1]})
                continue
            bar.set_postfix_str(f"checking {contender.name}")
            row: dict[str, Any] = {"name": contender.name, "ours": contender.ours}
            result.contenders.append(row)
            try:
                memory = _Memory(settings.device)
                with contender.context():
                    with _exact(settings.device):
                        row |= {"gate": contender.gate() or {}}
                    if settings.device == "cuda":
                        contender.run()  # warm: compilers, and graphs, which are captured at a second call
                        contender.run()
                    memory.watch()
                    contender.run()
                row["peak_bytes"] = memory.peak()
            except AssertionError as error:
                row["why_not"] = f"wrong result, not timed: {error}"
            except Exception as error:  # a baseline that cannot run here is told of, not fatal
                row["why_not"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            else:
                ready.append((contender, row))
        times: dict[str, list[float]] = {contender.name: [] for contender, _ in ready}
        start = time.perf_counter()
        for turn in range(settings.rounds):
            if turn >= 5 and time.perf_counter() - start > settings.seconds:
                break
            # Whoever comes after a slow one finds other caches: the order changes from turn to turn.
            for i in range(len(ready)):
                contender = ready[(i + turn) % len(ready)][0]
                bar.set_postfix_str(contender.name)
                with contender.context():
                    times[contender.name].append(_time(contender.run, settings.device, case.calls))
            bar.update()
    base = times.get(case.baseline)
    for contender, row in ready:
        taken = times[contender.name]
        row |= {"seconds": statistics.median(taken), "turns": len(taken), "spread": _spread(taken)}
        if base:
            # Of each turn: both saw the same clock.
            row["speedup"] = statistics.median(b / t for b, t in zip(base, taken, strict=True))
    timed(result)
    if settings.device == "cuda":
        for contender, row in ready:
            row["profile"] = _profile(contender.run, row["seconds"])
    gc.collect()
    return result


def _time(function: Callable[[], Any], device: str, calls: int = 1) -> float:
    """Seconds that a call takes, of several that are timed together."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def _spread(times: list[float]) -> float:
    """Interquartile range over median."""
    if len(times) < 4:
        return (max(times) - min(times)) / statistics.median(times)
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / middle


@contextmanager
def _exact(device: str) -> Iterator[None]:
    """Gates compare algorithms, so on a GPU without TF32, which torch's convolutions are timed with by default."""
    if device != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


class _Memory:
    """The most memory that a run takes, beside what was in use when this was made: what a contender prepared for
    itself counts, its inputs do not. None where the system does not tell. On a GPU it is what was taken from the
    device, which has graphs and workspaces in it."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.before = self._now()

    def watch(self) -> None:
        """From here on."""
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return
        self._now()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident memory starts anew (proc(5))
        except OSError:
            self.before = None

    def peak(self) -> int | None:
        if self.device == "cuda":
            return torch.cuda.max_memory_reserved() - (self.before or 0)
        return None if self.before is None else max(0, self._resident("VmHWM") - self.before)

    def _now(self) -> int | None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            return torch.cuda.memory_reserved()
        try:
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed
            return self._resident("VmRSS")
        except (OSError, AttributeError):
            return None

    @staticmethod
    def _resident(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def _profile(function: Callable[[], Any], seconds: float) -> dict[str, Any]:
    """What the host did in a run: launches, waits and allocations, and which kernels took the time."""
    from torch.profiler import ProfilerActivity, profile

    if seconds > 1:
        return {"why_not": "it takes longer than a second, and its profile minutes"}
    before = torch.cuda.memory_stats()["num_device_alloc"]
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            function()
        averages = profiler.key_averages()
    except RuntimeError as error:  # of the profiler's: what was timed is worth keeping
        return {"why_not": str(error)}
    events = {e.key: e.count for e in averages}
    launches = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
    kernels = sorted(averages, key=lambda e: e.self_device_time_total, reverse=True)[:12]
    return {
        "launches": sum(events.get(key, 0) for key in launches),
        "waits": max(0, sum(events.get(key, 0) for key in waits) - 1),  # the profiler's own
        "allocations": torch.cuda.memory_stats()["num_device_alloc"] - before,
        "kernels_us": {e.key[:100]: round(e.self_device_time_total, 1) for e in kernels if e.self_device_time_total},
    }


# ---------------------------------------------------------------------- what gates ask


def assert_close(got: torch.Tensor, expected: torch.Tensor, rtol: float) -> None:
    """Within ``rtol`` of the largest value."""
    largest = float(expected.abs().max())
    error = float((got.double() - expected.double()).abs().max())
    assert error <= rtol * largest, f"off by {error:.3g} where the largest value is {largest:.3g}"


def same_masks(got: torch.Tensor, expected: torch.Tensor, share: float = 1e-3) -> dict[str, Any]:
    """Equal but for pixels whose logits are within rounding of the threshold, and what these lead to."""
    differing, pixels = int((got != expected).sum()), expected.numel()
    assert differing <= share * pixels, f"{differing} of {pixels} pixels differ from the reference's masks"
    return {"differing_pixels": differing, "pixels": pixels}
