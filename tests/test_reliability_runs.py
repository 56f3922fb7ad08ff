# SPDX-License-Identifier: Apache-2.0
"""Runs and their folders: one at a time, nothing written through links, and what was damaged meanwhile drawn again."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scans import bright, small_model
from support import ENVIRONMENT, phantom_file, threads

from berdiff_fast import cli, locks, scans
from berdiff_fast.data import importers
from berdiff_fast.files import whole_file
from berdiff_fast.scans import result_files, results
from berdiff_fast.scans.store import Store


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("model") / "small.safetensors", size=(16, 16))


@pytest.fixture
def scan_path(tmp_path):
    array = np.random.default_rng(3).integers(0, 255, (4, 16, 16), dtype=np.uint8)
    np.save(tmp_path / "in.npy", array)
    return tmp_path / "in.npy"


def sample(path, model_path, output, *more):
    fixed = ["--model", model_path, "-n", 3, "--steps", 4, "--spacing", "trailing", "--quiet"]
    return cli.main(["sample", *map(str, (path, *fixed, "--output", output, *more))])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


#: Holds the lock of a folder (and file) until its input ends.
HOLDER = """
import sys
from pathlib import Path
from berdiff_fast import locks
file = Path(sys.argv[2]) if len(sys.argv) > 2 else None
with locks.exclusive(Path(sys.argv[1]), file):
    print("held", flush=True)
    sys.stdin.read()
"""


class Holder:
    def __init__(self, *paths: Path) -> None:
        words = [sys.executable, "-c", HOLDER, *map(str, paths)]
        self.process = subprocess.Popen(
            words, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout.readline() == "held\n"

    def __enter__(self) -> int:
        return self.process.pid

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


# ---------------------------------------------------------------------- the lock itself


def test_a_lock_says_who_holds_it_and_dies_with_its_process(tmp_path):
    holder = Holder(tmp_path)
    said = rf"another run is at work in {re.escape(str(tmp_path))} \(process {holder.process.pid} on .+, since 20\d\d-"
    with pytest.raises(locks.BusyError, match=said), locks.exclusive(tmp_path):
        pass
    holder.kill()
    assert (tmp_path / locks.NAME).exists(), "a killed process removes nothing"
    with locks.exclusive(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_is_of_a_thread_and_not_of_forked_children(tmp_path):
    found = []

    def other() -> None:
        try:
            with locks.exclusive(tmp_path):
                found.append("had it")
        except locks.BusyError as error:
            found.append(str(error))

    with locks.exclusive(tmp_path):
        with locks.exclusive(tmp_path):  # the thread that has it may ask again
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(found) == 1 and "another thread of this process" in found[0]
        if not (child := os.fork()):  # a worker that outlives us must not keep it
            try:
                with locks.exclusive(tmp_path):
                    os._exit(1)
            except locks.BusyError:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    other()
    assert found[1:] == ["had it"] and not list(tmp_path.iterdir())


def test_many_processes_take_turns(tmp_path):
    """Each adds one to a number in a file, unlocked but for the folder's lock; the file of the lock comes and goes."""
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom berdiff_fast import locks\n"
        "folder = Path(sys.argv[1])\n"
        "for _ in range(40):\n"
        "    while True:\n"
        "        try:\n"
        "            with locks.exclusive(folder):\n"
        "                count = int((folder.parent / 'count').read_text())\n"
        "                (folder.parent / 'count').write_text(str(count + 1))\n"
        "            break\n"
        "        except locks.BusyError:\n"
        "            time.sleep(0.0005)\n"
    )
    (tmp_path / "count").write_text("0")
    (tmp_path / "folder").mkdir()
    started = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "folder")], env=ENVIRONMENT) for _ in range(3)
    ]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "120"


# ---------------------------------------------------------------------- two runs, one folder


