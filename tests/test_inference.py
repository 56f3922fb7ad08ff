# SPDX-License-Identifier: Apache-2.0
"""The prepared network and the op ``group_norm_silu``: the numbers of the plain network, within rounding."""

from __future__ import annotations

import copy
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support import threads
from variants import VARIANTS, Variant

import berdiff_fast as bf
from berdiff_fast import ops
from berdiff_fast.backends import select
from berdiff_fast.network import graph, inference
from berdiff_fast.network.inference import PreparedUNet

if select.can_run("cpp", "cpu"):
    from berdiff_fast.backends import cpp

WITH_NORMS = [v for v in VARIANTS if "group_norm_silu" not in select.LACKING.get(v.backend, ())]
every_variant = pytest.mark.parametrize("variant", WITH_NORMS, ids=lambda v: v.name)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- GroupNorm and SiLU


def expected(x, weight, bias, groups, *, other=None, eps=1e-5, silu=True) -> torch.Tensor:
    """In float64."""
    both = x.double() if other is None else torch.cat([x, other], 1).double()
    y = F.group_norm(both, groups, weight.double(), bias.double(), eps)
    return F.silu(y) if silu else y


def assert_near(got: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    assert got.shape == exact.shape and got.movedim(1, -1).is_contiguous()
    assert float((got.double() - exact).abs().max()) <= tolerance * float(exact.abs().max())


@every_variant
@pytest.mark.parametrize(
    ("shape", "other", "groups"),
    [
        ((2, 32, 8, 8), 0, 32),
        ((1, 128, 16, 16), 0, 32),
        ((5, 64, 7, 9), 32, 8),  # groups straddle the seam: 12 channels each
        ((3, 40, 33, 31), 24, 32),  # and here: 2 each
        ((1, 96, 5, 4, 6), 32, 4),
        ((2, 6, 1030), 0, 3),
        ((2, 3, 1, 1), 1, 1),
        ((2, 130, 3, 3), 62, 2),
    ],
    ids=str,
)
def test_group_norm_silu(variant, shape, other, groups):
    x, channels = noise(*shape), shape[1] + other
    second = noise(shape[0], other, *shape[2:], seed=1) if other else None
    weight, bias = noise(channels, seed=2), noise(channels, seed=3)
    for silu in (True, False):
        with variant.use():
            got = ops.group_norm_silu(
                x.to(variant.device),
                weight.to(variant.device),
                bias.to(variant.device),
                groups,
                other=None if second is None else second.to(variant.device),
                silu=silu,
                backend=variant.backend,
            ).cpu()
        assert_near(got, expected(x, weight, bias, groups, other=second, silu=silu), 1e-6)


@every_variant
def test_a_large_mean_costs_no_digits(variant):
    """With sums of squares taken of x itself, nothing of the variance would be left."""
    x = noise(2, 8, 64, 64) + 1000.0
    weight, bias = torch.ones(8), torch.zeros(8)
    with variant.use():
        got = ops.group_norm_silu(
            *(a.to(variant.device) for a in (x, weight, bias)), 2, silu=False, backend=variant.backend
        ).cpu()
    # The factors are float32: 1000 / deviation - shift has an error of 1000 half units in the last place.
    assert_near(got, expected(x, weight, bias, 2, silu=False), 5e-5)


@every_variant
def test_extreme_values(variant):
    x = torch.cat([torch.linspace(-200, 200, 4096).view(1, 1, 64, 64), noise(1, 1, 64, 64)], 1)
    weight, bias = torch.tensor([90.0, 1.0]), torch.tensor([0.0, 2.0])  # SiLU of -150 .. 150
    with variant.use():
        got = ops.group_norm_silu(*(a.to(variant.device) for a in (x, weight, bias)), 2, backend=variant.backend).cpu()
    assert_near(got, expected(x, weight, bias, 2), 1e-6)
    x[0, 0, 3, 3] = float("nan")
    with variant.use():
        got = ops.group_norm_silu(*(a.to(variant.device) for a in (x, weight, bias)), 2, backend=variant.backend).cpu()
    assert got[0, 0].isnan().all() and not got[0, 1].isnan().any()


@every_variant
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(variant, dtype):
    if variant.backend == "cpp":
        with pytest.raises(TypeError, match="x must be float32 for backend 'cpp'"):
            ops.group_norm_silu(noise(1, 4, 8, 8).to(dtype), torch.ones(4), torch.zeros(4), 2, backend="cpp")
        return
    x, weight, bias = noise(2, 48, 9, 9).to(dtype), noise(48, seed=1), noise(48, seed=2)
    got = ops.group_norm_silu(*(a.to(variant.device) for a in (x, weight, bias)), 4, backend=variant.backend).cpu()
    assert got.dtype is dtype
    assert_near(got, expected(x, weight, bias, 4), torch.finfo(dtype).eps)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_threads_and_batch_leave_no_trace(count):
    """An image's result is its own, to the last bit, whatever it is computed beside and on how many threads."""
    x, weight, bias = noise(6, 64, 50, 50), noise(64, seed=1), noise(64, seed=2)
    with threads(1):
        expected = ops.group_norm_silu(x, weight, bias, 16, backend="cpp")
    with threads(count):
        assert torch.equal(ops.group_norm_silu(x, weight, bias, 16, backend="cpp"), expected)
        alone = torch.cat([ops.group_norm_silu(one[None], weight, bias, 16, backend="cpp") for one in x])
    assert torch.equal(alone, expected)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": noise(3, 4)}, ValueError, r"x must be \(N, C, \*spatial\)"),
        ({"x": noise(1, 4, 2, 2).double()}, TypeError, "x must be float32, float16 or bfloat16"),
        ({"weight": torch.ones(3)}, ValueError, r"weight must be float32 of shape \(4,\)"),
        ({"bias": torch.ones(4).double()}, ValueError, r"bias must be float32 of shape \(4,\)"),
        ({"groups": 3}, ValueError, "groups must be a divisor of the 4 channels, got 3"),
        ({"groups": 0}, ValueError, "groups must be"),
        ({"other": noise(1, 4, 2, 3)}, ValueError, "other must have the shape of x"),
        ({"other": noise(1, 4, 2, 2).half()}, TypeError, "other must have the dtype of x"),
        ({"weight": [1.0]}, TypeError, "weight must be a torch.Tensor"),
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"other": [1.0]}, TypeError, "other must be a torch.Tensor, got list"),
    ],
    ids=str,
)
def test_bad_input(changes, error, message):
    values = {"x": noise(1, 4, 2, 2), "weight": torch.ones(4), "bias": torch.zeros(4), "groups": 2} | changes
    with pytest.raises(error, match=message):
        ops.group_norm_silu(**values)


