# SPDX-License-Identifier: Apache-2.0
"""The U-Net and the reading of published checkpoints, against values of the published code."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from support import LIDC, SMALL, golden_path, inputs, published_unet, randomised

from berdiff_fast.network.blocks import (
    AttentionBlock,
    Downsample,
    Float32GroupNorm,
    ResBlock,
    Upsample,
    timestep_embedding,
)
from berdiff_fast.network.official import (
    build_unet,
    unet_arguments,
)
from berdiff_fast.network.unet import UNet


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def published():
    return published_unet()


# The published function


def test_probabilities_are_the_published_ones(published):
    config, weights, tensors = published
    network = build_unet(weights, **config).eval()
    with torch.no_grad():
        logits = network(tensors["y_t"], tensors["t"], tensors["img"])
        from_bits = network(tensors["y_t"].bool(), tensors["t"].double(), tensors["img"])
    expected = tensors["output_probability"]
    assert expected.std() > 0.01, "the golden output is constant and shows nothing"
    assert (logits.sigmoid() - expected).abs().max() <= 1e-5
    assert torch.equal(from_bits, logits)


def test_published_names_and_shapes():
    expected = json.loads(golden_path("unet_lidc128_parameter_shapes.json").read_text())
    with torch.device("meta"):
        network = UNet(**unet_arguments(**LIDC))
    assert {name: list(value.shape) for name, value in network.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in network.parameters()) == 85_599_233


def test_every_published_name_of_the_small_network(published):
    config, weights, _ = published
    with torch.device("meta"):
        network = UNet(**config)
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    assert shapes == {name: value.shape for name, value in weights.items()}


# The parts, against their formulas


def test_timestep_embedding():
    embedding = timestep_embedding(torch.tensor([0.0, 7.5, 999.0]), 32)
    assert embedding.dtype == torch.float32 and embedding.shape == (3, 32)
    for row, t in zip(embedding.tolist(), (0.0, 7.5, 999.0), strict=True):
        for i in range(16):
            angle = t * 10000.0 ** (-i / 16)
            assert row[i] == pytest.approx(math.cos(angle), abs=2e-4)
            assert row[i + 16] == pytest.approx(math.sin(angle), abs=2e-4)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "float64"])
def test_group_norm_computes_in_float32_or_wider(name, monkeypatch):
    dtype, computed_in, compute = getattr(torch, name), [], F.group_norm

    def spy(x, groups, weight, bias, eps):
        computed_in.extend([x.dtype, weight.dtype, bias.dtype])
        return compute(x, groups, weight, bias, eps)

    monkeypatch.setattr(F, "group_norm", spy)
    x = (torch.randn(2, 64, 8, 8) + 20).to(dtype)
    y = Float32GroupNorm(64, 32).to(dtype)(x)
    assert y.dtype == dtype and set(computed_in) == {torch.promote_types(dtype, torch.float32)}
    groups = x.double().reshape(2, 32, -1)
    variance = groups.var(2, correction=0, keepdim=True)
    exact = (groups - groups.mean(2, keepdim=True)) / (variance + 1e-5).sqrt()
    # One rounding at the end, of values below 8; in float32 the mean of 20 costs more than that.
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-5)
    assert (y.double() - exact.reshape(x.shape)).abs().max() <= tolerance


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_heads(heads):
    block = randomised(AttentionBlock(64, heads, groups=32))
    x = torch.randn(2, 64, 3, 5)
    qkv = block.qkv(F.group_norm(x.flatten(2), 32, block.norm.weight, block.norm.bias))
    size, mixed = 64 // heads, []
    for head in range(heads):  # each head owns 3 x size consecutive channels: q, then k, then v
        q, k, v = (qkv[:, (3 * head + part) * size :][:, :size] for part in range(3))
        weight = torch.softmax(torch.einsum("nct,ncs->nts", q, k) / math.sqrt(size), dim=-1)
        mixed.append(torch.einsum("nts,ncs->nct", weight, v))
    expected = x + block.proj_out(torch.cat(mixed, dim=1)).reshape(x.shape)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("widths", [(32, 64), (64, 64)])
def test_residual_block(widths, scale_shift):
    block = randomised(ResBlock(*widths, 128, dropout=0.5, dims=2, scale_shift=scale_shift, groups=32))
    x, embedding = torch.randn(2, widths[0], 6, 5), torch.randn(2, 128)
    weights = block.state_dict()

    def parameters(name):
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    h = F.silu(F.group_norm(x, 32, *parameters("in_layers.0")))
    h = F.conv2d(h, *parameters("in_layers.2"), padding=1)
    condition = F.linear(F.silu(embedding), *parameters("emb_layers.1"))[:, :, None, None]
    if scale_shift:
        scale, shift = condition[:, :64], condition[:, 64:]
        h = F.group_norm(h, 32, *parameters("out_layers.0")) * (1 + scale) + shift
    else:
        h = F.group_norm(h + condition, 32, *parameters("out_layers.0"))
    h = F.conv2d(F.silu(h), *parameters("out_layers.3"), padding=1)
    skip = F.conv2d(x, *parameters("skip_connection")) if widths[0] != widths[1] else x
    torch.testing.assert_close(block(x, embedding), skip + h, rtol=0, atol=1e-5)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("dims", [2, 3])
def test_resampling(dims, learned):
    spatial = (3, 4, 6)[-dims:]
    x = torch.randn(2, 32, *spatial)
    down, up = Downsample(32, learned, dims), Upsample(32, learned, dims)
    depth = (3,) if dims == 3 else ()
    assert down(x).shape == (2, 32, *depth, 2, 3)
    repeated = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    expected = up.conv(repeated) if learned else repeated
    assert torch.equal(up(x), expected)
    assert sorted(down.state_dict()) == (["op.bias", "op.weight"] if learned else [])
    assert sorted(up.state_dict()) == (["conv.bias", "conv.weight"] if learned else [])
    if not learned:
        mean = x.unflatten(-1, (3, 2)).unflatten(-3, (2, 2)).mean(dim=(-1, -3))
        torch.testing.assert_close(down(x), mean)


# The whole network, in all its forms


@pytest.mark.parametrize(
    "change, spatial",
    [
        (dict(), (16, 24)),
        (dict(in_channels=3, img_channels=2), (16, 16)),
        (dict(use_scale_shift_norm=True), (16, 16)),
        (dict(dims=3), (3, 8, 16)),
        (dict(channel_mult=(2, 3, 1), attention_resolutions=(1, 4)), (16, 16)),
        (dict(num_heads=4, num_heads_upsample=2), (16, 16)),
        (dict(conv_resample=False, num_res_blocks=2), (16, 16)),
        (dict(attention_resolutions=[]), (16, 16)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_variants(change, spatial):
    network = randomised(UNet(**{**SMALL, **change}))
    y_t, t, img = inputs(network, *spatial)
    with torch.no_grad():
        logits = network(y_t, t, img)
        assert logits.shape == y_t.shape and logits.dtype == torch.float32
        # Everything that goes in must matter, and an image only to its own mask.
        assert not torch.allclose(network(~y_t, t, img), logits, atol=1e-3)
        assert not torch.allclose(network(y_t, t + 100, img), logits, atol=1e-3)
        for channel in range(network.img_channels):
            other = img.clone()
            other[1, channel] += 1
            changed = network(y_t, t, other)
            assert not torch.allclose(changed[1], logits[1], atol=1e-3)
            torch.testing.assert_close(changed[0], logits[0], rtol=0, atol=1e-5)

        # What is in `config` and the state dict is the whole network.
        config = json.loads(json.dumps(network.config))
        twin = UNet(**config).eval()
        assert twin.config == config
        twin.load_state_dict(network.state_dict())
        assert torch.equal(twin(y_t, t, img), logits)


@pytest.mark.parametrize("name", ["num_heads", "num_heads_upsample"])
def test_heads_change_the_function_but_no_shape(name):
    one = randomised(UNet(**SMALL, num_heads=1))
    other = UNet(**SMALL, **{"num_heads": 1, name: 4}).eval()
    other.load_state_dict(one.state_dict())
    arguments = inputs(one, 16, 16)
    with torch.no_grad():
        assert not torch.allclose(one(*arguments), other(*arguments), atol=1e-4)


def test_untrained_network_predicts_zero():
    network = UNet(**SMALL)
    assert not network(*inputs(network, 16, 16)).any()


def test_attributes():
    network = UNet(**SMALL, in_channels=3, img_channels=2, dims=3)
    assert (network.mask_channels, network.img_channels, network.spatial_dims) == (3, 2, 3)
    assert network.downsampling == 2 and network.dtype == torch.float32
    with torch.device("meta"):
        assert UNet().downsampling == 16


@pytest.mark.parametrize("name, tolerance", [("bfloat16", 0.1), ("float16", 0.02), ("float64", 1e-4)])
def test_other_dtypes(name, tolerance):
    dtype = getattr(torch, name)
    network = randomised(UNet(**SMALL, num_heads=2, use_scale_shift_norm=True))
    arguments = inputs(network, 16, 16)
    with torch.no_grad():
        exact = network(*arguments)
        logits = network.to(dtype)(*arguments)
    assert logits.dtype == network.dtype == dtype
    assert exact.std() > 0.2
    assert (logits - exact).abs().max() <= tolerance


def test_volumes_with_one_slice_agree_with_images():
    """A 3-D network whose kernels act in the middle slice alone is the 2-D network."""
    flat = randomised(UNet(**SMALL))
    deep = UNet(**SMALL, dims=3).eval()
    weights = deep.state_dict()
    for name, value in flat.state_dict().items():
        if value.ndim == 4 and value.shape[-1] == 3:
            weights[name] = torch.stack([torch.zeros_like(value), value, torch.zeros_like(value)], dim=2)
        else:
            weights[name] = value.reshape(weights[name].shape)
    deep.load_state_dict(weights)
    y_t, t, img = inputs(flat, 16, 16)
    with torch.no_grad():
        volume = deep(y_t.unsqueeze(2), t, img.unsqueeze(2)).squeeze(2)
        torch.testing.assert_close(volume, flat(y_t, t, img), rtol=0, atol=1e-5)


def test_every_parameter_gets_a_gradient():
    network = randomised(UNet(**SMALL)).train()
    network(*inputs(network, 16, 16)).square().mean().backward()
    for name, value in network.named_parameters():
        assert value.grad is not None and value.grad.any(), name


def test_dropout_acts_in_training_only():
    network = randomised(UNet(**SMALL, dropout=0.5))
    arguments = inputs(network, 16, 16)
    with torch.no_grad():
        assert torch.equal(network(*arguments), network(*arguments))
        network.train()
        assert not torch.equal(network(*arguments), network(*arguments))


def test_one_graph_serves_every_batch_size():
    network = randomised(UNet(**SMALL))
    batch, half = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("half", min=2, max=64)
    sizes = {0: batch, 2: 2 * half}
    program = torch.export.export(
        network, inputs(network, 16, 16), dynamic_shapes=dict(y_t=sizes, timesteps={0: batch}, img=sizes)
    )
    arguments = inputs(network, 20, 16, batch=3)
    torch.testing.assert_close(program.module()(*arguments), network(*arguments), rtol=0, atol=1e-5)


# What goes wrong, in words


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(in_channels=0), "in_channels must be a positive int, got 0"),
        (dict(img_channels=True), "img_channels must be a positive int, got True"),
        (dict(num_res_blocks=1.5), "num_res_blocks must be a positive int, got 1.5"),
        (dict(num_heads=-1), "num_heads must be a positive int, got -1"),
        (dict(model_channels="128"), "model_channels must be a positive int, got '128'"),
        (dict(model_channels=48), "model_channels must be a multiple of 32, the groups of GroupNorm, got 48"),
        (dict(out_channels=2), "out_channels must equal in_channels = 1.*got 2"),
        (dict(attention_resolutions="16,8"), "attention_resolutions must be a list or tuple of.*got '16,8'"),
        (dict(channel_mult=(1, 1.5)), r"channel_mult must be a list or tuple of positive.* got \[1, 1.5\]"),
        (dict(channel_mult=()), "channel_mult must name at least one level, got none"),
        (dict(dropout=1.5), r"dropout must lie in \[0, 1\], got 1.5"),
        (dict(dropout="0"), r"dropout must be a number in \[0, 1\], got '0'"),
        (dict(dims=1), "dims must be 2 or 3, got 1"),
        (dict(conv_resample=1), "conv_resample must be True or False, got 1"),
        (dict(use_scale_shift_norm="False"), "use_scale_shift_norm must be True or False, got 'False'"),
        (dict(num_heads=3), "num_heads must divide the 64 channels attention works on, got 3"),
        (dict(num_heads_upsample=3), "num_heads_upsample must divide the 64 channels.*got 3"),
        (dict(num_heads_upsample=0), "num_heads_upsample must be a positive int, or -1 for num_heads, got 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_construction_errors(change, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{**SMALL, **change})


@pytest.mark.parametrize(
    "y_t, t, img, error, message",
    [
        ((2, 3, 8, 8), (2,), (2, 1, 8, 8), ValueError, r"y_t must have shape \(N, 1, H, W\), got \(2, 3,"),
        ((2, 8, 8), (2,), (2, 1, 8, 8), ValueError, r"y_t must have shape \(N, 1, H, W\), got \(2, 8, 8\)"),
        ((2, 1, 8, 8), (2,), (2, 3, 8, 8), ValueError, r"img must have shape \(N, 1, H, W\), got \(2, 3,"),
        ((2, 1, 8, 8), (2,), (1, 1, 8, 8), ValueError, "img must have the batch size of y_t, 2, got 1"),
        ((2, 1, 8, 8), (2,), (2, 1, 8, 16), ValueError, r"img .* size of y_t, \(8, 8\), got \(8, 16\)"),
        ((2, 1, 8, 8), (1,), (2, 1, 8, 8), ValueError, r"timesteps must have shape \(2,\), .*got \(1,\)"),
        ((2, 1, 8, 8), (), (2, 1, 8, 8), ValueError, r"timesteps must have shape \(2,\), .*got \(\)"),
        ((2, 1, 8, 9), (2,), (2, 1, 8, 9), ValueError, "height and width divisible by 2, got 8 x 9"),
        ((2, 1, 7, 8), (2,), (2, 1, 7, 8), ValueError, "height and width divisible by 2, got 7 x 8"),
        ((2, 1, 8, 8), (2,), None, TypeError, "img must be floating point.*got torch.uint8"),
    ],
)
def test_input_errors(y_t, t, img, error, message):
    image = torch.zeros(2, 1, 8, 8, dtype=torch.uint8) if img is None else torch.zeros(img)
    with pytest.raises(error, match=message):
        UNet(**SMALL)(torch.zeros(y_t, dtype=torch.bool), torch.zeros(t), image)


def test_volumes_may_have_any_depth_but_not_any_height():
    network = UNet(**SMALL, dims=3)
    assert network(*inputs(network, 5, 4, 4)).shape == (2, 1, 5, 4, 4)
    with pytest.raises(ValueError, match="divisible by 2, got 5 x 4"):
        network(*inputs(network, 4, 5, 4))
    with pytest.raises(ValueError, match=r"y_t must have shape \(N, 1, D, H, W\), got \(2, 1, 4, 4\)"):
        network(*inputs(network, 4, 4))


# The published scripts' arguments


def test_patches_are_the_published_network_on_shuffled_pixels():
    torch.manual_seed(0)
    whole = UNet(**{**SMALL, "patch_size": 2})
    inner = UNet(**{**SMALL, "in_channels": 4, "img_channels": 4 * SMALL.get("img_channels", 1)})
    torch.nn.init.normal_(whole.out[2].weight)
    inner.load_state_dict(whole.state_dict())
    y, img, t = torch.rand(2, 1, 32, 32).round(), torch.randn(2, 1, 32, 32), torch.tensor([3, 700])
    logits = inner(
        *(torch.nn.functional.pixel_unshuffle(x, 2) for x in (y,)), t, torch.nn.functional.pixel_unshuffle(img, 2)
    )
    assert torch.equal(whole(y, t, img), torch.nn.functional.pixel_shuffle(logits, 2))
    assert whole.downsampling == 2 * inner.downsampling
    with pytest.raises(ValueError, match="divisible by"):
        whole(y[..., :-2], t, img[..., :-2])


def test_groups_of_one_channel_lose_an_added_timestep():
    def change(**options) -> float:
        torch.manual_seed(0)
        network = UNet(model_channels=32, channel_mult=(1,), attention_resolutions=(), **options)
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.2)
        y, img = torch.rand(1, 1, 16, 16).round(), torch.randn(1, 1, 16, 16)
        early, late = (network(y, torch.tensor([t]), img) for t in (5, 900))
        return float((early - late).abs().max() / early.std())

    assert change() < 1e-4
    assert change(norm_groups=8) > 0.1 and change(use_scale_shift_norm=True) > 0.1
