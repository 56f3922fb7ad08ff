# SPDX-License-Identifier: Apache-2.0
"""Many scans: from folders and lists, by any number of processes, stopped anywhere, with bad ones among them."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scans import small_model, write_series

from berdiff_fast import cli
from berdiff_fast.imaging.volumes import Volume
from berdiff_fast.imaging.volumes import write as write_volume
from berdiff_fast.scans.cases import cases_of, read_list
from berdiff_fast.scans.result_files import read_summary
from berdiff_fast.scans.share import Share


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return small_model(tmp_path_factory.mktemp("model") / "small.safetensors", size=(16, 16))


def scan(k: int, slices: int = 2) -> Volume:
    array = np.random.default_rng(k).integers(-1000, 200, (slices, 20, 18)).astype(np.int16)
    return Volume(array, spacing=(0.7, 0.8, 2.5), origin=(k, 0.0, 5.0))


def make(folder: Path, count: int, bad: tuple[int, ...] = ()) -> Path:
    folder.mkdir()
    for k in range(count):
        path = folder / f"case{k:02d}.nii.gz"
        if k in bad:
            path.write_bytes(b"nothing that is a scan" * (k + 1))
        else:
            write_volume(path, scan(k).array, scan(k))
    return folder


def words(model: Path, source: Path, output: Path, *more: str) -> list[str]:
    options = ["--model", str(model), "--output", str(output), "-n", "3", "--steps", "2", "--quiet", *more]
    return ["sample", str(source), *options]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def table(output: Path) -> list[dict[str, str]]:
    with (output / "cohort.csv").open(newline="") as file:
        return [*csv.DictReader(file)]


# ---------------------------------------------------------------------- what is done, and what is left


def test_each_case_is_as_it_is_by_itself(model, tmp_path, capsys):
    source = make(tmp_path / "in", 3)
    assert cli.main(words(model, source, tmp_path / "all", "--report")) == 0
    assert cli.main(words(model, source / "case01.nii.gz", tmp_path / "one", "--report")) == 0
    together, alone = contents(tmp_path / "all" / "case01"), contents(tmp_path / "one")
    assert together.keys() == alone.keys() and len(alone) == 3 + 2 + 2
    differing = {name for name in alone if alone[name] != together[name]}
    assert differing <= {"summary.json", "report.html"}  # which say what the cohort asked for
    rows = table(tmp_path / "all")
    assert [(row["case"], row["status"], row["masks"]) for row in rows] == [
        (f"case0{k}", "done", "3") for k in range(3)
    ]
    page = (tmp_path / "all" / "index.html").read_text()
    assert all(f'href="case0{k}/report.html"' in page for k in range(3)) and "3 cases: 3 done" in page


def test_a_bad_case_is_a_line(model, tmp_path, capsys):
    source = make(tmp_path / "in", 4, bad=(1,))
    assert cli.main([word for word in words(model, source, tmp_path / "out") if word != "--quiet"]) == 1
    said = capsys.readouterr().out
    assert "3 of 4 cases done, 1 failed" in said and "failed: case01: " in said
    rows = table(tmp_path / "out")
    assert [row["status"] for row in rows] == ["done", "failed", "done", "done"]
    assert "case01.nii.gz" in rows[1]["error"] and not rows[0]["error"]
    assert not (tmp_path / "out" / "case01").exists()
    before = contents(tmp_path / "out")
    assert cli.main(words(model, source, tmp_path / "out")) == 1  # nothing new
    assert contents(tmp_path / "out") == before
    write_volume(source / "case01.nii.gz", scan(1).array, scan(1))  # mended
    assert cli.main(words(model, source, tmp_path / "out")) == 0
    assert [row["status"] for row in table(tmp_path / "out")] == ["done"] * 4
    after = contents(tmp_path / "out")
    assert {name: after[name] for name in before if "/" in name and not name.startswith(".")} == {
        name: data for name, data in before.items() if "/" in name and not name.startswith(".")
    }
    assert not (tmp_path / "out" / ".failed").exists()


def start(command: list[str], rank: int = 0, count: int = 1) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(count)}
    return subprocess.Popen(
        [sys.executable, "-m", "berdiff_fast.cli", *command],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_forty_scans_three_bad_one_process_killed(model, tmp_path):
    """Two processes, one killed at a random moment; after the second run every good case is there, once and whole."""
    source = make(tmp_path / "in", 40, bad=(4, 17, 39))
    assert cli.main(words(model, source, tmp_path / "undisturbed")) == 1
    expected = contents(tmp_path / "undisturbed")
    output = tmp_path / "out"
    first, second = (start(words(model, source, output), rank, 2) for rank in (0, 1))
    few = random.SystemRandom().randint(1, 12)
    deadline = time.monotonic() + 120
    while len([*output.glob("*/summary.json")]) < few and time.monotonic() < deadline:
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert second.wait(timeout=300) == 1
    done = {path.parent.name: path.stat().st_mtime_ns for path in output.glob("*/summary.json")}
    assert cli.main(words(model, source, output)) == 1
    again = {path.parent.name: path.stat().st_mtime_ns for path in output.glob("*/summary.json")}
    assert {name: again[name] for name in done} == done, "a case was drawn twice"
    assert contents(output) == expected
    assert sum(row["status"] == "done" for row in table(output)) == 37


#: Where a process is killed: (module, function, and whether after it or as it is about to replace a file).
MOMENTS = {
    "results in place, folder still locked": ("berdiff_fast.scans.results", "install", "after"),
    "a failure about to be told": ("berdiff_fast.scans.cohort", "line", "after"),
    "a failure told": ("berdiff_fast.scans.cohort", "append_text", "after"),
    "table beside its place": ("berdiff_fast.scans.cohort", "write_text", "within"),
    "page beside its place": ("berdiff_fast.imaging.index", "write_text", "within"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_bad_moment(model, tmp_path, moment):
    """Whatever a killed process was about, the next run leaves the files of an undisturbed one, and no other."""
    source = make(tmp_path / "in", 3, bad=(1,))
    assert cli.main(words(model, source, tmp_path / "undisturbed")) == 1
    where, name, when = MOMENTS[moment]
    program = (
        f"import {where} as module, os, signal, sys\n"
        "from berdiff_fast import files\n"
        f"do = module.{name}\n"
        "def die(*a):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "def replaced(*a, **k):\n"
        f"    files.keep_mode = {'die' if when == 'within' else 'files.keep_mode'}\n"
        "    do(*a, **k)\n"
        "    die()\n"
        f"module.{name} = replaced\n"
        "from berdiff_fast import cli\n"
        "cli.main(sys.argv[1:])\n"
    )
    output = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", program, *words(model, source, output)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert cli.main(words(model, source, output)) == 1
    assert contents(output) == contents(tmp_path / "undisturbed")
    assert not [*output.glob("*/.unfinished")] and not [*output.glob(".[ci]*")]


def test_the_same_by_one_two_and_four_processes(model, tmp_path):
    source = make(tmp_path / "in", 9, bad=(2,))
    found = []
    for count in (1, 2, 4):
        output = tmp_path / f"by{count}"
        running = [start(words(model, source, output, "--report"), rank, count) for rank in range(count)]
        assert [process.wait(timeout=300) for process in running] == [1] * count
        found.append(contents(output))
    assert found[0] == found[1] == found[2]
    assert [row["status"] for row in table(tmp_path / "by4")].count("done") == 8


def test_what_was_drawn_otherwise_is_not_mixed_in(model, tmp_path, capsys):
    source, output = make(tmp_path / "in", 2), tmp_path / "out"
    assert cli.main(words(model, source, output)) == 0
    before = contents(output)
    for more in (["--seed", "1"], ["--method", "ddpm"], ["--slices", "0", "1"], ["--model", "phantom64"]):
        assert cli.main(words(model, source, output, *more)) == 1
        assert "holds results that were drawn otherwise" in capsys.readouterr().err
    assert contents(output) == before
    assert cli.main(words(model, source, output, "--seed", "1", "--overwrite")) == 0
    assert contents(output) != before


def test_the_disk_is_full(model, tmp_path, monkeypatch, capsys):
    """That is no fault of a case: the run ends."""
    from berdiff_fast.scans import cohort

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cohort, "sample_case", full)
    assert cli.main(words(model, make(tmp_path / "in", 2), tmp_path / "out")) == 1
    assert "No space left" in capsys.readouterr().err
    assert not [*(tmp_path / "out").rglob("*.txt")]


# ---------------------------------------------------------------------- which cases there are


def test_a_list_says_where(model, tmp_path):
    make(tmp_path / "in", 3)
    write_volume(tmp_path / "in" / "reader.nii.gz", scan(1).array > 100, scan(1))
    (tmp_path / "list.csv").write_text(
        "case,files,center,slices,raters\n"
        "left,in/case00.nii.gz,8 7,0 1,\n"
        "right,in/case00.nii.gz,12 9.5,,\n"
        "\n"
        "read,in/case01.nii.gz,,,in/reader.nii.gz; in/reader.nii.gz\n"
    )
    output = tmp_path / "out"
    assert cli.main(words(model, tmp_path / "list.csv", output)) == 0
    rows = {row["case"]: row for row in table(output)}
    assert [*rows] == ["left", "right", "read"] and rows["read"]["ged"] and not rows["left"]["ged"]
    assert read_summary(output / "left")["slices"] == [0, 1]
    assert read_summary(output / "right")["tiles"] == [[4, 2]]
    assert read_summary(output / "read")["raters"]["count"] == 2


def test_names_as_people_give_them(model, tmp_path):
    """No spreadsheet takes one for a formula, and links lead to where reports are."""
    make(tmp_path / "in", 1)
    (tmp_path / "list.csv").write_text("case,files\n=1+1 50%,in/case00.nii.gz\n")
    output = tmp_path / "out"
    assert cli.main(words(model, tmp_path / "list.csv", output, "--report")) == 0
    assert [row["case"] for row in table(output)] == ["'=1+1 50%"]
    assert 'href="%3D1%2B1%2050%25/report.html"' in (output / "index.html").read_text()
    assert (output / "=1+1 50%" / "report.html").is_file()


def test_a_case_keeps_what_it_does_not_say_itself(model, tmp_path):
    """A center of its own is instead of the command's roi, and says nothing of slices."""
    make(tmp_path / "in", 1)
    (tmp_path / "list.csv").write_text("case,files,center,slices\na,in/case00.nii.gz,8 7,\nb,in/case00.nii.gz,,0 1\n")
    output = tmp_path / "out"
    more = ["--slices", "1", "2", "--roi", "2", "18", "1", "17"]
    assert cli.main(words(model, tmp_path / "list.csv", output, *more)) == 0
    found = {name: read_summary(output / name) for name in ("a", "b")}
    assert (found["a"]["slices"], found["b"]["slices"]) == ([1, 2], [0, 1])
    assert (found["a"]["tiles"], found["b"]["tiles"]) == ([[0, -1]], [[2, 1]])