def test_a_backend_without_norms_says_so(monkeypatch):
    """Also where it could run: an explicit choice never falls back to another one."""
    monkeypatch.setattr(select, "why_not", lambda name, device_type: None)
    with pytest.raises(select.BackendUnavailableError, match=r"'cuda' has no kernel of group_norm_silu; 'auto' and"):
        select.get("cuda", "cuda", "group_norm_silu")
    with pytest.raises(select.BackendUnavailableError, match="no kernel of group_norm_silu"):
        ops.group_norm_silu(noise(1, 4, 2, 2), torch.ones(4), torch.ones(4), 2, backend="cuda")


def test_auto_passes_over_a_backend_without_norms(monkeypatch):
    monkeypatch.setattr(select, "why_not", lambda name, device_type: None)
    monkeypatch.setattr(select, "_found", {})
    monkeypatch.setattr(select.importlib, "import_module", lambda name: SimpleNamespace(backend=name.split(".")[-1]))
    assert select.get("auto", "cuda", "group_norm_silu") == "triton"
    assert select.get("auto", "cuda") == "cuda"


def test_auto_says_why_only_the_reference_is_left(monkeypatch, caplog):
    """Also of backends that can run here and have no kernel of the op."""
    monkeypatch.setattr(select, "why_not", lambda name, device_type: "it is not here" if name == "triton" else None)
    monkeypatch.setattr(select, "_found", {})
    with caplog.at_level("WARNING", "berdiff_fast"):
        select.get("auto", "cuda", "group_norm_silu")
    assert "(cuda: it has no kernel of group_norm_silu; triton: it is not here)" in caplog.text


# ---------------------------------------------------------------------- the network


