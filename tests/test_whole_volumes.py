# SPDX-License-Identifier: Apache-2.0
"""Networks of three dimensions: files of volumes, their batches, a run, its evaluation, masks of a scan."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from import_trees import pictures, slices_tree
from small_runs import command, network_inputs, trained
from test_context import scan
from test_importers_volumes import ALL, brats
from test_importers_volumes import save as save_volume

import berdiff_fast as bf
from berdiff_fast.data.batches import Batches
from berdiff_fast.data.examples import Augmentation, TrainingExamples
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.data.importers import import_volumes
from berdiff_fast.imaging import shown, volumes
from berdiff_fast.network.prior import ModePrior

SIDE = 16


def spheres(count: int, first: int = 0, channels: int = 0, regions: int = 0) -> dict[str, np.ndarray]:
    """Volumes of 16^3 with a bright ball each, and three raters who differ by a voxel in its radius."""
    images, masks = [], []
    for i in range(first, first + count):
        random = np.random.default_rng(i)
        z, y, x = np.ogrid[:SIDE, :SIDE, :SIDE]
        middle = random.uniform(6, 10, 3)
        r = np.sqrt((z - middle[0]) ** 2 + (y - middle[1]) ** 2 + (x - middle[2]) ** 2)
        image = (100 + 80 * (r < 4) + random.normal(0, 8, (SIDE,) * 3)).astype(np.float32)
        images.append(np.stack([image, 10 * image][:channels]) if channels else image)
        balls = np.stack([r < 3 + k for k in range(3)])
        masks.append(np.stack([balls, balls & (r < 3)][:regions], axis=1) if regions else balls)
    return {
        "image": np.stack(images),
        "mask": np.stack(masks).astype(np.uint8),
        "patient_id": np.arange(first, first + count, dtype=np.int32),
    }


def write(path: Path, content: dict, **attributes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, value in content.items():
            file[name] = value
        file.attrs.update(attributes)
    return path


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("channels", "regions", "how"),
    [(0, 0, "argument"), (0, 0, "attribute"), (2, 0, "shapes"), (0, 2, "shapes"), (2, 2, "shapes"), (1, 1, "shapes")],
)
@pytest.mark.parametrize("in_memory", [False, True])
def test_files_of_volumes(tmp_path, channels, regions, how, in_memory):
    """(N, [C,] D, H, W) and (N, R, [K,] D, H, W); where shapes could be those of slices, something has to say it."""
    content = spheres(3, channels=channels, regions=regions)
    path = write(tmp_path / "v.h5", content, **({"spatial_dims": 3} if how == "attribute" else {}))
    data = RaterDataset(path, in_memory=in_memory, spatial_dims=3 if how == "argument" else None)
    assert (data.spatial_dims, data.image_size, data.raters) == (3, (SIDE,) * 3, 3)
    assert (data.img_channels, data.mask_channels) == (channels or 1, regions or 1)
    image, masks = data[1]
    assert image.shape == (channels or 1, SIDE, SIDE, SIDE) and masks.shape == (3, regions or 1, SIDE, SIDE, SIDE)
    assert np.array_equal(image.numpy().reshape(content["image"][1].shape), content["image"][1])
    assert np.array_equal(data.batch([0, 2])[1].numpy().reshape(2, *content["mask"].shape[1:]), content["mask"][[0, 2]])
    assert torch.equal(data.one_rater(1, 2)[1], masks[2])


def test_slices_of_channels_and_regions_are_what_they_were(tmp_path):
    data = RaterDataset(write(tmp_path / "s.h5", spheres(2)))
    assert (data.spatial_dims, data.img_channels, data.mask_channels, data.image_size) == (2, SIDE, SIDE, (SIDE, SIDE))


BAD_FILES = {
    "slices by shape": (lambda c: c.update(image=c["image"][:, 0]), {}, 3, "image must be (N, D, H, W) or"),
    "mask of slices": (lambda c: c.update(mask=c["mask"][:, :, 0]), {}, 3, "mask must be (N, R, D, H, W) or"),
    "another depth": (lambda c: c.update(mask=c["mask"][:, :, 1:]), {}, 3, "does not fit image"),
    "it says slices": (lambda c: None, {"spatial_dims": 2}, 3, "holds slices by its attribute spatial_dims, expected"),
    "it says volumes": (
        lambda c: None,
        {"spatial_dims": 3},
        2,
        "holds volumes by its attribute spatial_dims, expected",
    ),
    "four dimensions": (lambda c: None, {"spatial_dims": 4}, None, "spatial_dims must be 2 or 3, got"),
    "a word": (lambda c: None, {"spatial_dims": "three"}, None, "spatial_dims must be 2 or 3, got 'three'"),
    "two sides": (lambda c: None, {"pixel_spacing": [1.0, 2.0]}, 3, "pixel_spacing must be three positive numbers"),
    "in context": (lambda c: None, {"context_slices": 1}, 3, "slices must have a multiple of 3 channels"),
    "ignored slices": (lambda c: c.update(ignore=c["mask"][:, 0, 0]), {}, 3, "ignore must be"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name, tmp_path):
    change, attributes, dims, words = BAD_FILES[name]
    content = spheres(2)
    change(content)
    path = write(tmp_path / "v.h5", content, **attributes)
    with pytest.raises(ValueError) as caught:
        RaterDataset(path, spatial_dims=dims).ignored([0])
    assert str(caught.value).startswith(str(path)) and words in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------------- augmentation and batches


def test_augmentation_of_volumes():
    """Mirrored along each axis, turned in the plane; a mask as its image."""
    x = torch.from_numpy(spheres(1)["image"])
    y = (x > 140).float()
    seen = set()
    for seed in range(60):
        img, mask = Augmentation(flip=True, rotate90=True)(x, y, np.random.default_rng(seed))
        assert torch.equal(mask, (img > 140).float()) and torch.equal(img.flatten().sort()[0], x.flatten().sort()[0])
        seen.add(img.numpy().tobytes())
    assert len(seen) == 16  # eight symmetries of a square, and upside down
    img, mask = Augmentation(rotate=20.0, scale=0.2)(x, y, np.random.default_rng(1))
    assert img.shape == x.shape and set(mask.unique().tolist()) == {0.0, 1.0}
    assert (mask != (img > 140)).float().mean() < 0.02  # but for the border, where voxels are mixed


def test_a_turn_is_that_of_the_slices_and_a_zoom_of_all_axes():
    x = torch.from_numpy(spheres(1)["image"])
    y = (x > 140).float()
    turned, _ = Augmentation._affine(x, y, 15.0, 1.0)
    slices = [Augmentation._affine(x[:, d], y[:, d], 15.0, 1.0)[0] for d in range(SIDE)]
    assert torch.allclose(turned, torch.stack(slices, dim=1), atol=1e-3)
    zoomed = Augmentation._affine(x, y, 0.0, 1.25)[1]
    assert 1.6 < float(zoomed.sum() / y.sum()) < 2.3  # 1.25^3 = 1.95


def test_numbers_of_slices_are_what_they_were():
    """What a volume draws beyond them comes last."""
    x = torch.arange(64.0).reshape(1, 8, 8)
    for seed in range(8):
        a, b = np.random.default_rng(seed), np.random.default_rng(seed)
        img, _ = Augmentation(True, True)(x, x, a)
        mirror, turns = b.random(2) < 0.5, int(b.integers(4))
        wanted = x.flip([axis for axis, m in zip((-2, -1), mirror, strict=True) if m])
        assert torch.equal(img, wanted.rot90(turns, (-2, -1)))


@pytest.mark.parametrize("resident", [False, True])
def test_batches_are_their_items(tmp_path, resident):
    content = spheres(4, channels=2, regions=2)
    content["ignore"] = (np.random.default_rng(0).random((4, SIDE, SIDE, SIDE)) < 0.1).astype(np.uint8)
    data = RaterDataset(write(tmp_path / "v.h5", content), in_memory=True)
    examples = TrainingExamples(
        data, bf.Preprocessing(per_channel=True), 50, 1, Augmentation(True, True, 9, 0.1), crop=8
    )
    batches = Batches(examples, resident=resident)
    batch = batches(range(3, 6))
    assert batch["img"].shape == (3, 2, SIDE, 8, 8) and batch["y_0"].shape == batch["ignore"].shape == (
        3,
        2,
        SIDE,
        8,
        8,
    )
    for key, value in batch.items():
        assert torch.equal(value, torch.stack([examples[p][key] for p in range(3, 6)]))
    streamed = list(batches.stream([range(0, 3), range(3, 6)]))
    assert torch.equal(streamed[1]["y_0"], batch["y_0"]) and len(streamed) == 2


def test_the_slice_in_the_middle_is_shown():
    images, masks = torch.rand(2, 1, 5, 8, 8), torch.rand(2, 3, 2, 5, 8, 8) > 0.5
    assert torch.equal(shown.of_images(images), images[:, 0, 2])
    assert torch.equal(shown.of_masks(masks), masks[:, :, 0, 2])


# ---------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on files without any attribute, by network.dims alone."""
    folder = tmp_path_factory.mktemp("volumes")
    write(folder / "train.h5", spheres(6))
    write(folder / "val.h5", spheres(3, first=100))
    settings = dict(dims="3", steps=25, validate_every=25, learning_rate=4e-3, rotate=10.0)
    trained(folder / "run", folder / "train.h5", folder / "val.h5", **settings)
    return folder


