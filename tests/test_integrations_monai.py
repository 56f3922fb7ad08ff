# SPDX-License-Identifier: Apache-2.0
"""MONAI's inferers with our scheduler, MONAI's network as our model, MONAI's dictionaries and our files."""

from __future__ import annotations

import importlib
import sys

import h5py
import numpy as np
import pytest
import torch
from support import METHODS, PREDICTIONS, assert_binomial, phantom_file, toy_image

pytest.importorskip("monai", reason="MONAI is not installed (pip install 'berdiff_fast[monai]')")
pytest.importorskip("einops", reason="MONAI's diffusion network wants einops (pip install 'berdiff_fast[monai]')")

from monai.data import DataLoader, Dataset, MetaTensor
from monai.inferers import DiffusionInferer
from monai.networks.nets import DiffusionModelUNet
from monai.transforms import Compose, Flipd, Rotate90d, ScaleIntensityd, SpatialPadd

import berdiff_fast as bf
from berdiff_fast import ops
from berdiff_fast.data.hdf5 import RaterDataset, check_disjoint
from berdiff_fast.integrations.monai import BernoulliScheduler, as_dicts, as_model, to_hdf5

B, N, SIZE = 2, 3, 16
SEEDS = bf.image_seeds(7, B)


def unet(spatial_dims: int = 2, mask_channels: int = 1, img_channels: int = 1) -> DiffusionModelUNet:
    torch.manual_seed(0)
    network = DiffusionModelUNet(
        spatial_dims,
        in_channels=mask_channels + img_channels,
        out_channels=mask_channels,
        channels=(8, 8),
        attention_levels=(False, False),
        num_res_blocks=1,
        norm_num_groups=4,
        num_head_channels=8,
    ).eval()
    # MONAI's last convolution starts at zero, and with it all logits would be.
    torch.nn.init.normal_(network.out[2].conv.weight, std=0.5)
    return network


@pytest.fixture(scope="module")
def network() -> DiffusionModelUNet:
    return unet()


@pytest.fixture(scope="module")
def img() -> torch.Tensor:
    return toy_image(B, 1, SIZE, SIZE)


# ---------------------------------------------------------------------- networks


def test_masks_of_a_monai_network(network, img):
    """The same whatever the batch, and those of a loop written out."""
    model = as_model(network)
    assert (model.mask_channels, model.img_channels, model.spatial_dims) == (1, 1, 2)
    options = dict(n=N, steps=5, schedule="cosine2", prediction="epsilon", spacing="trailing", seed=7)
    masks = bf.sample(model, img, **options)
    assert masks.shape == (B, N, 1, SIZE, SIZE) and 0.05 < masks.float().mean() < 0.95
    for max_batch in (1, 2, 4):
        assert torch.equal(bf.sample(model, img, max_batch=max_batch, **options), masks)
    assert torch.equal(bf.sample(model, MetaTensor(img), **options), masks)
    assert torch.equal(bf.sample(bf.BerDiff(model, "cosine2", spacing="trailing"), img, N, 5, seed=7), masks)

    schedule = bf.NoiseSchedule()
    taus = schedule.subsequence(5, "trailing")
    table = schedule.step_table(taus).float()
    y = ops.initial_noise(SEEDS, (1, SIZE, SIZE), samples_per_image=N, dtype=torch.float32)
    for row in range(4, -1, -1):
        with torch.no_grad():
            z = network(torch.cat([y, img.repeat_interleave(N, 0)], 1), torch.full((B * N,), taus[row]))
        y = ops.sample_step(y, z, SEEDS, table[row], taus[row], threshold=row == 0)
    assert torch.equal(y.bool().reshape(masks.shape), masks)


def test_volumes_and_channels():
    model = as_model(unet(3, mask_channels=2, img_channels=3))
    assert (model.mask_channels, model.img_channels, model.spatial_dims) == (2, 3, 3)
    masks = bf.sample(model, toy_image(3, 8, 8, 8), 2, 2, spacing="trailing", schedule="cosine2", prediction="y_0")
    assert masks.shape == (1, 2, 2, 8, 8, 8)