def randomised(**config) -> bf.UNet:
    """A network whose branches do not end in zeros."""
    torch.manual_seed(0)
    network = bf.UNet(**{"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, **config})
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn_like(p) * (0.5 / max(p[0].numel(), 1) ** 0.5 if p.ndim > 1 else 0.3))
    return network.eval()


CONFIGS = {
    "plain": {},
    "attention": {"attention_resolutions": (1, 2), "num_heads": 4},
    "scale and shift": {"use_scale_shift_norm": True, "norm_groups": 8},
    "patches": {"patch_size": 2, "in_channels": 2, "img_channels": 3},
    "averaging": {"conv_resample": False},
    "volumes": {"dims": 3},
    "three levels": {"channel_mult": (1, 2, 3), "num_res_blocks": 2, "attention_resolutions": (4,)},
    "same width": {"channel_mult": (2, 1), "attention_resolutions": ()},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_same_function(name, backend):
    network = randomised(**CONFIGS[name])
    wide = copy.deepcopy(network).double()
    spatial = (2, 8, 16) if network.spatial_dims == 3 else (16, 24)
    img = noise(2, network.img_channels, *spatial)
    timesteps = torch.tensor([999, 500, 0])
    prepared = PreparedUNet(network, timesteps, backend=backend)
    rows = img.repeat_interleave(3, 0)
    y = (noise(6, network.mask_channels, *spatial, seed=1) > 0).float()
    with torch.no_grad():
        features = prepared.encode(img)
        for step, t in enumerate(timesteps):
            plain = network(y, t.expand(6), rows)
            got = prepared(y, step, features)
            assert got.shape == plain.shape
            largest = float(plain.abs().max())
            assert float((got - plain).abs().max()) <= 1e-5 * largest
            exact = wide(y.double(), t.expand(6), rows.double())
            # Which of two roundings is nearer depends on the convolutions that a processor has: with AVX-512 and one
            # thread the plain network's mean error is smaller by up to 1.84, and ours 1.2e-6 of the largest logit at
            # most.
            assert float((got - exact).abs().max()) <= 1.5e-6 * largest, "too far from float64"
            assert float((got - exact).norm()) <= 2 * float((plain - exact).norm())
            assert torch.equal(got, prepared(y, step, prepared.encode(rows)))


def test_bundled_and_published_sizes():
    model = bf.load("phantom64")
    img, y = noise(1, 1, 64, 64), (noise(3, 1, 64, 64, seed=1) > 0).float()
    prepared = PreparedUNet(model.network, [999, 3])
    with torch.no_grad():
        for step, t in enumerate((999, 3)):
            plain = model.network(y, torch.full((3,), t), img.expand(3, -1, -1, -1))
            got = prepared(y, step, prepared.encode(img))
            assert float((got - plain).abs().max()) <= 1e-5 * float(plain.abs().max())


# ---------------------------------------------------------------------- Winograd's convolution


WITH_WINOGRAD = [v for v in VARIANTS if "winograd" not in select.LACKING.get(v.backend, ())]
ISAS = cpp.available_isas() if select.can_run("cpp", "cpu") else []


@pytest.mark.parametrize("variant", [*WITH_WINOGRAD, Variant("reference", "reference")], ids=lambda v: v.name)
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [((1, 16, 4, 4), 16), ((3, 32, 7, 9), 48), ((2, 80, 1, 2), 64), ((5, 64, 16, 12), 144), ((1, 128, 33, 30), 128)],
    ids=str,
)
def test_winograd(variant, upsample, shape, outputs):
    x, weight = noise(*shape), noise(outputs, shape[1], 3, 3, seed=1) / shape[1] ** 0.5
    bias, scale = noise(outputs, seed=2), 1 + upsample
    residual = noise(shape[0], outputs, scale * shape[2], scale * shape[3], seed=3)
    repeated = x.double().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    exact = F.conv2d(repeated, weight.double(), bias.double(), padding=1)
    packed = ops.winograd_weight(weight)

    def convolve(x, residual=None):
        given = [None if a is None else a.to(variant.device) for a in (x, packed, bias, residual)]
        options = dict(upsample=upsample, residual=given.pop(), backend=variant.backend)
        return ops.winograd(*given, **options).cpu()

    with variant.use():
        last = x.contiguous(memory_format=torch.channels_last)
        assert_near(convolve(last), exact, 3e-5)
        got = convolve(last, residual)
        assert_near(got, exact + residual, 3e-5)
        assert torch.equal(convolve(x, residual.contiguous(memory_format=torch.channels_last)), got)
        if variant.backend == "cpp":
            with threads(3):
                assert torch.equal(convolve(last, residual), got)
            alone = [convolve(x[i : i + 1], residual[i : i + 1]) for i in range(len(x))]
            assert torch.equal(torch.cat(alone), got)


GOOD = {"x": noise(2, 16, 5, 6), "weight": ops.winograd_weight(noise(32, 16, 3, 3)), "bias": noise(32)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
        ({"residual": 1}, TypeError, "residual must be a torch.Tensor, got int"),
        ({"x": noise(2, 16, 5, 6).double()}, ValueError, "x must be float32 of 4 dimensions, got torch.float64"),
        ({"x": noise(16, 5, 6)}, ValueError, r"x must be float32 of 4 dimensions, got .* \(16, 5, 6\)"),
        ({"x": noise(2, 8, 5, 6)}, ValueError, "x must have channels by sixteens, got 8"),
        ({"x": noise(2, 32, 5, 6)}, ValueError, r"weight must be ops.winograd_weight of .* \(32, 32, 3, 3\), of shape"),
        ({"bias": noise(24)}, ValueError, "bias must have outputs by sixteens, got 24"),
        ({"bias": noise(80)}, ValueError, r"weight must .* of shape \(36, 2, 16, 64\), got \(36, 1, 16, 64\)"),
        ({"weight": noise(32, 16, 3, 3)}, ValueError, r"weight must be ops.winograd_weight .* got \(32, 16, 3, 3\)"),
        ({"residual": noise(2, 32, 5, 7)}, ValueError, r"residual must have .* \(2, 32, 5, 6\), got \(2, 32, 5, 7\)"),
        ({"bias": noise(32).to("meta")}, ValueError, "bias must be on cpu"),
        ({"backend": "triton"}, select.BackendUnavailableError, "'triton' has no kernel of winograd; 'auto' and"),
        ({"backend": "cuda"}, select.BackendUnavailableError, "'cuda' has no kernel of winograd"),
    ],
    ids=str,
)
def test_winograd_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        ops.winograd(**(GOOD | changes))


