# SPDX-License-Identifier: Apache-2.0
"""Trees of volumes: BraTS of both years, nnU-Net, QUBIQ and patterns, to slices with channels, regions and raters."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import berdiff_fast as bf
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.data.importers import import_volumes
from berdiff_fast.io import formats
from berdiff_fast.io.volume import Volume
from berdiff_fast.training import evaluate
from berdiff_fast.training.config import TrainConfig
from berdiff_fast.training.loop import train

SHAPE = (10, 40, 36)
MODALITIES = {"flair": (300, 700), "t1": (30, 45), "t1ce": (500, 1200), "t2": (400, 900)}
ALL = dict(split=(100, 0, 0))


def save(path, array, **place):
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"spacing": (1.0, 1.0, 1.5), "origin": (-10.0, 239.0, 4.0), "format": "nifti", "placed": True, **place}
    formats.write(path, array, Volume(array, **options))


def glioma(seed):
    """Four modalities and labels 0, 1, 2, 4: spheres in a head with nothing around it."""
    random = np.random.default_rng(seed)
    z, y, x = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    r = np.sqrt(((z - 5) * 2.0) ** 2 + (y - 20 - seed) ** 2 + (x - 16) ** 2)
    labels = np.select([r < 3, r < 5, r < 8], [1, 4, 2], 0).astype(np.uint8)
    head = np.broadcast_to(((y - 20) / 15) ** 2 + ((x - 17) / 13) ** 2 < 1, SHAPE)
    images = {
        name: (np.where(labels > 0, high, low) + random.normal(0, 5, SHAPE)).astype(np.int16) * head
        for name, (low, high) in MODALITIES.items()
    }
    return images, labels, head


def brats(root, cases=3, year=2021):
    spelled = dict(flair="t2f", t1="t1n", t1ce="t1c", t2="t2w") if year == 2023 else {}
    mark = "-" if year == 2023 else "_"
    for i in range(cases):
        images, labels, _ = glioma(i)
        name = f"BraTS-GLI-{i:05d}-000" if year == 2023 else f"BraTS2021_{i:05d}"
        for channel, x in images.items():
            save(root / name / f"{name}{mark}{spelled.get(channel, channel)}.nii.gz", x)
        if year == 2023:
            labels = np.where(labels == 4, 3, labels).astype(np.uint8)
        save(root / name / f"{name}{mark}seg.nii.gz", labels)
    return root


@pytest.mark.parametrize("year", [2021, 2023])
def test_brats(tmp_path, year):
    report = import_volumes(brats(tmp_path / "tree", year=year), tmp_path / "out", "brats", **ALL, empty_share=1.0)
    slices = RaterDataset(tmp_path / "out" / "train.h5")
    patients = json.loads((tmp_path / "out" / "splits.json").read_text())["train"]
    assert patients == [f"BraTS-GLI-{i:05d}" if year == 2023 else f"BraTS2021_{i:05d}" for i in range(3)]
    assert slices.channels == ("flair", "t1", "t1ce", "t2") and slices.regions.names == ("WT",)
    assert slices.image_size == report.size == (32, 32) and slices.foreground and slices.pixel_spacing == (1.0, 1.0)
    assert len(slices) == 30 and slices.provenance["patient_id"].tolist() == [i for i in range(3) for _ in range(10)]
    images, labels, head = glioma(1)
    rows, columns = (np.flatnonzero(head.any(axes)) for axes in ((0, 2), (0, 1)))
    middle = (rows[0] + rows[-1] + 1) / 2, (columns[0] + columns[-1] + 1) / 2
    top, left = (round(m - 16) for m in middle)
    image, masks = slices[15]
    window = np.s_[5, top : top + 32, left : left + 32]
    assert all(np.array_equal(image[c].numpy(), x[window]) for c, x in enumerate(images.values()))
    assert np.array_equal(masks[0, 0].numpy(), labels[window] > 0)
    inside = images["t1"][images["t1"] != 0]
    wanted = [images["t1"].min(), images["t1"].max(), inside.mean(), inside.std()]
    assert np.allclose(slices.statistics[15, 1], wanted)


def test_regions_of_several_raters(tmp_path):
    """As five algorithms left them: seg_0 to seg_4, of a case whose folder is the tree."""
    images, labels, _ = glioma(0)
    case = tmp_path / "TCGA-DU-1"
    for channel, x in images.items():
        save(case / f"TCGA-DU-1_{channel}.nii.gz", x)
    for rater in range(3):
        save(
            case / f"TCGA-DU-1_seg_{rater}.nii.gz",
            np.where(np.arange(10)[:, None, None] < 7 - rater, labels, 0).astype(np.uint8),
        )
    import_volumes(case, tmp_path / "out", "brats", **ALL, regions="WT=1,2,4 TC=1,4 ET=4", empty_share=0.0)
    slices = RaterDataset(tmp_path / "out" / "train.h5")
    assert (slices.raters, slices.mask_channels) == (3, 3) and slices.regions.names == ("WT", "TC", "ET")
    masks = slices.whole()[1]
    assert masks.any((1, 2, 3, 4)).all()  # whatever shows nothing was left out
    assert (masks[:, :, 2] <= masks[:, :, 1]).all() and (masks[:, :, 1] <= masks[:, :, 0]).all()
    assert masks[:, 0].sum() > masks[:, 2].sum() > 0


def test_nnunet(tmp_path):
    for i in range(2):
        images, labels, _ = glioma(i)
        for c, x in enumerate(images.values()):
            save(tmp_path / "t" / "imagesTr" / f"case_{i:03d}_{c:04d}.nii.gz", x)
        save(tmp_path / "t" / "labelsTr" / f"case_{i:03d}.nii.gz", labels)
    told = {
        "channel_names": {str(c): name for c, name in enumerate(MODALITIES)},
        "labels": {"background": 0, "whole tumor": [1, 2, 4], "ET": 4},
        "file_ending": ".nii.gz",
    }
    (tmp_path / "t" / "dataset.json").write_text(json.dumps(told))
    import_volumes(tmp_path / "t", tmp_path / "out", "nnunet", **ALL)
    slices = RaterDataset(tmp_path / "out" / "train.h5")
    assert slices.channels == tuple(MODALITIES) and str(slices.regions) == "whole_tumor=1,2,4 ET=4"
    assert slices.image_size == (48, 48) and not slices.foreground
    told["channel_names"]["4"] = "dwi"
    (tmp_path / "t" / "dataset.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"dataset.json: names channels .* and the files have"):
        import_volumes(tmp_path / "t", tmp_path / "out2", "nnunet", **ALL)
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize("deep", [False, True])
def test_qubiq(tmp_path, deep):
    for case in range(3):
        folder = tmp_path / "t" / f"case{case:02d}"
        y, x = np.ogrid[:32, :32]
        r = np.hypot(y - 16, x - 16)
        stack = (lambda a: np.stack([a] * 2)) if deep else (lambda a: a[None])
        save(folder / "image.nii.gz", stack((100 + 80 * (r < 8)).astype(np.float32)))
        for k in range(7 - case):
            save(folder / f"task01_seg{k + 1:02d}.nii.gz", stack((r < 5 + k).astype(np.uint8)))
    with pytest.raises(ValueError, match="has 6 label maps, others have 7"):
        import_volumes(tmp_path / "t", tmp_path / "out", "qubiq", **ALL)
    import_volumes(tmp_path / "t", tmp_path / "out", "qubiq", **ALL, missing_mask="absent")
    slices = RaterDataset(tmp_path / "out" / "train.h5")
    assert len(slices) == 3 * (1 + deep) and slices.raters == 7
    assert slices.rater_valid.sum(1).tolist() == [7 - c for c in range(3) for _ in range(1 + deep)]


def run(*words):
    return subprocess.run(
        [sys.executable, "-m", "berdiff_fast.cli", "import", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_tells_layouts_apart(tmp_path):
    brats(tmp_path / "tree")
    done = run(tmp_path / "tree", tmp_path / "out", "--split", "100/0/0", "--regions", "WT=1,2,4", "ET=4", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert RaterDataset(tmp_path / "out" / "train.h5").regions.names == ("WT", "ET")
    pattern = ["--image-pattern", "{case}/{case}_{channel}{ext}", "--mask-pattern", "{case}/{case}_seg{ext}"]
    options = ["--channels", "t2", "flair", "--regions", "WT=1,2,4", "--split", "100/0/0", "--quiet"]
    done = run(tmp_path / "tree", tmp_path / "own", "--layout", "pattern", *pattern, *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert RaterDataset(tmp_path / "own" / "train.h5").channels == ("t2", "flair")


def _elsewhere(case: Path, _: Path) -> None:
    save(case / f"{case.name}_t1.nii.gz", glioma(1)[0]["t1"], origin=(40.0, 239.0, 4.0))


def _smaller(case: Path, _: Path) -> None:
    save(case / f"{case.name}_t2.nii.gz", glioma(1)[0]["t2"][:, :30])


def _label(case: Path, _: Path) -> None:
    save(case / f"{case.name}_seg.nii.gz", np.full(SHAPE, 7, np.uint8))


def _shares(case: Path, _: Path) -> None:
    save(case / f"{case.name}_seg.nii.gz", np.full(SHAPE, 0.5, np.float32))


def _nothing(case: Path, _: Path) -> None:
    for name in MODALITIES:
        save(case / f"{case.name}_{name}.nii.gz", np.zeros(SHAPE, np.int16))


def _torn(case: Path, _: Path) -> None:
    path = case / f"{case.name}_t1ce.nii.gz"
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("what", "file", "words"),
    [
        (lambda case, _: (case / f"{case.name}_t1.nii.gz").unlink(), "", "lacks its channel t1"),
        (lambda case, _: (case / f"{case.name}_seg.nii.gz").unlink(), "", "has no label map"),
        (_elsewhere, "_t1.nii.gz", "lies elsewhere"),
        (_smaller, "_t2.nii.gz", "30"),
        (_label, "_seg.nii.gz", "label 7, which no region of WT=1,2,4 names"),
        (_shares, "_seg.nii.gz", "must be a label map of whole numbers"),
        (_nothing, "_flair.nii.gz", "is 0 everywhere"),
        (_torn, "_t1ce.nii.gz", "cannot be read"),
        (
            lambda case, _: save(case / f"{case.name}-t2f.nii.gz", np.ones(SHAPE, np.int16)),
            "",
            "is the same of the same case",
        ),
    ],
    ids=["channel", "labels", "elsewhere", "shape", "label", "shares", "nothing", "torn", "twice"],
)
def test_bad_cases(tmp_path, what, file, words):
    brats(tmp_path / "tree")
    what(tmp_path / "tree" / "BraTS2021_00001", tmp_path)
    options = dict(**ALL, regions="WT=1,2,4")
    with pytest.raises(ValueError, match="BraTS2021_00001") as error:
        import_volumes(tmp_path / "tree", tmp_path / "out", "brats", **options)
    assert words in str(error.value) and file in str(error.value) and "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tree"]
    report = import_volumes(tmp_path / "tree", tmp_path / "out", "brats", on_error="skip", **options)
    assert any(words in one.reason for one in report.problems)
    assert set(RaterDataset(tmp_path / "out" / "train.h5").provenance["patient_id"].tolist()) >= {0, 2}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layout", "pattern"], "image_pattern and mask_pattern"),
        (["--layout", "pattern", "--image-pattern", "a{ext}", "--mask-pattern", "b{ext}"], "must have {case}"),
        (["--layout", "pattern", "--image-pattern", "{cas}/a", "--mask-pattern", "{case}/b"], "known are {case}"),
        (["--regions", "WT"], "NAME=LABEL"),
        (["--regions", "WT=1", "WT=2"], "different names"),
        (["--channels", "t1", "t1"], "different names"),
        (["--empty-share", "1.5"], "empty_share must be in [0, 1]"),
        (["--other-labels", "no"], "other_labels must be one of"),
        (["--window", "0", "1"], "window is for trees of pictures"),
        (["--size", "8", "8"], "marks more than the 8 x 8"),
    ],
)
def test_bad_options(tmp_path, options, words):
    brats(tmp_path / "tree", cases=1)
    done = run(tmp_path / "tree", tmp_path / "out", "--quiet", *options)
    assert done.returncode != 0 and words in done.stderr.replace("\n", " ") and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_slices_without_marks_are_drawn_by_the_seed(tmp_path):
    tree = brats(tmp_path / "tree")
    some = [
        import_volumes(tree, tmp_path / f"o{k}", "brats", **ALL, empty_share=s, seed=seed).splits["train"].slices
        for k, (s, seed) in enumerate([(0.0, 0), (0.5, 0), (0.5, 0), (1.0, 0)])
    ]
    assert some[0] < some[1] == some[2] < some[3] == 30


@pytest.mark.parametrize("per_channel", ["auto", "false"])
def test_a_model_of_it_trains_validates_and_is_evaluated(tmp_path, per_channel):
    """And scales a slice as its volume, in training as in sampling."""
    tree = brats(tmp_path / "tree")
    import_volumes(tree, tmp_path / "a", "brats", split=(100, 0, 0), regions="WT=1,2,4 ET=4")
    brats(tmp_path / "b" / "tree", cases=5)
    for i in range(3):
        shutil.rmtree(tmp_path / "b" / "tree" / f"BraTS2021_{i:05d}")
    import_volumes(tmp_path / "b" / "tree", tmp_path / "v", "brats", **ALL, regions="WT=1,2,4 ET=4", size=(32, 32))
    config = TrainConfig(
        output=str(tmp_path / "run"),
        train_data=str(tmp_path / "a" / "train.h5"),
        val_data=str(tmp_path / "v" / "train.h5"),
        model_channels=32,
        channel_mult=(1,),
        attention_resolutions=(),
        steps=2,
        batch_size=2,
        rotate90=False,
        validate_every=2,
        validation_slices=2,
        validation_samples=2,
        validation_steps=2,
        per_channel=per_channel,
        tensorboard=False,
        quiet=True,
    )
    made = bf.load(train(config))
    assert made.channels == ("flair", "t1", "t1ce", "t2") and made.regions.names == ("WT", "ET")
    held_out = RaterDataset(tmp_path / "v" / "train.h5")
    summary = evaluate.evaluate(made, held_out, tmp_path / "e", n=2, steps=2, progress=False)
    assert [one["name"] for one in summary["model"]["regions"]] == ["WT", "ET"]
    images, _ = held_out.batch([2])
    volume = torch.from_numpy(np.stack(list(glioma(3)[0].values())).astype(np.float32))[None]
    of_file = held_out.statistics_for(made.preprocessing, [2])
    of_volume = made.preprocessing.statistics(volume)
    assert torch.allclose(made.preprocess(images, of_file), made.preprocess(images, of_volume), atol=1e-6)
    import_volumes(tmp_path / "b" / "tree", tmp_path / "w", "brats", **ALL, regions="WT=1,2,4 TC=1,4", size=(32, 32))
    with pytest.raises(ValueError, match="the model's regions are"):
        evaluate.evaluate(made, RaterDataset(tmp_path / "w" / "train.h5"), tmp_path / "f", n=2, progress=False)
    assert not (tmp_path / "f").exists()