def test_as_model_refuses():
    network = torch.nn.Conv2d(2, 1, 1)
    assert as_model(network, spatial_dims=2).img_channels == 1
    for arguments, message in [
        (dict(network=lambda x: x), "network must be a torch.nn.Module, got function"),
        (dict(network=network), "spatial_dims must be given for a Conv2d, which has no spatial_dims"),
        (dict(network=network, spatial_dims=4), "spatial_dims must be 2 or 3, got 4"),
        (dict(network=torch.nn.Identity()), "mask_channels must be given for a Identity, which has no out_channels"),
        (dict(network=network, mask_channels=2), "network must have in_channels for mask and image together, got 2 wi"),
        (dict(network=network, mask_channels=0), "mask_channels must be at least 1, got 0"),
        (dict(network=network, img_channels=0, spatial_dims=2), "img_channels must be at least 1, got 0"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            as_model(**arguments)


# ---------------------------------------------------------------------- MONAI's inferer


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_monais_inferer_draws_the_masks_of_sample(network, img, method, prediction):
    scheduler = BernoulliScheduler(prediction_type=prediction, method=method, timestep_spacing="trailing")
    scheduler.set_timesteps(5, seeds=SEEDS)
    noise = scheduler.initial_noise((B * N, 1, SIZE, SIZE))
    inferer = DiffusionInferer(scheduler)
    conditioning = img.repeat_interleave(N, 0)
    masks, steps = inferer.sample(
        noise, network, scheduler, True, 1, conditioning=conditioning, mode="concat", verbose=False
    )
    expected = bf.sample(
        as_model(network),
        img,
        N,
        5,
        method=method,
        spacing="trailing",
        schedule="cosine2",
        prediction=prediction,
        seed=7,
    )
    assert torch.equal(masks.bool().reshape(expected.shape), expected)
    assert len(steps) == 5 and torch.equal(steps[-1], masks)
    # What a MONAI data loader gives.
    meta = inferer.sample(
        MetaTensor(noise), network, conditioning=MetaTensor(conditioning), mode="concat", verbose=False
    )
    assert torch.equal(meta, masks)


def test_torchs_generator_governs_an_inferer(network, img):
    scheduler = BernoulliScheduler()
    scheduler.set_timesteps(5)

    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        noise = scheduler.initial_noise((B, 1, SIZE, SIZE))
        return DiffusionInferer(scheduler).sample(noise, network, conditioning=img, mode="concat", verbose=False)

    first = draw(0)
    assert torch.equal(draw(0), first) and not torch.equal(draw(1), first)


def test_gaussian_noise_is_refused(network, img):
    scheduler = BernoulliScheduler()
    scheduler.set_timesteps(5)
    inferer = DiffusionInferer(scheduler)
    with pytest.raises(ValueError, match="sample must be masks of 0 and 1, .* scheduler.initial_noise"):
        inferer.sample(torch.randn(B, 1, SIZE, SIZE), network, conditioning=img, mode="concat", verbose=False)
    y_0, t = torch.zeros(B, 1, SIZE, SIZE), torch.tensor([0, 999])
    with pytest.raises(ValueError, match="noise must be uniform"):
        inferer(y_0, network, torch.randn_like(y_0), t, condition=img, mode="concat")


def test_monais_inferer_trains(network, img):
    scheduler = BernoulliScheduler()
    y_0 = (toy_image(B, 1, SIZE, SIZE, seed=1) > 0.5).float()
    noise, t = torch.rand(y_0.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 700])
    logits = DiffusionInferer(scheduler)(y_0, network, noise, t, condition=img, mode="concat")
    y_t = scheduler.add_noise(y_0, noise, t)
    assert torch.equal(logits, network(torch.cat([y_t, img], 1), t))
    loss = ops.diffusion_loss(logits, y_t, y_0, t, scheduler.schedule)
    assert loss.shape == (B,) and bool(torch.isfinite(loss).all())
    loss.sum().backward()
    assert network.conv_in.conv.weight.grad.abs().sum() > 0
    network.zero_grad()


def test_noise_has_the_right_rate():
    scheduler, pixels = BernoulliScheduler(200, "linear"), 2**16
    t, y_0 = torch.tensor([3, 50, 199]), torch.ones(3, 1, pixels)
    flips = (scheduler.add_noise(y_0, torch.rand(y_0.shape, generator=torch.Generator().manual_seed(0)), t) == 0).sum(
        -1
    )
    assert_binomial(flips[:, 0], pixels, (1 - bf.NoiseSchedule("linear", 200).alphas_cumprod[t]) / 2)


def test_what_monai_reads_of_a_scheduler():
    schedule = bf.NoiseSchedule("linear", 50)
    scheduler = BernoulliScheduler(schedule=schedule)
    assert scheduler.schedule is schedule and len(scheduler) == scheduler.num_train_timesteps == 50
    assert scheduler.timesteps.tolist() == list(range(49, -1, -1)) and scheduler.num_inference_steps is None
    for name in ("betas", "alphas", "alphas_cumprod"):
        assert torch.equal(getattr(scheduler, name), getattr(schedule, name).float())
    with pytest.raises(NotImplementedError, match="no velocity"):
        scheduler.get_velocity(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    for arguments, message in [
        (dict(num_train_timesteps=40, schedule=schedule), "num_train_timesteps must be the schedule's 50, got 40"),
        (dict(num_train_timesteps=1), "num_train_timesteps must be at least 2, got 1"),
        (dict(schedule="linear_beta"), "schedule must be one of .*, got 'linear_beta'"),
        (dict(schedule=bf.NoiseSchedule(as_released=True)), "schedule must not be as_released"),
        (dict(prediction_type="v_prediction"), "prediction_type must be one of .*, got 'v_prediction'"),
    ]:
        with pytest.raises(ValueError, match=message):
            BernoulliScheduler(**arguments)


# ---------------------------------------------------------------------- data


def items(patients=("LIDC-7", "LIDC-7", "other")) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for i, patient in enumerate(patients):
        image = MetaTensor(torch.rand(1, 6, 8, generator=generator), meta={"filename_or_obj": f"{i}.nii"})
        mask = (torch.rand(2, 6, 8, generator=generator) < 0.3).float()
        mask[1] *= i != 1
        found.append({"image": image, "label": mask, "third": mask[:1] * 255, "patient": patient})
    return found


def test_dictionaries_to_a_file(tmp_path):
    data, path = items(), tmp_path / "train.h5"
    report = to_hdf5(
        Dataset(data, ScaleIntensityd("image", minv=0, maxv=1)),
        path,
        mask_keys=["label", "third"],
        patient_key="patient",
        window=(0, 1),
    )
    assert (report.patients, report.slices, report.empty_masks, report.missing_masks) == (2, 3, (0, 1, 0), (0, 0, 0))
    assert [p.name for p in tmp_path.iterdir()] == ["train.h5"]
    written = RaterDataset(path)
    assert (written.raters, written.mask_channels, written.image_size) == (3, 1, (6, 8))
    for item, (image, masks) in zip(data, written, strict=True):
        x = item["image"].as_tensor()
        scaled = (x - x.min()) / (x.max() - x.min())
        assert image.dtype is torch.uint8 and torch.equal(image, (scaled * 255).round().to(torch.uint8))
        assert torch.equal(masks[:, 0], torch.cat([item["label"], item["third"]]) > 0)
    assert len(set(written.provenance["patient_id"].tolist())) == 2
    assert written.provenance["slice"].tolist() == [0, 1, 0]
    with h5py.File(path) as file:
        assert [name.decode() for name in file["patient"]] == ["LIDC-7", "LIDC-7", "other"]
        assert [name.decode() for name in file["path"]] == ["0.nii", "1.nii", "2.nii"]
        assert file.attrs["format"] == 2 and file.attrs["source"] == "monai"

    # A name has one number in all files, so that the trainer sees who is in two of them.
    to_hdf5(items(("other",)), tmp_path / "val.h5", patient_key="patient")
    to_hdf5(items(("LIDC-8", 7)), tmp_path / "test.h5", patient_key="patient")
    with pytest.raises(ValueError, match="1 patients are in both"):
        check_disjoint(written, RaterDataset(tmp_path / "val.h5"))
    check_disjoint(written, RaterDataset(tmp_path / "test.h5"))
    assert RaterDataset(tmp_path / "test.h5").provenance["patient_id"][1] == 7


def test_a_file_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "train.h5"
    to_hdf5(items(), path, patient_key="patient")
    before = path.read_bytes()
    bad = items()
    bad[2]["label"][0, 0, 0] = 0.5
    with pytest.raises(FileExistsError, match=r"path: .*train.h5 exists; overwrite=True replaces it"):
        to_hdf5(items(), path, patient_key="patient")
    for target in (path, tmp_path / "new.h5"):
        with pytest.raises(ValueError, match=r"item 2: 'label' is not a binary mask: expected 0 and 1"):
            to_hdf5(bad, target, patient_key="patient", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["train.h5"] and path.read_bytes() == before
    to_hdf5(items()[:1], path, patient_key="patient", overwrite=True)
    assert len(RaterDataset(path)) == 1


def test_to_hdf5_refuses(tmp_path):
    good = items()[0]
    other = {**good, "image": good["image"][:, :4], "label": good["label"][:, :4]}
    for data, options, message in [
        ([], {}, "dataset must not be empty"),
        (iter([good]), {}, "dataset must have a length, got list_iterator"),
        ([good["image"]], {}, "item 0: must be a dictionary, got MetaTensor"),
        ([good], dict(image_key="img"), r"item 0: has no key 'img'; it has \['image', 'label', 'patient', 'third'\]"),
        ([good], dict(mask_keys="label"), "mask_keys must be a sequence of keys, one at least, got 'label'"),
        ([good], dict(window=(1, 0)), r"window must be \(low, high\), finite with low < high, got \(1, 0\)"),
        ([{**good, "image": "0.nii"}], {}, "item 0: 'image' must be a torch.Tensor or a numpy.ndarray, got str"),
        ([{**good, "image": good["image"][0]}], {}, r"item 0: 'image' must be a slice \(1, H, W\), got shape \(6, 8\)"),
        ([{**good, "image": good["image"] / 0}], {}, "item 0: 'image' has NaN or infinite values"),
        ([{**good, "label": good["label"][:, 1:]}], {}, r"item 0: 'label' must be \(R, H, W\) .*, \(6, 8\), got shape"),
        ([{**good, "patient": -1}], {}, "item 0: 'patient' must be at least 0, got -1"),
        ([{**good, "patient": 2**31}], {}, "item 0: 'patient' must be at most 2147483647, got 2147483648"),
        ([{**good, "patient": None}], {}, "item 0: 'patient' must be an int, got NoneType"),
        ([good, other], {}, r"item 1: every item must have masks \(R, H, W\) = \(2, 6, 8\) as the first, got \(2, 4"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            to_hdf5(data, tmp_path / "x.h5", **{"patient_key": "patient", **options})
    with pytest.raises(FileNotFoundError, match="path: there is no folder"):
        to_hdf5([good], tmp_path / "nowhere" / "x.h5", patient_key="patient")
    assert not list(tmp_path.iterdir())


def test_two_names_with_one_number(tmp_path, monkeypatch):
    monkeypatch.setattr("berdiff_fast.integrations.monai._name_number", lambda name: 7)
    with pytest.raises(ValueError, match=r"item 1: patients '7' and 'seven' have the same number 7; give numbers"):
        to_hdf5(items((7, "seven")), tmp_path / "x.h5", patient_key="patient")


def test_our_file_as_dictionaries(tmp_path):
    source = RaterDataset(phantom_file(tmp_path / "data.h5", 5, 3))
    plain = as_dicts(source)
    assert len(plain) == 3 and set(plain[1]) == {"image", "label", "rater_valid", "index", "patient_id"}
    assert plain[1]["index"] == 1 and plain[1]["patient_id"] == 6
    for item, (image, masks) in zip(plain, source, strict=True):
        assert torch.equal(item["image"], image) and torch.equal(item["label"].bool(), masks[:, 0])
    # Dictionary transforms move image and every rater's mask alike.
    keys = ["image", "label"]
    moved = as_dicts(
        source,
        Compose([Rotate90d(keys), Flipd(keys, spatial_axis=0), SpatialPadd(keys, (40, 32))]),
    )[2]
    for key in keys:
        x = plain[2][key].rot90(1, (1, 2)).flip(1)
        assert torch.equal(moved[key].as_tensor(), torch.nn.functional.pad(x, (0, 0, 4, 4)))
    batch = next(iter(DataLoader(plain, batch_size=3)))
    assert batch["image"].shape == (3, 1, 32, 32) and batch["label"].shape == (3, 4, 32, 32)
    with pytest.raises(TypeError, match="dataset must be a RaterDataset, got list"):
        as_dicts([])


def test_there_and_back(tmp_path):
    source = RaterDataset(phantom_file(tmp_path / "data.h5", 5, 3))
    to_hdf5(as_dicts(source), tmp_path / "again.h5", patient_key="patient_id")
    again = RaterDataset(tmp_path / "again.h5")
    for index in range(3):
        assert all(torch.equal(a, b) for a, b in zip(source[index], again[index], strict=True))
    assert np.array_equal(again.provenance["patient_id"], source.provenance["patient_id"])


# ---------------------------------------------------------------------- optional


def test_monai_is_optional(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "monai"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "berdiff_fast.integrations.monai")
    with pytest.raises(ImportError, match=r'needs MONAI 1.4 or newer: pip install "berdiff_fast\[monai\]" \('):
        importlib.import_module("berdiff_fast.integrations.monai")