def test_winograd_weight_refuses():
    with pytest.raises(ValueError, match=r"weight must be \(O, C, 3, 3\), got shape \(16, 16, 1, 1\)"):
        ops.winograd_weight(noise(16, 16, 1, 1))
    with pytest.raises(TypeError, match="weight must be a torch.Tensor, got list"):
        ops.winograd_weight([1.0])


@pytest.mark.parametrize("shape", [(0, 16, 5, 6), (2, 16, 0, 6)])
def test_winograd_of_nothing(shape):
    assert ops.winograd(noise(*shape), GOOD["weight"], GOOD["bias"]).shape == (shape[0], 32, *shape[2:])


@pytest.mark.skipif(not ISAS, reason="berdiff_fast._cpu not built")
def test_the_panel_is_the_module_s():
    assert ops.winograd_weight(noise(16, 16, 3, 3)).shape[-1] == cpp._cpu.winograd_panel


@pytest.mark.skipif(not ISAS, reason="berdiff_fast._cpu not built")
@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.get("dims") != 3])
def test_the_same_function_by_winograd(name):
    network = randomised(**CONFIGS[name])
    img, y = noise(2, network.img_channels, 16, 24), noise(6, network.mask_channels, 16, 24, seed=1) > 0
    prepared = PreparedUNet(network, [500], winograd=True)
    with torch.no_grad():
        plain = network(y.float(), torch.full((6,), 500), img.repeat_interleave(3, 0))
        got = prepared(y.float(), 0, prepared.encode(img))
    assert float((got - plain).abs().max()) <= 1e-4 * float(plain.abs().max())


def test_winograd_is_for_float32_images():
    with pytest.raises(ValueError, match="winograd is for images, in float32 on the CPU; got 3 dimensions"):
        PreparedUNet(randomised(dims=3), [1], winograd=True)
    with pytest.raises(ValueError, match=r"winograd .* torch.bfloat16"):
        PreparedUNet(randomised().bfloat16(), [1], winograd=True)


# ---------------------------------------------------------------------- in the sampler


def small_model(**config) -> bf.BerDiff:
    return bf.BerDiff(randomised(**{"norm_groups": 8, "use_scale_shift_norm": True, **config}), prediction="y_0")


@pytest.fixture
def model() -> bf.BerDiff:
    return small_model()


IMG = noise(3, 1, 32, 24, seed=5)


