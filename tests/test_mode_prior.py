# SPDX-License-Identifier: Apache-2.0
"""Size classes and their draw: the rule of docs/draw.md, section 11, and what masks of a class may depend on."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import safetensors.torch
import torch
from support import ALPHA, CPU_BACKENDS, FASTEST, METHODS, PREDICTIONS, Toy, assert_binomial, threads, toy_image
from torch import nn

import berdiff_fast as bf
from berdiff_fast import BerDiff, UNet, image_seeds, rng
from berdiff_fast.imaging import write_report
from berdiff_fast.network.prior import (
    LIKELIEST,
    ModePrior,
    class_bounds,
    class_probabilities,
    class_weights,
    size_class,
)
from berdiff_fast.sampling.loop import Trajectory
from berdiff_fast.sampling.modes import ClassDenoiser, bit_reversed, draw_classes

SEED, EDGES = 2023, (4, 20, 60)
CLASSES = len(EDGES) + 2


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


class TellingToy(Toy):
    """``Toy``, told a class: larger ones mark more. It keeps what it was told."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.told: list[torch.Tensor] = []

    def forward(self, y_t, t, img, mode):
        self.told.append(mode)
        return super().forward(y_t, t, img) + (mode.to(y_t.dtype) * 0.5 - 1.5).reshape(-1, *[1] * (y_t.ndim - 1))


def prior(scale: float = 2.0, seed: int = 0, **options) -> ModePrior:
    """With weights that make different images' classes differ."""
    torch.manual_seed(seed)
    found = ModePrior(1, EDGES, channels=(8, 16), **options)
    with torch.no_grad():
        found.members[0].head[-1].weight.normal_(std=scale)
    return found.eval()


def toy(**options) -> BerDiff:
    return BerDiff(TellingToy(**options), mode_prior=prior())


@pytest.fixture
def model() -> BerDiff:
    return toy()


@pytest.fixture(scope="module")
def img() -> torch.Tensor:
    return toy_image(3, 1, 12, 10) * torch.tensor([0.3, 1.0, 2.0]).reshape(3, 1, 1, 1)


def draw(model, img, n=16, steps=5, **options):
    return bf.sample(model, img, n, steps, **{"seed": SEED, **options})


# ---------------------------------------------------------------------- classes