def test_a_model_learns_is_saved_and_drawn_from(run, tmp_path):
    made = bf.load(run / "run" / "model.safetensors")
    assert made.spatial_dims == 3 and made.network.config["dims"] == 3 and made.preprocessing.size == (SIDE,) * 3
    assert [path.name for path in (run / "run" / "previews").iterdir()] == ["step-00000025.png"]
    made.save(tmp_path / "m.safetensors")
    again = bf.load(tmp_path / "m.safetensors")
    raw = spheres(2, first=50)
    img = again.preprocess(torch.from_numpy(raw["image"])[:, None])
    masks = bf.sample(again, img, n=3, steps=3, seed=1)
    assert masks.shape == (2, 3, 1, SIDE, SIDE, SIDE) and masks.dtype == torch.bool
    assert torch.equal(masks, bf.sample(made, img, n=3, steps=3, seed=1))
    truth = torch.from_numpy(raw["mask"][:, 1]) > 0
    both = 2 * (masks[:, 0, 0] & truth).sum() / (masks[:, 0, 0].sum() + truth.sum())
    assert float(both) > 0.5, "a bright ball is found after 25 steps"
    summary = bf.summarize(masks)
    assert summary.mean.shape == (2, 1, SIDE, SIDE, SIDE)


def test_it_is_evaluated(run, tmp_path):
    """Also where the file does not say that it holds volumes: the model does."""
    words = ["--model", run / "run" / "model.safetensors", "--data", run / "val.h5", "--output", tmp_path / "e"]
    assert command("evaluate", *words, "--steps", 2, "-n", 3, "--save-masks")[0] == 0
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert summary["data"]["slices"] == 3 and summary["data"]["spatial_dims"] == 3
    with h5py.File(tmp_path / "e" / "masks.h5") as file:
        assert file["mask"].shape == (3, 3, 1, SIDE, SIDE, SIDE)
    assert (tmp_path / "e" / "cases.png").is_file()


