# SPDX-License-Identifier: Apache-2.0
"""Training with a mode prior and a window: what examples say, that resuming changes nothing, that it learns."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch
from support import data_path, phantom_file

import berdiff_fast as bf
from berdiff_fast.data.examples import Augmentation, TrainingExamples
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.network.prior import size_class
from berdiff_fast.network.window import middle

pytest.importorskip("accelerate", reason="the trainer needs accelerate")
from berdiff_fast.training import loop, validate
from berdiff_fast.training.config import TrainConfig

EDGES = (16, 64)
SMALL = dict(
    channel_mult=[1],
    patch_size=4,
    norm_groups=8,
    attention_resolutions=[],
    batch_size=4,
    warmup=5,
    log_every=5,
    tensorboard=False,
    device="cpu",
    mode_prior=True,
    mode_edges=list(EDGES),
    prior_channels=[8, 16],
)


def sometimes_empty(path: Path, count: int, first: int = 0) -> Path:
    """Slices of 32 x 32 with a disc; in dark ones three of four raters mark nothing, and in bright ones one of four."""
    random = np.random.default_rng([first, count])
    yy, xx = np.mgrid[:32, :32] - 15.5
    image, mask = np.zeros((count, 32, 32), np.uint8), np.zeros((count, 4, 32, 32), np.uint8)
    for i in range(count):
        bright, radius = i % 2, random.uniform(3, 7)
        disc = yy**2 + xx**2 < radius**2
        image[i] = random.integers(0, 30, (32, 32)) + disc * (200 if bright else 90)
        image[i, 0, :2] = 0, 255  # so that bright is bright after each slice has been scaled
        mask[i, : 3 if bright else 1] = disc
    with h5py.File(path, "w") as file:
        file["image"], file["mask"] = image, mask
        file["patient_id"] = np.arange(first, first + count)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("discs")
    return {
        "train_data": str(sometimes_empty(folder / "train.h5", 24)),
        "val_data": str(sometimes_empty(folder / "val.h5", 8, 100)),
    }


def run(data, output, **changes) -> Path:
    return loop.train(
        TrainConfig(train_data=data["train_data"], output=str(output), **{**SMALL, "steps": 20, **changes})
    )


def weights(output: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(output / "model.safetensors")


def log(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------- examples


def examples(path, **options) -> TrainingExamples:
    options = {"mode_edges": EDGES, **options}
    return TrainingExamples(RaterDataset(path, in_memory=True), bf.Preprocessing(), 1000, 3, **options)


def test_an_example_says_its_class_and_those_of_all_raters(data):
    slices = RaterDataset(data["train_data"], in_memory=True)
    seen = examples(data["train_data"], augmentation=Augmentation(flip=True, rotate90=True))
    for position in range(60):
        example, (_, masks) = seen[position], slices[seen.slice_index(position)]
        classes = size_class(masks, EDGES)
        expected = torch.bincount(classes, minlength=4) / 4
        assert torch.equal(example["mode_target"], expected) and example["mode_target"].dtype == torch.float32
        assert example["mode"] == size_class(example["y_0"], EDGES) > 0, "of a rater who marked something"
        assert example["mode"].dtype == torch.int64 and example["img"].shape == (1, 32, 32)
        again = seen[position]
        assert all(torch.equal(again[k], example[k]) for k in example), "a function of the position"


def test_every_rater_who_marked_something_has_their_turn(tmp_path):
    """Twelve slices whose raters mark 0, 5, 20 and 80 pixels: the last three are seen equally often."""
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["image"] = np.arange(12 * 144, dtype=np.uint16).reshape(12, 12, 12)
        mask = np.zeros((12, 4, 144), np.uint8)
        for rater, area in enumerate([0, 5, 20, 80]):
            mask[:, rater, :area] = 1
        file["mask"] = mask.reshape(12, 4, 12, 12)
    seen = examples(tmp_path / "d.h5")
    counts = torch.bincount(torch.stack([seen[i]["mode"] for i in range(3000)]), minlength=4)
    assert counts[0] == 0 and (counts[1:] - 1000).abs().max() < 5 * (3000 * 2 / 9) ** 0.5


def test_slices_that_nobody_marked_say_so(tmp_path):
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["image"], file["mask"] = np.ones((2, 12, 12), np.uint8), np.zeros((2, 3, 12, 12), np.uint8)
    example = examples(tmp_path / "d.h5")[0]
    assert example["mode"] == 0 and example["mode_target"].tolist() == [1, 0, 0, 0] and not example["y_0"].any()


def test_classes_are_counted_in_the_window_and_after_a_zoom(data):
    slices = RaterDataset(data["train_data"], in_memory=True)
    window = examples(data["train_data"], mode_window=8)
    for position in range(20):
        example, (_, masks) = window[position], slices[window.slice_index(position)]
        expected = torch.bincount(size_class(middle(masks, 8), EDGES), minlength=4) / 4
        assert torch.equal(example["mode_target"], expected) and example["y_0"].shape == (1, 32, 32)
        assert example["mode"] == size_class(middle(example["y_0"], 8), EDGES)
    zoomed = examples(data["train_data"], augmentation=Augmentation(rotate=30, scale=1.0))
    moved = [zoomed[i] for i in range(20)]
    assert all(e["mode"] == size_class(e["y_0"], EDGES) and e["mode_target"].sum() == 1 for e in moved)


def test_without_a_prior_examples_are_what_they_were(data):
    example = examples(data["train_data"], mode_edges=None)[5]
    assert set(example) == {"img", "y_0", "t", "noise_seed"}


# ---------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"output_crop": 16, "distance": True},
        {"output_crop": 16, "context": True, "prior_crop": 16, "prior_context": True, "prior_shift": 2},
        {"accumulation": 2, "prior_members": 2, "prior_steps": 10, "dropout": 0.2},
        {"precision": "bf16", "channels_last": True, "rotate": 20.0, "scale": 0.2},
        {"workers": 1, "in_memory": False, "flip": False, "rotate90": False},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_resuming_changes_nothing(data, tmp_path, changes):
    run(data, tmp_path / "once", **changes)
    run(data, tmp_path / "twice", checkpoint_every=6, **changes)
    folder = tmp_path / "twice" / "checkpoints"
    for path in sorted(folder.iterdir())[1:]:  # as if it had been killed after step 18
        path.unlink()
    (tmp_path / "twice" / "model.safetensors").unlink()
    assert [p.name for p in folder.iterdir()] == ["step-00000018.safetensors"]
    run(data, tmp_path / "twice", checkpoint_every=6, **changes)
    one, two = weights(tmp_path / "once"), weights(tmp_path / "twice")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert any(k.startswith("mode_prior.") for k in one)
    lines = log(tmp_path / "once")
    assert [line["step"] for line in lines] == [5, 10, 15, 20] and all(0 < line["loss"] < 5 for line in lines)
    assert [line["prior_loss"] > 0 for line in lines] == [s <= changes.get("prior_steps", 20) for s in (5, 10, 15, 20)]
    model = bf.load(tmp_path / "once" / "model.safetensors")
    assert model.mode_prior.symmetries == (8 if changes.get("flip", True) else 1)
    assert bf.sample(model, torch.zeros(1, 1, 32, 32), 4, 2, seed=0).shape == (1, 4, 1, 32, 32)


def test_the_prior_stays_as_it_was_after_its_last_step(data, tmp_path):
    run(data, tmp_path / "short", steps=10, prior_steps=10, decay="constant")
    run(data, tmp_path / "long", steps=20, prior_steps=10, decay="constant")
    one, two = weights(tmp_path / "short"), weights(tmp_path / "long")
    same = {k: torch.equal(one[k], two[k]) for k in one}
    assert all(
        equal == k.startswith("mode_prior.") for k, equal in same.items() if "zero" not in k and "label" not in k
    )


def test_the_denoiser_learns_nothing_from_empty_masks(tmp_path):
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["image"] = np.random.default_rng(0).integers(0, 255, (4, 16, 16)).astype(np.uint8)
        file["mask"] = np.zeros((4, 2, 16, 16), np.uint8)
    data = {"train_data": str(tmp_path / "d.h5")}
    run(data, tmp_path / "run", steps=40, weight_decay=0.0, prior_learning_rate=0.01)
    lines = log(tmp_path / "run")
    assert all(line["loss"] == 0 for line in lines) and lines[-1]["prior_loss"] < 0.5 * lines[0]["prior_loss"]
    model = bf.load(tmp_path / "run" / "model.safetensors")
    assert (model.network.out[2].weight == 0).all(), "as it began"
    assert model.prior(torch.zeros(1, 1, 16, 16))[0, 0] > 0.5


@pytest.mark.slow
def test_it_learns_whether_there_is_anything(data, tmp_path):
    """Dark discs are marked by one rater of four, bright ones by three: a constant has an RMSE of 0.25."""
    changes = dict(batch_size=8, learning_rate=2e-3, prior_learning_rate=5e-3, warmup=10, prior_jitter=0.05)
    run(data, tmp_path, steps=150, validate_every=150, val_data=data["val_data"], output_crop=16, **changes)
    lines = log(tmp_path)
    numbers = lines[-1]
    assert numbers["validation_empty_squared_error"] ** 0.5 < 0.1
    assert numbers["validation_prior_cross_entropy"] < 0.95 and "validation_ged" in numbers
    model = bf.load(tmp_path / "model.safetensors")
    images, raters = RaterDataset(data["val_data"]).batch(range(8))
    p = model.prior(model.preprocess(images))[:, 0]
    masks = bf.sample(model, model.preprocess(images), 16, 5, seed=1)
    empty = (~masks.flatten(2).any(2)).double().mean(1)
    assert (empty - p).abs().max() < 1 / 16
    assert (p - (~raters.flatten(2).any(2)).double().mean(1)).abs().max() < 0.2


@pytest.mark.slow
def test_the_best_prior_is_kept(data, tmp_path):
    """A rate at which it gets worse and worse; also where the run was stopped after the best."""
    wild = dict(
        val_data=data["val_data"], validate_every=5, validation_slices=8, validation_samples=1, prior_jitter=0.0
    )
    wild |= dict(prior_learning_rate=0.3, warmup=0, prior_ema_decay=0.0, validation_steps=2, checkpoint_every=10)
    run(data, tmp_path / "best", **wild)
    run(data, tmp_path / "last", prior_keep_best=False, **wild)
    validations = {line["step"]: line for line in log(tmp_path / "best") if "validation_ged" in line}
    nats = {step: line["validation_prior_cross_entropy"] for step, line in validations.items()}
    best = min(nats, key=nats.get)
    assert list(nats) == [5, 10, 15, 20] and best < 20, "or the test would show nothing"

    def measured(name):
        model = bf.load(tmp_path / name / "model.safetensors")
        return validate.validate_prior(model, RaterDataset(data["val_data"]))["prior_cross_entropy"]

    assert measured("best") == pytest.approx(nats[best], rel=1e-5)
    assert measured("last") == pytest.approx(nats[20], rel=1e-5)
    (tmp_path / "best" / "checkpoints" / "step-00000020.safetensors").unlink()
    run(data, tmp_path / "best", **wild)
    assert measured("best") == pytest.approx(nats[best], rel=1e-5)


def test_initial_weights_bring_the_prior_along(data, tmp_path):
    run(data, tmp_path / "first", steps=5)
    run(data, tmp_path / "then", steps=1, learning_rate=0.0, prior_learning_rate=0.0, weight_decay=0.0,
        prior_weight_decay=0.0, initial_weights=str(tmp_path / "first" / "model.safetensors"))  # fmt: skip
    one, two = weights(tmp_path / "first"), weights(tmp_path / "then")
    assert all(torch.equal(one[k], two[k]) for k in one if k.startswith("mode_prior."))


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"mode_edges": [64, 16]}, "edges must be ascending"),
        ({"output_crop": 6}, "output_crop must have a height and width divisible by 4"),
        ({"output_crop": 16, "crop": 16}, "crop must be 0 with network.output_crop"),
        ({"context": True}, "context needs an output_crop"),
        ({"prior_steps": -1}, "prior.steps must be at least 0"),
        ({"prior_weight": -1.0}, "prior.weight must be a finite number"),
        ({"prior_ema_decay": 1.0}, "prior.ema_decay must be in"),
        ({"prior_channels": [12]}, "channels must be multiples of 8"),
        ({"output_crop": 64}, "output_crop must be at most the images"),
        ({"prior_crop": 64}, "prior.crop must be at most the images"),
    ],
)
def test_configs_that_make_no_sense(data, tmp_path, changes, words):
    with pytest.raises((ValueError, TypeError), match=words):
        run(data, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_run_with_other_classes_cannot_go_on(data, tmp_path):
    run(data, tmp_path, steps=2)
    with pytest.raises(ValueError, match="prior.edges was"):
        run(data, tmp_path, steps=4, mode_edges=[16])


def test_the_recipe_trains_on_real_slices(tmp_path):
    """The bundled config, for two steps of four slices."""
    from berdiff_fast.training.config import read_yaml

    values = read_yaml("lidc") | dict(steps=2, batch_size=4, device="cpu", tensorboard=False, prior_members=1)
    path = data_path("lidc/val.h5")
    loop.train(TrainConfig.from_dict(values | {"train_data": str(path), "output": str(tmp_path)}))
    model = bf.load(tmp_path / "model.safetensors")
    masks = bf.sample(model, torch.zeros(1, 1, 128, 128), 4, 2, seed=0)
    masks[..., 32:96, 32:96] = False
    assert not masks.any()


def test_phantoms_train_too(tmp_path):
    data = {"train_data": str(phantom_file(tmp_path / "p.h5", 0, 6))}
    run(data, tmp_path / "run", steps=2)