def test_size_classes_count_pixels_of_any_channel():
    masks = torch.zeros(6, 2, 5, 5, dtype=torch.bool)
    for row, area in enumerate([0, 1, 3, 4, 19, 20]):
        masks[row, 0].view(-1)[:area] = True
        masks[row, 1].view(-1)[: area // 2] = True  # the same pixels again count once
    assert size_class(masks, EDGES).tolist() == [0, 1, 1, 2, 2, 3]
    assert size_class(masks.float(), EDGES).tolist() == [0, 1, 1, 2, 2, 3]
    assert size_class(torch.ones(2, 3, 1, 8, 8), EDGES).tolist() == [[4] * 3] * 2
    assert class_bounds(EDGES) == [(0, 0), (1, 3), (4, 19), (20, 59), (60, 2**62)]


@pytest.mark.parametrize("edges", [[], [1], [8, 8], [9, 8], "16", 16, [2.5], list(range(2, 70))])
def test_edges_that_make_no_sense_are_refused(edges):
    if edges == []:
        assert ModePrior(1, edges).classes == 2  # empty or not
        return
    with pytest.raises((ValueError, TypeError), match="edges must be"):
        ModePrior(1, edges)


# ---------------------------------------------------------------------- the draw


def by_hand(logits: torch.Tensor, seed: int, k: int, stratify: bool) -> int:
    """Section 11 with Python's integers and fractions."""
    from berdiff_fast.backends.reference import exp_negative

    weights = [int(float(exp_negative(logits.max() - z)) * 2**24) for z in logits]
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    if stratify:
        word = int(rng.philox4x32((0, 0, 0, 3), key)[0])
        v = (word + int(f"{k:032b}"[::-1], 2)) % 2**32
    else:
        v = int(rng.philox4x32((0, k, 1, 3), key)[0])
    place = Fraction(v, 2**32)
    for c in range(len(weights)):
        if place < Fraction(sum(weights[: c + 1]), sum(weights)):
            return c
    raise AssertionError("v is below 1")


@pytest.mark.parametrize("stratify", [True, False])
def test_classes_are_drawn_by_the_rule(stratify):
    logits = toy_image(20, 7, seed=3) * torch.logspace(-2, 2, 20)[:, None]
    logits[3] = torch.tensor([-100.0, 0, -200, 0, 0, -17, 3e38])
    seeds = image_seeds(5, 20)
    found = draw_classes(class_weights(logits), seeds, 9, first_sample=2**31 - 4, stratify=stratify)
    for b, k in product(range(20), range(9)):
        assert found[b, k] == by_hand(logits[b], int(seeds[b]), 2**31 - 4 + k, stratify)


def test_vectors():
    """Those of docs/draw.md, section 11."""
    logits = torch.tensor([[0.5, -1.0, 0.0, 0.25]])
    weights = class_weights(logits)
    assert weights.tolist() == [[16777216, 3743502, 10175895, 13066109]]
    seeds = torch.tensor([7])
    assert rng.words(seeds, 1, stream=rng.STREAM_MODES).item() == 0xA9A340C8
    assert draw_classes(weights, seeds, 16).tolist() == [[2, 0, 3, 1, 3, 0, 0, 2, 3, 0, 3, 2, 3, 0, 0, 2]]
    found = draw_classes(weights, seeds, 16, stratify=False)
    assert found.tolist() == [[3, 0, 2, 0, 3, 3, 1, 3, 3, 2, 3, 2, 3, 0, 3, 2]]


def test_weights_are_those_of_a_softmax():
    logits = toy_image(50, 7, seed=1) * 3
    expected = torch.softmax(logits.double(), 1)
    assert (class_probabilities(logits).double() - expected).abs().max() < 1e-6
    only = class_weights(logits, [1, 4])
    assert (only[:, [0, 2, 3, 5, 6]] == 0).all() and (only.amax(1) == LIKELIEST).all()


def test_bits_are_reversed():
    k = torch.tensor([0, 1, 2, 3, 2**31, 2**32 - 1, 0x12345678])
    assert bit_reversed(k).tolist() == [int(f"{i:032b}"[::-1], 2) for i in k.tolist()]


@pytest.mark.parametrize("m", [0, 1, 3, 4, 6])
def test_every_aligned_block_has_each_class_to_within_one_mask(m):
    logits, seeds = toy_image(300, 7, seed=2) * 2, image_seeds(1, 300)
    p = class_weights(logits).double()
    p = p / p.sum(1, keepdim=True)
    for first in (0, 2**m, 5 * 2**m, 2**32 - 2**m):
        drawn = draw_classes(class_weights(logits), seeds, 2**m, first_sample=first)
        counts = torch.nn.functional.one_hot(drawn, 7).sum(1)
        assert (counts - p * 2**m).abs().max() < 1 + 1e-9


@pytest.mark.parametrize("stratify", [True, False])
@pytest.mark.parametrize("k", [0, 1, 7, 1000])
def test_over_seeds_each_mask_is_a_draw_from_p(stratify, k):
    logits = torch.tensor([[0.3, -1.2, 0.8, -4.0, 0.0]])
    p, count = torch.softmax(logits.double(), 1)[0], 20000
    drawn = draw_classes(
        class_weights(logits).expand(count, -1), image_seeds(9, count), 1, first_sample=k, stratify=stratify
    )
    assert_binomial(np.bincount(drawn[:, 0], minlength=5), count, p.numpy(), alpha=ALPHA / 8)


def test_without_strata_two_masks_are_independent():
    logits = torch.tensor([[0.3, -1.2, 0.8]])
    p, count = torch.softmax(logits.double(), 1)[0], 20000
    weights, seeds = class_weights(logits).expand(count, -1), image_seeds(9, count)
    a, b = draw_classes(weights, seeds, 2, stratify=False).unbind(1)
    assert_binomial(np.bincount(a * 3 + b, minlength=9), count, (p[:, None] * p).flatten().numpy())
    a, b = draw_classes(weights, seeds, 2).unbind(1)
    with pytest.raises(AssertionError):  # in strata they are not
        assert_binomial(np.bincount(a * 3 + b, minlength=9), count, (p[:, None] * p).flatten().numpy())


# ---------------------------------------------------------------------- masks


@pytest.mark.parametrize("final", ["threshold", "sample"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("channels", [1, 2])
def test_a_mask_is_of_its_class(img, method, prediction, final, channels):
    model = BerDiff(TellingToy(mask_channels=channels), prediction=prediction, mode_prior=prior())
    masks, classes = draw(model, img, method=method, final=final, return_modes=True)
    assert masks.shape == (3, 16, channels, 12, 10) and classes.shape == (3, 16)
    assert torch.equal(size_class(masks, EDGES), classes) and len(classes.unique()) > 3
    p = model.prior(img).double()
    assert ((classes == 0).double().mean(1) - p[:, 0]).abs().max() < 1 / 16


def test_not_on_n_nor_first_sample(model, img):
    masks, classes = draw(model, img, 32, return_modes=True)
    for n, first in ((1, 0), (5, 0), (16, 16), (3, 29)):
        some, of_some = draw(model, img, n, first_sample=first, return_modes=True)
        assert torch.equal(some, masks[:, first : first + n]) and torch.equal(of_some, classes[:, first : first + n])


def test_not_on_the_batch(model, img):
    seeds = image_seeds(SEED, 3).tolist()
    whole = draw(model, img)
    for b in range(3):
        assert torch.equal(draw(model, img[b : b + 1], seed=[seeds[b]])[0], whole[b])
    assert torch.equal(draw(model, img.flip(0), seed=seeds[::-1]), whole.flip(0))


@pytest.mark.parametrize("max_batch", [1, 2, 3, 5, 7, 11, 16, 47, 100])
def test_not_on_max_batch(model, img, max_batch):
    found = draw(model, img, max_batch=max_batch, return_probability=True, return_modes=True)
    for x, y in zip(found, draw(model, img, return_probability=True, return_modes=True), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("final", ["threshold", "sample"])
def test_not_on_threads_nor_backend(model, backend, final):
    image = toy_image(2, 1, 64, 64)
    expected = draw(model, image, n=6, steps=3, backend="reference", final=final)
    assert torch.equal(draw(model, image, n=6, steps=3, backend=backend, final=final), expected)
    with threads(2):
        assert torch.equal(draw(model, image, n=6, steps=3, backend=backend, final=final), expected)


def test_empty_masks_need_no_network(model, img):
    masks, probability, classes = draw(model, img, steps=3, return_probability=True, return_modes=True)
    empty = classes == 0
    assert 0 < empty.sum() < 48 and not masks[empty].any() and (probability[empty] == 0).all()
    assert model.network.rows == [48 - int(empty.sum())] * 3
    assert all((told > 0).all() for told in model.network.told)
    assert torch.equal(model.network.told[0], classes[~empty].sort().values)
    model.network.rows.clear()
    assert not draw(model, img, modes="empty").any() and model.network.rows == []


def test_modes_that_are_asked_for(model, img):
    _, classes = draw(model, img, 64, modes="non-empty", return_modes=True)
    p = model.prior(img).double()[:, 1:]
    shares = torch.nn.functional.one_hot(classes, CLASSES).double().mean(1)[:, 1:]
    assert (classes > 0).all() and (shares - p / p.sum(1, keepdim=True)).abs().max() <= 1 / 64
    masks, classes = draw(model, img, modes=2, return_modes=True)
    assert (classes == 2).all() and (size_class(masks, EDGES) == 2).all()
    assert set(draw(model, img, modes=[1, 4], return_modes=True)[1].unique().tolist()) <= {1, 4}
    assert torch.equal(draw(model, img, modes=range(CLASSES)), draw(model, img))
    sampler = bf.Sampler(model, 16, 5, modes="non-empty", stratify=False)
    assert torch.equal(sampler(img, seed=SEED), draw(model, img, modes="non-empty", stratify=False))


def test_the_prior_in_words(model, img):
    p = model.prior(img)
    assert p.shape == (3, CLASSES) and torch.allclose(p.sum(1), torch.ones(3)) and not p.requires_grad
    assert torch.equal(model.prior(img[1]), p[1:2]) and torch.equal(model.prior(img.numpy()), p)
    model.train()
    assert torch.equal(model.prior(img), p) and model.mode_prior.training, "in eval mode, and left as it was"
    # Mirrored and turned images have the same.
    torch.testing.assert_close(model.prior(img.flip(-1)), p)
    square = toy_image(2, 1, 16, 16)
    torch.testing.assert_close(model.prior(square.rot90(1, (-2, -1))), model.prior(square))


# ---------------------------------------------------------------------- the likeliest mask of a class


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("channels, size", [(1, (3, 3)), (2, (2, 2))])
def test_a_mask_outside_its_class_becomes_the_likeliest_within(prediction, channels, size):
    """By looking at all masks there are."""
    edges = (2, 4)
    pixels = channels * size[0] * size[1]
    every = torch.tensor(list(product([0.0, 1.0], repeat=pixels))).view(-1, channels, *size)
    classes = size_class(every, edges)
    z = toy_image(200, channels, *size, seed=4)  # of y_0
    y = (toy_image(200, channels, *size, seed=5) > 0).float()
    logits = z if prediction == "y_0" else torch.where(y == 1, -z, z)
    modes = torch.arange(200) % 4
    told = ClassDenoiser(None, modes, modes, edges)
    found = told.fit(Trajectory(z > 0, y, logits, prediction)).masks
    score = torch.einsum("ncij,mcij->nm", z.double(), every.double())
    score[classes[None] != modes[:, None]] = -torch.inf
    assert torch.equal(found, every[score.argmax(1)].bool())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_where_the_host_does_not_know_the_classes_masks_are_the_same(model, img, prediction, monkeypatch):
    """As on a GPU: the network is asked about all masks, and those that are empty are emptied after."""
    expected = draw(model, img, prediction=prediction, return_probability=True)
    model.network.rows.clear()
    made = ClassDenoiser.__init__

    def blind(self, *arguments):
        made(self, *arguments)
        self.rows = None

    monkeypatch.setattr(ClassDenoiser, "__init__", blind)
    found = draw(model, img, prediction=prediction, return_probability=True)
    assert model.network.rows == [48] * 5
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("max_batch", [None, 7])
def test_several_steps_at_once_draw_the_same_masks(model, img, prediction, max_batch, monkeypatch):
    """Those of one step after another: with the classes as the host knows them, and as on a GPU."""
    options = dict(prediction=prediction, return_probability=True, return_modes=True, method="ddpm")
    expected = draw(model, img, **options)
    made = ClassDenoiser.__init__

    def blind(self, *arguments):
        made(self, *arguments)
        self.rows = None

    for blinded in (False, True):
        if blinded:
            monkeypatch.setattr(ClassDenoiser, "__init__", blind)
        model.network.rows.clear()
        found = draw(model, img, parallel=3, max_batch=max_batch, **options)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert max_batch or len(model.network.rows) <= 5


def test_a_mask_of_its_class_is_left_alone():
    """Also where the last step was drawn, so that it is not the likeliest."""
    masks = (toy_image(40, 1, 6, 6) > 0.5).clone()
    modes = size_class(masks, EDGES)
    told = ClassDenoiser(None, modes, modes, EDGES)
    end = Trajectory(masks.clone(), masks.float(), toy_image(40, 1, 6, 6, seed=1), "y_0")
    assert torch.equal(told.fit(end).masks, masks)


# ---------------------------------------------------------------------- a U-Net, and files


def unet(**options) -> UNet:
    shape = dict(model_channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,), norm_groups=8)
    return UNet(**{**shape, **options})


def trained(module: nn.Module) -> nn.Module:
    """Weights that do something, and are the same at every call."""
    torch.manual_seed(11)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.1)
    return module.eval()


def small(**options) -> BerDiff:
    return BerDiff(trained(unet(num_classes=CLASSES, **options)), "cosine2", "y_0", mode_prior=prior())


def test_a_file_holds_the_prior(tmp_path, img):
    model = small()
    for name in ("m.safetensors", "folder"):
        model.save(tmp_path / name)
        again = bf.load(tmp_path / name)
        assert again.to_config() == model.to_config() and not again.mode_prior.training
        assert torch.equal(again.prior(img), model.prior(img))
        assert torch.equal(draw(again, img), draw(model, img))


def test_files_and_networks_without_a_prior_are_what_they_were(tmp_path):
    config = BerDiff(unet()).to_config()
    assert set(config) == {
        *("format", "draw_contract", "network", "schedule", "prediction", "spacing"),
        *("rescale_timesteps", "preprocessing"),
    }
    assert "num_classes" not in config["network"]
    assert not any("label" in name or "prior" in name for name in BerDiff(unet()).weights())
    torch.manual_seed(3)
    plain = unet().state_dict()
    torch.manual_seed(3)
    told = unet(num_classes=4).state_dict()
    assert told.keys() - plain.keys() == {"label_emb.weight"} and all(torch.equal(told[k], plain[k]) for k in plain)


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("how", [True, "winograd"])
def test_prepared_is_the_same_function(img, scale_shift, how):
    from berdiff_fast.network import inference

    if how == "winograd" and FASTEST != "cpp":
        pytest.skip("berdiff_fast._cpu not built")
    network = trained(unet(num_classes=CLASSES, use_scale_shift_norm=scale_shift))
    prepared = inference.PreparedUNet(network, [5, 900], winograd=how == "winograd")
    images = toy_image(7, 1, 12, 10, seed=1)
    y, features = (toy_image(7, 1, 12, 10) > 0).float(), prepared.encode(images)
    for step, t in enumerate([5, 900]):
        for classes in ([2] * 7, [1, 1, 2, 3, 3, 3, 4], [4, 0, 1, 0, 3, 2, 4]):
            c = torch.tensor(classes)
            expected = network(y, torch.full((7,), t), images, c)
            assert (prepared(y, step, features, c) - expected).abs().max() < 1e-4 * expected.abs().max()
            both = prepared(y.repeat(2, 1, 1, 1), slice(0, 2), features.repeat(2, 1, 1, 1), c)[step * 7 :][:7]
            assert (both - expected).abs().max() < 1e-4 * expected.abs().max()
    model = BerDiff(network, "cosine2", "y_0", mode_prior=prior())
    masks, plain = draw(model, img, prepare=how), draw(model, img, prepare=False)
    assert (masks != plain).double().mean() < 1e-3
    assert torch.equal(size_class(masks, EDGES), size_class(plain, EDGES))
    assert (draw(model, img, prepare=how, parallel=3) != masks).double().mean() < 1e-3


def test_half_precision_draws_the_same_classes(img):
    model = small()
    _, classes = draw(model, img, return_modes=True)
    _, half = draw(model, img, dtype=torch.bfloat16, return_modes=True)
    assert torch.equal(half, classes), "the prior computes in its own dtype"


# ---------------------------------------------------------------------- in words


def test_summaries_and_reports_state_the_probability(tmp_path, model, img):
    masks, p = draw(model, img), model.prior(img)
    found = bf.summarize(masks)
    assert found.existence.dtype == torch.float64 and found.existence.shape == (3,)
    assert torch.equal(found.existence, masks.flatten(2).any(2).double().mean(1))
    exact = bf.summarize(masks, prior=p)
    assert torch.equal(exact.existence, 1 - p[:, 0].double())
    assert str(exact).splitlines()[1] == f"probability that a reader marks something: {1 - float(p[1, 0]):.2f}"
    alone = bf.summarize(masks[0, :, 0], prior=p[0])
    assert alone.existence.shape == () and "something" in str(alone)
    for wrong in (p[:2], 2 * p, p[:, None]):
        with pytest.raises(ValueError, match="prior must be probabilities of shape"):
            bf.summarize(masks, prior=wrong)
    write_report(tmp_path / "share.html", img[0, 0], masks[0, :, 0])
    share = float(found.existence[0])
    assert f"probability that a reader marks something: {share:.2f}<" in (tmp_path / "share.html").read_text()
    write_report(tmp_path / "prior.html", img[0, 0], masks[0, :, 0], existence=0.561)
    assert "probability that a reader marks something: 0.56<" in (tmp_path / "prior.html").read_text()
    for value in (1.5, True, float("nan")):
        with pytest.raises(ValueError, match="existence must be a probability"):
            write_report(tmp_path / "no.html", img[0, 0], masks[0, :, 0], existence=value)


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "options, words",
    [
        ({"modes": 5}, "modes must be one or more classes from 0 to 4"),
        ({"modes": []}, "modes must be one or more classes"),
        ({"modes": "none"}, "modes must be classes, 'empty' or 'non-empty', got 'none'"),
        ({"modes": 1.5}, "modes must be an int"),
        ({"stratify": 1}, "stratify must be True or False"),
    ],
)
def test_options_that_are_refused(model, img, options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        draw(model, img, **options)
    assert model.network.rows == []


def test_a_model_without_a_prior_has_no_modes(img):
    plain = BerDiff(Toy())
    for options in ({"modes": 1}, {"return_modes": True}):
        with pytest.raises(ValueError, match="needs a model with a mode prior"):
            draw(plain, img, **options)
    with pytest.raises(ValueError, match="no mode prior"):
        plain.prior(img)
    with pytest.raises(ValueError, match="mode must be given exactly"):
        plain(torch.zeros(1, 1, 12, 10), torch.zeros(1), img[:1], torch.zeros(1))


def test_what_does_not_fit_is_refused(img):
    with pytest.raises(ValueError, match="mode_prior must be given exactly for a network that is told its 5 classes"):
        BerDiff(unet(num_classes=5))
    with pytest.raises(ValueError, match="mode_prior must be given exactly"):
        BerDiff(unet(), mode_prior=prior())
    with pytest.raises(TypeError, match="mode_prior must be a ModePrior"):
        BerDiff(Toy(), mode_prior=nn.Identity())
    with pytest.raises(ValueError, match="mode_prior must see the image's 2 channels"):
        BerDiff(unet(num_classes=5, img_channels=2), mode_prior=prior())
    with pytest.raises(ValueError, match="num_classes must be a positive int"):
        unet(num_classes=-1)
    network, y = unet(num_classes=5), torch.zeros(2, 1, 12, 10)
    with pytest.raises(ValueError, match="classes must be given exactly to a network with num_classes"):
        network(y, torch.zeros(2), img[:2])
    with pytest.raises(ValueError, match=r"classes must have shape \(2,\)"):
        network(y, torch.zeros(2), img[:2], torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="mode must be given exactly to a model with a mode prior, got none"):
        small()(y, torch.zeros(2), img[:2])


def test_a_prior_that_fails_is_no_silent_choice(model, img):
    with torch.no_grad():
        model.mode_prior.members[0].head[-1].bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match="the mode prior returned NaN"):
        draw(model, img)
    assert model.network.rows == []


@pytest.mark.parametrize(
    "options, words",
    [
        ({"channels": (12,)}, "channels must be multiples of 8"),
        ({"crop": 7}, "crop must be even"),
        ({"context": True}, "context needs a crop"),
        ({"dropout": 0.5}, "dropout must be in"),
        ({"symmetries": 2}, "symmetries must be 1, 4 or 8"),
        ({"jitter": -0.1}, "jitter must be in"),
        ({"members": 0}, "members must be at least 1"),
    ],
)
def test_priors_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words):
        ModePrior(1, EDGES, **options)