def test_results_among_the_scans_are_no_scans(model, tmp_path):
    source = make(tmp_path / "in", 2)
    assert cli.main(words(model, source / "case00.nii.gz", source / "one")) == 0
    for _ in range(2):
        assert cli.main(words(model, source, source / "out")) == 0
    assert [row["case"] for row in table(source / "out")] == ["case00", "case01"]


def test_colour_pictures_are_cases_of_a_model_of_colours(tmp_path):
    for k in range(2):
        (tmp_path / f"p{k}.png").write_bytes(b"")
    (tmp_path / "scan.nii.gz").write_bytes(b"")
    for names in (None, ("R", "G", "B")):
        assert [case.name for case in cases_of([str(tmp_path)], 3, names)] == ["p0", "p1"]
        assert len(cases_of([str(tmp_path / "p0.png"), str(tmp_path / "p1.png")], 3, names)) == 2
    assert cases_of([str(tmp_path / "p0.png")], 3, ("R", "G", "B")) is None
    assert cases_of([str(tmp_path / f"p{k}.png") for k in range(2)], 2, ("a", "b")) is None


def test_folders_of_series_are_cases(model, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "in" / name / "study" / "series").mkdir(parents=True)
        write_series(tmp_path / "in" / name / "study" / "series", scan(ord(name)))
    assert cli.main(words(model, tmp_path / "in", tmp_path / "out")) == 0
    assert [row["case"] for row in table(tmp_path / "out")] == ["a", "b"]
    # A folder with a series is a scan, not a cohort.
    assert cases_of([str(tmp_path / "in" / "a" / "study" / "series")], 1, None) is None


