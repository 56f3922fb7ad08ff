# SPDX-License-Identifier: Apache-2.0
"""The config of a training run: sections, flat names, YAML, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest

import berdiff_fast as bf
from berdiff_fast.network.prior import EDGES
from berdiff_fast.schedule import _SCHEDULES
from berdiff_fast.training.config import (
    FLAT,
    Augmentation,
    Network,
    Optimiser,
    Prior,
    TrainConfig,
    bundled_configs,
    read_yaml,
)

#: The fields of ``TrainConfig`` before there were sections, with their defaults.
FORMER_DEFAULTS = {
    "train_data": "", "val_data": "", "output": "", "in_memory": True, "data_on_device": "auto", "workers": 0,
    "initial_weights": "", "model_channels": 32, "channel_mult": [1, 1, 2, 3], "num_res_blocks": 1,
    "attention_resolutions": [8], "num_heads": 2, "dropout": 0.0, "use_scale_shift_norm": False, "norm_groups": 32,
    "patch_size": 1, "output_crop": 0, "context": False, "distance": False, "mode_prior": False,
    "mode_edges": [16, 32, 64, 128, 256], "prior_channels": [32, 64, 96, 128], "prior_crop": 0, "prior_context": False,
    "prior_members": 1, "prior_dropout": 0.1, "prior_shift": 0, "prior_jitter": 0.1, "prior_weight": 0.01,
    "prior_learning_rate": 1e-3, "prior_weight_decay": 0.05, "prior_ema_decay": 0.998, "prior_keep_best": True,
    "prior_steps": 0, "schedule": "cosine2", "timesteps": 1000, "input_scale": 1.0, "as_released": False,
    "prediction": "epsilon", "window": [], "kl_weight": 1.0, "bce_weight": 1.0, "leave_one_out": False, "flip": True,
    "rotate90": True, "rotate": 0.0, "scale": 0.0, "crop": 0, "crop_steps": 0, "steps": 4000, "batch_size": 16,
    "accumulation": 1, "learning_rate": 1e-3, "beta2": 0.99, "weight_decay": 1e-4, "warmup": 200, "decay": "cosine",
    "clip": 1.0, "ema_decay": 0.999, "precision": "fp32", "channels_last": False, "compile": False, "device": "auto",
    "seed": 0, "log_every": 50, "validate_every": 1000, "validation_slices": 64, "validation_samples": 16,
    "validation_steps": 10, "validation_method": "ddim", "spacing": "trailing-quadratic", "checkpoint_every": 500,
    "keep": 2, "tensorboard": True, "quiet": False,
}  # fmt: skip

#: Another value of each, which is allowed together with the others'.
CHANGED = {
    "train_data": "t.h5", "val_data": "v.h5", "output": "o", "in_memory": False, "data_on_device": "false",
    "workers": 3, "initial_weights": "lidc", "model_channels": 64, "channel_mult": [1, 2], "num_res_blocks": 2,
    "attention_resolutions": [2, 4], "num_heads": 4, "dropout": 0.1, "use_scale_shift_norm": True, "norm_groups": 16,
    "patch_size": 2, "output_crop": 0, "context": True, "distance": True, "mode_prior": True, "mode_edges": [10, 20],
    "prior_channels": [8, 16], "prior_crop": 32, "prior_context": True, "prior_members": 3, "prior_dropout": 0.2,
    "prior_shift": 2, "prior_jitter": 0.2, "prior_weight": 0.1, "prior_learning_rate": 2e-3, "prior_weight_decay": 0.1,
    "prior_ema_decay": 0.99, "prior_keep_best": False, "prior_steps": 100, "schedule": "linear", "timesteps": 500,
    "input_scale": 2.0, "as_released": True, "prediction": "y_0", "window": [-10.0, 300.0], "kl_weight": 0.5,
    "bce_weight": 0.25, "leave_one_out": True, "flip": False, "rotate90": False, "rotate": 5.0, "scale": 0.1,
    "crop": 64, "crop_steps": 50, "steps": 70, "batch_size": 8, "accumulation": 2, "learning_rate": 3e-4,
    "beta2": 0.999, "weight_decay": 0.01, "warmup": 10, "decay": "constant", "clip": 0.5, "ema_decay": 0.99,
    "precision": "bf16", "channels_last": True, "compile": True, "device": "cpu", "seed": 5, "log_every": 5,
    "validate_every": 20, "validation_slices": 6, "validation_samples": 4, "validation_steps": 5,
    "validation_method": "d3pm", "spacing": "uniform", "checkpoint_every": 30, "keep": 1, "tensorboard": False,
    "quiet": True,
}  # fmt: skip


#: Settings that there were not when settings got their sections.
LATER = {
    "scaling": "auto", "per_channel": "auto", "log_with": [], "project": "berdiff_fast", "network_class": "",
    "network_arguments": "", "allow_imports": [], "dims": "auto",
}  # fmt: skip


def test_flat_names_and_defaults_are_what_they_were():
    assert TrainConfig().to_dict() == {**FORMER_DEFAULTS, **LATER}
    assert len(FLAT) == len(FORMER_DEFAULTS) + len(LATER) - 4, "but output, seed, device and quiet"


def test_every_setting_by_its_flat_name_and_in_its_section(tmp_path):
    """In Python, in a flat YAML file as they were, and in sections as they are written now."""
    flat = TrainConfig(**CHANGED)
    assert flat.to_dict() == {**CHANGED, **LATER} == TrainConfig.from_dict(CHANGED).to_dict()
    for name, value in CHANGED.items():
        assert getattr(flat, name) == (tuple(value) if isinstance(value, list) else value), name
    by_place = TrainConfig(**{FLAT.get(name, name): value for name, value in CHANGED.items()})
    assert by_place == flat == TrainConfig(**dataclasses.asdict(flat))
    file = tmp_path / "c.yaml"
    file.write_text("".join(f"{name}: {value}\n" for name, value in CHANGED.items()))
    assert TrainConfig.from_dict(read_yaml(file)) == flat
    file.write_text(flat.to_yaml())
    assert TrainConfig.from_dict(read_yaml(file)) == flat
    assert "network:\n  model_channels: 64\n  channel_mult: [1, 2]\n" in flat.to_yaml()


def test_sections_in_python():
    made = TrainConfig(output="x", network=Network(model_channels=64), optimiser={"steps": 7}, batch_size=4)
    assert (made.network.model_channels, made.optimiser.steps, made.optimiser.batch_size) == (64, 7, 4)
    assert dataclasses.replace(made, steps=9).optimiser == Optimiser(steps=9, batch_size=4)
    assert dataclasses.replace(made, augmentation=Augmentation(flip=False)).optimiser == made.optimiser
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.seed = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.network.dropout = 0.5
    with pytest.raises(AttributeError, match="has no setting 'stepz'"):
        _ = made.stepz
    assert made == copy.deepcopy(made) == pickle.loads(pickle.dumps(made)) and hash(made) == hash(copy.copy(made))


def test_the_later_of_two_counts():
    """So that ``{**read_yaml(...), "steps": 100}`` changes what the file says."""
    assert TrainConfig.from_dict({**read_yaml("lidc_v1"), "steps": 100, "crop_steps": 50}).optimiser.steps == 100
    assert TrainConfig.from_dict({"steps": 100, "optimiser": {"steps": 3}}).optimiser.steps == 3


def test_a_heading_with_nothing_under_it(tmp_path):
    (tmp_path / "c.yaml").write_text("network:\noptimiser:\n  steps: 3\n")
    assert TrainConfig.from_dict(read_yaml(tmp_path / "c.yaml")) == TrainConfig(steps=3)


@pytest.mark.parametrize("name", bundled_configs())
def test_bundled_configs(name):
    from berdiff_fast.training import setup

    setup.check(TrainConfig.from_dict(read_yaml(name)))


def test_names_and_numbers_that_are_written_twice_agree():
    """What the config says without importing torch, and where it is used."""
    from typing import get_args

    from berdiff_fast import choices
    from berdiff_fast.ops import PREDICTIONS

    assert Prior().edges == EDGES
    assert set(get_args(choices.Schedule)) == set(_SCHEDULES) and set(get_args(choices.Prediction)) == set(PREDICTIONS)


BAD_CONFIGS = {
    "learning_rte": (
        {"learning_rte": 1},
        "unknown key 'learning_rte' in the training config; did you mean 'learning_rate'",
    ),
    "in a section": ({"network": {"dropot": 0.1}}, "unknown key 'network.dropot' .* did you mean 'network.dropout'"),
    "by place": ({"network.dropot": 0.1}, "unknown key 'network.dropot' .* did you mean 'network.dropout'"),
    "a section": ({"optimizer": {"steps": 3}}, "unknown key 'optimizer' .* did you mean 'optimiser'"),
    "no section": ({"network": 3}, "network must be a section of settings, got 3"),
    "another section": ({"network": Prior()}, r"network must be a section of settings, got Prior\("),
    "nonsense": ({"zzz": 1}, "unknown key 'zzz' in the training config; known are output, seed"),
    "a number as key": ({7: 1}, "unknown key '7' in the training config"),
    "steps": ({"steps": 0}, "optimiser.steps must be at least 1, got 0"),
    "float steps": ({"steps": 1.5}, "optimiser.steps must be an int, got float"),
    "text": ({"learning_rate": "fast"}, "optimiser.learning_rate must be a number, got 'fast'"),
    "nan": ({"learning_rate": float("nan")}, "learning_rate must be a finite number"),
    "negative": ({"weight_decay": -1}, "weight_decay must be a finite number of at least 0"),
    "bool": ({"flip": "yes"}, "augmentation.flip must be true or false, got 'yes'"),
    "list": ({"channel_mult": 2}, "channel_mult must be a list, got 2"),
    "list of text": ({"channel_mult": ["a"]}, "channel_mult must be an int, got str"),
    "string": ({"schedule": 3}, "schedule must be a string, got 3"),
    "path": ({"output": 3}, "output must be a string, got 3"),
    "seed": ({"seed": -1}, "seed must be at least 0, got -1"),
    "decay": ({"decay": "linear"}, "decay must be one of"),
    "precision": ({"precision": "fp8"}, "precision must be one of"),
    "on device": ({"data_on_device": "yes"}, "data.on_device must be one of"),
    "on device, a number": ({"data_on_device": 1}, "data.on_device must be a string, got 1"),
    "method": ({"validation_method": "euler"}, "validation.method must be one of"),
    "ema": ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\)"),
    "weights": ({"kl_weight": 0, "bce_weight": 0}, "must not both be 0"),
    "accumulation": ({"batch_size": 10, "accumulation": 4}, "batch_size must be a multiple of accumulation"),
    "window": ({"window": [3.0]}, "window must be LOW HIGH"),
    "schedule": ({"schedule": "sigmoid"}, "must be one of"),
    "prediction": ({"prediction": "v"}, "prediction must be"),
    "crop": ({"crop": 30}, "crop must be a multiple of 8"),
    "crop_steps": ({"crop_steps": 10}, "crop_steps needs crop"),
    "project": ({"project": " "}, "records.project must be a name, got ' '"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs(case):
    values, message = BAD_CONFIGS[case]
    with pytest.raises((ValueError, TypeError), match=message):
        TrainConfig.from_dict(values)


#: What schedule, network and window say of their arguments.
BAD_PARTS = {
    "empty window": ({"window": [3.0, 3.0]}, "window must be"),
    "channels": ({"model_channels": 30}, "model_channels must be a multiple of 32"),
    "spacing": ({"validation_steps": 300, "spacing": "uniform"}, "spacing 'uniform' cannot visit exactly 300"),
    "too many steps": ({"validation_steps": 2000}, "steps must be at most"),
    "input_scale": ({"input_scale": 0}, "input_scale must be"),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_bad_parts(case, tmp_path):
    """Before the data are read, and before the folder is made."""
    pytest.importorskip("accelerate", reason="the trainer needs accelerate")
    from berdiff_fast.training import loop

    values, message = BAD_PARTS[case]
    with pytest.raises((ValueError, TypeError), match=message):
        loop.train(TrainConfig(output=str(tmp_path / "run"), train_data="nowhere.h5", **values))
    assert not (tmp_path / "run").exists()


def test_bad_config_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file 'nowhere.yaml', and no bundled config"):
        read_yaml("nowhere.yaml")
    file = tmp_path / "c.yaml"
    file.write_text("a: [1")
    with pytest.raises(ValueError, match=r"c\.yaml is not YAML"):
        read_yaml(file)
    file.write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match="must hold keys and values, got a list"):
        read_yaml(file)


def test_numpys_numbers_are_welcome():
    import numpy as np

    made = TrainConfig(steps=np.int64(3), learning_rate=np.float32(0.5), channel_mult=[np.int32(1)])
    assert type(made.optimiser.steps) is int and type(made.optimiser.learning_rate) is float
    assert type(made.network.channel_mult[0]) is int and bf.NoiseSchedule("linear", made.diffusion.timesteps)


def test_a_checkpoint_from_before_there_were_sections(tmp_path):
    """Its header has the flat config, which a sectioned one goes on from; what matters is still compared."""
    pytest.importorskip("accelerate", reason="the trainer needs accelerate")
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file
    from support import phantom_file

    from berdiff_fast import digests
    from berdiff_fast.training import checkpoints, loop

    tiny = dict(channel_mult=[1], patch_size=4, norm_groups=8, attention_resolutions=[], batch_size=4, warmup=2)
    tiny |= dict(train_data=str(phantom_file(tmp_path / "t.h5", 0, 8)), device="cpu", tensorboard=False, quiet=True)
    whole = loop.train(TrainConfig(output=str(tmp_path / "whole"), steps=8, checkpoint_every=4, keep=9, **tiny))
    folder = tmp_path / "old" / "checkpoints"
    folder.mkdir(parents=True)
    name = "step-00000004.safetensors"
    with safe_open(tmp_path / "whole" / "checkpoints" / name, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    former = {**FORMER_DEFAULTS, **tiny, "output": "elsewhere", "steps": 8, "checkpoint_every": 4, "keep": 9}
    header = {"format": 1, "step": 4, "config": former, "extra": {"scaler": {}}}
    save_file(tensors, folder / name, metadata={checkpoints._KEY: digests.seal(header, tensors)})
    changed = TrainConfig(output=str(tmp_path / "old"), steps=8, learning_rate=0.5, **tiny)
    with pytest.raises(ValueError, match=r"optimiser\.learning_rate was 0\.001 and is 0\.5"):
        loop.train(changed)
    again = loop.train(TrainConfig(output=str(tmp_path / "old"), steps=8, **tiny))
    with safe_open(whole, framework="pt") as one, safe_open(again, framework="pt") as two:
        assert list(one.keys()) == list(two.keys())
        assert all(torch.equal(one.get_tensor(key), two.get_tensor(key)) for key in one.keys())  # noqa: SIM118
