# SPDX-License-Identifier: Apache-2.0
"""The fused network and its layers, against PyTorch: in float32 under Triton's interpreter, and on a GPU."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from berdiff_fast import BerDiff, UNet, sample
from berdiff_fast.backends import select
from berdiff_fast.network import fused, inference
from berdiff_fast.network.fused import FusedUNet

if not select.can_run("triton", "cuda" if torch.cuda.is_available() else "cpu"):
    pytest.skip("Triton is not here", allow_module_level=True)
from berdiff_fast.backends.triton.convolution import Weight, tiling
from berdiff_fast.backends.triton.layers import TritonLayers

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is compiled on this machine")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
gpu = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="no GPU of compute capability 9")]
CPU = torch.device("cpu")


def randomised(**options: Any) -> UNet:
    torch.manual_seed(0)
    network = UNet(**options).eval()
    with torch.no_grad():
        for p in network.parameters():  # branches end in zeros, which would hide them
            p.add_(torch.randn_like(p) * 0.05)
    return network


NETWORKS = {
    "attention, added timestep": dict(
        model_channels=16, channel_mult=(1, 2), num_res_blocks=1, norm_groups=8, num_heads=2
    ),
    "scale and shift, patches, channels": dict(
        model_channels=16, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4, attention_resolutions=(),
        use_scale_shift_norm=True, patch_size=2, in_channels=2, img_channels=3,
    ),
}  # fmt: skip


def inputs(network: UNet, size: tuple[int, int], n: int, images: int = 1):
    generator = torch.Generator().manual_seed(1)
    y = (torch.rand(n, network.mask_channels, *size, generator=generator) < 0.5).float()
    return y, torch.randn(images, network.img_channels, *size, generator=generator)


def exact_logits(network: UNet, y, img, t: float):
    with torch.no_grad():
        rows = img.double().repeat_interleave(len(y) // len(img), 0)
        return copy.deepcopy(network).double()(y.double(), torch.full((len(y),), t), rows)


@interpreted
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.slow
def test_float32_logits_are_within_1e_6_of_the_largest_of_float64(name):
    network = randomised(**NETWORKS[name])
    # Sides that are no multiples of a tile, and two images of two masks.
    y, img = inputs(network, (24, 40) if network.patch_size == 2 else (12, 20), 4, 2)
    form = FusedUNet(network, [3.0, 500.0])
    with torch.no_grad():
        got = form(y, 1, form.encode(img))
    exact = exact_logits(network, y, img, 500.0)
    assert (got - exact).abs().max() <= 1e-6 * exact.abs().max()


@interpreted
@pytest.mark.slow
def test_several_steps_at_once():
    network = randomised(**NETWORKS["attention, added timestep"])
    y, img = inputs(network, (8, 8), 2)
    form = FusedUNet(network, [3.0, 100.0, 500.0])
    with torch.no_grad():
        features = form.encode(img)
        both = form(torch.cat([y, y]), slice(1, 3), features)
        apart = torch.cat([form(y, 1, features), form(y, 2, features)])
    assert torch.equal(both, apart)
    assert not torch.equal(both[:2], both[2:])


@interpreted
@pytest.mark.slow
def test_masks_are_those_of_the_network_as_it_is(monkeypatch):
    network = randomised(**NETWORKS["attention, added timestep"])
    model = BerDiff(network, prediction="epsilon").eval()
    img = inputs(network, (16, 16), 1)[1]
    monkeypatch.setattr(fused, "why_not", lambda network, device, dtype: None)
    masks = sample(model, img, n=4, steps=3, seed=1)
    ((_, _, form),) = inference._prepared[network].values()
    assert isinstance(form, FusedUNet)
    assert torch.equal(masks, sample(model, img, n=4, steps=3, seed=1, prepare=False))


def conv(
    size: int, count: int, cout: int, taps: int, stride: int = 1, projected: tuple[int, ...] = (), n: int = 2, **made
):
    """Input, weight, what is projected, a residual; and the convolution by PyTorch, in float64."""
    made = dict(device=CPU, dtype=torch.float32) | made
    torch.manual_seed(0)
    x = torch.randn(n, size, size, count, **made)
    side = 3 if taps != 1 else 1
    kernel = torch.randn(cout, count, side, side, **made) * (count * side**2) ** -0.5
    skips = tuple(torch.randn(n, size, size, c, **made) for c in projected)
    skip = torch.randn(cout, sum(projected), **made) * max(1, sum(projected)) ** -0.5
    bias = torch.randn(cout, device=made["device"])
    maker = fused._Maker(made["dtype"], None, count)
    module = torch.nn.Conv2d(count, cout, side, device=made["device"])
    module.weight.data, module.bias.data = kernel.float(), bias
    if taps == 4:
        weight = maker.upsample(module)
    else:
        weight = maker.weight(module, stride=stride)
        weight.matrix = torch.cat([weight.matrix, skip.to(weight.matrix.dtype)], dim=1).contiguous()
        weight.projected = projected
    exact = x.double().movedim(-1, 1)
    if taps == 4:
        exact = F.interpolate(exact, scale_factor=2.0)
    exact = F.conv2d(exact, kernel.double(), bias.double(), stride=stride, padding=side // 2).movedim(1, -1)
    if projected:
        exact = exact + torch.cat(skips, -1).double() @ skip.double().T
    residual = torch.randn(exact.shape, **made)
    return x, weight, skips, residual, exact


CONVOLUTIONS = {
    "3 x 3": (16, 32, 32, 9),
    "borders inside a tile": (11, 16, 16, 9),
    "few pixels": (4, 32, 64, 9),
    "stride 2": (16, 16, 32, 9, 2),
    "stride 2, odd tiles": (20, 16, 16, 9, 2),
    "upsampling": (8, 32, 16, 4),
    "1 x 1": (8, 64, 32, 1),
    "one projected": (16, 32, 32, 9, 1, (16,)),
    "two projected": (16, 16, 32, 9, 1, (32, 16)),
}


def check_convolution(layers, case, tolerance: float, **made) -> None:
    x, weight, skips, residual, exact = conv(*case, **made)
    for rest in (None, residual):
        got = layers.convolution(x, weight, weight.bias, projected=skips, residual=rest)
        wanted = exact if rest is None else exact + rest.double()
        assert (got.x.double() - wanted).abs().max() <= tolerance * wanted.abs().max()
        found = got.x.double().flatten(1, 2)
        for sums, values in ((got.sums[:, :, 0], found), (got.sums[:, :, 1], found**2)):
            total = values.sum(1)
            assert (sums.double().sum(1) - total).abs().max() <= 1e-5 * values.abs().sum(1).max()


@interpreted
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_and_its_sums(name):
    check_convolution(TritonLayers(), CONVOLUTIONS[name], 1e-6)


def test_a_thread_that_compiles_keeps_no_other_from_launching():
    class Kernel:
        def __init__(self):
            self.launched, self.compiled = [], []

        def __getitem__(self, grid):
            return lambda *arguments, **constants: self.launched.append(threading.get_ident())

        def warmup(self, *arguments, grid, **constants):
            self.compiled.append(threading.get_ident())

    layers, kernel = TritonLayers(), Kernel()
    with layers.compiling():
        layers._launch(kernel, (1,))
        other = threading.Thread(target=lambda: layers._launch(kernel, (1,)))
        other.start()
        other.join()
    layers._launch(kernel, (1,))
    assert kernel.compiled == [threading.get_ident()] and len(kernel.launched) == 2


@interpreted
def test_biases_of_several_steps():
    x, weight, _, _, _ = conv(8, 16, 16, 9)
    layers, biases = TritonLayers(), torch.randn(2, 16)
    both = layers.convolution(x, weight, biases).x
    for i in range(2):
        assert torch.equal(both[i : i + 1], layers.convolution(x[i : i + 1], weight, biases[i]).x)


@interpreted
def test_factors_and_norm_of_two_tensors():
    torch.manual_seed(0)
    layers, parts = TritonLayers(), []
    for channels in (32, 16):
        x, weight, _, _, _ = conv(12, 16, channels, 9)
        parts.append(layers.convolution(x, weight, weight.bias * 3))
    w, b = torch.randn(48), torch.randn(48)
    factors = layers.factors(parts[0], parts[1], w, b, 4, 1e-5)  # groups of 12 channels, one of them from both tensors
    got = layers.norm(parts[0], parts[1], factors, silu=True)
    together = torch.cat([p.x for p in parts], -1).double().movedim(-1, 1)
    exact = F.silu(F.group_norm(together, 4, w.double(), b.double())).movedim(1, -1)
    assert (got - exact).abs().max() <= 2e-6 * exact.abs().max()


@pytest.mark.parametrize("images", [1, 16])
@pytest.mark.parametrize("side", [4, 8, 16, 20, 64, 128])
@pytest.mark.parametrize("channels", [(16, 16), (96, 64), (128, 128), (512, 384)])
def test_tiles_cover_everything(images, side, channels):
    weight = Weight(torch.empty(channels[1], 9 * channels[0]), torch.empty(channels[1]), channels[0])
    tile = tiling(images, side, side, weight, 2)
    assert channels[0] % tile.k == 0 and channels[1] % tile.outputs == 0
    assert tile.rows * tile.columns in (64, 128) and tile.outputs >= 16


def test_why_not():
    network = UNet(**NETWORKS["attention, added timestep"])
    assert "for GPUs" in str(fused.why_not(network, CPU, torch.bfloat16))
    for options, reason in (
        (dict(dims=3), "for images"),
        (dict(conv_resample=False), "without convolutions"),
        (dict(model_channels=24, norm_groups=8), "multiples of 16"),
    ):
        config = UNet(**NETWORKS["attention, added timestep"] | options).config
        assert reason in str(fused._why_not_shape(config))
    with pytest.raises(ValueError, match="network cannot be fused: it is for images"):
        FusedUNet(UNet(**NETWORKS["attention, added timestep"] | dict(dims=3)), [1.0])


# ---------------------------------------------------------------------- on a GPU


def on_gpu(marks):
    def decorate(function):
        for mark in marks:
            function = mark(function)
        return function

    return decorate


@on_gpu(gpu)
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1.2e-2), (torch.float16, 1.5e-3)], ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_on_the_gpu(name, dtype, tolerance):
    check_convolution(TritonLayers(), CONVOLUTIONS[name], tolerance, device="cuda", dtype=dtype)


@on_gpu(gpu)
@pytest.mark.parametrize(
    "shape",
    [(128, 128, 128, 16), (64, 256, 128, 16), (32, 256, 256, 16), (16, 384, 384, 16), (8, 512, 512, 1)],
    ids=str,
)
def test_the_same_bits_again_and_again(shape):
    """A race between loads and products would show as bits that change."""
    size, count, cout, n = shape
    x, weight, _, residual, exact = conv(size, count, cout, 9, n=n, device="cuda", dtype=torch.bfloat16)
    layers = TritonLayers()
    first = layers.convolution(x, weight, weight.bias, residual=residual)
    wanted = exact + residual.double()
    assert (first.x.double() - wanted).abs().max() <= 1.2e-2 * wanted.abs().max()
    for _ in range(50):
        again = layers.convolution(x, weight, weight.bias, residual=residual)
        assert torch.equal(first.x, again.x) and torch.equal(first.sums, again.sums)


@on_gpu(gpu)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_network_on_the_gpu(dtype):
    """No further from float64 than the plain network in the same type, and the same bits again."""
    network = randomised(model_channels=64, channel_mult=(1, 2, 3), num_res_blocks=1, attention_resolutions=(4,))
    y, img = inputs(network, (64, 96), 6, 2)
    exact = exact_logits(network, y, img, 500.0)
    network = network.cuda()
    assert fused.why_not(network, torch.device("cuda"), dtype) is None
    form = FusedUNet(network, [500.0], dtype=dtype)
    plain = copy.deepcopy(network).to(dtype)
    with torch.no_grad():
        y, img = y.cuda().to(dtype), img.cuda()
        features = form.encode(img)
        got = form(y, 0, features)
        theirs = plain(y, torch.full((6,), 500.0, device="cuda"), img.to(dtype).repeat_interleave(3, 0))
        assert all(torch.equal(got, form(y, 0, features)) for _ in range(20))
    error, other = ((z.cpu().double() - exact).norm() / exact.norm() for z in (got, theirs))
    assert error <= 1.3 * other + 1e-6, f"{error} where the plain network has {other}"
