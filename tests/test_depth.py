# SPDX-License-Identifier: Apache-2.0
"""Images of 16 bits and of floating point: kept by imports, read back, trained on, evaluated; and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from import_trees import ALL_IN_TRAIN, by_path, first, left, out, pictures, save, slices_tree, tree  # noqa: F401
from small_runs import command, trained
from test_importers_volumes import brats
from test_importers_volumes import save as save_volume

import berdiff_fast as bf
from berdiff_fast.data import pixels
from berdiff_fast.data.batches import Batches
from berdiff_fast.data.examples import Augmentation, TrainingExamples
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.data.importers import import_tree, import_volumes, split_of
from berdiff_fast.training import evaluate

H, W = 16, 16


def deep_tree(root: Path, kind: type, low: float, high: float, patients: int = 3) -> dict:
    """A tree of NPY images of a type, with values from ``low`` to ``high``, the first two pixels those."""
    made = {}
    for i, (key, (_, masks)) in enumerate(pictures(patients, 1, 2).items()):
        x = np.random.default_rng(i).uniform(low, high, (H, W))
        x = x.astype(kind) if kind in (np.float16, np.float32, np.float64) else np.rint(x).astype(kind)
        x.flat[:2] = low, high
        made[key] = x, np.pad(masks, ((0, 0), (0, H - 12), (0, W - 10)))
    slices_tree(root, {key: (x.astype(np.uint8), masks) for key, (x, masks) in made.items()})
    for (p, n, s), (x, _) in made.items():
        path = root / p / f"nodule-{n}" / "images" / f"slice-{s}.png"
        path.unlink()
        np.save(path.with_suffix(".npy"), x)
    return made


KEPT = {
    "16 of uint16": (16, np.uint16, 3, 60000, np.uint16),
    "16 of uint8": ("16", np.uint8, 3, 250, np.uint16),
    "16 of Hounsfield units": (16, np.int16, -1024, 3071, np.int16),
    "16 of int32": (16, np.int32, -1024, 3071, np.int16),
    "16 of whole floats": (16, np.int64, -7, 12, np.int16),
    "16 of large floats": (16, np.int64, 0, 40000, np.uint16),
    "float16": ("float16", np.float64, -2, 60000.0, np.float16),
    "float32": ("float32", np.float64, -1e6, 1e6, np.float32),
    "float32 of int16": ("float32", np.int16, -1024, 3071, np.float32),
}


@pytest.mark.parametrize("name", KEPT)
def test_values_are_kept(name, tree, out):  # noqa: F811
    depth, kind, low, high, wanted = KEPT[name]
    made = deep_tree(tree, kind, low, high)
    report = import_tree(tree, out, depth=depth, **ALL_IN_TRAIN)
    found = by_path(out)
    assert report.parameters["depth"] == str(depth) and len(found) == len(made)
    for (p, n, s), (x, _) in made.items():
        image, _ = found[f"{p}/nodule-{n}/images/slice-{s}.npy"]
        assert image.dtype == wanted and np.array_equal(image, x.astype(wanted))
        if np.dtype(wanted).kind in "iu":
            assert np.array_equal(image.astype(np.float64), x.astype(np.float64))


def test_eight_bits_are_what_they_were(tree, out):  # noqa: F811
    deep_tree(tree, np.int16, -1000, 400)
    import_tree(tree, out, **ALL_IN_TRAIN)
    before = (out / "train.h5").read_bytes()
    import_tree(tree, out, depth=8, overwrite=True, **ALL_IN_TRAIN)
    assert (out / "train.h5").read_bytes() == before
    ((image, _), *_) = by_path(out).values()
    assert image.dtype == np.uint8 and (image.min(), image.max()) == (0, 255)


def test_resized_images_are_whole_numbers_again(tree, out):  # noqa: F811
    made = deep_tree(tree, np.int16, -1000, 400)
    import_tree(tree, out, depth=16, size=(8, 8), fit="resize", **ALL_IN_TRAIN)
    (image, _), ((source, _), *_) = next(iter(by_path(out).values())), made.values()
    assert image.dtype == np.int16 and np.array_equal(image, np.rint(pixels.resize(source, (8, 8))))


def test_what_is_outside_the_scan_is_its_lowest_tissue(tree, out):  # noqa: F811
    """As ``sample_volume`` takes it."""
    made = deep_tree(tree, np.int16, -1000, 400, patients=1)
    place = tree / "P-01" / "nodule-0" / "images" / "slice-0.npy"
    x = made["P-01", 0, 0][0].copy()
    x[:, :3] = -2000
    np.save(place, x)
    import_tree(tree, out, depth=16, **ALL_IN_TRAIN)
    image, _ = by_path(out)["P-01/nodule-0/images/slice-0.npy"]
    assert image.min() == x[:, 3:].min() and np.array_equal(image[:, 3:], x[:, 3:])


@pytest.mark.parametrize("name", KEPT)
def test_batches_are_their_items(name, tree, out):  # noqa: F811
    depth, kind, low, high, _ = KEPT[name]
    deep_tree(tree, kind, low, high)
    import_tree(tree, out, depth=depth, **ALL_IN_TRAIN)
    slices = RaterDataset(out / "train.h5", in_memory=True)
    examples = TrainingExamples(slices, bf.Preprocessing(), 100, 3, Augmentation(True, True, 5.0, 0.1))
    items = [examples[p] for p in range(6)]
    for resident in (True, False):
        batch = Batches(examples, resident=resident)(range(6))
        for key, value in batch.items():
            assert torch.equal(value, torch.stack([item[key] for item in items])), (key, resident)
    low, high = float(items[0]["img"].min()), float(items[0]["img"].max())
    assert -1 <= low < 0 < high <= 1


@pytest.mark.parametrize("name", ["16 of uint16", "16 of Hounsfield units", "float16", "float32"])
def test_a_model_of_it_trains_validates_and_is_evaluated(name, tree, out, tmp_path):  # noqa: F811
    depth, kind, low, high, wanted = KEPT[name]
    deep_tree(tree, kind, low, high, patients=4)
    patients = [f"P-{p:02d}" for p in range(1, 5)]
    seed = next(s for s in range(99) if [split_of(p, (50, 50, 0), s) for p in patients].count("train") == 2)
    import_tree(tree, out, depth=depth, split=(50, 50, 0), seed=seed)
    window = (-1000.0, 400.0) if low == -1024 else ()
    made = trained(tmp_path / "run", out / "train.h5", out / "val.h5", window=window)
    held_out = RaterDataset(out / "val.h5")
    images, _ = held_out.batch([0, 1])
    assert images.numpy().dtype == wanted
    img = made.preprocess(images)
    if window:
        unit = (images.float().clamp(-1000, 400) + 1000) / 1400
        assert torch.allclose(img, 2 * unit - 1, atol=1e-6)
    summary = evaluate.evaluate(made, held_out, tmp_path / "e", n=2, steps=2, progress=False)
    assert 0 <= summary["model"]["ged"] <= 2 and list((tmp_path / "run" / "previews").glob("*.png"))


def test_a_deep_slice_gets_the_masks_that_it_has_as_a_picture(tree, out, tmp_path):  # noqa: F811
    """The file's slice and the picture that it came from are the same image for a model."""
    made = deep_tree(tree, np.int16, -1000, 400)
    import_tree(tree, out, depth=16, **ALL_IN_TRAIN)
    model = bf.BerDiff(bf.UNet(model_channels=32, channel_mult=(1,)), preprocessing=bf.Preprocessing(size=(H, W)))
    images, _ = RaterDataset(out / "train.h5").batch([0])
    alone = bf.sample(model, model.preprocess(images), n=2, steps=2, seed=3)[0, :, 0].numpy()
    assert np.array_equal(bf.sample_volume(model, made["P-01", 0, 0][0], n=2, steps=2, seed=3).masks[:, 0], alone)


