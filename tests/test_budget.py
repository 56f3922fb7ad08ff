# SPDX-License-Identifier: Apache-2.0
"""The budget of a sampling step, counted again: it may only fall (benchmarks/budget.py)."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton", reason="the budget is of the Triton kernels")

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "budget.py"
spec = importlib.util.spec_from_file_location("budget", PATH)
budget = sys.modules["budget"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(budget)


@pytest.fixture(scope="module")
def found():
    return budget.count()


@pytest.fixture(scope="module")
def record():
    return json.loads(budget.RECORD.read_text(encoding="utf-8"))


def test_a_step_costs_no_more_than_recorded(found, record):
    assert (
        set(found) == set(record) == {f"{name}, {form}" for name in ("published", "lidc-v1") for form in budget.FORMS}
    )
    worse = budget.exceeded(found, record)
    assert not worse, "\n".join([*worse, "the budget may only fall"])


@pytest.mark.parametrize("what", ["kernels", "flop", "bytes"])
@pytest.mark.parametrize("name", ["published, prepared", "lidc-v1, prepared"])
def test_one_more_is_found(found, name, what):
    record = copy.deepcopy(found)
    assert not budget.exceeded(found, record)
    record[name][what] -= 1
    (line,) = budget.exceeded(found, record)
    assert line.startswith(f"{name}: ") and f" {what}, " in line
    record[name][what] += 2
    assert not budget.exceeded(found, record)


def test_the_page_shows_the_record(record):
    text = budget.PAGE.read_text(encoding="utf-8")
    assert budget.on_page(text, record) == text, "run: python benchmarks/budget.py --update"
    with pytest.raises(ValueError, match="<!-- budget -->"):
        budget.on_page("no place", record)


def test_parts_add_up(found):
    for of_network in found.values():
        for what in ("kernels", "flop", "bytes"):
            assert of_network[what] == sum(part[what] for part in of_network["of"].values())
        for gpu in budget.GPUS:
            total = sum(part["estimated_ms"][gpu] for part in of_network["of"].values())
            assert of_network["estimated_ms"][gpu] == pytest.approx(total, abs=0.001 * len(of_network["of"]))


def test_the_published_network_multiplies_what_it_is_said_to(found):
    # 132 GFLOP a mask (bench/baselines.py); the image's own path and the transposed convolutions save some of them.
    plain = found["published, prepared"]["plain, ideally fused"]["flop"]
    assert plain / budget.MASKS == pytest.approx(132e9, rel=0.01)
    assert 0.9 * plain < found["published, prepared"]["flop"] < plain


# ---------------------------------------------------------------------- the counter itself


def meta(*shape, dtype=torch.bfloat16):
    x = torch.empty(*shape, dtype=dtype, device="meta")
    return x.to(memory_format=torch.channels_last) if len(shape) == 4 else x


def counted(function):
    with torch.no_grad(), budget.Counter(budget.OPERATIONS) as counter:
        function()
    return [(w.kind, w.bytes, w.flop) for w in counter.work]


def test_a_convolution_by_hand():
    x, weight, bias = meta(2, 16, 8, 8), meta(32, 16, 3, 3), meta(32)
    out = 2 * 32 * 8 * 8
    work = (budget.CONVOLUTION, 2 * (x.numel() + weight.numel() + out), 2 * out * 16 * 9)
    assert counted(lambda: F.conv2d(x, weight, padding=1)) == [work]
    assert counted(lambda: F.conv2d(x, weight, bias, padding=1)) == [work, (budget.BIAS, 2 * (32 + 2 * out), 0)]


def test_a_transposed_convolution_by_hand():
    x, weight = meta(2, 16, 8, 8), meta(16, 24, 4, 4)
    out = 2 * 24 * 16 * 16
    # Of 4 x 4 taps an output sees 2 x 2.
    expected = (budget.TRANSPOSED, 2 * (x.numel() + weight.numel() + out), 2 * out * 16 * 4)
    assert counted(lambda: F.conv_transpose2d(x, weight, stride=2, padding=1)) == [expected]


def test_products_by_hand():
    a, b, c = meta(64, 16), meta(16, 8), meta(64, 8)
    flop = 2 * 64 * 16 * 8
    assert counted(lambda: a @ b) == [(budget.LINEAR, 2 * (64 * 16 + 16 * 8 + 64 * 8), flop)]
    # Added to what is there: read and written.
    assert counted(lambda: c.addmm_(a, b)) == [(budget.LINEAR, 2 * (64 * 16 + 16 * 8 + 2 * 64 * 8), flop)]


def test_attention_by_hand():
    q = k = v = meta(2, 3, 64, 32).contiguous()
    ((kind, size, flop),) = counted(lambda: F.scaled_dot_product_attention(q, k, v))
    assert (kind, size, flop) == (budget.ATTENTION, 4 * 2 * q.numel(), 2 * 2 * 2 * 3 * 64 * 64 * 32)


def test_a_norm_reads_twice_and_writes_once():
    from berdiff_fast import ops

    x, vector = meta(2, 64, 32, 32), meta(64, dtype=torch.float32)
    work = counted(lambda: ops.group_norm_silu(x, vector, vector, 8))
    assert [kind for kind, _, _ in work] == [budget.SUMS, budget.FACTORS, budget.APPLY]
    assert sum(size for _, size, _ in work) == pytest.approx(3 * 2 * x.numel(), rel=0.05)
    # What is not channels last is copied.
    copy_, *_ = counted(lambda: ops.group_norm_silu(x.contiguous(), vector, vector, 8))
    assert copy_ == (budget.OTHER, 2 * 2 * x.numel(), 0)


def test_views_and_allocations_are_free_and_what_is_expanded_is_read_once():
    x, row = meta(2, 16, 8, 8), meta(1, 16, 8, 8)
    assert not counted(lambda: torch.empty_like(x).movedim(1, -1).flatten(0, 2)[3:].view(-1))
    assert counted(lambda: x.add_(row.expand(2, -1, -1, -1))) == [
        (budget.RESIDUAL, 2 * (2 * x.numel() + row.numel()), 0)
    ]


def test_what_is_not_known_is_not_counted_as_nothing():
    with pytest.raises(budget.UnknownOperationError, match=r"aten::cumsum.*OPERATIONS"):
        counted(lambda: meta(4, 4).cumsum(0))
    from berdiff_fast.backends.triton.loss import diffusion_loss_value_kernel

    with pytest.raises(budget.UnknownOperationError, match=r"diffusion_loss_value_kernel.*LAUNCHES"):
        counted(lambda: diffusion_loss_value_kernel[(1,)](meta(1), meta(1), 1, BLOCK=128))


def test_a_kernel_is_counted_by_the_launch(monkeypatch):
    from berdiff_fast.backends.triton.loss import diffusion_loss_value_kernel

    seen = []
    rule = budget.once(budget.OTHER, lambda given: seen.append(given) or 6)
    monkeypatch.setitem(budget.LAUNCHES, "diffusion_loss_value_kernel", rule)
    x = meta(7)
    assert counted(lambda: diffusion_loss_value_kernel[(1,)](meta(1), x, 3, BLOCK=128)) == [(budget.OTHER, 2 * 8, 6)]
    assert seen[0]["chunks_per_row"] == 3 and seen[0]["partial"] is x and seen[0]["BLOCK"] == 128
    assert counted(lambda: diffusion_loss_value_kernel[(1,)](x, x, 3, BLOCK=128)) == [(budget.OTHER, 2 * 7, 6)]
