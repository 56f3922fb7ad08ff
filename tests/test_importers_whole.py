# SPDX-License-Identifier: Apache-2.0
"""Imports are whole or not at all, and the command."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from import_trees import (
    by_path,
    first,
    left,
    pictures,
    plain_tree,
    slices_tree,
)

from berdiff_fast import cli
from berdiff_fast.data.importers import import_tree, layouts, writing

# ---------------------------------------------------------------------- whole or not at all


@pytest.fixture(params=["fresh", "overwrite"])
def earlier(request, tree, out):
    """Options, and a check that everything is as it was before."""
    slices_tree(tree, pictures())
    if request.param == "overwrite":
        import_tree(tree, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()} if out.exists() else None

    def check() -> None:
        assert left(out) == ([] if before is None else ["out"])
        assert before is None or {path.name: path.read_bytes() for path in out.iterdir()} == before

    return {"overwrite": True, "seed": 8} if before is not None else {}, check


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("method", ["append", "finish"])
def test_interrupted(error, method, earlier, tree, out, monkeypatch):
    options, unchanged = earlier
    original = getattr(writing.Writer, method)
    calls = []

    def fail(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2 or method == "finish":
            raise error
        return original(*arguments)

    monkeypatch.setattr(writing.Writer, method, fail)
    with pytest.raises(type(error)):
        import_tree(tree, out, **options)
    unchanged()


def test_interrupted_when_it_takes_its_place(earlier, tree, out, monkeypatch):
    options, unchanged = earlier
    rename = os.rename

    def fail(source: Any, target: Any) -> None:
        if Path(source).name == "new":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(writing.os, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        import_tree(tree, out, **options)
    unchanged()


def test_the_disk_is_full(earlier, tree, out):
    """A real failure to write, which HDF5 does not survive: it would crash when it closes the file."""
    resource = pytest.importorskip("resource")
    options, unchanged = earlier
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for limit in (10, 3000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(OSError) as caught:
                import_tree(tree, out, **options)
            assert caught.value.errno == errno.EFBIG
            unchanged()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    import_tree(tree, out, **options)


def test_ctrl_c_within_hdf5(earlier, tree, out, monkeypatch):
    """The signal comes while HDF5 calls back; it is heard when HDF5 is done."""
    options, unchanged = earlier
    write, calls = writing._Disk.write, []

    def pressed(self: Any, data: Any) -> int:
        calls.append(len(data))
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return write(self, data)

    monkeypatch.setattr(writing._Disk, "write", pressed)
    # A process that a script started in the background ignores the signal, and so would this one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            import_tree(tree, out, **options)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    unchanged()


def test_in_a_thread(tree, out):
    slices_tree(tree, pictures())
    thread = threading.Thread(target=import_tree, args=(tree, out))
    thread.start()
    thread.join()
    assert len(by_path(out)) == 4


# ---------------------------------------------------------------------- the command


def test_command(tree, out, capsys):
    slices_tree(tree, pictures())
    first(tree).write_text("x")
    arguments = ["import", str(tree), str(out)]
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err == (
        "berdiff-fast import: P-01/nodule-0/images/slice-0.png: cannot be read: not a PNG, JPEG or TIFF\n"
    )
    assert captured.out == "" and left(out) == []
    assert cli.main([*arguments, "--on-error", "skip", "--split", "100/0/0"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""  # no progress bar, since this is no terminal
    for line in (
        "layout    slices: P-01/nodule-0 holds images and mask-0",
        "slices    12 x 10, 4 raters",
        "train     3 slices of 2 patients; empty masks by rater: 0, 0, 0, 3",
        "note      val has no slices, and no file",
        "  P-01/nodule-0/images/slice-0.png: cannot be read: not a PNG, JPEG or TIFF",
        f"written   {out}",
    ):
        assert line in captured.out.splitlines()
    assert cli.main(arguments) == 1
    assert (
        capsys.readouterr().err
        == f"berdiff-fast import: output: {out} exists and is not empty; pass overwrite=True (--overwrite) to "
        "replace it\n"
    )


def test_command_options(tree, out, capsys):
    plain_tree(tree, {k: (v[0].astype(np.int16) * 8 - 1000, v[1]) for k, v in pictures().items()}, ".npy")
    options = ["--layout", "plain", "--window", "-1000", "400", "--size", "6", "8", "--crop", "--rater-count", "5"]
    options += ["--missing-mask", "empty", "--seed", "2", "--split", "50/25/25", "--no-preview", "--json"]
    options += ["--threshold", "0.4", "--patient-pattern", r"(?P<patient>P-\d+)_n(?P<nodule>\d)_(?P<slice>\d)"]
    assert cli.main(["import", str(tree), str(out), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["raters"] == 5 and report["size"] == [6, 8] and report["layout"] == "plain"
    given = {"window": [-1000.0, 400.0], "fit": "crop", "seed": 2, "split": [50, 25, 25], "threshold": 0.4}
    assert given.items() <= report["parameters"].items()
    assert not (out / "preview.png").exists()
    assert cli.main(["import", str(tree), str(out), "--overwrite", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_command_interrupted(tree, out, capsys, monkeypatch):
    slices_tree(tree, pictures())

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing.Writer, "append", interrupt)
    assert cli.main(["import", str(tree), str(out)]) == 130
    assert capsys.readouterr().err == "interrupted\n" and left(out) == []


def test_command_help(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["import", "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for word in (*(f"  {name}" for name in layouts.LAYOUTS), "examples:", "--split-file", "docs/data.md"):
        assert word in text
    for layout in layouts.LAYOUTS.values():
        assert layout.shape in text


def test_what_does_not_reach_the_disk_is_read_back(tmp_path):
    resource = pytest.importorskip("resource")
    disk = writing._Disk(tmp_path / "file", "w+")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        assert disk.write(b"0123456789abcdef") == 16 and disk.error is not None and disk.tell() == 16
        disk.seek(12)
        assert disk.write(b"XY") == 2 and disk.tell() == 14
        disk.seek(8)
        found = bytearray(10)
        assert disk.readinto(found) == 10 and found == b"89abXYef" + bytes(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    disk.close()
