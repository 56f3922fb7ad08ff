# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the published code: arguments, names, and files that are none."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support import SMALL, inputs, published_unet, randomised

from berdiff_fast.network.official import (
    DIFFUSION_ARGUMENTS,
    UNET_ARGUMENTS,
    build_unet,
    read_state_dict,
    split_arguments,
    unet_arguments,
)
from berdiff_fast.network.unet import UNet


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def published():
    return published_unet()


def test_arguments_of_the_published_scripts():
    assert unet_arguments() == dict(
        in_channels=1,
        img_channels=1,
        model_channels=128,
        num_res_blocks=2,
        attention_resolutions=(8, 16),
        dropout=0.0,
        channel_mult=(1, 1, 2, 3, 4),
        num_heads=4,
        num_heads_upsample=-1,
        use_scale_shift_norm=True,
    )
    changed = unet_arguments(
        image_size=64,
        attention_resolutions="32, 8",
        num_channels=64,
        num_heads=2,
        num_heads_upsample=1,
        num_res_blocks=3,
        dropout=0.1,
        img_channels=4,
        use_scale_shift_norm=False,
        use_checkpoint=True,
    )
    assert changed == dict(
        in_channels=1,
        img_channels=4,
        model_channels=64,
        num_res_blocks=3,
        attention_resolutions=(2, 8),
        dropout=0.1,
        channel_mult=(1, 2, 3, 4),
        num_heads=2,
        num_heads_upsample=1,
        use_scale_shift_norm=False,
    )


@pytest.mark.parametrize(
    "size, levels",
    [
        (512, (1, 1, 2, 2, 4, 4)),
        (256, (1, 1, 2, 2, 4, 4)),
        (128, (1, 1, 2, 3, 4)),
        (64, (1, 2, 3, 4)),
        (32, (1, 2, 2, 2)),
    ],
)
def test_levels_belong_to_the_image_size(size, levels):
    arguments = unet_arguments(image_size=size)
    assert arguments["channel_mult"] == levels
    assert arguments["attention_resolutions"] == (size // 16, size // 8)
    assert unet_arguments(image_size=size, channel_mult=(1, 5))["channel_mult"] == (1, 5)
    with torch.device("meta"):
        UNet(**arguments)


def test_split_arguments():
    unet, diffusion = split_arguments(dict(image_size=64, noise_schedule="cosine2", dropout=0.5))
    assert unet == {**UNET_ARGUMENTS, "image_size": 64, "dropout": 0.5}
    assert diffusion == {**DIFFUSION_ARGUMENTS, "noise_schedule": "cosine2"}
    assert unet_arguments(**unet)["channel_mult"] == (1, 2, 3, 4)
    assert (
        dict(
            diffusion_steps=1000,
            noise_schedule="linear",
            timestep_respacing="",
            ltype="bce",
            mean_type="xstart",
            rescale_timesteps=True,
        )
        == DIFFUSION_ARGUMENTS
    )


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(num_head=4, depth=2), TypeError, "unknown argument num_head, depth; the known.* num_heads"),
        (dict(ltype="mix"), TypeError, "unknown argument ltype; the known ones are image_size, "),
        (dict(image_size=100), ValueError, "one of 32, 64, .*512 unless channel_mult is given, got 100"),
        (dict(image_size="128"), ValueError, "image_size must be a positive int, got '128'"),
        (dict(attention_resolutions="16;8"), ValueError, "attention_resolutions must be pixels.*got '16;8'"),
        (dict(attention_resolutions="0"), ValueError, "pixels between 1 and image_size = 128.*got '0'"),
        (dict(attention_resolutions="256"), ValueError, "pixels between 1 and image_size = 128.*got '256'"),
        (dict(attention_resolutions=(16, 8)), ValueError, r"attention_resolutions must be.*got \(16, 8\)"),
    ],
)
def test_argument_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        unet_arguments(**arguments)


def test_split_names_unknown_arguments():
    with pytest.raises(TypeError, match="unknown argument steps; .*image_size.*diffusion_steps"):
        split_arguments(dict(steps=10, ltype="mix"))


# Checkpoints


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("kind", ["mapping", "model.pt", "model.safetensors"])
def test_state_dict_round_trip(tmp_path, kind, prefix):
    network = randomised(UNet(**SMALL))
    expected = network.state_dict()
    state = {prefix + key: value for key, value in expected.items()}
    source = tmp_path / kind
    if kind == "mapping":
        source = state
    elif kind == "model.pt":
        torch.save(state, source)
    else:
        safetensors.torch.save_file(state, source)
    weights = read_state_dict(source)
    assert type(weights) is dict and same(weights, expected)
    assert not any(value.requires_grad for value in weights.values())

    rebuilt = build_unet(weights, **SMALL).eval()
    arguments = inputs(network, 16, 16)
    assert torch.equal(rebuilt(*arguments), network(*arguments))
    rebuilt.out[2].weight.data.zero_()  # the rebuilt network has its own memory
    assert weights["out.2.weight"].any() and network.out[2].weight.any()


