# SPDX-License-Identifier: Apache-2.0
"""``sample(parallel=)``: the masks of one step after another, bit by bit, in fewer calls of the network."""

from __future__ import annotations

import logging
import math
import re

import pytest
import torch
from support import CPU_BACKENDS, METHODS, PREDICTIONS, Toy, data_path, threads, toy_image

import berdiff_fast as bf
from berdiff_fast import BerDiff, NoiseSchedule, UNet
from berdiff_fast.backends import select
from berdiff_fast.data import phantom
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.network.inference import PreparedUNet

SEED = 2024


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


@pytest.fixture(scope="module")
def img() -> torch.Tensor:
    return toy_image(3, 1, 12, 10)


def draw(model, img, n=4, steps=12, **options):
    return bf.sample(model, img, n, steps, **{"seed": SEED, "spacing": "trailing", **options})


def calls(model: BerDiff) -> list[int]:
    """Rows of each call of the toy since the last question."""
    rows, model.network.rows = model.network.rows, []
    return rows


class Chaotic(Toy):
    """Its logits depend on everything, and strongly: a wrong bit anywhere near makes another mask."""

    def forward(self, y_t, t, img):
        z = super().forward(y_t, t, img)
        return 4 * (z + y_t.roll(1, -2) - 2 * y_t.roll(-1, -1) * y_t.roll(2, -2))


# ---------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("network", [Toy, Chaotic])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("final", ["threshold", "sample"])
def test_masks_are_those_of_one_step_after_another(img, network, method, prediction, final):
    model = BerDiff(network(), prediction=prediction)
    options = dict(method=method, final=final, return_probability=True)
    masks, probability = draw(model, img, **options)
    assert calls(model) == [12] * 12
    for window in (1, 2, 3, 8, 12, 100):
        found = draw(model, img, parallel=window, **options)
        assert torch.equal(found[0], masks) and torch.equal(found[1], probability)
        assert found[0].dtype == torch.bool
        rows = calls(model)
        assert len(rows) <= 12 and max(rows) <= 12 * window


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_backend_and_dtype(img, backend, dtype, prediction):
    model = BerDiff(Chaotic(mask_channels=2, dtype=dtype), prediction=prediction)
    options = dict(final="sample", leave_one_out=True, return_probability=True, backend=backend, first_sample=7)
    one, several = draw(model, img, **options), draw(model, img, parallel=5, **options)
    assert torch.equal(one[0], several[0]) and torch.equal(one[1], several[1])


@pytest.mark.parametrize("n", [1, 3])
def test_every_state_of_the_trajectory_was_predicted(img, n):
    """The network saw each state of the sequential sampler, at its timestep and beside its image."""
    model = BerDiff(Chaotic())

    def seen() -> list[tuple]:
        found = [
            (t, y.numpy().tobytes(), image.numpy().tobytes())
            for y_t, times, images in model.network.seen
            for y, t, image in zip(y_t, times.tolist(), images, strict=True)
        ]
        model.network.seen.clear()
        return found

    draw(model, img, n)
    expected = seen()
    draw(model, img, n, parallel=6)
    assert set(expected) <= set(seen())


def test_steps_and_seeds_and_first_sample(img):
    model = BerDiff(Chaotic(), NoiseSchedule("linear", 300))
    masks = draw(model, img, 6, [3, 50, 51, 120, 299], method="d3pm", seed=[1, 2, 3])
    found = draw(model, img, 6, [3, 50, 51, 120, 299], method="d3pm", seed=[1, 2, 3], parallel=3)
    assert torch.equal(found, masks)
    alone = draw(model, img[1], 2, [3, 50, 51, 120, 299], method="d3pm", seed=[2], first_sample=3, parallel=4)
    assert torch.equal(alone[0], masks[1, 3:5])
    sampler = bf.Sampler(model, 6, [3, 50, 51, 120, 299], method="d3pm", parallel=2)
    assert torch.equal(sampler(img, seed=[1, 2, 3]), masks)


def test_volumes():
    model, img = BerDiff(Chaotic(spatial_dims=3)), toy_image(2, 1, 3, 6, 5)
    assert torch.equal(draw(model, img, parallel=4), draw(model, img))


@pytest.mark.parametrize("max_batch", [1, 2, 3, 5, 8, 13, 24, 40, 1000])
def test_max_batch_counts_a_mask_at_every_step(img, max_batch):
    """Chunks of 3 or 5 masks reach from one image into the next."""
    model = BerDiff(Chaotic())
    expected = draw(model, img, return_probability=True)
    calls(model)
    found = draw(model, img, parallel=8, max_batch=max_batch, return_probability=True)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    rows = calls(model)
    most = min(max_batch, 96)
    assert most - 8 < max(rows) <= most  # whole windows, where one fits
    if max_batch < 8:
        assert max(rows) == max_batch


# ---------------------------------------------------------------------- fewer calls


