# SPDX-License-Identifier: Apache-2.0
"""Chunks of HDF5 files: a warning where reading slice by slice unpacks many, and files written anew."""

from __future__ import annotations

import logging
from pathlib import Path

import h5py
import numpy as np
import pytest
from import_trees import pictures, plain_tree
from support import phantom_file

from berdiff_fast import cli
from berdiff_fast.data.chunking import slices_unpacked
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.data.importers import import_tree
from berdiff_fast.data.rechunking import rechunk

COUNT, SIZE = 32, 32


@pytest.fixture
def plain(tmp_path) -> Path:
    return phantom_file(tmp_path / "plain.h5", 0, COUNT)


def cut(plain: Path, path: Path, chunks: int | bool, compression: str | None = "gzip") -> Path:
    """The slices of ``plain`` in chunks of so many; True: as h5py cuts them."""
    with h5py.File(plain) as source, h5py.File(path, "w") as target:
        for name in source:
            data = source[name][()]
            if name not in ("image", "mask"):
                target[name] = data
                continue
            shape = chunks if chunks is True else (chunks, *data.shape[1:])
            target.create_dataset(name, data=data, chunks=shape, compression=compression)
        target.attrs["pixel_spacing"] = [0.5, 0.7]
    return path


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if "unpacks" in r.getMessage()]