def test_it_goes_on_where_it_stopped(run, tmp_path):
    settings = dict(dims="3", learning_rate=4e-3, rotate=10.0, checkpoint_every=2, decay="constant")
    whole = trained(tmp_path / "a", run / "train.h5", steps=4, **settings)
    trained(tmp_path / "b", run / "train.h5", steps=2, **settings)
    parts = trained(tmp_path / "b", run / "train.h5", steps=4, **settings)
    for name, tensor in whole.weights().items():
        assert torch.equal(tensor, parts.weights()[name]), name


def test_channels_regions_and_memory_format(tmp_path):
    """Two channels, two regions, statistics, workers' way of reading, channels last."""
    content = spheres(4, channels=2, regions=2)
    content["statistics"] = np.tile([[0.0, 200.0, 110.0, 20.0], [0.0, 2000.0, 1100.0, 200.0]], (4, 1, 1))
    regions = json.dumps([["ball", [1, 2]], ["core", [1]]])
    write(tmp_path / "t.h5", content, channels=json.dumps(["a", "b"]), regions=regions)
    settings = dict(in_memory=False, channels_last=True)
    made = trained(tmp_path / "run", tmp_path / "t.h5", **settings)
    assert made.preprocessing.mode == "z-score" and made.preprocessing.by_volume and made.channels == ("a", "b")
    img = made.preprocess(torch.from_numpy(content["image"][:1]), made.preprocessing.statistics(
        torch.from_numpy(content["image"][:1])))  # fmt: skip
    masks = bf.sample(made, img, n=4, steps=2, seed=0)
    assert masks.shape == (1, 4, 2, SIDE, SIDE, SIDE) and bool((masks[:, :, 1] <= masks[:, :, 0]).all())


