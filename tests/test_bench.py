# SPDX-License-Identifier: Apache-2.0
"""The benchmark suite: wrong results are not timed, turns are fair, tables come from the JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from support import Toy

import berdiff_fast as bf
from berdiff_fast import cli
from berdiff_fast.bench import baselines, cases, report, single_ops
from berdiff_fast.bench.runner import Case, Contender, Settings, run


def toy_case(*contenders: Contender | tuple[str, str]) -> Case:
    return Case("toy", "kernel", lambda: iter(contenders), "slow", "things", 3, bytes=100)


def passing(name: str, run=lambda: None, **options) -> Contender:
    return Contender(name, run, lambda: None, **options)


def failing(message: str):
    def gate():
        raise AssertionError(message)

    return gate


def test_what_is_wrong_is_not_timed():
    ran = []
    result = run(
        toy_case(
            passing("slow"),
            Contender("wrong", lambda: ran.append("wrong"), failing("off by one")),
            Contender("broken", lambda: 1 / 0, lambda: None),
            ("absent", "it is not installed"),
        ),
        Settings(rounds=3),
        progress=False,
    )
    rows = {row["name"]: row for row in result.contenders}
    assert not ran and rows["wrong"]["why_not"] == "wrong result, not timed: off by one"
    assert rows["broken"]["why_not"].startswith("ZeroDivisionError")
    assert rows["absent"]["why_not"] == "it is not installed"
    assert rows["slow"]["speedup"] == 1.0 and rows["slow"]["turns"] == 3


def test_turns():
    order: list[str] = []
    run(
        toy_case(*(passing(n, lambda n=n: order.append(n)) for n in ("slow", "b", "c"))),
        Settings(rounds=4),
        progress=False,
    )
    warm, turns = order[:3], [order[i : i + 3] for i in range(3, 15, 3)]
    assert warm == ["slow", "b", "c"] and all(sorted(t) == ["b", "c", "slow"] for t in turns)
    assert [t[0] for t in turns] == ["slow", "b", "c", "slow"], "each is first in turn"


def test_some_contenders():
    told = []
    settings = Settings(rounds=1, contenders=["fast", "abs"])
    case = toy_case(passing("slow"), passing("b"), passing("faster"), ("absent", "why"))
    result = run(case, settings, progress=False, timed=lambda r: told.append([c["name"] for c in r.contenders]))
    assert told == [["slow", "faster", "absent"]] and "seconds" in result.contenders[1]


@pytest.mark.parametrize("prediction", ["epsilon", "y_0"])
def test_baselines_draw_the_same_masks(prediction):
    """Given the contract's random numbers, what plain PyTorch computes are our masks."""
    model = bf.BerDiff(Toy(), prediction=prediction)
    img = torch.randn(1, 1, 24, 20, generator=torch.Generator().manual_seed(0))
    taus = model.schedule.subsequence(10)
    expected = bf.sample(model, img, 5, taus, seed=3)[0]
    for sampler in (baselines.one_after_another, baselines.batched):
        masks = sampler(
            model, img, 5, taus, model.schedule, predicts_y0=prediction == "y_0", draw=baselines.as_contracted(3)
        )
        assert (masks.bool() != expected).float().mean() < 1e-3
        assert sampler(model, img, 5, taus, model.schedule).unique().tolist() == [0.0, 1.0]


def test_the_command_and_its_tables(tmp_path, monkeypatch, capsys):
    """The cheapest real case, from the command line to the table in a document."""
    monkeypatch.setattr("berdiff_fast.bench.ceilings.measure", lambda device: {"copy_bytes_per_second": 1e10})
    assert cli.main(["bench", "--quick", "--only", "metrics", "--output", str(tmp_path / "out")]) == 0
    measured = json.loads((tmp_path / "out" / "bench.json").read_text())
    (case,) = measured["cases"]
    assert case["group"] == "metrics" and all(row["seconds"] > 0 for row in case["contenders"])
    assert "GED and HM-IoU" in (tmp_path / "out" / "bench.md").read_text()
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")

    document = tmp_path / "d.md"
    document.write_text("before\n<!-- bench: metrics -->\nold\n<!-- /bench -->\nafter\n")
    source = ["--from", str(tmp_path / "out" / "bench.json"), "--update", str(document)]
    assert cli.main(["bench", *source]) == 0
    text = document.read_text()
    assert text.startswith("before\n<!-- bench: metrics -->\n") and text.endswith("<!-- /bench -->\nafter\n")
    assert "old" not in text and "| **ours** |" in text
    document.write_text("nothing")
    capsys.readouterr()
    assert cli.main(["bench", *source]) == 1
    assert "has no place for a table" in capsys.readouterr().err
    assert cli.main(["bench", "--only", "nonsense"]) == 1
    assert "no case has one of ['nonsense']" in capsys.readouterr().err


def test_tables_tell_what_was_not_timed():
    row = {"name": "x", "why_not": "no such thing"}
    text = report._table({"ceilings": {}}, {"case": "c", "baseline": "b", "flops": 0, "bytes": 0, "contenders": [row]})
    assert "| x | no such thing |" in text


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_registry(device):
    """Cases are built without work, on a machine without the device too."""
    quick, full = (cases.registry(device, quick=q) for q in (True, False))
    assert {c.name for c in quick} <= {c.name for c in full}
    assert {c.group for c in full} >= {"kernel", "loss", "metrics", "training", "call"}
    published = next(c for c in full if c.group == "call" and "published" in c.name)
    with torch.device("meta"):
        network = bf.UNet(**baselines.PUBLISHED)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(85.6e6, rel=1e-3)
    assert published.flops / published.amount == pytest.approx(132e9 * (10 if device == "cuda" else 2), rel=0.02)


