# SPDX-License-Identifier: Apache-2.0
"""The registry's cases for a CPU under pytest-benchmark, but whole calls and training steps.

    make bench
    pytest benchmarks --benchmark-only --baseline benchmarks/results/cpu-avx512-2026-11-26.json

Every contender passes its gate before it is timed. Whole calls and steps take minutes: ``berdiff-fast bench``.
"""

from __future__ import annotations

import pytest

from berdiff_fast.bench import cases
from berdiff_fast.bench.runner import Contender


def contenders():
    for case in cases.registry("cpu", quick=True, compile=False):
        if case.group in ("call", "training"):
            continue
        for contender in case.contenders():
            if isinstance(contender, Contender):
                yield pytest.param(case, contender, id=f"{case.name}: {contender.name}")


@pytest.mark.parametrize(("case", "contender"), contenders())
def test_case(benchmark, case, contender):
    benchmark.group = case.name
    with case.on_its_threads(), contender.context():
        contender.gate()
        benchmark(contender.run)
