# SPDX-License-Identifier: Apache-2.0
"""The machine in every JSON, plain medians of many rounds, and a comparison with a committed run as ratios.

pytest benchmarks --benchmark-only --baseline benchmarks/results/cpu-avx512-2026-11-26.json
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import berdiff_fast
from berdiff_fast.bench import single_ops
from berdiff_fast.info import collect

#: What every time is divided by before runs are compared: torch's own work, measured in the same run.
UNIT = f"test_case[{single_ops.cases()[0].name}: {single_ops.UNIT}]"


def pytest_addoption(parser):
    parser.addoption("--baseline", metavar="JSON", help="fail where a case has become slower than in this run")
    parser.addoption("--slower", type=float, default=1.5, help="by more than this factor (default: %(default)s)")


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(collect())
    machine_info["berdiff_fast"] = berdiff_fast.__version__
    machine_info["torch_threads"] = torch.get_num_threads()


def pytest_benchmark_update_json(config, benchmarks, output_json):
    # Statistics are enough; the rounds one by one would be most of the file.
    for case in output_json["benchmarks"]:
        case["stats"].pop("data", None)
        for name in ("param", "params"):  # whole cases, as text
            case.pop(name, None)
    output_json["machine_info"].pop("node", None)


def slower(now: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    """How many times as long each case of both runs takes, in units of ``UNIT``'s time in its own run."""
    if UNIT not in now or UNIT not in before:
        raise pytest.UsageError(f"--baseline needs {UNIT} in both runs: it is what makes them comparable")
    return {
        name: (now[name] / now[UNIT]) / (before[name] / before[UNIT]) for name in now if name in before and name != UNIT
    }


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    path = session.config.getoption("--baseline")
    if not path or exitstatus or session.config.getoption("collectonly"):
        return
    run = json.loads(Path(path).read_text())
    # Least times: other work on a machine adds to the rest.
    before = {case["name"]: case["stats"]["min"] for case in run["benchmarks"]}
    now = {case.name: case.stats.min for case in session.config._benchmarksession.benchmarks if case.stats.rounds}
    session.config._ratios = ratios = slower(now, before)
    if any(ratio > session.config.getoption("--slower") for ratio in ratios.values()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    ratios = getattr(config, "_ratios", {})
    if ratios:
        terminalreporter.section("least time of a case in units of rand_like(p) < p, now over baseline")
        for name, ratio in sorted(ratios.items(), key=lambda item: -item[1]):
            flag = "  SLOWER" if ratio > config.getoption("--slower") else ""
            terminalreporter.write_line(f"{ratio:6.2f}  {name.removeprefix('test_case[').rstrip(']')}{flag}")
