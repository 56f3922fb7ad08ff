# SPDX-License-Identifier: Apache-2.0
"""``sample``: what a mask may depend on, every option, and what happens when something goes wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import CPU_BACKENDS, FASTEST, METHODS, PREDICTIONS, Toy, golden, threads, toy_image
from torch import nn

import berdiff_fast as bf
from berdiff_fast import BerDiff, NoiseSchedule, UNet, image_seeds, ops

SEED = 2023


def toy(**options) -> BerDiff:
    return BerDiff(Toy(**options))


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors here are tiny: handing them out to threads costs more than the work, and far more on a busy machine."""
    with threads(1):
        yield


@pytest.fixture
def model() -> BerDiff:
    return toy()


@pytest.fixture(scope="module")
def img() -> torch.Tensor:
    return toy_image(3, 1, 12, 10)


def draw(model, img, n=4, steps=5, **options):
    return bf.sample(model, img, n, steps, **{"seed": SEED, **options})


# ---------------------------------------------------------------------- what a mask depends on


def test_shape_and_variety(model, img):
    masks = draw(model, img, n=16)
    assert masks.dtype == torch.bool and masks.shape == (3, 16, 1, 12, 10)
    assert masks.device == img.device and not masks.requires_grad
    # All else in this file says what must be equal; this, that not everything is.
    assert len(masks.flatten(2).flatten(0, 1).unique(dim=0)) == 48
    assert not torch.equal(draw(model, img, n=16, seed=SEED + 1), masks)
    assert not torch.equal(draw(model, -img, n=16), masks)
    assert torch.equal(draw(model, img, n=16), masks)


@pytest.mark.parametrize("method", METHODS)
def test_not_on_n(model, img, method):
    assert torch.equal(draw(model, img, 16, method=method)[:, :4], draw(model, img, 4, method=method))


@pytest.mark.parametrize("n", [1, 5])
def test_not_on_the_batch(model, img, n):
    whole = draw(model, img, n)
    seeds = image_seeds(SEED, 3).tolist()
    for b in range(3):
        alone = draw(model, img[b : b + 1], n, seed=[seeds[b]])
        assert torch.equal(alone[0], whole[b])
    assert torch.equal(draw(model, img, n, seed=seeds), whole)
    assert torch.equal(draw(model, img.flip(0), n, seed=seeds[::-1]), whole.flip(0))
    assert torch.equal(draw(model, img, n, seed=np.array(seeds)), whole)
    # An unsigned reading of the same 64 bits is the same seed.
    assert torch.equal(draw(model, img, n, seed=[s % 2**64 for s in seeds]), whole)