def draw(model, n=5, **options):
    return bf.sample(model, IMG, n, 5, seed=1, **options)


def kept(model):
    return [prepared for _, _, prepared in inference._prepared[model.network].values()]


def test_sample_draws_the_same_masks(model):
    """Equal but for pixels within rounding of their threshold; of 11,520 bits there are none here."""
    plain = draw(model, prepare=False)
    assert 0.05 < plain.float().mean() < 0.95
    assert torch.equal(draw(model), plain)
    assert inference.prepare(model.network, [800, 600, 400, 200, 0]) in kept(model)
    assert (draw(model, prepare="winograd") != plain).float().mean() < 1e-3
    with pytest.raises(ValueError, match="prepare must be True, False or 'winograd', got 'fast'"):
        draw(model, prepare="fast")


@pytest.mark.parametrize("max_batch", [1, 4, 5, 7, 10, 15])
def test_chunks(model, max_batch):
    """Chunks within an image, of whole images, and across images."""
    assert torch.equal(draw(model, max_batch=max_batch), draw(model))


def test_rescaled_timesteps(model):
    model.rescale_timesteps, model.schedule = True, bf.NoiseSchedule("cosine2", 250)
    assert torch.equal(draw(model), draw(model, prepare=False))


WRITES = {
    "in place": lambda p: p.mul_(-1.5),
    "by .data": lambda p: p.data.mul_(-1.5),
    "new .data": lambda p: setattr(p, "data", p.data * -1.5),
}


@pytest.mark.parametrize("write", WRITES)
def test_changed_weights_are_noticed(model, write):
    before = draw(model)
    with torch.no_grad():
        WRITES[write](model.network.out[2].weight)
    after = draw(model)
    assert not torch.equal(after, before)
    assert torch.equal(after, draw(model, prepare=False))


def test_what_was_prepared_is_kept(model):
    draw(model)
    (first,) = kept(model)
    draw(model, n=2)
    assert kept(model) == [first]
    for _ in range(2):  # in turns, as a benchmark has them
        draw(model, prepare="winograd")
        draw(model)
    assert kept(model)[0] is first and len(kept(model)) == 2
    bf.sample(model, IMG, 2, 10, seed=1)
    assert len(kept(model)) == inference.KEPT and first not in kept(model), "other timesteps: the oldest goes"
    with torch.no_grad():
        model.network.out[2].weight.mul_(2)
    draw(model)
    assert len(kept(model)) == 1, "of weights that are gone"