BAD_SETTINGS = {
    "patches": (dict(patch_size=2), "network.patch_size must be 1 for volumes, which .* holds; got 2"),
    "window": (dict(output_crop=8), "network.output_crop must be 0 for volumes"),
    "distance": (dict(distance=True), "network.distance must be False for volumes"),
    "prior": (dict(prior={"enabled": True}), "prior.enabled must be False for volumes"),
    "halvings": (dict(channel_mult=(1, 1, 1, 1, 1, 1)), "volumes must have a height and width divisible by 32"),
    "crop": (dict(crop=32), r"augmentation.crop must be at most the images of .*, \(16, 16, 16\), got 32"),
    "dims": (dict(dims="4"), r"network.dims must be one of \['auto', '2', '3'\], got '4'"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings(name, tmp_path):
    settings, words = BAD_SETTINGS[name]
    path = write(tmp_path / "t.h5", spheres(2), spatial_dims=3)
    with pytest.raises(ValueError, match=words):
        trained(tmp_path / "run", path, **settings)
    assert not (tmp_path / "run").exists()


def test_dims_that_the_file_has_not(tmp_path):
    path = write(tmp_path / "t.h5", spheres(2), spatial_dims=3)
    with pytest.raises(ValueError, match="holds volumes by its attribute spatial_dims, expected slices"):
        trained(tmp_path / "run", path, dims="2")
    with pytest.raises(ValueError, match="holds slices by its attribute spatial_dims, expected volumes"):
        trained(tmp_path / "run", write(tmp_path / "s.h5", spheres(2), spatial_dims=2), dims="3")
    slices = write(tmp_path / "v.h5", {**spheres(2, first=9), "image": spheres(2)["image"][:, 0]}, spatial_dims=3)
    with pytest.raises(ValueError, match="v.h5: image must be"):
        trained(tmp_path / "run", path, slices)
    assert not (tmp_path / "run").exists()


def test_volumes_that_look_like_slices_are_pointed_out(tmp_path, caplog):
    trained(tmp_path / "run", write(tmp_path / "t.h5", spheres(2)), steps=1)
    assert any("if these are volumes of as many slices, network.dims: 3" in one.getMessage() for one in caplog.records)


def test_evaluating_a_model_of_the_other_kind(run, tmp_path):
    write(tmp_path / "s.h5", spheres(2), spatial_dims=2)
    words = ["--model", run / "run" / "model.safetensors", "--data", tmp_path / "s.h5", "--output", tmp_path / "e"]
    status, said = command("evaluate", *words)
    assert status == 1 and "holds slices by its attribute spatial_dims, expected volumes" in said
    assert not (tmp_path / "e").exists()


def test_a_model_says_of_volumes_what_is_of_volumes():
    network = bf.UNet(dims=3, model_channels=32, channel_mult=(1,))
    for name, value in (("size", (16, 16)), ("pixel_spacing", (1.0, 1.0))):
        with pytest.raises(ValueError, match=f"{name} must be 3 numbers for spatial_dims = 3"):
            bf.BerDiff(network, preprocessing=bf.Preprocessing(**{name: value}))
    with pytest.raises(ValueError, match="size must be 2 numbers for spatial_dims = 2"):
        bf.BerDiff(bf.UNet(model_channels=32), preprocessing=bf.Preprocessing(size=(8, 16, 16)))
    with pytest.raises(ValueError, match="context_slices must be 0 for spatial_dims = 3"):
        bf.BerDiff(bf.UNet(dims=3, img_channels=3), preprocessing=bf.Preprocessing(context_slices=1))
    with pytest.raises(ValueError, match="mode_prior are for images"):
        bf.BerDiff(network, mode_prior=ModePrior(1, [4], channels=[8]))


# ---------------------------------------------------------------------- import and scans


def test_import_of_whole_volumes(tmp_path):
    """Cases of several depths, in the smallest size that holds them."""
    images = [scan(tmp_path / "t" / f"case{i}", i, shape=(5 + i, 27, 39)) for i in range(3)]
    report = import_volumes(tmp_path / "t", tmp_path / "o", "qubiq", whole_volumes=True, **ALL)
    data = RaterDataset(tmp_path / "o" / "train.h5")
    assert report.size == data.image_size == (7, 32, 48) and data.spatial_dims == 3 and len(data) == 3
    assert data.pixel_spacing == (2.5, pytest.approx(0.8), pytest.approx(0.703125)) and data.statistics.shape == (
        3,
        1,
        4,
    )
    assert "3 volumes of 3 patients" in report.to_text() and (tmp_path / "o" / "preview.png").is_file()
    for i, image in enumerate(images):
        found, masks = data[i]
        start = (5 + i - 7) // 2
        inside = found[0, -start : 5 + i - start, 3:30, 5:44].numpy()
        assert np.array_equal(inside, image) and found.min() == image.min()
        assert masks.shape == (2, 1, 7, 32, 48)
    status, said = command("import", tmp_path / "t", tmp_path / "p", "--volumes", "--size", 4, 32, 48, "--quiet")
    assert status == 1 and "marks more than the 4 x 32 x 48 voxels that are cut out" in said
    assert not (tmp_path / "p").exists()


def test_import_around_what_is_not_0(tmp_path):
    options = dict(whole_volumes=True, regions="WT=1,2,4 ET=4", **ALL)
    report = import_volumes(brats(tmp_path / "t"), tmp_path / "o", "brats", **options)
    data = RaterDataset(tmp_path / "o" / "train.h5")
    assert report.size == (10, 32, 32) and data.img_channels == 4 and data.foreground
    made = trained(tmp_path / "run", tmp_path / "o" / "train.h5", steps=1)
    assert made.preprocessing.foreground and made.regions.names == ("WT", "ET")
    case = tmp_path / "t" / "BraTS2021_00001"
    scans = [volumes.read(case / f"{case.name}_{name}.nii.gz") for name in made.channels]
    drawn = bf.sample_volume(made, scans, n=2, steps=1, seed=0)
    assert bool((drawn["ET"].masks <= drawn["WT"].masks).all()) and drawn["ET"].masks.shape == (2, 10, 40, 36)
    assert drawn.plan["whole_volume"]["size"] == [10, 32, 32]


@pytest.fixture(scope="module")
def scans_run(tmp_path_factory):
    """A run on whole scans: its folder and data."""
    folder = tmp_path_factory.mktemp("scans")
    for i in range(6):
        scan(folder / "t" / f"case{i:02d}", i, padding=i == 0)
    import_volumes(folder / "t", folder / "o", "qubiq", whole_volumes=True, split=(60, 40, 0))
    made = trained(folder / "run", folder / "o" / "train.h5", folder / "o" / "val.h5", rotate90=False)
    torch.manual_seed(0)
    with torch.no_grad():  # masks that are neither empty nor full
        made.network.out[-1].weight.normal_(0, 0.3)
    made.save(folder / "run" / "model.safetensors")
    return folder


@pytest.mark.parametrize("case", [0, 3])
def test_the_network_is_shown_the_bits_of_the_file(scans_run, case):
    """The imported volume, and the volume that ``sample_volume`` is given; with padding, and without."""
    made = bf.load(scans_run / "run" / "model.safetensors")
    name = next(
        n for n in ("train", "val") if case in RaterDataset(scans_run / "o" / f"{n}.h5").provenance["patient_id"]
    )
    data = RaterDataset(scans_run / "o" / f"{name}.h5")
    i = data.provenance["patient_id"].tolist().index(case)
    volume = volumes.read(scans_run / "t" / f"case{case:02d}" / "image.nii.gz")
    seen, _ = network_inputs(made, volume)
    of_file = made.preprocess(data.batch([i])[0], data.statistics_for(made.preprocessing, [i]))
    assert torch.equal(seen, of_file)


def test_masks_of_a_scan_are_on_its_grid(scans_run, tmp_path):
    made, place = scans_run / "run" / "model.safetensors", scans_run / "t" / "case02" / "image.nii.gz"
    words = ["--model", made, "--n", 3, "--steps", 2, "--seed", 4, "--quiet", "--report", "--output", tmp_path / "s"]
    assert command("sample", place, *words, "--raters", place.with_name("seg02.nii.gz")) == (0, "")
    volume, mask = volumes.read(place), volumes.read(tmp_path / "s" / "mask_002.nii.gz")
    assert mask.origin == volume.origin and mask.spacing == volume.spacing and mask.array.shape == volume.array.shape
    loaded = bf.load(made)
    drawn = bf.sample_volume(loaded, volume, n=3, steps=2, seed=4)
    assert np.array_equal(mask.array > 0, drawn.mask(2))
    img, _ = network_inputs(loaded, volume)
    alone = bf.sample(loaded, img, n=3, steps=2, seed=4)[0, :, 0].numpy()
    assert 0.01 < drawn.masks.mean() < 0.99 and np.array_equal(drawn.masks, alone[:, :, 3:30, 5:44])
    assert (tmp_path / "s" / "report.html").is_file()
    summary = json.loads((tmp_path / "s" / "summary.json").read_text())
    assert summary["sampled"]["whole_scan"] and summary["raters"]["voxels_not_compared"] == 0


def test_masks_of_a_shallow_scan(scans_run, tmp_path):
    """Which is filled up with a slice on either side: its masks are those of the slices between."""
    scan(tmp_path / "shallow", 0, shape=(5, 27, 39))
    made = bf.load(scans_run / "run" / "model.safetensors")
    volume = volumes.read(tmp_path / "shallow" / "image.nii.gz")
    img, _ = network_inputs(made, volume)
    drawn, alone = bf.sample_volume(made, volume, n=2, steps=2, seed=4), bf.sample(made, img, n=2, steps=2, seed=4)
    assert drawn.plan["whole_volume"]["starts"] == [-1, -3, -5] and img.shape[2:] == (7, 32, 48)
    assert drawn.masks.any() and np.array_equal(drawn.masks, alone[0, :, 0, 1:6, 3:30, 5:44].numpy())


def test_another_plane_and_going_on(scans_run, tmp_path):
    made = bf.load(scans_run / "run" / "model.safetensors")
    made.preprocessing = bf.Preprocessing("min-max")
    volume = volumes.read(scans_run / "t" / "case02" / "image.nii.gz")
    options = dict(n=9, steps=2, seed=1, plane="coronal")
    whole = bf.sample_volume(made, volume, **options)
    assert whole.masks.shape == (9, *volume.array.shape) and whole.plan["axis"] == 1
    bf.sample_volume(made, volume, work=tmp_path / "w", **options)
    again = bf.sample_volume(made, volume, work=tmp_path / "w", **options)
    assert np.array_equal(whole.masks, again.masks)
    # By hand: rows in front, 7 x 39 in 8 x 40.
    x = np.moveaxis(volume.array, 1, 0).astype(np.float32)
    padded = np.full((27, 8, 40), x.min(), np.float32)
    padded[:, 1:8, 1:40] = x
    alone = bf.sample(made, made.preprocess(torch.from_numpy(padded)), n=9, steps=2, seed=1)[0, :, 0, :, 1:8, 1:40]
    assert np.array_equal(np.moveaxis(whole.masks, 2, 1), alone.numpy())


def test_a_larger_scan_is_drawn_at_its_own_size(scans_run, tmp_path):
    made = bf.load(scans_run / "run" / "model.safetensors")
    scan(tmp_path / "large", 0, shape=(9, 40, 61))
    drawn = bf.sample_volume(made, volumes.read(tmp_path / "large" / "image.nii.gz"), n=1, steps=1)
    assert drawn.plan["whole_volume"] == {"starts": [0, 0, -1], "size": [9, 40, 62]}


@pytest.mark.parametrize(
    ("options", "place", "words"),
    [
        (dict(slices=(0, 2)), {}, r"slices is for models of slices, and this one draws whole volumes; got \(0, 2\)"),
        (dict(center=(3, 3)), {}, "center is for models of slices"),
        (dict(center_mm=(3, 3, 3)), {}, "center_mm is for models of slices"),
        (dict(roi=(0, 5, 0, 5)), {}, "roi is for models of slices"),
        (
            {},
            dict(spacing=(0.703125, 0.8, 5.0)),
            r"volume must have voxels of .* mm \(slice, row, column\), got \(5.0, 0.8",
        ),
        ({}, dict(spacing=None), "volume must say its spacing for this model, whose voxels are"),
    ],
)
def test_bad_scans(scans_run, options, place, words):
    made = bf.load(scans_run / "run" / "model.safetensors")
    volume = volumes.read(scans_run / "t" / "case02" / "image.nii.gz")
    given = volumes.Volume(volume.array, **{"spacing": volume.spacing, **place})
    with pytest.raises(ValueError, match=words):
        bf.sample_volume(made, given, n=1, steps=1, **options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "32", "48"], "size must be (depth, height, width) of whole volumes, three ints"),
        (["--size", "0", "32", "48"], "size must be (depth, height, width) of whole volumes, three ints"),
        (["--size", "5", "32", "8"], "marks more than the 5 x 32 x 8 voxels"),
        (["--size", "7", "32", "48", "--context", "1"], "context_slices is for slices of volumes"),
    ],
)
def test_bad_imports(scans_run, tmp_path, words, message):
    status, said = command("import", scans_run / "t", tmp_path / "o", "--volumes", "--quiet", *words)
    assert status == 1 and message in said and said.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_pictures_are_no_volumes(tmp_path):
    slices_tree(tmp_path / "t", pictures())
    for words in (["--volumes"], ["--size", "3", "8", "8"]):
        status, said = command("import", tmp_path / "t", tmp_path / "o", *words)
        wanted = (
            "volumes is for trees of volumes" if words[0] == "--volumes" else "size must be (height, width), two ints"
        )
        assert status == 1 and wanted in said and not (tmp_path / "o").exists()


def test_volumes_of_one_file_are_of_one_size(tmp_path):
    """Given a size, a scan that has more is refused by name, and one that has less is filled up."""
    scan(tmp_path / "t" / "a", 0, shape=(7, 27, 39))
    scan(tmp_path / "t" / "b", 0, shape=(3, 27, 39))
    save_volume(tmp_path / "t" / "b" / "seg01.nii.gz", np.zeros((4, 27, 39), np.uint8), spacing=(0.703125, 0.8, 2.5))
    status, said = command("import", tmp_path / "t", tmp_path / "o", "--volumes", "--split", "100/0/0", "--quiet")
    assert status == 1 and "b/seg01.nii.gz: has the shape (4, 27, 39)" in said
    assert not (tmp_path / "o").exists()
