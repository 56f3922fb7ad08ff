# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of 8-bit convolutions in benchmarks/fp8.py: what is rounded, to what, and what is left alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import berdiff_fast as bf

_spec = importlib.util.spec_from_file_location("fp8", Path(__file__).resolve().parents[1] / "benchmarks" / "fp8.py")
assert _spec is not None
assert _spec.loader is not None
fp8 = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fp8)


def e4m3(x: float) -> float:
    """The nearest of all 253 finite numbers of the format, written out; ties to the even mantissa."""
    values = [((8 + m) * 2.0 ** (e - 10), m) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    values += [(m * 2.0**-9, m) for m in range(8)]
    best = min(values, key=lambda v: (abs(v[0] - abs(x)), v[1] % 2))[0]
    return best if x >= 0 else -best


def test_numbers():
    x = torch.tensor([0.0, 1.0, 1.0625, 1.1875, -3.3, 447.0, 448.0, 500.0, 1e-3, 2**-10, 0.4, -(2.0**-9)])
    got, scale = fp8.rounded(x, None)
    assert scale == 1 and got.tolist() == [e4m3(v) for v in x.tolist()]
    got, scale = fp8.rounded(x * 1e3, (0,))
    assert scale.item() == pytest.approx(500e3 / 448) and got.abs().max() == 448
    assert got.tolist() == [e4m3(v) for v in (x * 1e3 / scale).tolist()]
    assert fp8.rounded(torch.zeros(3), (0,))[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("scale", fp8.SCALES)
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions(scale, transposed):
    """Against the same by hand: every image, every output channel with its own scale."""
    torch.manual_seed(0)
    x = torch.randn(2, 16, 6, 6) * torch.tensor([1.0, 30.0]).view(2, 1, 1, 1)
    w, b = torch.randn(16, 16, 4 if transposed else 3, 4 if transposed else 3), torch.randn(16)
    conv, options = (F.conv_transpose2d, {"stride": 2, "padding": 1}) if transposed else (F.conv2d, {"padding": 1})
    with fp8.Rounded(scale) as rounding:
        got = conv(x, w, b, **options)
    assert (rounding.count, rounding.kept) == (1, 0)
    outputs = 1 if transposed else 0
    expected = torch.zeros_like(got)
    for i in range(2):
        largest = {"tensor": x.abs().max(), "mask": x[i].abs().max(), "none": torch.tensor(448.0)}[scale]
        image = fp8.rounded(x[i : i + 1] * (448 / largest), None)[0] * (largest / 448)
        for o in range(16):
            one = w.select(outputs, o).unsqueeze(outputs)
            kernel, s = fp8.rounded(one, (0, 1, 2, 3))
            expected[i, o] = conv(image, kernel * s, None, **options)[0, 0] + b[o]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    plain = conv(x, w, b, **options)
    assert 1e-3 < float((got - plain).abs().max() / plain.abs().max()) < 0.1


def test_what_is_left_alone():
    torch.manual_seed(0)
    x, few = torch.randn(1, 16, 6, 6), torch.randn(1, 16, 3, 3)
    with fp8.Rounded() as rounding:
        one, kept = F.conv2d(x, few[..., :1, :1]), F.conv2d(x, few)
    assert (rounding.count, rounding.kept) == (0, 1) and torch.equal(kept, F.conv2d(x, few))
    assert torch.equal(one, F.conv2d(x, few[..., :1, :1]))
    with fp8.Rounded(ends=True) as rounding:
        assert not torch.equal(F.conv2d(x, few), kept)
    assert rounding.count == 1
    with pytest.raises(ValueError, match="scale must be one of"):
        fp8.Rounded("row")


def test_inside_the_prepared_network():
    """Every 3 x 3 convolution of a call but the first and the last, at every step."""
    torch.manual_seed(0)
    network = bf.UNet(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(), norm_groups=8)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.05)
    model = bf.BerDiff(network, preprocessing=bf.Preprocessing())
    img = torch.rand(1, 1, 16, 16)
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    plain = bf.sample(model, img, 4, 3, seed=1, return_probability=True)
    with fp8.Rounded() as rounding:
        rounded = bf.sample(model, img, 4, 3, seed=1, return_probability=True)
    assert rounding.count == 3 * (len(convolutions) - 2)
    assert not torch.equal(plain[1], rounded[1])
    assert (plain[1] - rounded[1]).abs().median() < 0.1