def test_images_the_prior_cannot_see(img):
    seeing = prior(crop=16)
    with pytest.raises(ValueError, match="img must be at least 16 pixels"):
        seeing(img)
    with pytest.raises(ValueError, match=r"img must have shape \(N, 1, H, W\)"):
        seeing(torch.zeros(1, 2, 16, 16))
    with pytest.raises(TypeError, match="img must be floating point"):
        BerDiff(TellingToy(), mode_prior=prior()).prior(torch.zeros(1, 1, 12, 10, dtype=torch.uint8))


# ---------------------------------------------------------------------- the command


def test_the_command_draws_what_is_asked_for(tmp_path, capsys):
    from berdiff_fast import cli

    network = trained(unet(num_classes=CLASSES, img_channels=2))
    options = dict(preprocessing=bf.Preprocessing(), output_crop=16, distance=True, mode_prior=prior(scale=0.0))
    BerDiff(network, "cosine2", "y_0", **options).save(tmp_path / "m.safetensors")
    np.save(tmp_path / "scan.npy", toy_image(1, 20, 24)[0].numpy())

    def masks(name: str, *words: str) -> list[int]:
        where = [
            str(tmp_path / "scan.npy"),
            "--model",
            str(tmp_path / "m.safetensors"),
            "--output",
            str(tmp_path / name),
        ]
        assert (
            cli.main(["sample", *where, "--n", "12", "--steps", "3", "--roi", "2", "18", "4", "20", "--json", *words])
            == 0
        )
        return json.loads(capsys.readouterr().out)["sizes"]["voxels"]

    assert sum(size == 0 for size in masks("all")) in (2, 3), "classes are equally likely"
    assert all(masks("some", "--modes", "non-empty"))
    assert all(EDGES[0] <= size < EDGES[1] for size in masks("two", "--modes", "2"))
    assert cli.main(["sample", str(tmp_path / "scan.npy"), "--model", str(tmp_path / "m.safetensors"), "--output",
                     str(tmp_path / "no"), "--modes", "9"]) != 0  # fmt: skip
    assert "modes must be one or more classes from 0 to 4" in capsys.readouterr().err


def test_files_that_say_other_things_about_the_prior_are_refused(tmp_path, img):
    model = small()
    config, weights = model.to_config(), {k: v.contiguous() for k, v in model.weights().items()}
    network = {k: v for k, v in weights.items() if not k.startswith("mode_prior.")}
    wrong = {
        "no description": ({k: v for k, v in config.items() if k != "mode_prior"}, weights),
        "no weights": (config, network),
        "a word": ({**config, "mode_prior": "yes"}, weights),
        "other classes": ({**config, "mode_prior": {**config["mode_prior"], "edges": [3]}}, weights),
        "another key": ({**config, "mode_prior": {**config["mode_prior"], "depth": 3}}, weights),
    }
    for name, (said, held) in wrong.items():
        file = tmp_path / f"{name}.safetensors"
        safetensors.torch.save_file(held, file, metadata={"berdiff_fast": json.dumps(said)})
        with pytest.raises(ValueError, match=f"{name}.safetensors does not hold a complete berdiff_fast model"):
            bf.load(file)