def test_a_second_sample_is_refused_and_touches_nothing(tmp_path, scan_path, model_path, capsys, monkeypatch):
    out = tmp_path / "out"
    real, before = Store.put, {}

    def put(self, *arguments):  # the second run comes while the first is at work
        real(self, *arguments)
        if len(self.done) == 2:
            before.update(tree(out))
            words = [sys.executable, "-m", "berdiff_fast.cli", "sample", scan_path, "--output", out, "--quiet"]
            words += ["--model", model_path, "-n", 3, "--steps", 4, "--seed", 1, "--overwrite"]
            second = subprocess.run([*map(str, words)], env=ENVIRONMENT, capture_output=True, text=True)
            assert second.returncode == 1 and second.stderr.count("\n") == 1
            assert f"another run is at work in {out / results.WORK} (process {os.getpid()} on " in second.stderr
            assert tree(out) == before

    monkeypatch.setattr(Store, "put", put)
    assert sample(scan_path, model_path, out) == 0
    assert before and not (out / results.WORK).exists()
    monkeypatch.setattr(Store, "put", real)
    assert sample(scan_path, model_path, tmp_path / "alone") == 0
    assert tree(out) == tree(tmp_path / "alone")


def test_a_second_sample_volume_is_refused(tmp_path):
    array = np.zeros((2, 16, 16), np.uint8)
    with Holder(tmp_path), pytest.raises(locks.BusyError, match="another run is at work"):
        scans.sample_volume(bright(), array, 2, 2, work=tmp_path)
    scans.sample_volume(bright(), array, 2, 2, work=tmp_path)


def test_masks_that_are_in_use_do_not_change(tmp_path):
    """Another call with the same folder begins with files of its own: the former's masks lie in the old ones."""
    array = np.random.default_rng(3).integers(0, 255, (3, 16, 16), dtype=np.uint8)
    first = scans.sample_volume(bright(), array, 9, 3, work=tmp_path)
    masks = first.masks
    scans.sample_volume(bright(), array, 2, 3, seed=9, work=tmp_path)
    assert np.array_equal(first.masks, masks)