def test_equal_seeds_give_equal_masks(model, img):
    same = img[:1].expand(3, -1, -1, -1)
    masks = draw(model, same, seed=[5, 5, 6])
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("max_batch", [1, 2, 3, 4, 5, 7, 11, 12, 13, 100])
def test_not_on_max_batch(model, img, max_batch):
    """Chunks of 3, 5, 7 or 11 masks reach from one image into the next."""
    masks = draw(model, img)
    model.network.rows.clear()
    chunked, probability = draw(model, img, max_batch=max_batch, return_probability=True)
    assert torch.equal(chunked, masks)
    assert torch.equal(probability, draw(model, img, return_probability=True)[1])
    assert max(model.network.rows[: 5 * math.ceil(12 / max_batch)]) == min(max_batch, 12)
    assert model.network.rows[: 5 * math.ceil(12 / max_batch)].count(min(max_batch, 12)) >= 5


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_not_on_threads(model, backend):
    # 131072 pixels a step: enough for the kernels to start a second thread.
    img = toy_image(2, 1, 256, 256)
    with threads(1):
        one = draw(model, img, n=1, steps=2, backend=backend)
    with threads(2):
        two = draw(model, img, n=1, steps=2, backend=backend)
    assert torch.equal(one, two)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("final", ["threshold", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_not_on_the_backend(img, method, prediction, final, dtype):
    model = BerDiff(Toy(mask_channels=2, dtype=dtype))
    options = dict(method=method, prediction=prediction, final=final, return_probability=True)
    expected = draw(model, img, backend="reference", **options)
    found = draw(model, img, backend=FASTEST, **options)
    auto = draw(model, img, **options)
    for i in (0, 1):
        assert torch.equal(found[i], expected[i]) and torch.equal(auto[i], expected[i])


def test_first_sample_goes_on_where_the_last_call_stopped(model, img):
    masks = draw(model, img, 32)
    assert torch.equal(draw(model, img, 16, first_sample=16), masks[:, 16:])
    assert torch.equal(draw(model, img, 1, first_sample=31, max_batch=2), masks[:, 31:])
    last = draw(model, img, 2, first_sample=2**32 - 2)
    assert not torch.equal(last, masks[:, :2])


def test_a_sampler_draws_what_sample_draws(model, img):
    sampler = bf.Sampler(model, 4, 5, method="ddpm", max_batch=3)
    for seed in (SEED, 4):
        assert torch.equal(sampler(img, seed=seed), draw(model, img, method="ddpm", seed=seed))
    assert torch.equal(sampler(img[0], seed=SEED, first_sample=2)[:, :2], sampler(img[0], seed=SEED)[:, 2:])
    masks, probability = sampler(img.numpy(), seed=SEED, return_probability=True)
    assert torch.equal(masks, sampler(img, seed=SEED)) and probability.shape == masks.shape
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-1)
    assert torch.equal(sampler(img, seed=SEED), draw(model, img, method="ddpm")), "changed weights"


@pytest.mark.parametrize("options", [{"n": 0}, {"steps": 7.5}, {"method": "fast"}, {"final": 1}, {"max_batch": -1}])
def test_a_sampler_refuses_before_it_sees_images(model, options):
    with pytest.raises((ValueError, TypeError), match=f"{next(iter(options))}.* must|steps"):
        bf.Sampler(model, **options)


def test_without_a_seed_torch_governs(model, img):
    def unseeded() -> torch.Tensor:
        return bf.sample(model, img, 4, 5)

    torch.manual_seed(1)
    first, second = unseeded(), unseeded()
    torch.manual_seed(1)
    assert torch.equal(unseeded(), first) and torch.equal(unseeded(), second)
    assert not torch.equal(first, second), "every call draws anew"
    # A seed of one's own leaves torch's generator alone.
    torch.manual_seed(1)
    draw(model, img)
    assert torch.equal(unseeded(), first)


# ---------------------------------------------------------------------- what is computed


def by_hand(network, img, n, timesteps, method, *, prediction="epsilon", final="threshold", seed=SEED):
    """Algorithm 2, one mask at a time, in the equations' own words."""
    schedule = NoiseSchedule()
    table = schedule.step_table(timesteps, method).float()
    masks = []
    for b, image_seed in enumerate(image_seeds(seed, len(img))):
        for k in range(n):
            where = dict(samples_per_image=1, first_sample=k, backend="reference")
            y = ops.initial_noise(image_seed[None], (1, *img.shape[2:]), dtype=torch.float32, **where)
            for s in reversed(range(len(timesteps))):
                logits = network(y, torch.tensor([timesteps[s]]), img[b : b + 1])
                threshold = s == 0 and final == "threshold"
                y = ops.sample_step(
                    y,
                    logits,
                    image_seed[None],
                    table[s],
                    timesteps[s],
                    prediction=prediction,
                    threshold=threshold,
                    **where,
                )
            masks.append(y.bool())
    return torch.cat(masks).view(len(img), n, 1, *img.shape[2:])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spacing", ["uniform", "quadratic", "trailing", "trailing-quadratic"])
@pytest.mark.parametrize("final", ["threshold", "sample"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_option_does_what_it_says(img, method, spacing, final, prediction):
    network = Toy()
    timesteps = NoiseSchedule().subsequence(5, spacing)
    with torch.no_grad():
        expected = by_hand(network, img[:2], 2, timesteps, method, prediction=prediction, final=final)
    options = dict(method=method, final=final, prediction=prediction)
    model = BerDiff(network)
    assert torch.equal(draw(model, img[:2], 2, 5, spacing=spacing, **options), expected)
    assert torch.equal(draw(model, img[:2], 2, timesteps, **options), expected)


@pytest.mark.parametrize("name, other", [("final", "sample"), ("method", "ddpm"), ("method", "d3pm")])
def test_every_option_matters(model, img, name, other):
    assert not torch.equal(draw(model, img, **{name: other}), draw(model, img))


@pytest.mark.parametrize("spacing", ["quadratic", "trailing", "trailing-quadratic"])
def test_spacing_matters(model, img, spacing):
    assert not torch.equal(draw(model, img, spacing=spacing), draw(model, img))
    model.spacing = spacing
    assert torch.equal(draw(model, img), draw(model, img, spacing=spacing)), "a model's own is the default"
    assert not torch.equal(draw(model, img), draw(model, img, spacing="uniform"))


def test_the_network_sees_the_timesteps_in_falling_order(model, img):
    draw(model, img, 2, 5)
    expected = NoiseSchedule().subsequence(5)[::-1]
    assert [set(t.tolist()) for _, t, _ in model.network.seen] == [{t} for t in expected]
    for y_t, t, image in model.network.seen:
        assert y_t.shape == (6, 1, 12, 10) and set(y_t.unique().tolist()) <= {0.0, 1.0}
        assert t.shape == (6,) and t.dtype == torch.int64
        assert torch.equal(image, img.repeat_interleave(2, 0))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("final", ["threshold", "sample"])
def test_probability_is_that_of_the_last_step(img, prediction, final):
    model = BerDiff(Toy(), prediction=prediction)
    masks, probability = draw(model, img, final=final, return_probability=True)
    assert torch.equal(masks, draw(model, img, final=final)), "asking for it must not change the masks"
    assert probability.shape == masks.shape and probability.dtype == torch.float32
    y_t, t, image = model.network.seen[4]  # the fifth call of the network is the last step
    assert set(t.tolist()) == {0}
    with torch.no_grad():
        e = torch.sigmoid(Toy()(y_t, t, image).double())
    expected = e if prediction == "y_0" else (y_t - e).abs()  # the calibration F_C
    expected = expected.view(masks.shape)
    # Exactly rounded float32 arithmetic on an exponential good to 6e-7 (logits here are below 8), times p (1 - p).
    assert (probability - expected).abs().max() <= 0.25 * (6e-7 + 10 * 2.0**-24)
    away_from_ties = (expected - 0.5).abs() > 1e-6
    likely = (expected > 0.5)[away_from_ties]
    assert 0 < likely.sum() < likely.numel()
    agree = masks[away_from_ties] == likely
    assert bool(agree.all()) if final == "threshold" else not bool(agree.all())


def test_all_timesteps():
    model = BerDiff(Toy(), NoiseSchedule("cosine2", 20))
    masks = draw(model, toy_image(1, 1, 8, 8), 2, 20, method="d3pm")
    assert masks.shape == (1, 2, 1, 8, 8)
    assert [int(t[0]) for _, t, _ in model.network.seen] == list(range(19, -1, -1))


def test_schedule_and_prediction_can_be_overridden(model, img):
    expected = draw(BerDiff(Toy(), "linear", "y_0"), img)
    assert not torch.equal(draw(model, img), expected)
    assert torch.equal(draw(model, img, schedule=NoiseSchedule("linear"), prediction="y_0"), expected)
    assert torch.equal(draw(model, img, schedule="linear", prediction="y_0"), expected)


# ---------------------------------------------------------------------- what may be given


def test_numpy_and_single_images(model, img):
    masks = draw(model, img)
    assert torch.equal(draw(model, img.numpy()), masks)
    assert torch.equal(draw(model, img.numpy().astype(np.float64)), masks)
    assert torch.equal(draw(model, np.asfortranarray(img.numpy())), masks)
    for one in (img[0], img[0].numpy()):
        assert torch.equal(draw(model, one), masks[:1])
    back = img.flip(3).numpy()[..., ::-1]  # negative strides
    assert torch.equal(draw(model, back), masks)
    assert torch.equal(draw(model, img.transpose(2, 3).contiguous().transpose(2, 3)), masks)
    assert torch.equal(draw(model, img, n=np.int64(4), seed=np.int64(SEED)), masks)


def test_steps_may_be_a_numpy_integer(model, img):
    assert torch.equal(draw(model, img, steps=np.int64(5)), draw(model, img))


def test_seeds_as_image_seeds_returns_them(model, img):
    assert torch.equal(draw(model, img, seed=image_seeds(SEED, 3)), draw(model, img))


def test_inputs_are_left_alone(model, img):
    before = img.clone().requires_grad_()
    masks = draw(model, before)
    assert torch.equal(before, img) and before.grad is None and not masks.requires_grad


@pytest.mark.parametrize("batched", [True, False])
def test_volumes(batched):
    model = toy(spatial_dims=3)
    img = toy_image(1, 1, 3, 6, 5)
    masks = draw(model, img if batched else img[0])
    assert masks.shape == (1, 4, 1, 3, 6, 5)
    # Without the attribute, five dimensions are a batch of volumes too.
    bare = draw(lambda y, t, x: Toy(spatial_dims=3)(y, t, x), img, schedule="cosine2", prediction="epsilon")
    assert torch.equal(bare, masks)


def test_several_mask_channels(img):
    masks = draw(toy(mask_channels=3), img)
    assert masks.shape == (3, 4, 3, 12, 10)
    assert torch.equal(draw(toy(mask_channels=3), img, max_batch=5), masks)
    assert not torch.equal(masks[:, :, 0], masks[:, :, 1])


def test_any_callable(model, img):
    masks = draw(model, img)
    network = Toy()
    given = dict(schedule=NoiseSchedule(), prediction="epsilon")
    assert torch.equal(draw(network, img, **given), masks)
    assert torch.equal(draw(lambda y_t, t, x: network(y_t, t, x), img, **given), masks)

    class Carrier:
        """Not a module, but it says what it needs."""

        schedule, prediction, mask_channels = NoiseSchedule(), "epsilon", 1

        def __call__(self, y_t, t, x):
            return network(y_t, t, x)

    assert torch.equal(draw(Carrier(), img), masks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_networks(img, dtype):
    model = toy(dtype=dtype)
    masks = draw(model, img, n=16)
    assert masks.dtype == torch.bool
    assert all(y_t.dtype == x.dtype == dtype for y_t, _, x in model.network.seen)
    # It is the same sampler on nearly the same logits: most bits agree, as they do not with other noise.
    exact, other = draw(toy(), img, n=16), draw(toy(), img, n=16, seed=1)
    assert (masks != exact).double().mean() < 0.5 * (masks != other).double().mean()


def test_gradients_are_off_and_training_goes_on(img):
    class Network(Toy):
        def __init__(self):
            super().__init__()
            self.dropout, self.frozen = nn.Dropout(0.5), nn.Sequential(nn.BatchNorm2d(1), nn.ReLU())
            self.modes = []

        def forward(self, y_t, t, x):
            assert not torch.is_grad_enabled()
            self.modes.append([m.training for m in self.modules()])
            return super().forward(y_t, t, self.dropout(x))

    network = Network()
    model = BerDiff(network).train()
    network.frozen.eval()  # as one does when fine-tuning
    network.frozen[1].train()
    before = [m.training for m in model.modules()]
    assert len(set(before)) == 2
    masks = draw(model, img)
    assert not any(mode for modes in network.modes for mode in modes)
    assert [m.training for m in model.modules()] == before and torch.is_grad_enabled()
    assert torch.equal(masks, draw(toy(), img)), "dropout was active"
    assert not network.frozen[0].num_batches_tracked

    def fail(*_):
        raise RuntimeError("broken network")

    network.frozen[0].forward = network.dropout.forward = fail
    with pytest.raises(RuntimeError, match="broken network"):
        draw(model, img)
    assert [m.training for m in model.modules()] == before and torch.is_grad_enabled()


def test_progress_goes_to_stderr_and_changes_nothing(model, img, capfd):
    quiet = draw(model, img)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(draw(model, img, progress=True, max_batch=5), quiet)
    out, err = capfd.readouterr()
    assert out == "" and "sampling" in err and "100%" in err and "60/60" in err  # 3 images x 4 masks x 5 steps


# ---------------------------------------------------------------------- what goes wrong


class Failing(Toy):
    """NaN in one pixel of one row at one timestep."""

    def __init__(self, timestep: int, only_call: int | None = None):
        super().__init__()
        self.timestep, self.only_call, self.calls = timestep, only_call, 0

    def forward(self, y_t, t, img):
        z = super().forward(y_t, t, img)
        if int(t[0]) == self.timestep:
            self.calls += 1
            if self.only_call in (None, self.calls):
                z[-1, 0, -1, -1] = math.nan
        return z


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("final", ["threshold", "sample"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("step, timestep", [(1, 800), (3, 400), (5, 0)])
def test_nan_is_reported_with_its_step(img, backend, final, prediction, step, timestep):
    model = BerDiff(Failing(timestep))
    with pytest.raises(FloatingPointError, match=rf"NaN at step {step} of 5 \(t = {timestep}\)"):
        draw(model, img, backend=backend, final=final, prediction=prediction)


def test_nan_in_one_chunk_is_enough(img):
    with pytest.raises(FloatingPointError, match=r"step 2 of 5 \(t = 600\)"):
        draw(BerDiff(Failing(600, only_call=2)), img, max_batch=5)


class Hungry(Toy):
    """Runs out of memory above ``limit`` rows, ``after`` some calls."""

    def __init__(self, limit: int, after: int = 0):
        super().__init__()
        self.limit, self.after = limit, after

    def forward(self, y_t, t, img):
        if len(y_t) > self.limit and len(self.rows) >= self.after:
            raise torch.OutOfMemoryError(f"no memory for {len(y_t)} rows")
        return super().forward(y_t, t, img)


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("after", [0, 2])
def test_out_of_memory_halves_the_batch(model, img, limit, after, caplog):
    masks, probability = draw(model, img, return_probability=True)
    hungry = Hungry(limit, after)
    with caplog.at_level("WARNING", logger="berdiff_fast"):
        found = draw(BerDiff(hungry), img, return_probability=True)
    assert torch.equal(found[0], masks) and torch.equal(found[1], probability)
    assert "out of memory with 12 masks a call; going on with 6" in caplog.text
    # Halving does not stop far below what fits.
    assert max(hungry.rows[after:]) > limit / 2


def test_progress_ends_at_100_percent_after_running_out_of_memory(img, capfd):
    draw(BerDiff(Hungry(6, after=2)), img, progress=True)
    assert "60/60" in capfd.readouterr().err


def test_out_of_memory_with_a_single_mask_is_raised(img):
    model = BerDiff(Hungry(0))
    model.train()
    with pytest.raises(torch.OutOfMemoryError, match="no memory for 1 rows"):
        draw(model, img)
    assert model.training


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (lambda z: z[:, :, 1:], ValueError, r"shape of y_t, \(12, 1, 12, 10\), got \(12, 1, 11, 10\)"),
        (lambda z: z.repeat(1, 2, 1, 1), ValueError, r"shape of y_t, \(12, 1, 12, 10\), got \(12, 2, 12, 10\)"),
        (lambda z: z.double(), TypeError, "float32, float16 or bfloat16 logits, got torch.float64"),
        (lambda z: z > 0, TypeError, "float32, float16 or bfloat16 logits, got torch.bool"),
        (lambda z: (z, z), TypeError, "model must return a tensor of logits, got tuple"),
        (lambda z: None, TypeError, "model must return a tensor of logits, got NoneType"),
    ],
    ids=["short", "channels", "float64", "bool", "tuple", "None"],
)
def test_wrong_output_of_the_model(img, wrong, error, message):
    network = Toy()
    with pytest.raises(error, match=message):
        draw(lambda *x: wrong(network(*x)), img, schedule="cosine2", prediction="epsilon")


# ---------------------------------------------------------------------- a real network


@pytest.fixture(scope="module")
def small_unet() -> BerDiff:
    torch.manual_seed(0)
    network = UNet(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,))
    with torch.no_grad():
        for parameter in network.parameters():  # a fresh network predicts 0 everywhere
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return BerDiff(network)


def test_end_to_end(small_unet):
    """The U-Net's convolutions may round differently in another batch; bits that turn for it are few."""
    img = toy_image(2, 1, 16, 16)
    masks, probability = draw(small_unet, img, n=4, return_probability=True)
    assert masks.shape == probability.shape == (2, 4, 1, 16, 16)
    assert 0.02 < masks.double().mean() < 0.98
    assert torch.equal(draw(small_unet, img, n=4), masks)
    assert torch.equal(draw(small_unet, img, n=4, backend="reference"), masks)
    assert len(masks.flatten(2).flatten(0, 1).unique(dim=0)) == 8
    alone = draw(small_unet, img[1:], n=2, seed=[int(image_seeds(SEED, 2)[1])], max_batch=1)
    assert (alone[0] != masks[1, :2]).double().mean() < 0.01


def test_end_to_end_with_the_published_network():
    tensors = golden("unet_concat")
    weights = {k.removeprefix("state_dict."): v for k, v in tensors.items() if k.startswith("state_dict.")}
    model = bf.load_official(
        weights,
        image_size=32,
        num_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        num_heads=1,
        attention_resolutions="16",
        use_scale_shift_norm=False,
        mean_type="epsilon",
        noise_schedule="cosine2",
    )
    masks = draw(model, tensors["img"], n=2, steps=3)
    assert masks.shape == (2, 2, 1, 32, 32) and 0 < masks.double().mean() < 1


@pytest.mark.parametrize("steps", [50, 250])
def test_steps_at_which_the_published_code_raises(steps):
    """Its float32 mean exceeds 1 with cosine2 and 50 or 250 ddim steps."""
    logits = torch.linspace(-30, 30, 64).reshape(1, 1, 8, 8)
    masks = bf.sample(lambda y, t, img: logits.expand(y.shape), torch.zeros(1, 8, 8), 2, steps, schedule="cosine2",
                   prediction="epsilon", seed=1)  # fmt: skip
    assert masks.shape == (1, 2, 1, 8, 8)