def test_peak_memory_is_that_of_a_run():
    """64 MiB that a run allocates and frees are seen; 64 that were there before are not."""
    there = torch.ones(2**24)
    result = run(
        toy_case(passing("slow"), passing("hungry", lambda: torch.ones(2**24) * there.sum())),
        Settings(rounds=1),
        progress=False,
    )
    slow, hungry = (row["peak_bytes"] for row in result.contenders)
    if slow is None:
        pytest.skip("this system does not tell the peak of a process's memory")
    assert slow < 2**24 and 2**26 <= hungry < 2**26 + 2**24 + 2**26


def test_training_steps_agree():
    """The published recipe and ours have the same gradients; so the gate passes, and fails for another loss."""
    contenders = {c.name: c for c in cases.training.case("cpu").contenders()}
    plain = {"plain PyTorch, two forwards (published)", "plain PyTorch, one forward"}
    assert set(contenders) == {*plain, "ours", "ours, channels last"}
    for contender in contenders.values():
        contender.gate()
    step = contenders["ours"].run.func
    step.model.schedule = bf.NoiseSchedule("linear")
    with pytest.raises(AssertionError, match="off by"):
        contenders["ours"].gate()


@pytest.mark.parametrize("ratio", [1.0, 1.4, 1.6])
def test_regressions_are_ratios(pytester, ratio, monkeypatch):
    """A machine that is twice as fast changes nothing; a case that became slower than the rest does."""
    unit = f"{single_ops.cases()[0].name}: {single_ops.UNIT}"
    conftest = Path(__file__).parents[1] / "benchmarks" / "conftest.py"
    pytester.makeconftest(conftest.read_text())
    pytester.makepyfile(
        test_it=f"""
        import time, pytest
        @pytest.mark.parametrize("seconds", [pytest.param(0.01, id={unit!r}), pytest.param(0.02, id="other")])
        def test_case(benchmark, seconds):
            benchmark.pedantic(time.sleep, (seconds,), rounds=3)
        """
    )
    times = {f"test_case[{unit}]": 0.005, "test_case[other]": 0.01 / ratio}
    cases = [{"name": name, "stats": {"min": least}} for name, least in times.items()]
    Path("before.json").write_text(json.dumps({"benchmarks": cases}))
    # Beside xdist, which these tests themselves may run under, nothing is timed.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    quiet = ("-p", "no:cacheprovider", "-p", "no:xdist")
    result = pytester.runpytest_subprocess("--benchmark-only", "--baseline=before.json", *quiet)
    assert result.ret == (1 if ratio > 1.5 else 0)
    result.stdout.fnmatch_lines(["*  other*" + ("SLOWER" if ratio > 1.5 else "")])


def test_cases_can_be_added_to_a_run(tmp_path, monkeypatch):
    """Those of the same name are measured again; another machine's are not kept."""
    monkeypatch.setattr(report.ceilings, "measure", lambda device: {"copy_bytes_per_second": 1e9})
    path, settings = tmp_path / "bench.json", Settings(rounds=1)
    cases_ = [Case(name, "kernel", lambda: iter([passing("slow")]), "slow") for name in ("a", "b")]
    first = report.measure(cases_, settings, path, progress=False)
    monkeypatch.setattr(report.ceilings, "measure", lambda device: {"copy_bytes_per_second": 2e9})
    second = report.measure(cases_[1:], settings, path, former=first, progress=False)
    assert [(c["case"], c.get("ceilings")) for c in second["cases"]] == [("a", first["ceilings"]), ("b", None)]
    assert second == json.loads(path.read_text()) and second["ceilings"] == {"copy_bytes_per_second": 2e9}
    with pytest.raises(ValueError, match="append: .* is of another machine, date"):
        report.measure(cases_, settings, path, former={**first, "date": "2020-01-01"}, progress=False)


@pytest.mark.parametrize("case", single_ops.cases(), ids=lambda case: case.name)
def test_single_ops(case):
    """Each passes its gate, is timed on one thread, by as many calls as it says, inside its context."""
    before, inside = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        only = [c for c in case.contenders() if isinstance(c, Contender)]
        counted = [dataclasses.replace(c, run=lambda: inside.append(torch.get_num_threads())) for c in only]
        result = run(dataclasses.replace(case, contenders=lambda: iter(counted)), Settings(rounds=1), progress=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert case.baseline in {row["name"] for row in result.contenders}
    assert all("seconds" in row for row in result.contenders), result.contenders
    assert inside == [1] * (len(only) * (case.calls + 1))


def test_a_contender_runs_inside_its_context():
    from berdiff_fast.backends import cpp

    found = []
    contender = passing("portable", lambda: found.append(cpp.isa()))
    contender.context = lambda: cpp.use_isa("portable")
    run(toy_case(passing("slow"), contender), Settings(rounds=1), progress=False)
    assert found == ["portable", "portable"]


def test_rows_that_may_not_be_compared_say_so():
    """A spread over a half is named; what leaves the network out is not said to be thousands of times as fast."""
    row = {"seconds": 1e-3, "spread": 7.98, "speedup": 4799.0}
    case = {"case": "c", "baseline": "b", "flops": 0, "bytes": 0}
    case["contenders"] = [{"name": "ours, without the network", **row}, {"name": "ours", **row, "spread": 0.5}]
    without, ours = report._table({"ceilings": {}}, case).splitlines()[-2:]
    assert "798% (unsteady)" in without and "4799" not in without
    assert "unsteady" not in ours and "4799.00" in ours
