# SPDX-License-Identifier: Apache-2.0
"""From a run to one JSON, and from the JSON to tables and a picture."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from berdiff_fast import info
from berdiff_fast.bench import ceilings
from berdiff_fast.bench.runner import Case, Result, Settings, run
from berdiff_fast.files import write_text
from berdiff_fast.words import line

#: A spread (interquartile range over median) from which on a row says so: its median may not come again.
UNSTEADY = 0.5

#: Tables go between these lines of a Markdown file.
_MARKED = re.compile(r"(<!-- bench: (?P<groups>[\w ]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def measure(
    cases: Sequence[Case],
    settings: Settings,
    output: Path,
    *,
    former: dict[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Run cases and write the report after each, so that a run that is cut short keeps what it measured.

    Args:
        cases, settings: what and how.
        output: the JSON.
        former: a report of this machine, date and source whose other cases are kept, each with its own ceilings.
        progress: show it.

    Returns:
        The report: machine, versions, ceilings, settings and a result for each case.

    Raises:
        ValueError: ``former`` is another machine's, date's or source's.
    """
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": info.collect(),
        "settings": asdict(settings),
        "source_sha256": _source(),
        "ceilings": ceilings.measure(settings.device),
        "cases": [],
    }
    if former is not None:
        if any(former[key] != report[key] for key in ("date", "machine", "settings", "source_sha256")):
            raise ValueError(f"append: {output} is of another machine, date, source or of other settings")
        names = {case.name for case in cases}
        report["cases"] = [{"ceilings": former["ceilings"], **c} for c in former["cases"] if c["case"] not in names]
    former_cases = report["cases"]

    def save(result: Result) -> None:
        report["cases"] = [*former_cases, asdict(result)]
        write_text(output, json.dumps(report, indent=1) + "\n")

    for case in cases:
        save(run(case, settings, progress, timed=save))
        former_cases = report["cases"]
        if progress:
            print(_table(report, report["cases"][-1]), flush=True)
        torch.compiler.reset()  # compiled graphs keep their weights
    return report


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What was measured before.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is not what ``measure`` writes.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        tables(report)  # takes all that is relied on
        return report
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{path} is not what berdiff-fast bench writes: {line(repr(error))}") from None


def _source() -> str:
    """Of the package as it is: cases of other sources do not belong into one table."""
    root, digest = Path(info.__file__).parent, hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".so", ".pyd")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def tables(report: dict[str, Any], groups: Sequence[str] = ()) -> str:
    """Markdown: where it was measured, and a table for each case (of some groups)."""
    machine = report["machine"]
    where = machine["gpu"] if report["settings"]["device"] == "cuda" else machine["cpu"]
    threads = "" if report["settings"]["device"] == "cuda" else f", {machine['threads']} threads"
    ours = ", ".join(f"{k} {v}" for k, v in machine["packages"].items() if k in ("torch", "triton") and v)
    tf32 = " Convolutions in float32 are in TF32, torch's default." if report["settings"]["device"] == "cuda" else ""
    found = [f"{where}{threads}, {ours}, {report['date']}.{tf32}"]
    found += [_table(report, case) for case in report["cases"] if not groups or case["group"] in groups]
    return "\n\n".join(found) + "\n"


def _table(report: dict[str, Any], case: dict[str, Any]) -> str:
    share = bool(case["flops"] or case["bytes"])
    memory = case.get("group") in ("call", "training")
    head = ["", "median", "spread", f"speed-up over {case['baseline']}"]
    head += [*(["plain FLOP or bytes, of the ceiling"] if share else []), *(["peak memory"] if memory else [])]
    lines = [f"**{case['case']}**", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in case["contenders"]:
        name = f"**{row['name']}**" if row.get("ours") else row["name"]
        if "seconds" not in row:
            lines.append(f"| {name} | {row['why_not']} |" + " |" * (len(head) - 2))
            continue
        # The baseline may not have run; and what leaves out most of the work is no faster way to do it.
        speedup = f"{row['speedup']:.2f}" if "speedup" in row and _same_work(row) else ""
        unsteady = " (unsteady)" if row["spread"] > UNSTEADY else ""
        cells = [name, _seconds(row["seconds"]), f"{row['spread']:.0%}{unsteady}", speedup]
        if share:
            cells.append(f"{_share(report, case, row):.0%}" if _comparable(row) else "")
        if memory:
            cells.append(f"{row['peak_bytes'] / 2**20:.0f} MiB" if row.get("peak_bytes") is not None else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _same_work(row: dict[str, Any]) -> bool:
    """Whether it does the case's work, and not the sampler's part of it alone."""
    return "without the network" not in row["name"]


def _comparable(row: dict[str, Any]) -> bool:
    """Whether it does the case's floating-point operations: not another network's, nor none."""
    return _same_work(row) and "another network" not in row["name"]


def _share(report: dict[str, Any], case: dict[str, Any], row: dict[str, Any]) -> float:
    """Of the measured copy bandwidth, or of the best convolution or matrix rate in the contender's precision."""
    measured = case.get("ceilings", report["ceilings"])
    if case["bytes"]:
        return case["bytes"] / row["seconds"] / measured["copy_bytes_per_second"]
    dtype = "bfloat16" if "bfloat16" in row["name"] else "float32"
    best = max(v for k, v in measured.items() if k.startswith(dtype))
    return case["flops"] / row["seconds"] / best


def _seconds(value: float) -> str:
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if value >= s), ("us", 1e-6))
    return f"{value / scale:.3g} {unit}"


def update(path: str | os.PathLike[str], report: dict[str, Any]) -> int:
    """Put tables where a Markdown file asks for them: between ``<!-- bench: call kernel -->`` and ``<!-- /bench -->``.

    Returns:
        How many such places there are.
    """
    text, count = _MARKED.subn(
        lambda m: m[1] + tables(report, m["groups"].split()) + m[3], Path(path).read_text(encoding="utf-8")
    )
    write_text(Path(path), text)
    return count


def plot(report: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """A PNG: for each case, how many times as fast as its baseline each contender is, on a logarithmic axis."""
    from berdiff_fast.imaging import figures

    figures.require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    # What leaves out most of the work would squeeze the rest into a corner; the tables have it.
    cases = [(c, [r for r in c["contenders"] if "speedup" in r and _same_work(r)]) for c in report["cases"]]
    cases = [(c, rows) for c, rows in cases if rows]
    heights = [len(rows) + 1.5 for _, rows in cases]
    figure = Figure(figsize=(9, 0.28 * sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(cases), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axis, (case, rows) in zip(axes, cases, strict=True):
        speedups = [row["speedup"] for row in rows]
        colours = ["tab:blue" if row.get("ours") else "0.65" for row in rows]
        axis.barh(range(len(rows)), speedups, color=colours)
        axis.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
        axis.invert_yaxis()
        axis.set_xscale("log")
        low, high = min(speedups), max(speedups)
        axis.set_xlim(min(1.0, low) / 1.3, max(high, 1.0) * 1.6)
        axis.axvline(1.0, color="0.3", linewidth=0.8)
        axis.set_title(case["case"], fontsize=9, loc="left")
        for i, row in enumerate(rows):
            label = f" {row['speedup']:.3g}x   {_seconds(row['seconds'])}"
            axis.text(row["speedup"] * math.exp(0.02), i, label, va="center", fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.tick_params(axis="x", labelsize=7)
    axes[-1].set_xlabel("times as fast as the baseline (of the same turns)", fontsize=8)
    figure.savefig(path, dpi=150)