def test_parameters_and_text_paths_are_accepted(tmp_path):
    network = UNet(**SMALL)
    weights = read_state_dict(dict(network.named_parameters()))
    assert not weights["out.2.bias"].requires_grad
    torch.save(weights, tmp_path / "a.pt")
    assert same(read_state_dict(str(tmp_path / "a.pt")), weights)


def test_module_prefix_is_kept_where_it_is_not_uniform():
    mixed = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert list(read_state_dict(mixed)) == ["module.a", "b"]


def test_weights_of_another_dtype_are_converted():
    weights = {key: value.half() for key, value in randomised(UNet(**SMALL)).state_dict().items()}
    network = build_unet(weights, **SMALL)
    assert {value.dtype for value in network.parameters()} == {torch.float32}
    assert torch.equal(network.out[2].weight, weights["out.2.weight"].float())


def test_building_leaves_the_random_generator_alone():
    weights = UNet(**SMALL).state_dict()
    before = torch.get_rng_state()
    build_unet(weights, **SMALL)
    assert torch.equal(torch.get_rng_state(), before)


class Malicious:
    """Unpickling this makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, zipped):
    path, trace = tmp_path / "bad.pt", tmp_path / "trace"
    torch.save({"a": torch.zeros(1), "b": Malicious(trace)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="bad.pt holds more than tensors: it asks for .*mkdir") as caught:
        read_state_dict(path)
    assert not trace.exists()
    # torch's text, which says how to run it anyway, is not shown
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    torch.load(path, weights_only=False)
    assert trace.exists(), "the checkpoint was harmless, so this test shows nothing"


@pytest.mark.parametrize("name", ["model.pt", "old.pt", "model.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.002, 0.5, 0.99])
def test_truncated_files(tmp_path, name, share):
    weights, path = {"a": torch.randn(2000), "b": torch.randn(2000)}, tmp_path / name
    if path.suffix == ".pt":
        torch.save(weights, path, _use_new_zipfile_serialization=name != "old.pt")
    else:
        safetensors.torch.save_file(weights, path)
    assert same(read_state_dict(path), weights)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=re.escape(f"checkpoint {path} is damaged")):
        read_state_dict(path)


def test_files_which_are_no_checkpoints(tmp_path):
    for path in (tmp_path / "absent.pt", tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(f"checkpoint {path} is not an existing file")):
            read_state_dict(path)
    path = tmp_path / "notes.pt"
    path.write_text("not a checkpoint")
    with pytest.raises(ValueError, match=re.escape(f"checkpoint {path} is damaged, or is no checkpoint")):
        read_state_dict(path)


@pytest.mark.parametrize(
    "content, message",
    [
        ([torch.zeros(1)], "must map names to tensors, got a value of type list"),
        ({}, "must map names to tensors, got an empty dict"),
        ({"a": torch.zeros(1), "epoch": 3}, "'epoch' holds a value of type int"),
        ({"state_dict": {"a": torch.zeros(1)}}, "'state_dict' holds a value of type dict; if"),
        ({3: torch.zeros(1)}, "must map names to tensors, but 3"),
    ],
)
def test_checkpoints_which_are_no_state_dicts(tmp_path, content, message):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=re.escape(f"checkpoint {path} ") + ".*" + message):
        read_state_dict(path)
    if isinstance(content, dict):
        with pytest.raises(ValueError, match="state_dict .*" + message):
            read_state_dict(content)


@pytest.mark.parametrize(
    "change, told, not_told",
    [
        (dict(use_scale_shift_norm=True), ["use_scale_shift_norm"], ["attention", "channel_mult"]),
        (dict(attention_resolutions=()), ["attention_resolutions"], ["use_scale_shift_norm", "channel_mult"]),
        (dict(img_channels=2), ["in_channels, img_channels, dims"], ["channel_mult", "model_channels"]),
        (dict(channel_mult=(1, 3)), ["channel_mult (published: by image_size)"], ["img_channels"]),
        (dict(num_res_blocks=2), ["num_res_blocks"], ["model_channels", "img_channels"]),
        (dict(model_channels=64), ["model_channels (published name: num_channels)"], []),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_misfit_says_which_arguments_to_check(change, told, not_told):
    weights = UNet(**SMALL).state_dict()
    with pytest.raises(ValueError, match="the state dict does not fit the network") as caught:
        build_unet(weights, **{**SMALL, **change})
    advice = str(caught.value).splitlines()[-1]
    assert advice.startswith("check ")
    assert all(name in advice for name in told) and not any(name in advice for name in not_told)


def test_a_misfit_lists_keys_and_shapes():
    weights = UNet(**SMALL).state_dict()
    del weights["out.0.bias"], weights["out.2.bias"]
    weights.update({f"extra.{i}": torch.zeros(1) for i in range(7)})
    weights["out.2.weight"] = torch.zeros(2, 32, 3, 3)
    with pytest.raises(ValueError) as caught:
        build_unet(weights, **SMALL)
    assert str(caught.value).splitlines()[:4] == [
        "the state dict does not fit the network",
        "  missing (2): out.0.bias; out.2.bias",
        "  unexpected (7): extra.0; extra.1; extra.2; extra.3; extra.4; ...",
        "  wrong shape (1): out.2.weight (2, 32, 3, 3) instead of (1, 32, 3, 3)",
    ]
