# SPDX-License-Identifier: Apache-2.0
"""Bad trees, files and arguments: each in one line, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from import_trees import (
    ALL_IN_TRAIN,
    H,
    R,
    W,
    berdiff_tree,
    by_path,
    cimd_tree,
    first,
    left,
    pictures,
    plain_tree,
    save,
    slices_tree,
)
from PIL import Image

from berdiff_fast.data import importers
from berdiff_fast.data.importers import import_tree, trees

# ---------------------------------------------------------------------- bad trees


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

    monkeypatch.setattr(trees.os, "scandir", scandir)
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