class Decided(Toy):
    """What it predicts of y_0 depends on the image alone, so the first guesses are right."""

    def forward(self, y_t, t, img):
        super().forward(y_t, t, img)
        z = 3 * img[:, :1].expand(y_t.shape)
        return torch.where(y_t == 0, z, -z) if self.epsilon else z


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_right_guesses_settle_whole_windows(img, method, prediction):
    model = BerDiff(Decided(), prediction=prediction)
    model.network.epsilon = prediction == "epsilon"
    masks = draw(model, img, steps=20, method=method)
    calls(model)
    assert torch.equal(draw(model, img, steps=20, method=method, parallel=8), masks)
    assert calls(model) == [12, 8 * 12, 8 * 12, 3 * 12]


def test_the_log_counts_calls_and_states(img, caplog):
    model = BerDiff(Chaotic())
    with caplog.at_level(logging.DEBUG, logger="berdiff_fast"):
        draw(model, img, parallel=4)
    rows = calls(model)
    found = re.search(r"parallel in time: 12 steps in (\d+) calls of the network, (\d+) states", caplog.text)
    assert found and [int(x) for x in found.groups()] == [len(rows), sum(rows) // 12]
    assert rows[0] == 12 and len(rows) > 3


def test_by_default_one_step_after_another(img, caplog):
    model = BerDiff(Toy())
    with caplog.at_level(logging.DEBUG, logger="berdiff_fast"):
        for options in ({}, {"parallel": None}, {"parallel": 1}):
            draw(model, img, **options)
            assert calls(model) == [12] * 12
        draw(model, img, steps=[5], parallel=8)
    assert calls(model) == [12] and "parallel in time" not in caplog.text


@pytest.mark.parametrize("options", [{}, {"max_batch": 20}])
def test_progress_counts_settled_steps(img, capfd, options):
    draw(BerDiff(Chaotic()), img, parallel=8, progress=True, **options)
    err = capfd.readouterr().err
    counts = [int(x) for x in re.findall(r"(\d+)/144 ", err)]  # 12 masks, 12 steps
    assert counts[-1] == 144 and counts == sorted(counts)


# ---------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("parallel", "error", "message"),
    [
        (0, ValueError, "parallel must be at least 1, got 0"),
        (-8, ValueError, "parallel must be at least 1, got -8"),
        (8.0, TypeError, "parallel must be an int, got float"),
        (True, TypeError, "parallel must be an int, got bool"),
        ("8", TypeError, "parallel must be an int, got str"),
    ],
)
def test_refusals(img, parallel, error, message):
    model = BerDiff(Toy())
    for call in (lambda: draw(model, img, parallel=parallel), lambda: bf.Sampler(model, parallel=parallel)):
        with pytest.raises(error, match=message):
            call()
    assert not calls(model)


class Picky(Chaotic):
    """NaN for every state that is not of the trajectory it was shown, and where it is told to."""

    known: dict[int, torch.Tensor] | None = None
    broken: int | None = None

    def forward(self, y_t, t, img):
        z = super().forward(y_t, t, img)
        for row, (y, time) in enumerate(zip(y_t, t.tolist(), strict=True)):
            if self.known is not None and not any(torch.equal(y, k) for k in self.known[time]):
                z[row, 0, 0, 0] = math.nan
            if time == self.broken:
                z[row, 0, -1, -1] = math.nan
        return z


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_nan_for_a_wrong_guess_is_none_of_the_result(img, prediction):
    model = BerDiff(Picky(), prediction=prediction)
    masks = draw(model, img)
    known = {int(t[0]): y_t for y_t, t, _ in model.network.seen}
    model.network.known = known
    assert torch.equal(draw(model, img), masks)
    model.network.seen.clear()
    assert torch.equal(draw(model, img, parallel=8), masks)
    wrong = [(y_t, t) for y_t, t, _ in model.network.seen if not torch.equal(y_t[-12:], known[int(t[-1])])]
    assert wrong, "no guess was wrong, so nothing was shown"


@pytest.mark.parametrize("max_batch", [None, 7, 30])
@pytest.mark.parametrize("step", [0, 1, 6, 11])
def test_nan_in_the_trajectory_is_reported_with_its_step(img, step, max_batch):
    model = BerDiff(Picky())
    timesteps = bf.Sampler(model, 4, 12, spacing="trailing").timesteps
    model.network.broken = timesteps[step]
    message = rf"NaN at step {step + 1} of 12 \(t = {timesteps[step]}\)"
    for window in (None, 8):
        with pytest.raises(FloatingPointError, match=message):
            draw(model, img, parallel=window, max_batch=max_batch)


class Hungry(Chaotic):
    limit = 1000

    def forward(self, y_t, t, img):
        if len(y_t) > self.limit:
            raise torch.OutOfMemoryError(f"no memory for {len(y_t)} rows")
        return super().forward(y_t, t, img)


