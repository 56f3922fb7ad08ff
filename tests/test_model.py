# SPDX-License-Identifier: Apache-2.0
"""``BerDiff``: files that come back as they went, images prepared as in training, published checkpoints."""

from __future__ import annotations

import builtins
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from support import Toy, golden, golden_path

import berdiff_fast as bf
from berdiff_fast import BerDiff, NoiseSchedule, Preprocessing, UNet, loading

SMALL = dict(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,))


def small_model(seed: int = 0, **options) -> BerDiff:
    generator = torch.Generator().manual_seed(seed)
    network = UNet(**SMALL)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return BerDiff(network, **options)


def same_model(a: BerDiff, b: BerDiff) -> bool:
    x, y = a.network.state_dict(), b.network.state_dict()
    return a.to_config() == b.to_config() and x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


# ---------------------------------------------------------------------- save and load

VARIANTS = {
    "plain": dict(),
    "all": dict(
        schedule=NoiseSchedule("linear", 500),
        prediction="y_0",
        preprocessing=Preprocessing("window", (-1000, 400), (0, 1)),
        rescale_timesteps=True,
        spacing="trailing",
    ),
    "own schedule": dict(schedule=NoiseSchedule.from_betas([0.1, 1 / 3, 0.7]), preprocessing=Preprocessing()),
    "as released": dict(schedule=NoiseSchedule(as_released=True)),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("place", ["model.safetensors", "directory", "deep/er/directory"])
@pytest.mark.parametrize("kind", [str, Path])
def test_round_trip(tmp_path, variant, place, kind):
    model = small_model(**VARIANTS[variant])
    path = kind(tmp_path / place)
    model.save(path)
    again = bf.load(path)
    assert same_model(again, model)
    assert again.preprocessing == model.preprocessing and again.prediction == model.prediction
    assert again.rescale_timesteps == model.rescale_timesteps and again.spacing == model.spacing
    assert torch.equal(again.schedule.betas, model.schedule.betas)
    assert not again.training and model.training, "load gives eval mode, save changes nothing"
    assert (again.mask_channels, again.img_channels, again.spatial_dims) == (1, 1, 2)


def test_a_directory_is_readable_without_this_package(tmp_path):
    model = small_model(preprocessing=Preprocessing())
    model.save(tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config == json.loads(json.dumps(model.to_config()))
    assert (config["format"], config["draw_contract"], config["prediction"]) == (1, 1, "epsilon")
    weights = safetensors.torch.load_file(tmp_path / "m" / "model.safetensors")
    assert weights.keys() == model.network.state_dict().keys()
    # The weights' file is complete in itself.
    assert same_model(bf.load(tmp_path / "m" / "model.safetensors"), model)


def test_a_loaded_model_draws_the_same_masks(tmp_path):
    model = small_model(preprocessing=Preprocessing())
    img = model.preprocess(np.arange(64, dtype=np.uint8).reshape(8, 8))
    expected = bf.sample(model, img, n=2, steps=2, seed=3)
    model.save(tmp_path / "m.safetensors")
    assert torch.equal(bf.sample(bf.load(tmp_path / "m.safetensors"), img, n=2, steps=2, seed=3), expected)


def test_half_precision_weights_come_back_as_float32(tmp_path):
    model = small_model().bfloat16()
    model.save(tmp_path / "m.safetensors")
    again = bf.load(tmp_path / "m.safetensors")
    assert all(p.dtype == torch.float32 for p in again.parameters())
    assert same_model(again, model.float())


def test_saving_again_replaces(tmp_path):
    for place in ("m", "m.safetensors"):
        small_model(1).save(tmp_path / place)
        small_model(2).save(tmp_path / place)
        assert same_model(bf.load(tmp_path / place), small_model(2))


def test_a_saved_file_has_the_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        small_model().save(tmp_path / "m.safetensors")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == 0o640


class DiskFull(OSError):
    pass


@pytest.mark.parametrize("place", ["m.safetensors", "m"])
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("moment", ["write", "rename"])
def test_nothing_is_left_half_written(tmp_path, monkeypatch, place, existing, moment):
    old, path = small_model(1), tmp_path / place
    if existing:
        old.save(path)

    def everything() -> dict[Path, bytes | None]:
        return {p: p.read_bytes() if p.is_file() else None for p in tmp_path.rglob("*") if p != tmp_path / "m"}

    before = everything()

    def fail(*_, **__):
        raise DiskFull("no space left on device")

    if moment == "rename":
        monkeypatch.setattr(os, "replace", fail)
    else:
        write_bytes = Path.write_bytes

        def half(file, data):
            write_bytes(file, data[: len(data) // 2])
            fail()

        monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(DiskFull):
        small_model(2).save(path)
    monkeypatch.undo()
    assert everything() == before, "a temporary file stayed behind, or the old model was touched"
    if existing:
        assert same_model(bf.load(path), old)


def test_a_network_of_another_kind_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match=r"only a berdiff_fast.UNet can be saved .* got Toy"):
        BerDiff(Toy()).save(tmp_path / "m")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- files that are no models


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "m.safetensors"
    small_model().save(path)
    return path


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 0.5, -1])
def test_truncated_file(saved, keep):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=re.escape(str(saved)) + r" cannot be read as safetensors \(truncated"):
        bf.load(saved)