def test_several_inputs_are_several_cases(tmp_path):
    make(tmp_path / "in", 2)
    named = [str(tmp_path / "in" / f"case0{k}.nii.gz") for k in range(2)]
    assert [case.name for case in cases_of(named, 1, None)] == ["case00", "case01"]
    assert cases_of(named, 2, ["t1", "t2"]) is None  # the channels of one
    assert [case.name for case in cases_of([str(tmp_path / "in")], 2, ["t1", "t2"]) or []] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must name columns"),
        ("case,files\n", "lists no case"),
        ("case,files\n\n\n", "lists no case"),
        ("case\na\n", "lacks files"),
        ("files\na\n", "lacks case"),
        ("case,files,centre\na,b,1 2\n", "has 'centre'"),
        ("case,files,files\na,b,c\n", "repeats a name"),
        ("case,files\na\n", "line 2: must have 2 columns, got 1"),
        ("case,files,center\na,b,1\n", "line 2: center must be 2 numbers"),
        ("case,files,center\na,b,1 x\n", "line 2: center must be 2 numbers"),
        ("case,files,roi\na,b,1 2 3\n", "line 2: roi must be 4 whole numbers"),
        ("case,files,slices\na,b,1.5 2\n", "line 2: slices must be 2 whole numbers"),
        ("case,files,center,roi\na,b,1 2,1 2 3 4\n", "line 2: center, center_mm and roi exclude each other"),
        ("case,files\n,b\n", "line 2: case must not be empty"),
        ("case,files\na,\n", "line 2: files must not be empty"),
        ("case,files\na,b\nA,c\n", "there is the case A twice"),
        ("case,files\na/b,c\n", "is no name that a folder can have"),
        ("case,files\n..,c\n", "may not begin with a point"),
        ("case,files\n.failed,c\n", "may not begin with a point"),
        ("case,files\ncohort.csv,c\n", "may not be called cohort.csv"),
        ('case,files\na,"b\n', "must be CSV"),
    ],
)
def test_bad_lists(tmp_path, model, capsys, text, message):
    path = tmp_path / "list.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match="input") as raised:
        read_list(path)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert cli.main(words(model, path, tmp_path / "out")) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_other_bad_cohorts(tmp_path, model, capsys):
    source = make(tmp_path / "in", 2)
    write_volume(source / "case00.nii", scan(0).array, scan(0))  # as case00.nii.gz
    output = tmp_path / "out"

    def refused(message: str, *arguments: str) -> None:
        assert cli.main([*words(model, *arguments[:1], output), *arguments[1:]]) == 1
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1 and not output.exists(), said

    refused("there is the case case00 twice", source)
    (source / "case00.nii").unlink()
    refused("a list (CSV) has a column raters", source, "--raters", str(source / "case00.nii.gz"))
    refused("a list (CSV) has a column series", source, "--series", "1.2.3")
    refused("cases would be named after files", source, "--anonymize")
    refused("there is no file", tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes(b"case,files\n\xe9,b\n")
    refused("must be a text file in UTF-8", tmp_path / "latin.csv")
    (tmp_path / "l.csv").write_text("case,files\na,in/case00.nii.gz\n")
    refused("must be the only input", tmp_path / "l.csv", str(source / "case00.nii.gz"))
    output.write_text("a file")
    assert cli.main(words(model, source, output)) == 1
    assert "output must be a folder" in capsys.readouterr().err and output.read_text() == "a file"
    output.unlink()
    (output / "cohort.csv").mkdir(parents=True)
    assert cli.main(words(model, source, output)) == 1
    assert "is a folder, and a file is to have its name" in capsys.readouterr().err


def test_the_results_of_one_scan_are_no_cohort(tmp_path, model, capsys):
    source = make(tmp_path / "in", 2)
    assert cli.main(words(model, source / "case00.nii.gz", tmp_path / "out")) == 0
    assert cli.main(words(model, source, tmp_path / "out")) == 1
    assert "holds the results of one scan" in capsys.readouterr().err


# ---------------------------------------------------------------------- who does what


def test_every_case_is_somebodys_own():
    things = [*range(11)]
    for count in (1, 2, 3, 5, 16):
        shares = [Share(rank, count) for rank in range(count)]
        assert sorted(x for share in shares for x in share.own(things)) == things
        for share in shares:
            assert sorted([*share.own(things), *share.others(things)]) == things


def test_launchers():
    assert Share.of({}) == Share(0, 1, 0)
    assert Share.of({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == Share(2, 4, 1)
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_STEP": "2"}
    assert Share.of({**array, "SLURM_ARRAY_TASK_COUNT": "5"}) == Share(2, 5, 0)
    step = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
    assert Share.of(step) == Share(3, 4, 1)
    # An array of jobs of four processes each: a number for each process, no two alike.
    array["SLURM_ARRAY_TASK_COUNT"] = "5"
    jobs = [{**array, **step, "SLURM_ARRAY_TASK_ID": str(3 + 2 * j)} for j in range(5)]
    both = [Share.of({**job, "SLURM_PROCID": str(p)}) for job in jobs for p in range(4)]
    assert sorted(share.rank for share in both) == [*range(20)] and {share.count for share in both} == {20}
    assert Share.of({"WORLD_SIZE": "many"}) == Share(0, 1, 0)
    assert os.environ.get("WORLD_SIZE") is None