@pytest.mark.parametrize("limit", [1, 2, 5, 11, 40])
def test_out_of_memory_halves_masks_then_the_window(img, limit, caplog, capfd):
    model = BerDiff(Hungry())
    masks = draw(model, img)
    model.network.limit = limit
    calls(model)
    assert torch.equal(draw(model, img, parallel=8, progress=True), masks)
    assert "out of memory with 96 masks a call; going on with 48" in caplog.text
    assert limit / 4 < max(calls(model)) <= limit
    assert "144/144" in capfd.readouterr().err
    model.network.limit = 0
    with pytest.raises(torch.OutOfMemoryError, match="no memory for 1 rows"):
        draw(model, img, parallel=8)


def test_wrong_output_of_the_model(img):
    network = Toy()
    options = dict(schedule="cosine2", prediction="epsilon", parallel=8)
    with pytest.raises(ValueError, match=r"shape of y_t, \(12, 1, 12, 10\), got \(12, 1, 11, 10\)"):
        draw(lambda *x: network(*x)[:, :, 1:], img, **options)
    with pytest.raises(TypeError, match="model must return a tensor of logits, got NoneType"):
        draw(lambda *x: None, img, **options)


# ---------------------------------------------------------------------- networks of one's own, and prepared


def small(scale_shift: bool) -> BerDiff:
    torch.manual_seed(0)
    network = UNet(
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2,),
        use_scale_shift_norm=scale_shift,
    )
    with torch.no_grad():
        for parameter in network.parameters():  # a fresh network predicts 0 everywhere
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return BerDiff(network).eval()


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(
    "winograd",
    [
        False,
        pytest.param(
            True, marks=pytest.mark.skipif(not select.can_run("cpp", "cpu"), reason="berdiff_fast._cpu not built")
        ),
    ],
)
@torch.no_grad()
def test_a_prepared_network_takes_several_steps(scale_shift, images, winograd):
    """As one call a step, within rounding; and each step's logits are its own."""
    network = small(scale_shift).network
    prepared = PreparedUNet(network, [900.0, 500.0, 100.0, 0.0], winograd=winograd)
    features = prepared.encode(toy_image(images, 1, 16, 16))
    y = (toy_image(3, 2 * images, 1, 16, 16, seed=1) > 0).float()  # two masks an image, at three steps
    got = prepared(y.flatten(0, 1), slice(1, 4), features.repeat(3, 1, 1, 1)).unflatten(0, (3, -1))
    for i in range(3):
        expected, others = prepared(y[i], i + 1, features), prepared(y[i], (i + 2) % 4, features)
        assert (got[i] - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (others - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("prepare", [False, True])
def test_end_to_end(scale_shift, prepare):
    """The U-Net's convolutions may round differently in another batch; bits that turn for it are few."""
    model, img = small(scale_shift), toy_image(2, 1, 16, 16)
    masks, probability = draw(model, img, 3, 8, prepare=prepare, return_probability=True)
    found = draw(model, img, 3, 8, prepare=prepare, return_probability=True, parallel=4)
    assert 0.02 < masks.double().mean() < 0.98
    assert (found[0] != masks).double().mean() < 0.01
    assert (found[1] - probability).abs().mean() < 0.01


def test_a_trained_network_takes_half_of_the_calls(caplog):
    """It predicts nearly the same y_0 from a guess. (The plain fixed-point iteration takes 16 calls.)"""
    model = bf.load("phantom64")
    img = model.preprocess(phantom.generate(1, 64, seed=3).images)
    with caplog.at_level(logging.DEBUG, logger="berdiff_fast"):
        found = draw(model, img, 1, 20, seed=2, parallel=8)
    assert torch.equal(found, draw(model, img, 1, 20, seed=2))
    count = re.search(r"20 steps in (\d+) calls", caplog.text)
    assert count and int(count[1]) <= 11  # 9 when this was written


def test_lidc_on_a_slice_of_its_validation_set():
    model, data = bf.load("lidc-v1"), RaterDataset(data_path("lidc/val.h5"))
    img = model.preprocess(data.batch([300])[0])
    options = dict(seed=[300], return_probability=True)
    (found, probability), (masks, expected) = (bf.sample(model, img, 1, 10, parallel=p, **options) for p in (8, None))
    assert torch.equal(found, masks) and (probability - expected).abs().max() < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_on_the_gpu(img, backend, prediction):
    """Also beside a sequential call that is a graph; and the prepared U-Net, within rounding."""

    def network(y_t, t, image):
        time = (t.to(y_t.dtype) * 0.001).reshape(-1, 1, 1, 1)
        return 4 * (image * 1.5 + y_t.roll(1, -1) * 0.75 - y_t.roll(-1, -2) * 2 + y_t * time)

    options = dict(schedule="cosine2", prediction=prediction, backend=backend, return_probability=True)
    one, several = draw(network, img.cuda(), **options), draw(network, img.cuda(), parallel=5, **options)
    assert torch.equal(one[0], several[0]) and torch.equal(one[1], several[1])
    model, image = small(prediction == "epsilon").cuda(), toy_image(2, 1, 16, 16).cuda()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        masks = [draw(model, image, 3, 8, backend=backend, parallel=p) for p in (None, 4, None, 4, None)]
    assert torch.equal(masks[1], masks[3])
    assert all((m != masks[1]).double().mean() < 0.01 for m in masks)
