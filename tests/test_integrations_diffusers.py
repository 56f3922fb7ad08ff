# SPDX-License-Identifier: Apache-2.0
"""The scheduler for diffusers: our masks in its words, and an independent implementation of the same posterior."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from support import (
    ALPHA,
    ENVIRONMENT,
    METHODS,
    PREDICTIONS,
    Toy,
    assert_binomial,
    theta,
    toy_image,
)

pytest.importorskip("diffusers", reason="diffusers is not installed (pip install 'berdiff_fast[diffusers]')")

import diffusers

import berdiff_fast as bf
from berdiff_fast import ops
from berdiff_fast.integrations.diffusers import BernoulliScheduler

B, N, SIZE = 2, 3, 9
SEEDS = bf.image_seeds(7, B)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loop(scheduler, model, img, n=N, generator=None, **seeds) -> torch.Tensor:
    """What a pipeline does: bool (B, n, K, H, W)."""
    img = img.repeat_interleave(n, 0)
    y = scheduler.initial_noise((len(img), model.mask_channels, *img.shape[2:]), generator, **seeds)
    y = y * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        logits = model(scheduler.scale_model_input(y, t), t.expand(len(y)), img)
        y = scheduler.step(logits, t, y, generator, **seeds).prev_sample
    return y.bool().unflatten(0, (-1, n))


# ---------------------------------------------------------------------- our masks


@pytest.mark.parametrize("final", ["threshold", "sample"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_a_loop_draws_the_masks_of_sample(method, prediction, final):
    model, img = Toy(2), toy_image(B, 1, SIZE, SIZE)
    for spacing, shift in (("uniform", False), ("trailing-quadratic", True)):
        scheduler = BernoulliScheduler(
            100,
            prediction_type=prediction,
            method=method,
            final=final,
            timestep_spacing=spacing,
            leave_one_out=shift,
        )
        scheduler.set_timesteps(10)
        expected = bf.sample(
            model,
            img,
            N,
            10,
            method=method,
            final=final,
            spacing=spacing,
            leave_one_out=shift,
            schedule=bf.NoiseSchedule("cosine2", 100),
            prediction=prediction,
            seed=SEEDS,
        )
        assert torch.equal(loop(scheduler, model, img, seeds=SEEDS), expected)
        scheduler.set_timesteps(10, seeds=SEEDS)  # for loops that are somebody else's
        assert torch.equal(loop(scheduler, model, img), expected)
        scheduler.set_timesteps(timesteps=scheduler.timesteps)
        assert torch.equal(loop(scheduler, model, img, seeds=SEEDS), expected)
        assert not torch.equal(loop(scheduler, model, img, seeds=SEEDS + 1), expected)


def test_every_timestep_is_visited_before_set_timesteps():
    model, img = Toy(), toy_image(1, 1, SIZE, SIZE)
    scheduler = BernoulliScheduler(20)
    assert scheduler.num_inference_steps is None and len(scheduler) == 20
    assert scheduler.timesteps.tolist() == list(range(19, -1, -1))
    expected = bf.sample(
        model, img, N, 20, schedule=bf.NoiseSchedule("cosine2", 20), prediction="epsilon", seed=SEEDS[:1]
    )
    assert torch.equal(loop(scheduler, model, img, seeds=SEEDS[:1]), expected)


def test_what_a_step_returns():
    scheduler = BernoulliScheduler(prediction_type="sample")
    scheduler.set_timesteps(4)
    y = scheduler.initial_noise((4, 1, SIZE, SIZE), generator())
    z = toy_image(4, 1, SIZE, SIZE).requires_grad_()
    t = scheduler.timesteps[1]
    output = scheduler.step(z, t, y, generator())
    previous, clean = output
    assert previous is output.prev_sample and clean is output.pred_original_sample
    plain = scheduler.step(z, int(t), y, generator(), return_dict=False)
    assert type(plain) is tuple and all(torch.equal(a, b) for a, b in zip(plain, output, strict=True))
    assert previous.dtype is y.dtype and set(previous.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(clean, torch.sigmoid(z.detach()), rtol=1e-5, atol=1e-6)
    as_epsilon = BernoulliScheduler()
    as_epsilon.set_timesteps(4)
    clean = as_epsilon.step(z, t, y, generator()).pred_original_sample
    torch.testing.assert_close(clean, torch.sigmoid(torch.where(y == 1, -z, z).detach()), rtol=1e-5, atol=1e-6)


def test_generators_govern():
    model, img = Toy(), toy_image(B, 1, SIZE, SIZE)
    scheduler = BernoulliScheduler()
    scheduler.set_timesteps(10)
    first, again, other = (loop(scheduler, model, img, generator=generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(0)
    first = loop(scheduler, model, img)
    torch.manual_seed(0)
    assert torch.equal(loop(scheduler, model, img), first)
    # One for each mask, as in diffusers: then a mask depends on its own alone.
    both = loop(scheduler, model, img, 1, generator=[generator(3), generator(4)])
    alone = loop(scheduler, model, img[1:], 1, generator=[generator(4)])
    assert torch.equal(both[1:], alone)


# ---------------------------------------------------------------------- the forward process


def test_noise_is_that_of_q_sample():
    scheduler = BernoulliScheduler()
    y_0 = (toy_image(4, 2, SIZE, SIZE) > 0).float()
    t, seeds = torch.tensor([0, 250, 500, 999]), bf.image_seeds(1, 4)
    expected = ops.q_sample(y_0, t, seeds, scheduler.schedule)
    assert torch.equal(scheduler.add_noise(y_0, seeds, t), expected)
    same = scheduler.add_noise(y_0, generator(5), t)
    assert torch.equal(scheduler.add_noise(y_0, generator(5), t), same) and not torch.equal(same, expected)


def test_uniform_noise_flips_at_the_right_rate():
    scheduler, timesteps, pixels = BernoulliScheduler(), torch.tensor([0, 10, 100, 500, 999]), 2**16
    y_0 = torch.zeros(5, 1, 2, pixels)
    y_0[:, :, 1] = 1
    y_t = scheduler.add_noise(y_0, torch.rand(y_0.shape, generator=generator()), timesteps)
    assert y_t.dtype is y_0.dtype
    flips = (y_t != y_0).sum(-1)[:, 0]
    expected = (1 - scheduler.schedule.alphas_cumprod[timesteps]) / 2
    assert_binomial(flips, pixels, expected[:, None])


# ---------------------------------------------------------------------- an independent implementation


def counts(temperature, method, logits, S=8, draws=2**16):
    """Ones among ``draws`` from every y_t and every logit of y_0, at every step they and we have: ours, theirs, and
    the probability by our table in float64; (steps, 2, logits).

    Their clean share is alpha(t) = 1 - t at t = k / S. Ours has no timestep without anything of the clean mask left, so
    their first step, from t = 1, has no counterpart; timestep k of ours is their t = (k + 1) / S.
    """
    alpha_bar = 1 - torch.arange(1, S, dtype=torch.float64) / S
    betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    ours = BernoulliScheduler(S - 1, trained_betas=betas.tolist(), prediction_type="y_0", method=method, final="sample")
    theirs = diffusers.DiscreteDDIMScheduler(S)
    z = torch.tensor(logits).reshape(1, -1, 1).expand(2, -1, draws)
    y_t = torch.tensor([0, 1]).reshape(2, 1, 1).expand_as(z)
    here, there, expected = [], [], []
    table = ours.schedule.step_table(range(S - 1), method)
    for t in ours.timesteps.tolist():
        y = ours.step(z, t, y_t.float(), generator(t)).prev_sample
        here.append(y.sum(-1))
        of_epsilon = torch.where(y_t == 1, -z, z)[..., 0]
        flip = theta(table[t], of_epsilon)
        expected.append(torch.where(y_t[..., 0] == 1, 1 - flip, flip))
        two = torch.stack([torch.zeros_like(z), z], dim=-1).flatten(0, 1)
        output = theirs.step(
            two, S - 1 - t, y_t.flatten(0, 1).contiguous(), temperature=temperature, generator=generator(100 + t)
        )
        there.append(output.prev_sample.sum(-1).reshape(y.shape[:-1]))
    return torch.stack(here), torch.stack(there), torch.stack(expected), draws


def assert_same_rates(here, there, draws, alpha=ALPHA):
    """Fisher's exact test of every cell of two tables of counts; Bonferroni keeps the family's error at ``alpha``."""
    for cell in np.ndindex(*here.shape):
        a, b = int(here[cell]), int(there[cell])
        p = scipy.stats.fisher_exact([[a, draws - a], [b, draws - b]]).pvalue
        assert p >= alpha / here.numel(), f"cell {cell}: {a} and {b} of {draws}, p = {p:.3g}"


def test_ddpm_is_their_posterior_for_a_certain_mask():
    """One-hot logits: both know y_0. Largest difference of two frequencies that may pass: 0.015 at p = 1/2."""
    here, there, expected, draws = counts(0.0, "ddpm", [-64.0, 64.0])
    assert_same_rates(here, there, draws)
    assert_binomial(here, draws, expected)
    assert_binomial(there, draws, expected)


def test_d3pm_is_their_step_for_an_uncertain_mask():
    """They draw y_0 from the logits and then the posterior, which marginalises y_0."""
    here, there, expected, draws = counts(1.0, "d3pm", [-3.0, -0.5, 0.0, 1.5])
    assert_same_rates(here, there, draws)
    assert_binomial(here, draws, expected)
    assert_binomial(there, draws, expected)


def test_the_comparison_would_show_a_mistake():
    here, there, _, draws = counts(1.0, "ddpm", [-0.5, 1.5])  # plugged in, which is another rule
    with pytest.raises(AssertionError, match="p = "):
        assert_same_rates(here, there, draws)
    here, there, _, draws = counts(0.0, "ddim", [-64.0, 64.0])
    with pytest.raises(AssertionError, match="p = "):
        assert_same_rates(here, there, draws)


# ---------------------------------------------------------------------- configuration


def test_config_round_trip(tmp_path):
    given = dict(
        num_train_timesteps=50,
        beta_schedule="linear",
        prediction_type="sample",
        method="d3pm",
        timestep_spacing="trailing",
        final="sample",
        leave_one_out=True,
        input_scale=0.5,
    )
    scheduler = BernoulliScheduler(**given)
    assert {name: scheduler.config[name] for name in given} == given
    scheduler.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "BernoulliScheduler"
    for loaded in (BernoulliScheduler.from_pretrained(tmp_path), BernoulliScheduler.from_config(scheduler.config)):
        assert {name: loaded.config[name] for name in given} == given
        assert loaded.schedule.to_config() == scheduler.schedule.to_config()
        model, img = Toy(), toy_image(1, 1, SIZE, SIZE)
        for one in (scheduler, loaded):
            one.set_timesteps(5)
        assert torch.equal(loop(loaded, model, img, seeds=SEEDS[:1]), loop(scheduler, model, img, seeds=SEEDS[:1]))


def test_betas_of_ones_own_are_saved(tmp_path):
    betas = [0.1, 0.2, 0.3]
    BernoulliScheduler(3, trained_betas=betas).save_pretrained(tmp_path)
    assert BernoulliScheduler.from_pretrained(tmp_path).schedule.betas.tolist() == betas


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine2"])
def test_schedules(name):
    assert torch.equal(BernoulliScheduler(beta_schedule=name).schedule.betas, bf.NoiseSchedule(name).betas)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_train_timesteps=1), "num_train_timesteps must be at least 2, got 1"),
        (dict(num_train_timesteps=10.0), "num_train_timesteps must be an int, got float"),
        (
            dict(beta_schedule="squaredcos_cap_v2"),
            "beta_schedule must be one of .*'cosine2'.*, got 'squaredcos_cap_v2'",
        ),
        (dict(trained_betas=[0.5, 0.5]), "trained_betas must be num_train_timesteps = 1000 numbers, got 2"),
        (dict(num_train_timesteps=2, trained_betas=[0.5, 1.5]), "every beta must lie strictly between 0 and 1"),
        (dict(num_train_timesteps=2, trained_betas=[0.5, 0.5], input_scale=0.5), "input_scale must be 1 with trained"),
        (dict(prediction_type="v_prediction"), "prediction_type must be one of .*, got 'v_prediction'"),
        (dict(method="euler"), "method must be one of .*, got 'euler'"),
        (dict(timestep_spacing="leading"), "timestep_spacing must be one of .*, got 'leading'"),
        (dict(final="argmax"), "final must be one of .*, got 'argmax'"),
        (dict(leave_one_out=1), "leave_one_out must be True or False, got 1"),
        (dict(input_scale=0), "input_scale must be a finite number above 0, got 0"),
    ],
)
def test_the_constructor_refuses(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        BernoulliScheduler(**arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(), "give num_inference_steps or timesteps, and not both, got None and None"),
        (dict(num_inference_steps=5, timesteps=[1]), "give num_inference_steps or timesteps, and not both"),
        (dict(num_inference_steps=0), "num_inference_steps must be at least 1, got 0"),
        (dict(num_inference_steps=5.0), "num_inference_steps must be an int, got float"),
        (dict(num_inference_steps=1001), "steps must be at most the schedule's 1000 timesteps, got 1001"),
        (dict(timesteps=[0, 1000]), r"every timestep must be in \[0, 1000\), got 1000"),
        (dict(num_inference_steps=5, seeds=7), "seeds must be a torch.Tensor, as from image_seeds, got int"),
    ],
)
def test_set_timesteps_refuses(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        BernoulliScheduler().set_timesteps(**arguments)


def test_step_refuses():
    scheduler = BernoulliScheduler()
    scheduler.set_timesteps(10)
    y = scheduler.initial_noise((4, 1, 5, 5), seeds=SEEDS)
    z = toy_image(4, 1, 5, 5)
    good = dict(model_output=z, timestep=900, sample=y, seeds=SEEDS)
    scheduler.step(**good)
    nan = z.clone()
    nan[0, 0, 0, 0] = float("nan")
    for changed, message in [
        (dict(model_output=z.numpy()), "model_output must be a torch.Tensor, got ndarray"),
        (dict(model_output=z.double()), "model_output must be float32, float16 or bfloat16, got torch.float64"),
        (dict(model_output=z[:, :, 1:]), r"model_output must have the shape of sample, \(4, 1, 5, 5\), got \(4, 1, 4"),
        (dict(model_output=nan), "logits contain NaN"),
        (dict(timestep=901), "timestep must be one of the 10 of timesteps, from 900 down to 0, got 901"),
        (dict(timestep=900.0), "timestep must be an int, got float"),
        (dict(timestep=torch.tensor([900, 800])), r"timestep must be one for the whole batch, got shape \(2,\)"),
        (dict(sample=z), "sample must be masks of 0 and 1, got values from .*scheduler.initial_noise, not from Gauss"),
        (dict(sample=y.double()), "sample must be bool, uint8, float32, float16 or bfloat16, got torch.float64"),
        (dict(sample=y[:0]), "sample must be .N, K, .spatial. and not empty, got shape"),
        (dict(seeds=SEEDS[None]), r"seeds must be int64 of shape \(B,\), got torch.int64 of shape \(1, 2\)"),
        (dict(seeds=bf.image_seeds(0, 3)), "seeds must be one per image: 4 masks do not divide among 3 seeds"),
        (dict(generator=generator()), "give seeds or generator, not both"),
        (dict(seeds=None, generator=7), "generator must be a torch.Generator or one for each mask, got int"),
        (dict(seeds=None, generator=[generator()] * 3), "one for each of the 4 masks, got 3"),
    ]:
        with pytest.raises((ValueError, TypeError, FloatingPointError), match=message):
            scheduler.step(**(good | changed))


def test_add_noise_refuses():
    scheduler = BernoulliScheduler()
    y, t = torch.zeros(2, 1, 5, 5), torch.tensor([0, 1])
    for arguments, message in [
        ((y, torch.randn(y.shape, generator=generator()), t), r"noise must be uniform in \[0, 1\), .*not randn_like"),
        ((y, torch.rand_like(y).bfloat16(), t), r"noise must be float32 or float64 .*, got torch.bfloat16 of shape"),
        ((y, torch.rand(2, 1, 5), t), r"noise must be float32 or float64 of shape \(2, 1, 5, 5\)"),
        ((y, "gaussian", t), "noise must be a torch.Generator or one for each mask, got str"),
        ((y - 1, torch.rand_like(y), t), "original_samples must be masks of 0 and 1, got values from -1 to -1"),
        ((y, torch.rand_like(y), t[:1]), r"timesteps must be int64 of shape \(2,\), got torch.int64 of shape \(1,\)"),
        ((y, torch.rand_like(y), 5), "timesteps must be a torch.Tensor, got int"),
        ((y, torch.rand_like(y), t + 999), r"timesteps must be in \[0, 1000\), got values from 999 to 1000"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            scheduler.add_noise(*arguments)
    with pytest.raises(ValueError, match=r"shape must be \(N, K, \*spatial\), got \(4,\)"):
        scheduler.initial_noise((4,))


# ---------------------------------------------------------------------- optional


def test_diffusers_is_optional(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "diffusers"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "berdiff_fast.integrations.diffusers")
    with pytest.raises(ImportError, match=r'needs diffusers: pip install "berdiff_fast\[diffusers\]" \('):
        importlib.import_module("berdiff_fast.integrations.diffusers")


def test_nothing_is_imported_unless_asked_for():
    code = """
import sys, berdiff_fast, berdiff_fast.integrations.scheduling
print([name for name in ("diffusers", "monai") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