def test_junk(saved):
    saved.write_bytes(b"\x80\x04junk" * 100)
    with pytest.raises(ValueError, match=re.escape(str(saved))):
        bf.load(saved)


def test_safetensors_of_something_else(saved):
    safetensors.torch.save_file({"weight": torch.zeros(3)}, saved)
    with pytest.raises(ValueError, match="does not describe a berdiff_fast model; load_official"):
        bf.load(saved)


def rewrite(path: Path, change) -> None:
    """Saves the model at ``path`` again with a changed configuration and state dict."""
    weights = safetensors.torch.load_file(path)
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["berdiff_fast"])
    config = change(config, weights) or config
    text = config if isinstance(config, str) else json.dumps(config)
    safetensors.torch.save_file(weights, path, metadata={"berdiff_fast": text})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda config, _: config.update(format=2), "model format 2 is unknown; this version reads 1"),
        (lambda config, _: config.pop("format") and None, "model format None is unknown"),
        (lambda config, _: config["network"].update(type="Other"), "network type must be 'UNet', got 'Other'"),
        (lambda config, _: config["network"].update(novelty=1), "novelty"),
        (lambda config, _: config.pop("schedule") and None, "schedule"),
        (lambda config, _: config["schedule"].update(name="bogus"), "bogus"),
        (lambda config, _: config.update(prediction="x"), "prediction must be"),
        (lambda config, _: config["network"].update(model_channels=64), "size mismatch"),
        (lambda _, weights: weights.pop("time_embed.0.bias") is None, "time_embed.0.bias"),
        (lambda _, weights: weights.update(extra=torch.zeros(1)), "extra"),
        (lambda *_: "{not json", "does not hold a complete berdiff_fast model"),
    ],
    ids=[
        "later format",
        "no format",
        "other network",
        "unknown argument",
        "no schedule",
        "unknown schedule",
        "prediction",
        "other widths",
        "missing weight",
        "extra weight",
        "no json",
    ],
)
def test_incomplete_model(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(ValueError, match=f"(?s){re.escape(str(saved))}.*{re.escape(message)}"):
        bf.load(saved)


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or directory '.*nothing', and no bundled model"):
        bf.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors"):
        bf.load(tmp_path)


def test_bundled_models_load():
    names = bf.bundled_models()
    assert names == sorted(names)
    for name in names:
        model = bf.load(name)
        assert isinstance(model, BerDiff) and not model.training
        assert model.preprocessing is not None, "a bundled model knows how its images were prepared"


def test_a_folder_with_the_name_of_a_bundled_model(tmp_path, monkeypatch):
    """Such as the one that data were imported to, or that a training run keeps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lidc").mkdir()
    (tmp_path / "lidc" / "train.h5").touch()
    assert bf.load("lidc").network.config == bf.load(Path(bf.__file__).parent / "weights" / "lidc").network.config
    small_model().save(tmp_path / "lidc")
    assert same_model(bf.load("lidc"), small_model())


def test_bundled_names(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_BUNDLED", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    assert bf.bundled_models() == []
    for seed, name in enumerate(["zeta", "alpha"]):
        small_model(seed).save(tmp_path / "weights" / name)
    (tmp_path / "weights" / "unfinished").mkdir()
    assert bf.bundled_models() == ["alpha", "zeta"]
    assert same_model(bf.load("zeta"), small_model(0)) and same_model(bf.load("alpha"), small_model(1))
    with pytest.raises(FileNotFoundError, match=r"'beta'.*there are \['alpha', 'zeta'\]"):
        bf.load("beta")
    with pytest.raises(FileNotFoundError, match="'unfinished'"):
        bf.load("unfinished")


# ---------------------------------------------------------------------- preprocessing


def prepared(raw, preprocessing: Preprocessing | None = None, **options) -> torch.Tensor:
    return BerDiff(Toy(), preprocessing=preprocessing or Preprocessing(), **options).preprocess(raw)


def test_min_max():
    raw = np.array([[0, 51], [102, 255]], dtype=np.uint8)
    img = prepared(raw)
    assert img.dtype == torch.float32 and img.shape == (1, 1, 2, 2)
    # One subtraction, division, multiplication and addition of numbers up to 2.
    expected = torch.tensor([[-1.0, -0.6], [-0.2, 1.0]])
    assert (img[0, 0] - expected).abs().max() <= 4 * 2**-24
    assert img.min() == -1 and img.max() == 1


def test_min_max_is_that_of_each_image():
    raw = torch.tensor([[[[0.0, 1.0]]], [[[100.0, 300.0]]]])
    assert prepared(raw).tolist() == [[[[-1.0, 1.0]]], [[[-1.0, 1.0]]]]
    # Channels of one image keep their proportion.
    raw = torch.tensor([[[[0.0, 1.0]], [[2.0, 4.0]]]])
    assert prepared(raw, Preprocessing(output_range=(0, 1))).tolist() == [[[[0.0, 0.25]], [[0.5, 1.0]]]]


def test_window():
    """The lung window in Hounsfield units."""
    window = Preprocessing("window", window=(-1000, 400), output_range=(0, 1))
    raw = np.array([[-3024, -1000], [-300, 3071]], dtype=np.int16)
    img = prepared(raw, window)
    assert img.dtype == torch.float32 and img.tolist() == [[[[0.0, 0.0], [0.5, 1.0]]]]
    # Unlike min-max, it is the same for every image.
    assert prepared(raw[:1], window).tolist() == [[[[0.0, 0.0]]]]


@pytest.mark.parametrize(
    "preprocessing, expected",
    [
        (Preprocessing(), -1.0),
        (Preprocessing(output_range=(0, 1)), 0.0),
        (Preprocessing("window", (0, 10)), 0.4),
        (Preprocessing("window", (-5, 1)), 1.0),
    ],
)
def test_constant_image(preprocessing, expected):
    img = prepared(np.full((4, 4), 7, dtype=np.int16), preprocessing)
    assert (img - expected).abs().max() <= 2**-23


@pytest.mark.parametrize(
    "dtype",
    ["uint8", "int8", "uint16", "int16", "int32", "uint32", "int64", "float16", "float32", "float64"],
)
def test_every_real_dtype(dtype):
    raw = np.arange(16).reshape(4, 4).astype(dtype)
    expected = torch.arange(16).reshape(1, 1, 4, 4) / 7.5 - 1
    assert (prepared(raw) - expected).abs().max() <= 4 * 2**-24
    assert (prepared(torch.from_numpy(raw)) - expected).abs().max() <= 4 * 2**-24


def test_large_offsets_are_not_lost():
    """float64 stays float64 until it is scaled: 2^40 and 2^40 + 1 are one float32."""
    assert prepared(np.array([[2.0**40, 2.0**40 + 1]])).tolist() == [[[[-1.0, 1.0]]]]


@pytest.mark.parametrize(
    "spatial_dims, shape, expected",
    [
        (2, (6, 5), (1, 1, 6, 5)),
        (2, (1, 6, 5), (1, 1, 6, 5)),
        (2, (3, 6, 5), (1, 3, 6, 5)),
        (2, (4, 3, 6, 5), (4, 3, 6, 5)),
        (3, (2, 6, 5), (1, 1, 2, 6, 5)),
        (3, (3, 2, 6, 5), (1, 3, 2, 6, 5)),
        (3, (4, 3, 2, 6, 5), (4, 3, 2, 6, 5)),
    ],
)
def test_dimensions(spatial_dims, shape, expected):
    raw = torch.rand(shape)
    img = prepared(raw, Preprocessing("window", (0, 1), (0, 1)), spatial_dims=spatial_dims)
    assert img.shape == expected and torch.equal(img.view(shape), raw)
    assert torch.equal(raw, raw.clone()) and img.is_contiguous()


@pytest.mark.parametrize(
    "raw, message",
    [
        (torch.zeros(5), r"raw must have 2 to 4 dimensions, got shape \(5,\)"),
        (torch.zeros(1, 1, 1, 4, 4), r"raw must have 2 to 4 dimensions, got shape \(1, 1, 1, 4, 4\)"),
        (torch.zeros(2, 4, 4), r"raw must have 1 channels, got shape \(1, 2, 4, 4\)"),
        (torch.full((4, 4), torch.nan), "raw must be finite"),
        (torch.full((4, 4), torch.inf), "raw must be finite"),
        (torch.zeros(4, 4, dtype=torch.bool), "raw must have a real dtype, got torch.bool"),
        (torch.zeros(4, 4, dtype=torch.complex64), "raw must have a real dtype, got torch.complex64"),
    ],
)
def test_images_that_are_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        prepared(raw, img_channels=1)


def test_a_model_without_preprocessing_says_so():
    with pytest.raises(ValueError, match="does not know how its images were prepared"):
        BerDiff(Toy()).preprocess(torch.zeros(4, 4))


# ---------------------------------------------------------------------- the model itself


def test_attributes_come_from_the_network_unless_given():
    model = BerDiff(Toy(mask_channels=3, spatial_dims=3))
    assert (model.mask_channels, model.img_channels, model.spatial_dims) == (3, None, 3)
    model = BerDiff(torch.nn.Identity(), mask_channels=2, img_channels=4, spatial_dims=3)
    assert (model.mask_channels, model.img_channels, model.spatial_dims) == (2, 4, 3)
    model = BerDiff(torch.nn.Identity(), "linear", "y_0")
    assert (model.mask_channels, model.img_channels, model.spatial_dims) == (1, None, 2)
    assert model.schedule.name == "linear" and model.prediction == "y_0"


@pytest.mark.parametrize("rescale", [False, True])
def test_rescale_timesteps(rescale):
    """The published scripts' option: the network is told t * 1000 / T."""
    network = Toy()
    model = BerDiff(network, NoiseSchedule("cosine2", 250), rescale_timesteps=rescale)
    t = torch.tensor([0, 1, 249])
    y = torch.zeros(3, 1, 4, 4)
    model(y, t, y)
    seen = network.seen[0][1]
    assert seen.tolist() == ([0, 4, 996] if rescale else [0, 1, 249])
    assert seen.dtype == (torch.float32 if rescale else torch.int64)


PUBLISHED = dict(
    image_size=32,
    num_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    num_heads=1,
    attention_resolutions="16",
    use_scale_shift_norm=False,
)


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    return golden("unet_concat")


def published_weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.removeprefix("state_dict."): v for k, v in tensors.items() if k.startswith("state_dict.")}


