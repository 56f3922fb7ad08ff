# SPDX-License-Identifier: Apache-2.0
"""The metrics on a CPU, one thread, on 4 raters and 16 samples of 128 x 128 (bool), whole Python calls.

    pytest benchmarks/test_metrics_cpu.py --benchmark-json benchmarks/results/metrics.json

Every case checks its result before it is timed. Two kinds of masks: discs that cover about a hundredth of the image, as
nodules do, most of whose tiles are empty; and noise, in which no tile is.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from berdiff_fast import metrics, ops
from berdiff_fast.backends import cpp
from berdiff_fast.bench import baselines

R, N, SIZE = 4, 16, 128


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def masks(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Raters (1, R, H, W) and samples (1, n, H, W)."""
    generator = torch.Generator().manual_seed(0)
    if kind == "noise":
        every = torch.rand(R + N, SIZE, SIZE, generator=generator) < 0.5
    else:
        centre = 60 + 8 * torch.rand(R + N, 2, 1, 1, generator=generator)
        radius = 5 + 5 * torch.rand(R + N, 1, 1, generator=generator)
        y, x = torch.arange(SIZE)[:, None], torch.arange(SIZE)
        every = (y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2 < radius**2
    return every[None, :R], every[None, R:]


def timed(benchmark, function, rounds=200, **options):
    benchmark.extra_info["pixels"] = 0  # no time per pixel is reported
    benchmark.pedantic(function, rounds=rounds, warmup_rounds=min(rounds, 20), **options)


def ours(raters: torch.Tensor, samples: torch.Tensor) -> tuple[float, float]:
    values = metrics.evaluate(raters, samples, ("ged", "hm_iou"))
    return float(values["ged"]), float(values["hm_iou"])


def published(raters: np.ndarray, samples: np.ndarray) -> tuple[float, float]:
    return baselines.ged(raters, samples), baselines.hm_iou(raters, samples)


kinds = pytest.mark.parametrize("kind", ["discs", "noise"])


@kinds
@pytest.mark.parametrize("isa", cpp.available_isas())
def test_overlap(benchmark, isa, kind):
    raters, samples = masks(kind)
    with cpp.use_isa(isa):
        assert torch.equal(ops.overlap(raters, samples), ops.overlap(raters, samples, backend="reference"))
        timed(benchmark, lambda: ops.overlap(raters, samples), rounds=2000)


@kinds
def test_ged_and_hm_iou(benchmark, kind):
    raters, samples = masks(kind)
    assert ours(raters, samples) == pytest.approx(published(raters[0].numpy(), samples[0].numpy()), abs=1e-12)
    timed(benchmark, lambda: ours(raters, samples), rounds=2000)


@kinds
def test_ged_and_hm_iou_of_eight_images(benchmark, kind):
    """As ``berdiff-fast evaluate`` calls them: what a call costs beside the counting is shared by its images."""
    raters, samples = (x.expand(8, -1, -1, -1).contiguous() for x in masks(kind))
    values = metrics.evaluate(raters, samples, ("ged", "hm_iou"))
    for name, one in zip(("ged", "hm_iou"), ours(*masks(kind)), strict=True):
        assert values[name].tolist() == pytest.approx(8 * [one], abs=1e-12)
    benchmark.extra_info["images"] = 8
    timed(benchmark, lambda: metrics.evaluate(raters, samples, ("ged", "hm_iou")), rounds=500)


@kinds
def test_ged_and_hm_iou_as_published(benchmark, kind):
    raters, samples = (x[0].numpy() for x in masks(kind))
    timed(benchmark, lambda: published(raters, samples), rounds=10)


@kinds
def test_every_metric(benchmark, kind):
    raters, samples = masks(kind)
    timed(benchmark, lambda: metrics.evaluate(raters, samples))


@kinds
def test_metrics_in_turns(benchmark, kind):
    """The published way over ours, taken in turns: what a noisy machine can still say. The median of the ratios."""
    raters, samples = masks(kind)
    arrays = raters[0].numpy(), samples[0].numpy()
    assert ours(raters, samples) == pytest.approx(published(*arrays), abs=1e-12)
    ratios = []
    for _ in range(20):
        before, middle, after = (
            seconds(lambda: ours(raters, samples), 20),
            seconds(lambda: published(*arrays), 3),
            seconds(lambda: ours(raters, samples), 20),
        )
        ratios.append(2 * middle / (before + after))
    benchmark.extra_info["ratio"] = sorted(ratios)[len(ratios) // 2]
    timed(benchmark, lambda: ours(raters, samples), rounds=20, iterations=10)


def seconds(function, calls: int) -> float:
    """The median call: another process may stop one for longer than all the others take."""
    taken = []
    for _ in range(calls):
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[calls // 2]