@pytest.mark.parametrize(
    ("shape", "chunks", "wanted"),
    [
        ((32, 30, 30), (1, 30, 30), 1),
        ((32, 30, 30), (8, 30, 30), 8),
        ((32, 30, 30), (8, 10, 15), 8),
        ((32, 30, 30), (8, 16, 16), 8 * 32**2 / 30**2),  # a chunk at the edge is unpacked whole, too
        ((32, 4, 30, 30), (2, 1, 30, 30), 2),
        ((32, 4, 30, 30), (2, 3, 30, 30), 3),
    ],
)
def test_what_is_unpacked(tmp_path, shape, chunks, wanted):
    """Against the chunks that hold a pixel of slice 5, one by one."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset("d", shape, np.uint8, chunks=chunks, compression="gzip")
        pixels = np.stack(np.meshgrid(*(np.arange(n) for n in shape[1:]), indexing="ij"), -1).reshape(
            -1, len(shape) - 1
        )
        touched = np.unique(pixels // np.array(chunks[1:]), axis=0)
        assert len(touched) * np.prod(chunks) / np.prod(shape[1:]) == pytest.approx(wanted)
        assert slices_unpacked(data) == pytest.approx(wanted)
        assert slices_unpacked(file.create_dataset("e", shape, np.uint8, chunks=chunks)) == 1, "nothing is packed"
        assert slices_unpacked(file.create_dataset("f", shape, np.uint8)) == 1


def test_a_warning_once(plain, tmp_path, caplog):
    path = cut(plain, tmp_path / "a.h5", 16)
    with caplog.at_level(logging.WARNING, "berdiff_fast"):
        for _ in range(3):
            RaterDataset(path)
    (said,) = warnings(caplog)
    assert said.startswith(f"{path}: each slice that is read unpacks 16 of 'image' and 16 of 'mask'")
    assert "berdiff_fast.data.rechunking.rechunk(path, output)" in said and "--in-memory" in said


@pytest.mark.parametrize("layout", ["1", "4", "not packed", "in memory", "contiguous"])
def test_no_warning(plain, tmp_path, caplog, layout):
    path = plain
    if layout != "contiguous":
        path = cut(plain, tmp_path / "a.h5", int(layout) if layout in "14" else 16, None if "not" in layout else "gzip")
    with caplog.at_level(logging.WARNING, "berdiff_fast"):
        data = RaterDataset(path, in_memory=layout == "in memory")
    assert not warnings(caplog) and len(data) == COUNT


def test_the_commands_warn(plain, tmp_path, caplog, capsys):
    pytest.importorskip("accelerate")
    train, val = cut(plain, tmp_path / "t.h5", True), tmp_path / "v.h5"
    cut(phantom_file(tmp_path / "other.h5", 100, COUNT), val, 32)
    words = ["--train-data", str(train), "--val-data", str(val), "--output", str(tmp_path / "run"), "--device", "cpu"]
    words += ["--steps", "1", "--batch-size", "2", "--channel-mult", "1", "--patch-size", "4", "--norm-groups", "8"]
    words += ["--attention-resolutions", "--no-tensorboard", "--quiet", "--validation-slices", "2"]
    with caplog.at_level(logging.WARNING, "berdiff_fast"):
        assert cli.main(["train", *words]) == 0
        assert not warnings(caplog), "both are read at once"
        (tmp_path / "run" / "model.safetensors").rename(tmp_path / "m.safetensors")
        assert cli.main(["train", *words, "--no-in-memory", "--output", str(tmp_path / "again")]) == 0
        assert [said.partition(":")[0] for said in warnings(caplog)] == [str(train), str(val)]
        caplog.clear()
        anew = cut(plain, tmp_path / "e.h5", 32)
        evaluate = ["evaluate", "--model", str(tmp_path / "m.safetensors"), "--data", str(anew), "--device", "cpu"]
        assert cli.main([*evaluate, "--n", "1", "--steps", "1", "--output", str(tmp_path / "results")]) == 0
        assert [said.partition(":")[0] for said in warnings(caplog)] == [str(anew)]


@pytest.mark.parametrize("chunks", [16, True])
def test_a_file_written_anew_says_the_same(plain, tmp_path, caplog, chunks):
    path = cut(plain, tmp_path / "a.h5", chunks)
    with h5py.File(path, "a") as file:
        file["image"].attrs["unit"] = "HU"
        file.create_group("more")["notes"] = np.arange(3)
        file["ignore"] = np.zeros((COUNT, SIZE, SIZE), np.uint8)
    assert rechunk(path, tmp_path / "b.h5") == tmp_path / "b.h5"
    caplog.clear()
    with caplog.at_level(logging.WARNING, "berdiff_fast"):
        one, other = RaterDataset(path, in_memory=True), RaterDataset(tmp_path / "b.h5")
    assert not warnings(caplog)
    for mine, theirs in zip(one.whole(), other.whole(), strict=True):
        assert np.array_equal(mine, theirs)
    assert one.pixel_spacing == other.pixel_spacing == (0.5, 0.7)
    with h5py.File(path) as a, h5py.File(tmp_path / "b.h5") as b:
        assert set(a) == set(b) and b["image"].attrs["unit"] == "HU" and b["more/notes"][2] == 2
        assert b["image"].chunks == (1, SIZE, SIZE) and b["mask"].chunks == (1, 4, SIZE, SIZE)
        assert b["image"].dtype == a["image"].dtype and b["patient_id"].dtype == a["patient_id"].dtype


def test_files_that_are_not_written_anew(plain, tmp_path):
    (tmp_path / "text.h5").write_text("no HDF5")
    with h5py.File(tmp_path / "empty.h5", "w") as file:
        file["image"] = np.zeros((2, 8, 8))
    with h5py.File(tmp_path / "bad.h5", "w") as file, h5py.File(plain) as source:
        file["image"], file["mask"] = source["image"][()], np.full((COUNT, 4, SIZE, 8), 1)
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["image"] = h5py.ExternalLink(str(plain), "image")
        file["mask"] = h5py.ExternalLink(str(plain), "mask")
    cases = {
        "nowhere.h5": (FileNotFoundError, "there is no file"),
        "text.h5": (ValueError, "text.h5 cannot be read as HDF5"),
        "empty.h5": (ValueError, "has no dataset 'mask'"),
        "bad.h5": (ValueError, "does not fit image"),
        "link.h5": (ValueError, "is a link into another file"),
    }
    for name, (error, words) in cases.items():
        with pytest.raises(error, match=words):
            rechunk(tmp_path / name, tmp_path / "b.h5")
    with pytest.raises(FileExistsError, match=r"output: .*plain.h5 is there already"):
        rechunk(plain, plain)
    assert not (tmp_path / "b.h5").exists() and not list(tmp_path.glob(".*")) and len(RaterDataset(plain)) == COUNT


def test_a_damaged_chunk_leaves_nothing(plain, tmp_path):
    path = cut(plain, tmp_path / "a.h5", 16)
    with h5py.File(path) as file:
        at = file["mask"].id.get_chunk_info(1).byte_offset
    data = bytearray(path.read_bytes())
    data[at + 4 : at + 40] = bytes(36)
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"a.h5: mask cannot be read \(damaged\?\)"):
        rechunk(path, tmp_path / "b.h5")
    assert not (tmp_path / "b.h5").exists() and not list(tmp_path.glob(".*"))


def test_what_the_importer_writes_needs_no_warning(tmp_path, caplog):
    import_tree(plain_tree(tmp_path / "tree", pictures()), tmp_path / "out", split=(100, 0, 0), progress=False)
    with h5py.File(tmp_path / "out" / "train.h5") as file:
        assert slices_unpacked(file["image"]) == slices_unpacked(file["mask"]) == 1