@pytest.mark.parametrize("source", ["mapping", "pt", "safetensors"])
def test_load_official(published, tmp_path, source):
    weights = published_weights(published)
    given: object = weights
    if source == "pt":
        given = tmp_path / "their.pt"
        torch.save(weights, given)
    if source == "safetensors":
        given = str(tmp_path / "their.safetensors")
        safetensors.torch.save_file(weights, given)
    model = bf.load_official(given, **PUBLISHED, mean_type="epsilon", noise_schedule="cosine2")
    assert isinstance(model, BerDiff) and not model.training
    assert (model.prediction, model.schedule.name, model.schedule.timesteps) == ("epsilon", "cosine2", 1000)
    assert model.preprocessing is None
    # With 1000 timesteps rescaling, which is on by default, changes nothing.
    assert model.rescale_timesteps
    with torch.no_grad():
        found = model(published["y_t"], published["t"], published["img"]).sigmoid()
    assert (found - published["output_probability"]).abs().max() <= 1e-5


def test_load_official_takes_the_published_defaults(published):
    model = bf.load_official(published_weights(published), **PUBLISHED)
    assert (model.prediction, model.schedule.name, model.rescale_timesteps) == ("y_0", "linear", True)


def test_load_official_rescales_timesteps(published):
    model = bf.load_official(published_weights(published), **PUBLISHED, diffusion_steps=500)
    with torch.no_grad():
        # Their t of 522 is our 261 of 500; the other is uneven and has no counterpart.
        half = torch.tensor([261, 0])
        found = model(published["y_t"], half, published["img"]).sigmoid()[:1]
        plain = bf.load_official(
            published_weights(published), **PUBLISHED, diffusion_steps=500, rescale_timesteps=False
        )
        unscaled = plain(published["y_t"], half, published["img"]).sigmoid()[:1]
    assert published["t"][0] == 522
    assert (found - published["output_probability"][:1]).abs().max() <= 1e-5
    assert (unscaled - published["output_probability"][:1]).abs().max() > 1e-4


