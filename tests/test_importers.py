# SPDX-License-Identifier: Apache-2.0
"""Importers: every layout there and back, splits that never mix patients, bad trees refused, nothing half written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image
from support import data_path

from berdiff_fast import cli
from berdiff_fast.data import importers, layouts, pixels, writing
from berdiff_fast.data.importers import import_tree, split_of

H, W, R = 12, 10, 4
ALL_IN_TRAIN = {"split": (100, 0, 0)}
Pictures = dict[tuple[str, int, int], tuple[np.ndarray, np.ndarray]]


# ---------------------------------------------------------------------- small trees


def pictures(patients: int = 2, nodules: int = 2, slices: int = 1, seed: int = 0) -> Pictures:
    """(patient, nodule, slice) to an image (H, W) and masks (R, H, W) of 0 and 1; rater 3 is empty in slice 0."""
    rng = np.random.default_rng(seed)
    made: Pictures = {}
    for p in range(patients):
        for n in range(nodules):
            for s in range(slices):
                masks = np.zeros((R, H, W), np.uint8)
                for rater in range(R - (s == 0)):
                    y, x = rng.integers(0, 5, 2)
                    masks[rater, y : y + 5, x : x + 4] = 1
                made[f"P-{p + 1:02d}", n, s] = rng.integers(0, 256, (H, W), dtype=np.uint8), masks
    return made


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def slices_tree(root: Path, made: Pictures) -> Path:
    for (p, n, s), (image, masks) in made.items():
        save(root / p / f"nodule-{n}" / "images" / f"slice-{s}.png", image)
        for rater, mask in enumerate(masks):
            save(root / p / f"nodule-{n}" / f"mask-{rater}" / f"slice-{s}.png", mask * 255)
    return root


def cimd_tree(root: Path, made: Pictures) -> Path:
    for case, (image, masks) in enumerate(made.values()):
        save(root / str(case) / f"image_{case + 1}.jpg", image)
        for rater, mask in enumerate(masks):
            save(root / str(case) / f"label{rater}_.jpg", mask * 255)
    return root


def berdiff_tree(root: Path, made: Pictures, split: Callable[[str], str] = split_of) -> Path:
    for (p, n, s), (image, masks) in made.items():
        stem = f"{p}/z{-105.0 + 1.25 * s}_c{n}"
        save(root / split(p) / "images" / f"{stem}.png", image)
        for rater, mask in enumerate(masks):
            save(root / split(p) / "gt" / f"{stem}_l{rater}.png", mask * 255)
    return root


def plain_tree(root: Path, made: Pictures, suffix: str = ".png") -> Path:
    for (p, n, s), (image, masks) in made.items():
        save(root / "images" / f"{p}_n{n}_{s}{suffix}", image)
        for rater, mask in enumerate(masks):
            save(root / f"masks_{rater}" / f"{p}_n{n}_{s}{suffix}", mask)
    return root


TREES: dict[str, Callable[[Path, Pictures], Path]] = {
    "slices": slices_tree,
    "cimd": cimd_tree,
    "berdiff": berdiff_tree,
    "plain": plain_tree,
}


def contents(output: Path) -> dict[str, dict[str, np.ndarray]]:
    read = {}
    for name in layouts.SPLITS:
        if (output / f"{name}.h5").exists():
            with h5py.File(output / f"{name}.h5") as file:
                read[name] = {key: d.asstr()[()] if d.dtype == object else d[()] for key, d in file.items()}
    return read


def by_path(output: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {
        path: (split["image"][k], split["mask"][k])
        for split in contents(output).values()
        for k, path in enumerate(split["path"])
    }


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return tmp_path / "tree"


def left(out: Path) -> list[str]:
    """What is beside the tree."""
    return sorted(name for name in os.listdir(out.parent) if name != "tree")


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
    assert list(read) == [name for name in layouts.SPLITS if report.splits[name].slices]
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
    name = next(name for name in layouts.SPLITS if report.splits[name].slices)
    with h5py.File(out / f"{name}.h5") as file:
        assert file["image"].chunks == (1, H, W) and file["mask"].chunks == (1, R, H, W)
        assert file["image"].compression == "gzip"
        assert file.attrs["format"] == 1 and file.attrs["source"] == "slices" and file.attrs["split"] == name
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
    shares = [list(split.values()).count(name) / len(names) for name in layouts.SPLITS]
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
    for name in layouts.SPLITS:
        assert set(before[name]) <= set(after[name])
    everyone = [patient for name in layouts.SPLITS for patient in after[name]]
    assert len(everyone) == len(set(everyone)) == 30
    assert after["seed"] == 0 and after["shares"] == [70, 10, 20]
    assert sum(after["counts"][name]["patients"] for name in layouts.SPLITS) == 30


def test_split_file(tree, tmp_path, out):
    slices_tree(tree, pictures(patients=6))
    import_tree(tree, tmp_path / "first", split="30/30/40", seed=9)
    import_tree(tree, out, split_file=tmp_path / "first" / "splits.json")
    ours, theirs = (json.loads((folder / "splits.json").read_text()) for folder in (out, tmp_path / "first"))
    assert all(ours[name] == theirs[name] for name in layouts.SPLITS) and ours["rule"] == "a split file"
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


# ---------------------------------------------------------------------- bad trees


def first(tree: Path, what: str = "images", nodule: str = "P-01/nodule-0") -> Path:
    return tree / nodule / what / "slice-0.png"


def broken(tree: Path) -> None:
    path = first(tree)
    path.write_bytes(path.read_bytes()[:60])


def write(path: str, array: np.ndarray) -> Callable[[Path], None]:
    return lambda tree: save(tree / path, array)


def colour(tree: Path) -> None:
    save(first(tree), np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8))


def transparent(tree: Path) -> None:
    save(first(tree), np.full((H, W, 4), 99, np.uint8))


def several(tree: Path) -> None:
    frames = [Image.new("L", (W, H), k) for k in (1, 2)]
    first(tree).unlink()
    frames[0].save(first(tree).with_suffix(".tif"), save_all=True, append_images=frames[1:])


def cmyk(tree: Path) -> None:
    first(tree).unlink()
    Image.new("CMYK", (W, H)).save(first(tree).with_suffix(".jpg"))


def as_npy(array: Any) -> Callable[[Path], None]:
    def replace(tree: Path) -> None:
        first(tree).unlink()
        np.save(first(tree).with_suffix(".npy"), array, allow_pickle=True)

    return replace


def empty_file(tree: Path) -> None:
    first(tree).write_bytes(b"")


def a_folder(tree: Path) -> None:
    first(tree, "mask-2").unlink()
    first(tree, "mask-2").mkdir()


SMALL, GREY = np.zeros((H, W - 1), np.uint8), np.full((H, W), 77, np.uint8)
NODULE = "P-01/nodule-0"

# What is done to a sound "slices" tree, the path that is named and the reason.
BAD_FILES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "image truncated": (broken, f"{NODULE}/images/slice-0.png", "cannot be read: "),
    "image empty": (empty_file, f"{NODULE}/images/slice-0.png", "cannot be read: not a PNG, JPEG or TIFF"),
    "image of text": (
        lambda tree: first(tree).write_text("no picture"),
        f"{NODULE}/images/slice-0.png",
        "cannot be read: not a PNG, JPEG or TIFF",
    ),
    "image gone": (
        lambda tree: first(tree).unlink(),
        f"{NODULE}/mask-0/slice-0.png",
        "a mask whose image is missing",
    ),
    "image coloured": (colour, f"{NODULE}/images/slice-0.png", "is a colour picture, expected a grey one"),
    "image transparent": (transparent, f"{NODULE}/images/slice-0.png", "has transparent pixels"),
    "image CMYK": (cmyk, f"{NODULE}/images/slice-0.jpg", "is a picture of mode CMYK"),
    "image of pages": (several, f"{NODULE}/images/slice-0.tif", "holds 2 pictures, expected one"),
    "image NaN": (as_npy(np.full((H, W), np.nan)), f"{NODULE}/images/slice-0.npy", "has NaN or infinite values"),
    "image infinite": (as_npy(np.full((H, W), np.inf)), f"{NODULE}/images/slice-0.npy", "has NaN or infinite values"),
    "image of objects": (as_npy(np.array([{}])), f"{NODULE}/images/slice-0.npy", "cannot be read: Object arrays"),
    "image a volume": (as_npy(np.zeros((3, H, W))), f"{NODULE}/images/slice-0.npy", "must be one (H, W) picture"),
    "image complex": (as_npy(np.zeros((H, W), complex)), f"{NODULE}/images/slice-0.npy", "of real numbers, got"),
    "image of no pixels": (as_npy(np.zeros((0, W))), f"{NODULE}/images/slice-0.npy", "is empty, of shape (0, 10)"),
    "image too wide a range": (
        as_npy(np.where(np.eye(H, W), 1.5e308, -1.5e308)),
        f"{NODULE}/images/slice-0.npy",
        "too far apart to be scaled",
    ),
    "mask missing": (
        lambda tree: first(tree, "mask-1").unlink(),
        f"{NODULE}/images/slice-0.png",
        "the mask of rater 1 is missing",
    ),
    "mask a folder": (a_folder, f"{NODULE}/images/slice-0.png", "the mask of rater 2 is missing"),
    "mask of another size": (
        write(f"{NODULE}/mask-1/slice-0.png", SMALL),
        f"{NODULE}/mask-1/slice-0.png",
        "is 12 x 9, its image 12 x 10",
    ),
    "mask not binary": (
        write(f"{NODULE}/mask-1/slice-0.png", GREY),
        f"{NODULE}/mask-1/slice-0.png",
        "is not a binary mask: expected 0 and 1 or 0 and 255, got 77",
    ),
    "mask of three values": (
        write(f"{NODULE}/mask-1/slice-0.png", np.arange(H * W, dtype=np.uint8).reshape(H, W) % 3),
        f"{NODULE}/mask-1/slice-0.png",
        "is not a binary mask: expected 0 and 1 or 0 and 255, got 0, 1, 2",
    ),
    "mask truncated": (
        lambda tree: first(tree, "mask-3").write_bytes(first(tree, "mask-3").read_bytes()[:45]),
        f"{NODULE}/mask-3/slice-0.png",
        "cannot be read: ",
    ),
    "slice of another size": (
        lambda tree: [
            save(first(tree, what, "P-02/nodule-1"), SMALL) for what in ("images", *(f"mask-{r}" for r in range(R)))
        ],
        "P-02/nodule-1/images/slice-0.png",
        "is 12 x 9, expected 12 x 10 as P-01/nodule-0/images/slice-0.png",
    ),
    "slice twice by name": (
        lambda tree: save(first(tree).with_suffix(".tif"), GREY),
        f"{NODULE}/images/slice-0.tif",
        f"duplicate: {NODULE}/images/slice-0.png has the same name",
    ),
    "slice twice by number": (
        lambda tree: [
            save(tree / NODULE / what / "slice-00.png", GREY * 0)
            for what in ("images", *(f"mask-{r}" for r in range(R)))
        ],
        f"{NODULE}/images/slice-00.png",
        f"duplicate: slice 0 of nodule nodule-0 of patient P-01 is also {NODULE}/images/slice-0.png",
    ),
    "slice without number": (
        lambda tree: first(tree).rename(first(tree).with_name("slice.png")),
        f"{NODULE}/images/slice.png",
        "no slice number at the end of its name",
    ),
    "slice of too large a number": (
        lambda tree: first(tree).rename(first(tree).with_name("slice-20240131120000.png")),
        f"{NODULE}/images/slice-20240131120000.png",
        "no slice number at the end of its name",
    ),
    "nodule without images": (
        lambda tree: (tree / "P-01" / "nodule-0" / "images").rename(tree / "P-01" / "nodule-0" / "image"),
        NODULE,
        "no folder images in it",
    ),
    "patient without nodules": (lambda tree: (tree / "P-00").mkdir(), "P-00", "no nodule's folder in it"),
    "name that is not text": (
        lambda tree: os.mkdir(os.fsencode(tree) + b"/P-\xff"),
        "'P-\\udcff'",
        "a name that is not UTF-8",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(name, tree, out):
    """Stop: the first problem is the error, and nothing is written. Skip: the rest is, and the report has the path."""
    spoil, path, reason = BAD_FILES[name]
    made = pictures()
    spoil(slices_tree(tree, made) and tree)
    with pytest.raises(ValueError) as caught:
        import_tree(tree, out)
    assert str(caught.value).startswith(f"{path}: ") and reason in str(caught.value)
    assert left(out) == []
    report = import_tree(tree, out, on_error="skip")
    assert any(p.path == path and reason in p.reason for p in report.problems)
    written = sum(split.slices for split in report.splits.values())
    assert written == len(by_path(out)) and len(made) - 2 <= written <= len(made)
    assert json.loads((out / "import.json").read_text())["problems"][0]["path"] == report.problems[0].path


def test_each_slice_of_another_size_is_reported(tree, out):
    made = pictures(patients=4, slices=3)
    odd = {key: (v[0][:, 1:], v[1][:, :, 1:]) for key, v in made.items() if key[0] == "P-03"}
    slices_tree(tree, made | odd)
    report = import_tree(tree, out, on_error="skip")
    assert [problem.path for problem in report.problems] == [
        f"P-03/nodule-{n}/images/slice-{s}.png" for n in range(2) for s in range(3)
    ]
    assert import_tree(tree, out, size=(8, 8), fit="crop", overwrite=True).problems == ()
    with pytest.raises(ValueError, match="is 12 x 9, too small to be cropped to 11 x 10"):
        import_tree(tree, out, size=(11, 10), fit="crop", overwrite=True)


def test_missing_masks_may_be_empty(tree, out):
    slices_tree(tree, pictures())
    first(tree, "mask-1").unlink()
    report = import_tree(tree, out, missing_mask="empty", **ALL_IN_TRAIN)
    assert not by_path(out)[f"{NODULE}/images/slice-0.png"][1][1].any()
    assert report.splits["train"].missing_masks == (0, 1, 0, 0)
    report = import_tree(tree, out, missing_mask="empty", raters=6, overwrite=True, **ALL_IN_TRAIN)
    assert report.raters == 6 and report.splits["train"].missing_masks == (0, 1, 0, 0, 4, 4)


def test_a_folder_that_cannot_be_listed(tree, out, monkeypatch):
    slices_tree(tree, pictures())
    listed = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("P-02/nodule-0"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(layouts.os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"P-02/nodule-0: cannot be listed: Permission denied"):
        import_tree(tree, out)
    report = import_tree(tree, out, on_error="skip")
    assert report.problems[0] == importers.Problem("P-02/nodule-0", "cannot be listed: Permission denied")


def published(path: str) -> Callable[[Path], None]:
    return lambda tree: save(berdiff_tree(tree, pictures(), lambda p: "train") / path, GREY)


# How a tree is made, the options, and the message. These are never skipped.
BAD_TREES: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "nothing": (lambda tree: tree.mkdir(), {}, "has none that is known. Looked for 'slices': PATIENT.*Found nothing"),
    "unknown": (
        write("a/b.png", GREY),
        {},
        r"Looked for .*'cimd': CASE.*'berdiff': .*'plain': \{images.*\. Found a$",
    ),
    "no masks": (write("P-1/nodule-0/images/slice-0.png", GREY), {"layout": "slices"}, "images and not one mask"),
    "ambiguous": (
        lambda tree: plain_tree(slices_tree(tree, pictures()), pictures()),
        {},
        r"looks like several: 'slices' \(P-01/nodule-0 holds images and mask-0\); 'plain' \(images beside masks_0\)",
    ),
    "another layout": (
        lambda tree: slices_tree(tree, pictures()),
        {"layout": "plain"},
        r"\.: no folder images in it",
    ),
    "another layout, skipping": (
        lambda tree: slices_tree(tree, pictures()),
        {"layout": "cimd", "on_error": "skip"},
        "no slice of layout 'cimd' in .*; the first problem: P-01: one image_N expected in it, found 0",
    ),
    "every slice bad": (
        lambda tree: [first(slices_tree(tree, pictures(1, 1))).write_text("x")],
        {"on_error": "skip"},
        "every slice has a problem; the first: P-01/nodule-0/images/slice-0.png: cannot be read",
    ),
    "too few raters asked for": (
        lambda tree: slices_tree(tree, pictures()),
        {"raters": 2},
        "raters must be at least 4, since there is P-01/nodule-0/mask-3/slice-0.png, got 2",
    ),
    "too many raters asked for": (
        lambda tree: slices_tree(tree, pictures()),
        {"raters": 5},
        "P-01/nodule-0/images/slice-0.png: the mask of rater 4 is missing",
    ),
    "a rater by date": (
        lambda tree: first(slices_tree(tree, pictures()), "mask-1").parent.rename(tree / NODULE / "mask-20240131"),
        {},
        r"mask-20240131/slice-\d.png: rater 20240131, where at most 100 raters are expected",
    ),
    "cimd two images": (
        lambda tree: save(cimd_tree(tree, pictures()) / "0" / "image_9.jpg", GREY),
        {},
        "0: one image_N expected in it, found 2",
    ),
    "cimd a rater twice": (
        lambda tree: save(cimd_tree(tree, pictures()) / "0" / "label0.png", GREY),
        {},
        "duplicate: rater 0 also has",
    ),
    "patient in two splits": (
        lambda tree: berdiff_tree(berdiff_tree(tree, pictures(), lambda p: "train"), pictures(1, 1), lambda p: "test"),
        {"on_error": "skip"},
        "source: patient 'P-01' is in train and test; split anew",
    ),
    "slice in two splits, split anew": (
        lambda tree: berdiff_tree(berdiff_tree(tree, pictures(), lambda p: "train"), pictures(1, 1), lambda p: "test"),
        ALL_IN_TRAIN,
        "test/images/P-01/z-105.0_c0.png: duplicate: slice 0 of nodule 0 of patient P-01 is also train/images/P-01/",
    ),
    "published name": (
        published("train/images/P-01/slice-3.png"),
        {},
        "train/images/P-01/slice-3.png: its name is not z<position>_c<nodule>",
    ),
    "published mask alone": (
        published("train/gt/P-01/z-7.0_c0_l0.png"),
        {},
        "train/gt/P-01/z-7.0_c0_l0.png: a mask whose image is missing",
    ),
    "published patient alone": (
        published("train/gt/P-09/z-7.0_c0_l0.png"),
        {},
        "train/gt/P-09: no folder train/images/P-09 for it",
    ),
    "published without gt": (
        published("val/images/P-09/z-7.0_c0.png"),
        {},
        "val: no folder gt in it",
    ),
    "one patient in all names": (
        lambda tree: plain_tree(tree, {("ISIC", n, 0): v for n, v in enumerate(pictures().values())}),
        {},
        r"patient_pattern .* finds one patient, 'ISIC', in all 4 names",
    ),
    "pattern that does not match": (
        lambda tree: plain_tree(tree, pictures()),
        {"patient_pattern": r"case(\d+)"},
        r"images/P-01_n0_0.png: its name does not match the patient pattern 'case",
    ),
    "pattern without a patient": (
        lambda tree: plain_tree(tree, pictures()),
        {"patient_pattern": r"(?P<patient>x?)P"},
        "finds no patient in its name",
    ),
    "pattern without a number": (
        lambda tree: plain_tree(tree, pictures()),
        {"patient_pattern": r"(?P<patient>P-\d+)(?P<slice>_)"},
        "finds no number of the slice in its name",
    ),
}


@pytest.mark.parametrize("name", BAD_TREES)
def test_bad_tree(name, tree, out):
    make, options, message = BAD_TREES[name]
    make(tree)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        import_tree(tree, out, **options)
    assert left(out) == []


BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "layout": ({"layout": "dicom"}, ValueError, r"layout must be one of \['auto', 'slices', .*got 'dicom'"),
    "split sum": ({"split": (70, 10, 10)}, ValueError, r"split must be .*add up to 100.*got \(70, 10, 10\)"),
    "split text": ({"split": "70/30"}, ValueError, "split must be .*got '70/30'"),
    "split words": ({"split": "a/b/c"}, ValueError, "split must be .*got 'a/b/c'"),
    "split negative": ({"split": (120, -20, 0)}, ValueError, "split must be"),
    "split floats": ({"split": (0.7, 0.1, 0.2)}, ValueError, "split must be .*per cent"),
    "seed negative": ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
    "seed float": ({"seed": 1.0}, TypeError, "seed must be an int, got float"),
    "split and file": ({"split": "70/10/20", "split_file": "x"}, ValueError, "split and split_file cannot both"),
    "split file": ({"split_file": "no-such.json"}, FileNotFoundError, "split_file: there is no file no-such.json"),
    "size": ({"size": (0, 4)}, ValueError, r"size must be \(height, width\).*got \(0, 4\)"),
    "size one": ({"size": 128}, ValueError, "size must be .*got 128"),
    "fit": ({"fit": "pad"}, ValueError, "fit must be one of .*got 'pad'"),
    "fit alone": ({"fit": "resize"}, ValueError, "size must be given with fit='resize'"),
    "raters": ({"raters": 0}, ValueError, "raters must be at least 1, got 0"),
    "missing_mask": ({"missing_mask": "full"}, ValueError, "missing_mask must be one of"),
    "on_error": ({"on_error": "ignore"}, ValueError, "on_error must be one of"),
    "threshold": ({"threshold": 128}, ValueError, r"threshold must be a share of the range, in \(0, 1\), got 128"),
    "window": ({"window": (400, -1000)}, ValueError, "window must be .*low < high"),
    "pattern": ({"patient_pattern": "("}, ValueError, r"patient_pattern must be a regular expression, got '\('"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call(name, tree, out):
    """Refused before the tree is so much as looked at."""
    options, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        import_tree(tree, out, **options)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "cannot be read as JSON"),
        ("[]", 'must hold lists of patients under "train", "val" and "test"'),
        ('{"training": []}', "must hold lists of patients"),
        ('{"train": "P-01"}', "'train' in .* must be a list of patients' names, got 'P-01'"),
        ('{"train": [1]}', "must be a list of patients' names"),
        ('{"train": ["P-01"], "test": ["P-02", "P-01"]}', "patient 'P-01' is in train and test"),
        ('{"train": ["P-01"]}', "P-02/nodule-0/images/slice-0.png: its patient 'P-02' is not in the split file"),
    ],
)
def test_bad_split_file(content, message, tree, tmp_path, out):
    slices_tree(tree, pictures())
    (tmp_path / "splits.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        import_tree(tree, out, split_file=tmp_path / "splits.json")
    assert not out.exists()


def test_source_and_output(tree, tmp_path, out):
    with pytest.raises(FileNotFoundError, match="source: there is no folder .*tree"):
        import_tree(tree, out)
    slices_tree(tree, pictures())
    with pytest.raises(NotADirectoryError, match="source must be a folder, got the file"):
        import_tree(first(tree), out)
    import_tree(tree, tmp_path / "new" / "parents" / "out")
    assert (tmp_path / "new" / "parents" / "out" / "train.h5").is_file()
    shutil.rmtree(tmp_path / "new")
    whole = first(tree).read_bytes()
    first(tree).write_bytes(whole[:20])
    with pytest.raises(ValueError, match=first(tree).name):
        import_tree(tree, tmp_path / "none" / "of" / "these")
    assert not (tmp_path / "none").exists()
    first(tree).write_bytes(whole)
    for inside in (tree, tree / "out"):
        with pytest.raises(ValueError, match="output must lie outside source"):
            import_tree(tree, inside)
    with pytest.raises(ValueError, match="is a mount point"):
        import_tree(tree, "/")
    out.write_text("x")
    with pytest.raises(NotADirectoryError, match="output must be a folder, got the file"):
        import_tree(tree, out)
    assert left(out) == ["out"]


def test_output_that_exists(tree, out):
    slices_tree(tree, pictures())
    out.mkdir()
    import_tree(tree, out)  # into an empty folder
    before = (out / "import.json").read_bytes()
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        import_tree(tree, out)
    assert (out / "import.json").read_bytes() == before
    report = import_tree(tree, out, overwrite=True, seed=4)
    assert json.loads((out / "splits.json").read_text())["seed"] == 4 == report.parameters["seed"]
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds 'thesis.tex', which no import wrote"):
        import_tree(tree, out, overwrite=True)
    assert (out / "thesis.tex").exists() and left(out) == ["out"]


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
    assert capsys.readouterr().err == f"berdiff-fast import: output: {out} exists and is not empty; overwrite it?\n"


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