def test_a_second_import_is_refused(tmp_path):
    for kind in ("images", "masks_0"):
        (tmp_path / "tree" / kind).mkdir(parents=True)
        for k in range(2):
            Image.fromarray(np.full((8, 8), 255 * (k % 2), np.uint8)).save(tmp_path / "tree" / kind / f"p{k}_1.png")
    out = tmp_path / "out"
    with Holder(out, tmp_path / ".out.lock"):
        with pytest.raises(locks.BusyError, match="another run is at work in"):
            importers.import_tree(tmp_path / "tree", out, split=(100, 0, 0), preview=False)
        assert not out.exists()
    importers.import_tree(tmp_path / "tree", out, split=(100, 0, 0), preview=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tree"]


TRAINING = ["--channel-mult", "1", "--patch-size", "4", "--norm-groups", "8", "--attention-resolutions"]
TRAINING += ["--batch-size", "4", "--warmup", "1", "--no-tensorboard", "--device", "cpu", "--steps", "2"]


def train(output, data, *more):
    return cli.main(["train", "--train-data", str(data), "--output", str(output), *TRAINING, *more])


def test_a_second_training_is_refused_and_touches_nothing(tmp_path, capsys):
    pytest.importorskip("accelerate")
    data, out = phantom_file(tmp_path / "data.h5", 0, 8), tmp_path / "run"
    out.mkdir()
    with Holder(out) as pid:
        before = tree(out)
        assert train(out, data) == 1
        err = capsys.readouterr().err
        assert f"another run is at work in {out} (process {pid} on " in err and err.count("\n") == 1
        assert tree(out) == before
    assert train(out, data) == 0
    assert locks.NAME not in os.listdir(out)


# ---------------------------------------------------------------------- an unfinished folder that was damaged

N, SLICES = 9, 4


@pytest.fixture(scope="module")
def interrupted():
    """An array, a model, and its masks."""
    array = np.random.default_rng(5).integers(0, 255, (SLICES, 24, 24), dtype=np.uint8)
    return array, bright(), scans.sample_volume(bright(), array, N, 3, seed=5).masks


def draw(interrupted, work, **options):
    array, model, _ = interrupted
    return scans.sample_volume(model, array, N, 3, seed=5, work=work, **options)


def flip(path: Path, at: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(bytes(data))


def header_as(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data and len(old) == len(new)
    path.write_bytes(data.replace(old, new))


DAMAGE = {
    "bits cut short": lambda w: os.truncate(w / "bits.npy", 200),
    "bits cut by one": lambda w: os.truncate(w / "bits.npy", (w / "bits.npy").stat().st_size - 1),
    "bits too long": lambda w: (w / "bits.npy").write_bytes((w / "bits.npy").read_bytes() + b"\0"),
    "bits empty": lambda w: (w / "bits.npy").write_bytes(b""),
    "bits gone": lambda w: (w / "bits.npy").unlink(),
    "bits of another shape": lambda w: np.save(w / "bits.npy", np.zeros((2, 24, 24, SLICES), np.uint8)),
    "bits of another dtype": lambda w: np.save(w / "bits.npy", np.zeros((2, SLICES, 24, 24), np.int8)),
    "bits in Fortran's order": lambda w: header_as(
        w / "bits.npy", b"'fortran_order': False,", b"'fortran_order': True, "
    ),
    "a header of junk": lambda w: header_as(w / "bits.npy", b"'descr'", b"'desc\xff'"),
    "one bit of a slice": lambda w: flip(w / "bits.npy", -(2 * 24 * 24), 4),
    "a digit of a slice in done": lambda w: header_as(w / "done", b"\n1 ", b"\n7 "),
    "a slice listed that is another": lambda w: header_as(w / "done", b"\n1 ", b"\n3 "),
    "a digit of a checksum": lambda w: flip(w / "done", -3),
    "done without checksums": lambda w: (w / "done").write_text("0\n1\n2\n3\n"),
    "done of junk": lambda w: (w / "done").write_bytes(b"\xff\xfe\n\n99999999999999999999 0\n-1 0\n"),
    "done cut short": lambda w: os.truncate(w / "done", (w / "done").stat().st_size - 5),
    "done gone": lambda w: (w / "done").unlink(),
    "plan damaged": lambda w: flip(w / "plan.json", 30, 128),
    "plan gone": lambda w: (w / "plan.json").unlink(),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_was_damaged_is_drawn_again(tmp_path, interrupted, what):
    draw(interrupted, tmp_path)
    DAMAGE[what](tmp_path)
    assert np.array_equal(draw(interrupted, tmp_path).masks, interrupted[2])
    assert np.array_equal(draw(interrupted, tmp_path).masks, interrupted[2]), "and is as if nothing had been"


def test_every_bit_of_the_masks_counts(tmp_path, interrupted):
    """Any one of them; the slices that are whole are not drawn again, and a warning says how many are."""
    draw(interrupted, tmp_path)
    file, whole = tmp_path / "bits.npy", (tmp_path / "bits.npy").read_bytes()
    start = len(whole) - 2 * SLICES * 24 * 24
    for at in np.random.default_rng(0).integers(start, len(whole), 25):
        flip(file, int(at), 1 << int(at % 8))
        store = Store(tmp_path, (tmp_path / "plan.json").read_text(), (2, SLICES, 24, 24), 0)
        assert len(store.done) == SLICES - 1
        assert np.array_equal(draw(interrupted, tmp_path).masks, interrupted[2])
        assert file.read_bytes() == whole


def test_damage_is_told_and_whole_slices_are_kept(tmp_path, interrupted, caplog):
    draw(interrupted, tmp_path)
    flip(tmp_path / "bits.npy", -1)
    _, model, masks = interrupted
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    with caplog.at_level(logging.WARNING, "berdiff_fast"):
        assert np.array_equal(draw(interrupted, tmp_path).masks, masks)
    handle.remove()
    assert "1 slices are not as they were left, and are drawn again" in caplog.text
    assert len(calls) == 3, "one slice, in three steps"


def test_bits_outside_the_slices_that_are_sampled_are_no_masks(tmp_path, interrupted):
    draw(interrupted, tmp_path, slices=(1, 3))
    flip(tmp_path / "bits.npy", -1)  # of slice 3
    masks = draw(interrupted, tmp_path, slices=(1, 3)).masks
    assert not masks[:, [0, 3]].any() and np.array_equal(masks[:, 1:3], interrupted[2][:, 1:3])


# ---------------------------------------------------------------------- links that somebody planted

PLANTED = ["bits.npy", "done", "plan.json", "results", locks.NAME]


def keep_unfinished(scan_path, model_path, out, monkeypatch):
    """A run that is interrupted after two slices."""
    real = Store.put

    def put(self, *arguments):
        real(self, *arguments)
        if len(self.done) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", put)
        assert sample(scan_path, model_path, out) == 130


@pytest.mark.parametrize("kind", ["symbolic", "hard", "dangling", "folder"])
@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("resumed", [False, True])
def test_nothing_in_the_unfinished_folder_is_written_through_a_link(
    tmp_path, scan_path, model_path, name, kind, resumed, monkeypatch
):
    out, work = tmp_path / "out", tmp_path / "out" / results.WORK
    (tmp_path / "home" / "folder").mkdir(parents=True)
    thesis = tmp_path / "home" / "thesis.txt"
    thesis.write_text("precious")
    (tmp_path / "home" / "folder" / "letter").write_text("dear")
    before = tree(tmp_path / "home")
    if resumed:
        keep_unfinished(scan_path, model_path, out, monkeypatch)
        result_files.remove(work / name)
    else:
        work.mkdir(parents=True)
    if kind == "hard":
        os.link(thesis, work / name)
    else:
        target = {"symbolic": thesis, "dangling": tmp_path / "home" / "new", "folder": tmp_path / "home" / "folder"}
        (work / name).symlink_to(target[kind])
    status = sample(scan_path, model_path, out)
    assert tree(tmp_path / "home") == before
    if status == 0:
        assert sample(scan_path, model_path, tmp_path / "alone") == 0
        assert tree(out) == tree(tmp_path / "alone")
    else:
        assert name == locks.NAME


def test_an_unfinished_folder_that_is_a_link_is_refused(tmp_path, scan_path, model_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "out" / results.WORK).symlink_to(tmp_path / "home")
    assert sample(scan_path, model_path, tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert "is a symbolic link, and nothing is written through it" in err and err.count("\n") == 1
    assert not list((tmp_path / "home").iterdir()) and os.listdir(tmp_path / "out") == [results.WORK]


@pytest.mark.parametrize("name", ["mask_000.npy", "mean.npy", "summary.json", "report.html"])
def test_results_take_the_place_of_links(tmp_path, scan_path, model_path, name, capsys):
    """Not without being told to; and then what the link points to stays as it was."""
    out, thesis = tmp_path / "out", tmp_path / "thesis.txt"
    assert sample(scan_path, model_path, out, "--report") == 0
    whole = tree(out)
    thesis.write_bytes(whole[name])
    (out / name).unlink()
    (out / name).symlink_to(thesis)
    assert sample(scan_path, model_path, out, "--report") == 1
    assert sample(scan_path, model_path, out, "--report", "--seed", 1, "--overwrite") == 0
    assert thesis.read_bytes() == whole[name] and not (out / name).is_symlink()
    (out / "report.html").unlink()
    (out / "report.html").symlink_to(thesis)
    assert cli.main(["report", str(out)]) == 0
    assert thesis.read_bytes() == whole[name] and not (out / "report.html").is_symlink()


@pytest.mark.parametrize("name", ["config.yaml", "log.jsonl", "model.safetensors", locks.NAME])
@pytest.mark.parametrize("hard", [False, True])
def test_training_writes_through_no_link(tmp_path, name, hard, capsys):
    pytest.importorskip("accelerate")
    data, out, thesis = phantom_file(tmp_path / "data.h5", 0, 8), tmp_path / "run", tmp_path / "thesis.txt"
    out.mkdir()
    thesis.write_text("precious")
    os.link(thesis, out / name) if hard else (out / name).symlink_to(thesis)
    assert train(out, data) == (name == locks.NAME)
    assert thesis.read_text() == "precious"


@pytest.mark.parametrize("name", ["checkpoints", "previews", "tensorboard"])
def test_training_fills_no_linked_folder(tmp_path, name, capsys):
    pytest.importorskip("accelerate")
    data, out = phantom_file(tmp_path / "data.h5", 0, 8), tmp_path / "run"
    out.mkdir()
    (tmp_path / "home").mkdir()
    (out / name).symlink_to(tmp_path / "home")
    assert train(out, data) == 1
    assert f"{out / name} is a symbolic link" in capsys.readouterr().err
    assert not list((tmp_path / "home").iterdir()) and os.listdir(out) == [name]


def test_a_name_that_the_user_gave_may_be_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with whole_file(tmp_path / "link") as new:
        new.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    with whole_file(tmp_path / "link", follow=False) as new:
        new.write_text("newer")
    assert not (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


# ---------------------------------------------------------------------- summaries that are none


def forged(**changes):
    return lambda summary: {**summary, **changes}


FORGED = {
    "a file of the user's": forged(masks=["mine.txt"]),
    "a number": forged(masks=[1]),
    "a path": forged(masks=["../mask_000.npy"]),
    "null": forged(masks=None),
    "no masks": forged(masks=[]),
    "a text": forged(masks="mask_000.npy"),
    "mean": forged(mean="mine.txt"),
    "entropy": forged(entropy={}),
    "segmentations": forged(segmentations=["mine.txt"]),
    "segmentations null": forged(segmentations=None),
    "input": forged(input=3),
    "series": forged(series=[1]),
    "a list": lambda summary: [summary],
    "nested": lambda summary: json.loads("[" * 400 + "]" * 400),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_summary_is_refused_before_any_work(tmp_path, scan_path, model_path, what, capsys):
    out = tmp_path / "out"
    assert sample(scan_path, model_path, out) == 0
    (out / "mine.txt").write_text("mine")
    summary = json.loads((out / "summary.json").read_text())
    (out / "summary.json").write_text(json.dumps(FORGED[what](summary)))
    before = tree(out)
    for words in (["sample", scan_path, "--model", model_path, "--output", out, "--overwrite"], ["report", out]):
        assert cli.main([*map(str, words)]) == 1
        err = capsys.readouterr().err
        assert f"{out / 'summary.json'} is not of results" in err and err.count("\n") == 1
        assert tree(out) == before


def test_a_summary_nested_beyond_what_can_be_read(tmp_path, scan_path, model_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.json").write_text("[" * 200_000)
    assert sample(scan_path, model_path, tmp_path / "out", "--overwrite") == 1
    assert "is not of results" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mean.npy", "mask_002.npy", "report.html"])
def test_a_folder_with_the_name_of_a_result(tmp_path, scan_path, model_path, name, capsys):
    """The former results stay whole when the new ones could not take all places."""
    out = tmp_path / "out"
    assert sample(scan_path, model_path, out) == 0
    (out / name).unlink(missing_ok=True)
    (out / name).mkdir()
    before = tree(out)
    assert sample(scan_path, model_path, out, "--overwrite", "--report", "--seed", 1) == 1
    assert f"{out / name} is a folder" in capsys.readouterr().err and tree(out) == before


def test_the_former_summary_stays_until_its_replacement_is_whole(tmp_path, scan_path, model_path, monkeypatch, capsys):
    """Whatever fails while the new results are made, down to their last file, the old ones are as they were."""
    out = tmp_path / "out"
    assert sample(scan_path, model_path, out) == 0
    before = tree(out)
    for name in ("sync", "keep_mode"):
        with monkeypatch.context() as patch:

            def full(*_):
                raise OSError(28, "No space left on device")

            patch.setattr(result_files, name, full)
            assert sample(scan_path, model_path, out, "--overwrite", "--seed", 1) == 1
        assert "No space left" in capsys.readouterr().err
        assert {k: v for k, v in tree(out).items() if not k.startswith(results.WORK)} == before
    assert sample(scan_path, model_path, out, "--overwrite", "--seed", 1) == 0
    assert sample(scan_path, model_path, tmp_path / "alone", "--seed", 1) == 0
    assert tree(out) == tree(tmp_path / "alone")