# ---------------------------------------------------------------------- volumes


@pytest.mark.parametrize(("depth", "wanted"), [(None, "float32"), (16, "int16"), ("float16", "float16")])
def test_volumes_keep_their_units(tmp_path, depth, wanted):
    options = {} if depth is None else {"depth": depth}
    import_volumes(brats(tmp_path / "t", 2), tmp_path / "o", "brats", regions="WT=1,2,4", **ALL_IN_TRAIN, **options)
    plain = brats(tmp_path / "u", 2)
    import_volumes(plain, tmp_path / "p", "brats", regions="WT=1,2,4", **ALL_IN_TRAIN)
    a, b = RaterDataset(tmp_path / "o" / "train.h5"), RaterDataset(tmp_path / "p" / "train.h5")
    x, y = a.whole()[0], b.whole()[0]
    assert x.dtype == wanted and np.array_equal(x, y.astype(wanted)) and np.array_equal(a.statistics, b.statistics)
    trained(tmp_path / "run", tmp_path / "o" / "train.h5", rotate90=False)


# ---------------------------------------------------------------------- what is refused


def _second(x: np.ndarray):
    return lambda root: np.save(first(root, nodule="P-02/nodule-0").with_suffix(".npy"), x)


ONES = np.ones((H, W))
BAD_IMAGES = {
    "beyond uint16": (16, np.uint16, _second(70000 * ONES.astype(np.int64)), "70000", "uint16, as P-01/nodule-0"),
    "below uint16": (16, np.uint16, _second(-5 * ONES.astype(np.int16)), "from -5 to -5", "holds 0 to 65535"),
    "beyond int16": (16, np.int16, _second(40000 * ONES.astype(np.uint16)), "40000", "holds -32768 to 32767"),
    "not whole": (16, np.int16, _second(0.5 * ONES), "values that are not whole, as 0.5", "depth 16"),
    "float16 overflow": ("float16", np.int16, _second(65505 * ONES), "65505", "depth float16 holds -65504 to 65504"),
    "float16 below": ("float16", np.int16, _second(-1e5 * ONES), "from -100000", "depth float16 holds"),
    "float32 overflow": ("float32", np.int16, _second(1e39 * ONES), "1e+39", "depth float32 holds"),
    "NaN": ("float32", np.int16, _second(np.nan * ONES), "has NaN or infinite values", ""),
    "infinite": ("float16", np.int16, _second(np.inf * ONES), "has NaN or infinite values", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_depth_that_does_not_hold_the_values(name, tree, out):  # noqa: F811
    depth, kind, change, *words = BAD_IMAGES[name]
    deep_tree(tree, kind, 0, 200)
    change(tree)
    with pytest.raises(ValueError, match=r"^P-02/nodule-0/images/slice-0.npy: ") as caught:
        import_tree(tree, out, depth=depth, **ALL_IN_TRAIN)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
    assert left(out) == []
    report = import_tree(tree, out, depth=depth, on_error="skip", **ALL_IN_TRAIN)
    assert [one.path for one in report.problems] == ["P-02/nodule-0/images/slice-0.npy"]
    assert report.splits["train"].slices == 5


def test_an_image_that_is_left_out_decides_nothing(tree, out):  # noqa: F811
    deep_tree(tree, np.uint16, 0, 60000)
    np.save(first(tree).with_suffix(".npy"), 0.5 * ONES)
    report = import_tree(tree, out, depth=16, on_error="skip", **ALL_IN_TRAIN)
    assert len(report.problems) == 1 and {image.dtype.name for image, _ in by_path(out).values()} == {"uint16"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(depth="double"), r"depth must be one of \['8', '16', 'float16', 'float32'\], got 'double'"),
        (dict(depth=12), "depth must be one of .*got '12'"),
        (dict(depth=16, window=(-1000, 400)), "window is what becomes 0 and 255 of 8 bits, and depth '16' keeps"),
    ],
)
def test_bad_options(options, words, tree, out):  # noqa: F811
    deep_tree(tree, np.int16, 0, 200)
    with pytest.raises(ValueError, match=words):
        import_tree(tree, out, **options)
    assert left(out) == []


BAD_VOLUMES = {
    "8 bits": (8, np.full((10, 40, 36), 700, np.int16), "depth 8 holds 0 to 255"),
    "float16": ("float16", np.full((10, 40, 36), 1e5, np.float32), "depth float16 holds"),
    "16 bits": (16, np.full((10, 40, 36), 0.25, np.float32), "that are not whole, as 0.25"),
}


@pytest.mark.parametrize("name", BAD_VOLUMES)
def test_a_volume_that_the_depth_does_not_hold(name, tmp_path):
    depth, x, words = BAD_VOLUMES[name]
    brats(tmp_path / "t", 2)
    save_volume(tmp_path / "t" / "BraTS2021_00001" / "BraTS2021_00001_flair.nii.gz", x)
    if depth == 8:
        for channel in ("flair", "t1", "t1ce", "t2"):
            path = tmp_path / "t" / "BraTS2021_00000" / f"BraTS2021_00000_{channel}.nii.gz"
            save_volume(path, np.full((10, 40, 36), 7, np.int16))
    status, said = command("import", tmp_path / "t", tmp_path / "o", "--depth", depth, "--split", "100/0/0", "--quiet")
    assert status == 1 and "BraTS2021_00001_flair.nii.gz: " in said and words in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
