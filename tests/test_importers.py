# SPDX-License-Identifier: Apache-2.0
"""Importers: every layout there and back, splits that never mix patients, bad trees refused, nothing half written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from import_trees import (
    ALL_IN_TRAIN,
    TREES,
    H,
    R,
    W,
    berdiff_tree,
    by_path,
    contents,
    pictures,
    plain_tree,
    save,
    slices_tree,
)
from PIL import Image
from support import data_path

from berdiff_fast.data import pixels
from berdiff_fast.data.importers import import_tree, split_of, trees

# ---------------------------------------------------------------------- real trees


def test_real_slices(out):
    root = data_path("trees/slices_tree")
    report = import_tree(root, out)
    assert report.layout == "slices" and report.size == (128, 128) and report.raters == 4 and not report.problems
    read = by_path(out)
    assert len(read) == sum(split.slices for split in report.splits.values()) == 57
    for path, (image, mask) in read.items():
        assert np.array_equal(image, np.asarray(Image.open(root / path)))
        for rater in range(4):
            png = np.asarray(Image.open(root / path.replace("/images/", f"/mask-{rater}/")))
            assert np.array_equal(mask[rater] * 255, png)
    for split in contents(out).values():
        for k, path in enumerate(split["path"]):
            patient, nodule, _, name = path.split("/")
            numbers = int(patient[-4:]), int(nodule.split("-")[1]), int(name.split("-")[1][:-4])
            assert (split["patient_id"][k], split["nodule"][k], split["slice"][k]) == numbers
            assert split["patient"][k] == patient


def test_real_slices_agree_with_the_data_at_hand(out):
    """The same slices, from the same public source, by way of this importer."""
    import_tree(data_path("trees/slices_tree"), out)
    ours = contents(out)["train"]
    with h5py.File(data_path("lidc/train.h5")) as file:
        keys = zip(*(file[k][()] for k in ("patient_id", "nodule", "slice")), strict=True)
        rows = {key: row for row, key in enumerate(keys)}
        matched = 0
        for k, key in enumerate(zip(*(ours[k] for k in ("patient_id", "nodule", "slice")), strict=True)):
            if row := rows.get(key):
                assert np.array_equal(file["image"][row], ours["image"][k])
                assert np.array_equal(file["mask"][row], ours["mask"][k])
                matched += 1
    assert matched > 20


def test_real_cimd(out):
    root = data_path("trees/cimd_tree")
    report = import_tree(root, out)
    assert report.layout == "cimd" and any("names no patients" in note for note in report.notes)
    read = by_path(out)
    assert len(read) == 19
    for path, (image, mask) in read.items():
        assert np.array_equal(image, np.asarray(Image.open(root / path)))
        for rater in range(4):
            jpeg = np.asarray(Image.open((root / path).parent / f"label{rater}_.jpg"))
            assert np.array_equal(mask[rater], jpeg > 127)


def test_real_masks_as_the_published_tree(tree, out):
    """No published tree is at hand; one is made of real slices."""
    rows = {}
    with h5py.File(data_path("lidc/val.h5")) as file:
        for k in range(0, 60, 10):
            p, n, s = (int(file[key][k]) for key in ("patient_id", "nodule", "slice"))
            rows[f"LIDC-IDRI-{p:04d}", n, s] = file["image"][k], file["mask"][k]
    berdiff_tree(tree, rows, lambda patient: "val")
    import_tree(tree, out)
    read = contents(out)
    assert list(read) == ["val"]
    for k, (patient, nodule) in enumerate(zip(read["val"]["patient"], read["val"]["nodule"], strict=True)):
        match = [pair for (p, n, _), pair in rows.items() if (p, n) == (patient, nodule)]
        assert any(
            np.array_equal(read["val"]["image"][k], i) and np.array_equal(read["val"]["mask"][k], m) for i, m in match
        )


def test_default_split_is_that_of_the_data_at_hand():
    for name in ("train", "val"):
        with h5py.File(data_path(f"lidc/{name}.h5")) as file:
            assert {split_of(f"LIDC-IDRI-{i:04d}") for i in set(file["patient_id"][()].tolist())} == {name}


# ---------------------------------------------------------------------- the layouts


@pytest.mark.parametrize("kind", TREES)
def test_round_trip(kind, tree, out):
    made = pictures(patients=6, slices=2)
    TREES[kind](tree, made)
    report = import_tree(tree, out)
    assert report.layout == kind and report.raters == R and report.size == (H, W)
    assert report.problems == () and report.ignored == ()
    read = contents(out)
    assert list(read) == [name for name in trees.SPLITS if report.splits[name].slices]
    found = [pair for split in read.values() for pair in zip(split["image"], split["mask"], strict=True)]
    assert len(found) == len(made)
    for image, masks in made.values():
        if kind == "cimd":  # JPEG moves grey levels, and masks must still come out
            assert any(np.array_equal(m, masks) and np.abs(i - image.astype(float)).mean() < 8 for i, m in found)
        else:
            assert sum(np.array_equal(i, image) and np.array_equal(m, masks) for i, m in found) == 1
    for name, split in read.items():
        assert split["image"].dtype == split["mask"].dtype == np.uint8
        assert {split[key].dtype for key in ("patient_id", "nodule", "slice")} == {np.dtype(np.int32)}
        assert report.splits[name].empty_masks == tuple((split["mask"].sum((2, 3)) == 0).sum(0))
        if kind != "cimd":
            assert all(split_of(patient) == name for patient in split["patient"])
            assert [int(patient[2:]) for patient in split["patient"]] == split["patient_id"].tolist()
            keys = ("patient", "nodule", "slice")
            rows = list(zip(*(split[k] for k in keys), strict=True)) if kind != "plain" else []
            assert rows == sorted(rows) and all((p, n, s) in made for p, n, s in rows)


def test_file_layout(tree, out):
    """A slice per chunk, attributes, and the report beside the data."""
    slices_tree(tree, pictures())
    report = import_tree(tree, out, seed=3)
    name = next(name for name in trees.SPLITS if report.splits[name].slices)
    with h5py.File(out / f"{name}.h5") as file:
        assert file["image"].chunks == (1, H, W) and file["mask"].chunks == (1, R, H, W)
        assert file["image"].compression == "gzip"
        assert file.attrs["format"] == 2 and file.attrs["source"] == "slices" and file.attrs["split"] == name
        assert json.loads(file.attrs["parameters"])["seed"] == 3
        assert file.attrs["berdiff_fast"] == report.berdiff_fast
    written = json.loads((out / "import.json").read_text())
    assert written == json.loads(report.to_json())
    assert written["splits"][name]["slices"] == report.splits[name].slices
    assert (out / "preview.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "import.json").stat().st_mode == (tree / "P-01").stat().st_mode & 0o666 | 0o100000


def test_the_same_bytes_again(tree, tmp_path):
    slices_tree(tree, pictures())
    for name in ("a", "b"):
        import_tree(tree, tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        if path.name != "import.json":  # which names the folder
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_clutter_is_ignored_and_named(tree, out):
    slices_tree(tree, pictures())
    (tree / ".DS_Store").write_bytes(b"")
    (tree / "README.txt").write_text("x")
    (tree / "P-01" / "nodule-0" / "notes").mkdir()
    report = import_tree(tree, out)
    assert set(report.ignored) == {"README.txt", "P-01/nodule-0/notes"} and not report.problems


def test_slices_come_in_natural_order(tree, out):
    slices_tree(tree, pictures(patients=1, nodules=1, slices=12))
    import_tree(tree, out, **ALL_IN_TRAIN)
    assert contents(out)["train"]["slice"].tolist() == list(range(12))


def test_positions_become_slice_numbers(tree, out):
    """z is a number of millimetres, possibly negative or broken: stored is its rank in the patient."""
    berdiff_tree(tree, pictures(patients=1, nodules=2, slices=3), lambda patient: "train")
    import_tree(tree, out)
    read = contents(out)["train"]
    assert read["slice"].tolist() == [0, 1, 2, 0, 1, 2] and read["nodule"].tolist() == [0, 0, 0, 1, 1, 1]
    assert "z-105.0_c0" in read["path"][0]


def test_patients_without_numbers(tree, out):
    made = {("ab"[int(p[2:]) - 1] + "-x", n, s): v for (p, n, s), v in pictures().items()}
    slices_tree(tree, made)
    report = import_tree(tree, out, **ALL_IN_TRAIN)
    read = contents(out)["train"]
    assert set(zip(read["patient"], read["patient_id"], strict=True)) == {("a-x", 0), ("b-x", 1)}
    assert any("place in sorted order" in note for note in report.notes)


@pytest.mark.parametrize(
    "pattern, patients",
    [
        (None, {"P-01", "P-02"}),
        (r"(P-\d+)_n(?P<nodule>\d+)_(?P<slice>\d+)", {"P-01", "P-02"}),
        (r"P-\d\d_n\d", {"P-01_n0", "P-01_n1", "P-02_n0", "P-02_n1"}),
        (r"P-(?P<patient>\d+)_n(?P<nodule>\d)_(?P<slice>\d+)", {"01", "02"}),
    ],
)
def test_patient_pattern(pattern, patients, tree, out):
    plain_tree(tree, pictures(slices=3))
    import_tree(tree, out, **ALL_IN_TRAIN, **({"patient_pattern": pattern} if pattern else {}))
    read = contents(out)["train"]
    assert set(read["patient"]) == patients
    if pattern and "slice" in pattern:
        assert sorted(read["slice"].tolist()) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
        assert set(read["nodule"].tolist()) == {0, 1}
    assert len(set(zip(read["patient"], read["nodule"], read["slice"], strict=True))) == 12


# ---------------------------------------------------------------------- pixels


@pytest.mark.parametrize("suffix", [".npy", ".tif", ".png"])
def test_sixteen_bits_become_eight(suffix, tree, out):
    made = pictures()
    deep = {key: (image.astype(np.uint16) * 16 + 100, masks) for key, (image, masks) in made.items()}
    plain_tree(tree, deep, suffix)
    import_tree(tree, out, **ALL_IN_TRAIN)
    for key, (image, masks) in by_path(out).items():
        p, n, s = Path(key).stem.split("_")
        x = deep[p, int(n[1:]), int(s)][0].astype(float)
        assert np.array_equal(image, np.rint(255 * (x - x.min()) / (x.max() - x.min())))
        assert np.array_equal(masks, made[p, int(n[1:]), int(s)][1])


def test_window(tree, out):
    plain_tree(tree, pictures(nodules=1), ".npy")
    hounsfield = np.linspace(-2000, 2000, H * W).reshape(H, W)
    save(tree / "images" / "P-01_n0_0.npy", hounsfield)
    report = import_tree(tree, out, window=(-1000, 400), **ALL_IN_TRAIN)
    image = by_path(out)["images/P-01_n0_0.npy"][0]
    assert np.array_equal(image, np.rint(np.clip((hounsfield + 1000) / 1400, 0, 1) * 255))
    assert report.notes[-1] == "window: 1 images of 8 bits were taken as they are"


def test_one_grey_level_is_black(tree, out):
    plain_tree(tree, pictures(nodules=1), ".npy")
    save(tree / "images" / "P-01_n0_0.npy", np.full((H, W), 7.5))
    import_tree(tree, out, **ALL_IN_TRAIN)
    assert not by_path(out)["images/P-01_n0_0.npy"][0].any()


def test_grey_in_other_clothes(tmp_path):
    """Equal channels, opaque alpha, palettes and single bits are grey all the same."""
    grey = pictures()["P-01", 0, 0][0]
    picture = Image.fromarray(grey)
    for mode in ("RGB", "RGBA", "LA"):
        picture.convert(mode).save(tmp_path / "x.png")
        assert np.array_equal(pixels.read(tmp_path / "x.png")[0], grey), mode
    palette = picture.convert("P")
    palette.save(tmp_path / "x.png")
    assert np.array_equal(pixels.read(tmp_path / "x.png")[0], grey)
    bits = Image.fromarray(grey > 99)
    bits.save(tmp_path / "x.png")
    assert np.array_equal(pixels.to_mask(*pixels.read(tmp_path / "x.png"), None), grey > 99)


@pytest.mark.parametrize("top, dtype", [(1, bool), (1, "uint8"), (255, "uint8"), (65535, "uint16"), (1, "float32")])
def test_masks_of_two_values(top, dtype):
    inside = np.eye(5, dtype=bool)
    assert np.array_equal(pixels.to_mask((inside * top).astype(dtype), False, None), inside)
    assert np.array_equal(pixels.to_mask(np.full((2, 2), top, dtype), False, None), np.ones((2, 2)))
    assert not pixels.to_mask(np.zeros((2, 2), dtype), False, None).any()


def test_threshold_is_a_share_of_the_range():
    for full, dtype in ((255, np.uint8), (65535, np.uint16), (1, np.float64)):
        soft = (np.linspace(0, 1, 101) * full).astype(dtype).reshape(1, -1)
        assert pixels.to_mask(soft, False, 0.3).sum() == pytest.approx(70, abs=1)
        assert pixels.to_mask(soft, True, None).sum() == pytest.approx(50, abs=1)


def test_resize_and_crop(tree, out):
    made = pictures(nodules=1)
    slices_tree(tree, made)
    import_tree(tree, out, size=(6, 6), fit="crop", **ALL_IN_TRAIN)
    image, masks = made["P-01", 0, 0]
    read = by_path(out)["P-01/nodule-0/images/slice-0.png"]
    assert np.array_equal(read[0], image[3:9, 2:8]) and np.array_equal(read[1], masks[:, 3:9, 2:8])
    import_tree(tree, out, size=(24, 20), fit="resize", overwrite=True, **ALL_IN_TRAIN)
    read = by_path(out)["P-01/nodule-0/images/slice-0.png"]
    assert read[0].shape == (24, 20) and np.array_equal(read[1], masks.repeat(2, 1).repeat(2, 2))


def test_resizing_keeps_means_and_large_numbers():
    stripes = np.tile([0, 255], (16, 8)).astype(np.uint8)
    assert np.abs(pixels.resize(stripes, (4, 4)).astype(int) - 128).max() <= 25  # antialiased: no stripe survives
    large = 1e9 + np.arange(256.0).reshape(16, 16) / 256
    assert np.abs(pixels.resize(large, (8, 8)) - 1e9 - 0.5).max() < 0.5


# ---------------------------------------------------------------------- splits


def test_split_by_hash():
    names = [f"case {i}" for i in range(3000)]
    split = {name: split_of(name, (70, 10, 20), 5) for name in names}
    shares = [list(split.values()).count(name) / len(names) for name in trees.SPLITS]
    assert np.abs(np.array(shares) - (0.7, 0.1, 0.2)).max() < 0.03
    assert split == {name: split_of(name, (70, 10, 20), 5) for name in names}
    assert split != {name: split_of(name, (70, 10, 20), 6) for name in names}
    place = int(hashlib.sha256(b"case 7#5").hexdigest(), 16) % 100
    assert split["case 7"] == ("train" if place < 70 else "val" if place < 80 else "test")
    # Test patients stay test patients when training data are taken away for validation.
    assert all(split_of(n, (60, 20, 20), 5) == "test" for n in names if split[n] == "test")


def test_added_patients_move_nobody(tree, out):
    slices_tree(tree, pictures(patients=6))
    import_tree(tree, out)
    before = json.loads((out / "splits.json").read_text())
    slices_tree(tree, pictures(patients=30, nodules=1))
    import_tree(tree, out, overwrite=True)
    after = json.loads((out / "splits.json").read_text())
    for name in trees.SPLITS:
        assert set(before[name]) <= set(after[name])
    everyone = [patient for name in trees.SPLITS for patient in after[name]]
    assert len(everyone) == len(set(everyone)) == 30
    assert after["seed"] == 0 and after["shares"] == [70, 10, 20]
    assert sum(after["counts"][name]["patients"] for name in trees.SPLITS) == 30


def test_split_file(tree, tmp_path, out):
    slices_tree(tree, pictures(patients=6))
    import_tree(tree, tmp_path / "first", split="30/30/40", seed=9)
    import_tree(tree, out, split_file=tmp_path / "first" / "splits.json")
    ours, theirs = (json.loads((folder / "splits.json").read_text()) for folder in (out, tmp_path / "first"))
    assert all(ours[name] == theirs[name] for name in trees.SPLITS) and ours["rule"] == "a split file"
    for name, split in contents(out).items():
        assert set(split["patient"]) == set(ours[name])
        theirs_read = contents(tmp_path / "first")[name]
        assert all(np.array_equal(split[key], theirs_read[key]) for key in split)


def test_the_published_tree_keeps_its_splits(tree, out):
    berdiff_tree(tree, pictures(patients=4), lambda patient: {"P-01": "test", "P-02": "val"}.get(patient, "train"))
    import_tree(tree, out)
    assert {name: set(split["patient"]) for name, split in contents(out).items()} == {
        "train": {"P-03", "P-04"},
        "val": {"P-02"},
        "test": {"P-01"},
    }
    import_tree(tree, out, split="0/100/0", overwrite=True)
    assert list(contents(out)) == ["val"]