def test_networks_that_are_run_as_they_are(model):
    calls = []
    handle = model.network.middle_block.register_forward_hook(lambda *_: calls.append(1))
    draw(model)
    assert len(calls) == 5 and inference.why_not(model.network) == "its middle_block has hooks"
    handle.remove()
    draw(model)
    assert len(calls) == 5 and inference.why_not(model.network) is None

    class Scaled(torch.nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model.network.out[2] = Scaled(32, 1, 3, padding=1)
    assert inference.why_not(model.network) == "its out.2 is a Scaled"
    assert torch.equal(draw(model), draw(model, prepare=False))
    assert "is a Linear, not a UNet" in inference.why_not(torch.nn.Linear(1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert inference.why_not(small_model().network) == "autocast is on"
    assert inference.why_not(small_model().network.double()) == "it computes in torch.float64"


def test_half_precision_network(model):
    """bfloat16 changes the result, and not by much: the prepared form is as near to float32 as the plain one is."""
    exact = draw(model, prepare=False)
    half = copy.deepcopy(model).bfloat16()
    off = [float((bf.sample(half, IMG.bfloat16(), 5, 5, seed=1, prepare=p) != exact).float().mean()) for p in (1, 0)]
    assert off[0] <= 1.2 * off[1] + 1e-3


def test_in_another_dtype(model):
    """``dtype`` prepares in it: masks near float32's, and those of the sampler that holds it."""
    exact, half = draw(model), draw(model, dtype=torch.bfloat16)
    assert 0 < (half != exact).float().mean() < 0.05
    assert torch.equal(bf.Sampler(model, 5, 5, dtype=torch.bfloat16)(IMG, seed=1), half)
    assert next(model.parameters()).dtype is torch.float32
    assert torch.equal(draw(model, dtype=torch.float32), exact)
    for options, reason in (({"prepare": False}, "prepare is False"), ({}, "its out.0 has hooks")):
        if not options:
            model.network.out[0].register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match=rf"dtype must be the model's own .*, got torch.bfloat16: {reason}"):
            draw(model, dtype=torch.bfloat16, **options)
    with pytest.raises(TypeError, match="dtype must be float32, float16 or bfloat16, got torch.float64"):
        draw(model, dtype=torch.float64)


# ---------------------------------------------------------------------- captured graphs (test_gpu.py has real ones)


def ask(graphs, size=8):
    return graph.captured(graphs, ("key",), None, torch.zeros(1, 1, size, size), None, 6, None, check=True)


def test_what_cannot_be_captured_is_said_once(monkeypatch, caplog):
    made = []

    class Refusing(graph.Graph):
        def __init__(self, draw, img, *rest):
            made.append(tuple(img.shape))
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graph, "Graph", Refusing)
    graphs = {}
    assert [ask(graphs, size) for size in (8, 8, 8, 9, 9)] == [None] * 5
    assert made == [(1, 1, 8, 8), (1, 1, 9, 9)], "at the second call, and once"
    assert [r.getMessage() for r in caplog.records] == [
        "no CUDA graph, so every kernel is launched by itself: operation not permitted when stream is capturing"
    ] * 2


def test_waiting_is_seen_of_this_thread_alone(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def wait():  # as torch does in the mode "warn"
        warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)

    with graph._host_must_not_wait():
        warnings.warn("another warning", UserWarning, stacklevel=1)
        other = threading.Thread(target=wait)
        other.start()
        other.join()
    with pytest.raises(RuntimeError, match="called a synchronizing"), graph._host_must_not_wait():
        wait()
    assert modes == ["warn", 0] * 2


def test_out_of_memory_is_passed_on(monkeypatch):
    class Full(graph.Graph):
        def __init__(self, *_):
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graph, "Graph", Full)
    graphs = {}
    ask(graphs)
    with pytest.raises(torch.OutOfMemoryError):
        ask(graphs)


def test_few_graphs_are_kept(monkeypatch):
    class Fake(graph.Graph):
        def __init__(self, *_):
            pass

        def close(self):
            closed.append(self)

    closed = []
    monkeypatch.setattr(graph, "Graph", Fake)
    graphs = {}
    assert ask(graphs) is None, "capturing takes longer than a call"
    first = ask(graphs)
    assert isinstance(first, Fake) and ask(graphs) is first
    with torch.autocast("cpu", torch.bfloat16):
        assert ask(graphs) is None, "autocast's copies of weights would be freed"
    for size in range(9, 9 + graph.KEPT):
        ask(graphs, size)
    assert len(graphs) == graph.KEPT and ask(graphs) is None
    assert closed == [first], "a graph that is dropped waits for its last replay"


# ---------------------------------------------------------------------- what is not exactly the class's own code


def _instance(model, where):
    module = model.get_submodule(where)
    own = module.forward
    module.forward = lambda *arguments: own(*arguments) * 0


def _hook(model, where):
    model.get_submodule(where).register_forward_hook(lambda module, inputs, output: output * 0)


@pytest.mark.parametrize("where", ["", "network", "network.middle_block", "network.out.2"])
@pytest.mark.parametrize("change", [_instance, _hook], ids=["forward", "hook"])
def test_what_was_changed_is_run_as_it_is(where, change):
    """Accelerate's hooks and offloading, steering: whoever replaces ``forward`` means it to run."""
    model, img = bf.load("phantom64"), noise(1, 1, 64, 64)
    before = bf.sample(model, img, n=2, steps=2, seed=7)
    change(model, where)
    got = bf.sample(model, img, n=2, steps=2, seed=7)
    assert torch.equal(got, bf.sample(model, img, n=2, steps=2, seed=7, prepare=False))
    assert not torch.equal(got, before), "the change was passed over"


def test_a_patched_class_is_noticed(monkeypatch):
    model, img = bf.load("phantom64"), noise(1, 1, 64, 64)
    own = bf.UNet.forward
    monkeypatch.setattr(bf.UNet, "forward", lambda self, *arguments: own(self, *arguments) * 0)
    assert "forward of its own" in inference.why_not(model.network)
    bf.sample(model, img, n=1, steps=2, seed=7)
    monkeypatch.undo()
    assert inference.why_not(model.network) is None