def test_a_published_model_can_be_saved(published, tmp_path):
    model = bf.load_official(published_weights(published), **PUBLISHED)
    model.save(tmp_path / "m")
    assert same_model(bf.load(tmp_path / "m"), model)


def test_load_official_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return builtins.exec, ("raise SystemExit('code from a checkpoint was run')",)

    torch.save({"weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        bf.load_official(tmp_path / "evil.pt")


def test_load_official_names_what_does_not_fit(published):
    with pytest.raises(ValueError, match=r"(?s)does not fit.*model_channels"):
        bf.load_official(published_weights(published), **{**PUBLISHED, "num_channels": 64})


def test_golden_file_describes_the_arguments_used_here():
    with safe_open(golden_path("unet_concat.safetensors"), "pt") as file:
        config = json.loads(file.metadata()["config"])
    assert config["model_channels"] == PUBLISHED["num_channels"]
    assert tuple(config["channel_mult"]) == PUBLISHED["channel_mult"]
    assert config["attention_resolutions"] == [32 // int(PUBLISHED["attention_resolutions"])]


@pytest.mark.parametrize("kind", ["flipped", "big-endian"])
def test_arrays_as_image_readers_give_them(kind):
    """A flipped axis is a negative stride; DICOM and NIfTI files come in either byte order."""
    raw = np.arange(16, dtype=np.int16).reshape(4, 4)
    given = raw[::-1] if kind == "flipped" else raw.astype(">i2")
    assert torch.equal(prepared(given), prepared(given.astype("<i2").copy()))
