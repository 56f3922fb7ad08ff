# SPDX-License-Identifier: Apache-2.0
"""Wrong calls, one table: each is refused with a message that names the argument, what came and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import Toy

import berdiff_fast as bf
from berdiff_fast import BackendUnavailableError, BerDiff, NoiseSchedule, Preprocessing, metrics, ops

IMG = torch.zeros(2, 1, 8, 8)
Y = torch.zeros(2, 1, 4, 4)
SEEDS = torch.zeros(2, dtype=torch.int64)
SCHEDULE = NoiseSchedule()
META = torch.device("meta")
RATERS, SAMPLES = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4)


class Counting(Toy):
    """Errors have to come before any work: this network must not have been called."""

    img_channels = 1

    def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the network was called")


def sample(img: Any = IMG, *, model: Any = None, **options: Any) -> Callable[[], Any]:
    return lambda: bf.sample(BerDiff(Counting()) if model is None else model, img, **{"steps": 3, "n": 2, **options})


def bare(**options: Any) -> Callable[[], Any]:
    return lambda: bf.sample(lambda y, t, x: y, IMG, **options)


def noise(seeds: Any = SEEDS, shape: Any = (1, 4, 4), **options: Any) -> Callable[[], Any]:
    return lambda: ops.initial_noise(seeds, shape, **options)


def q_sample(**options: Any) -> Callable[[], Any]:
    return lambda: ops.q_sample(**{"y_0": Y, "t": SEEDS, "seeds": SEEDS, "schedule": SCHEDULE, **options})


def step(**options: Any) -> Callable[[], Any]:
    given = dict(y_t=Y, logits=Y, seeds=SEEDS, coefficients=torch.ones(4), timestep=5)
    return lambda: ops.sample_step(**{**given, **options})


def posterior(**options: Any) -> Callable[[], Any]:
    return lambda: ops.posterior(**{"y_t": Y, "logits": Y, "coefficients": torch.ones(4), **options})


def loss(**options: Any) -> Callable[[], Any]:
    return lambda: ops.diffusion_loss(**{"logits": Y, "y_t": Y, "y_0": Y, "t": SEEDS, "schedule": SCHEDULE, **options})


def subsequence(*arguments: Any) -> Callable[[], Any]:
    return lambda: SCHEDULE.subsequence(*arguments)


def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[], Any]:
    return lambda: function(*arguments, **options)


T, V = TypeError, ValueError

# Call, exception, message.
CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # sample: the image
    "img uint8": (sample(IMG.byte()), T, "img must be floating point.*got torch.uint8; raw.* model.preprocess"),
    "img array of ints": (sample(np.zeros((1, 8, 8), np.int16)), T, "img must be floating point.*got torch.int16"),
    "img bool": (sample(IMG.bool()), T, "img must be floating point.*got torch.bool"),
    "img complex": (sample(IMG.to(torch.complex64)), T, "img must be floating point.*got torch.complex64"),
    "img a list": (sample([[0.0]]), T, "img must be a torch.Tensor or a numpy.ndarray, got list"),
    "img None": (sample(None), T, "img must be a torch.Tensor or a numpy.ndarray, got NoneType"),
    "img too flat": (sample(IMG[0, 0]), V, r"img must be \(B, C, \*spatial\).* 2 spatial .*got shape \(8, 8\)"),
    "img too deep": (sample(IMG[:, :, None]), V, r"img must be .*got shape \(2, 1, 1, 8, 8\)"),
    "img empty batch": (sample(IMG[:0]), V, r"img must not be empty, got shape \(0, 1, 8, 8\)"),
    "img empty": (sample(IMG[..., :0]), V, r"img must not be empty, got shape \(2, 1, 8, 0\)"),
    "img channels": (sample(IMG.expand(2, 3, 8, 8)), V, r"img must have 1 channels .* got shape \(2, 3, 8, 8\)"),
    "img of a size that cannot be halved": (
        call(bf.sample, bf.load("lidc-v1"), torch.zeros(1, 1, 100, 100), n=1, steps=1),
        V,
        "y_t and img must have a height and width divisible by 16, got 100 x 100",
    ),
    "img NaN": (sample(IMG / 0), V, "img must be finite, got NaN or infinite"),
    "img infinite": (sample(IMG + torch.inf), V, "img must be finite, got NaN or infinite"),
    "img elsewhere": (sample(IMG.to(META)), V, "img must be on the model's device cpu, got meta"),
    "model elsewhere": (
        sample(model=BerDiff(Counting()).to(META)),
        V,
        "img must be on the model's device meta, got cpu",
    ),
    # sample: the model
    "model None": (call(bf.sample, None, IMG), T, r"model must be a BerDiff or callable .*got NoneType"),
    "model a path": (call(bf.sample, "lidc", IMG), T, r"model must be a BerDiff or callable .*got str"),
    "no schedule": (bare(prediction="epsilon"), V, "schedule must be given for a model that does not carry one"),
    "no prediction": (bare(schedule=SCHEDULE), V, r"prediction must be given \('epsilon' or 'y_0'\)"),
    "schedule of another kind": (sample(schedule=3), T, "schedule must be a NoiseSchedule or its name, got int"),
    "schedule unknown": (sample(schedule="cos"), V, r"must be one of \['cosine', 'cosine2', 'linear'\], got 'cos'"),
    "prediction unknown": (sample(prediction="x0"), V, "prediction must be 'epsilon' or 'y_0', got 'x0'"),
    # sample: the numbers
    "n zero": (sample(n=0), V, "n must be at least 1, got 0"),
    "n negative": (sample(n=-4), V, "n must be at least 1, got -4"),
    "n float": (sample(n=4.0), T, "n must be an int, got float"),
    "n bool": (sample(n=True), T, "n must be an int, got bool"),
    "n huge": (sample(n=2**32 + 1), V, r"first_sample \+ n must be at most 2\^32, got 0 \+ 4294967297"),
    "first_sample negative": (sample(first_sample=-1), V, "first_sample must be at least 0, got -1"),
    "first_sample huge": (sample(first_sample=2**32), V, r"first_sample \+ n must be at most 2\^32, got 4294967296"),
    "first_sample float": (sample(first_sample=1.0), T, "first_sample must be an int, got float"),
    "max_batch zero": (sample(max_batch=0), V, "max_batch must be at least 1, got 0"),
    "max_batch float": (sample(max_batch=2.5), T, "max_batch must be an int, got float"),
    "steps zero": (sample(steps=0), V, "steps must be at least 1, got 0"),
    "steps too many": (sample(steps=1001), V, "steps must be at most the schedule's 1000 timesteps, got 1001"),
    "steps float": (sample(steps=10.0), T, "steps must be an int or a sequence of ints, got 10.0"),
    "steps empty": (sample(steps=[]), V, "steps must name at least one timestep, got an empty sequence"),
    "steps out of range": (sample(steps=[0, 1000]), V, r"steps: every timestep must be in \[0, 1000\), got 1000"),
    "steps negative": (sample(steps=[-1, 5]), V, r"steps: every timestep must be in \[0, 1000\), got -1"),
    "steps twice": (sample(steps=[3, 3]), V, "steps: every timestep may appear once"),
    "method": (sample(method="euler"), V, r"method must be one of \['ddim', 'ddpm', 'd3pm'\], got 'euler'"),
    "spacing": (sample(spacing="even"), V, r"spacing must be one of \['uniform', .*'trailing-quadratic'\], got 'ev"),
    "final": (sample(final="mean"), V, r"final must be one of \['threshold', 'sample'\], got 'mean'"),
    "seed float": (sample(seed=1.5), T, "seed must be None, an int, or one int per image, got 1.5"),
    "seed bool": (sample(seed=True), T, "seed must be None, an int, or one int per image, got True"),
    "seed text": (sample(seed="7"), T, "seed must be None, an int, or one int per image, got '7'"),
    "seed floats": (sample(seed=[1, 2.0]), T, r"seed must be None, an int, or one int per image, got \[1, 2.0\]"),
    "seed too few": (sample(seed=[1]), V, "seed must have one int per image, 2 in all, got 1"),
    "seed too many": (sample(seed=[1, 2, 3]), V, "seed must have one int per image, 2 in all, got 3"),
    "backend unknown": (sample(backend="opencl"), V, r"backend must be 'auto' or one of \['cpp', .*got 'opencl'"),
    "backend cuda": (sample(backend="cuda"), BackendUnavailableError, "backend 'cuda' cannot run here: .*'cpu'"),
    # ops.initial_noise
    "noise seeds dtype": (noise(SEEDS.int()), V, r"seeds must be .*int64, got shape \(2,\) of torch.int32"),
    "noise seeds shape": (
        noise(SEEDS[None, None]),
        V,
        r"seeds must be \(B,\) or \(B, 2\) int64, got shape \(1, 1, 2\)",
    ),
    "noise rows": (noise(rows=3), V, "seeds: 2 seeds with samples_per_image=1 .*leave 2 masks, and 3 are asked for"),
    "noise samples_per_image": (noise(rows=1, samples_per_image=0), V, "samples_per_image must be at least 1, got 0"),
    "noise first_row": (noise(first_row=-1, rows=1), V, "first_row must be at least 0, got -1"),
    "noise first_sample": (noise(first_sample=2**32), V, r"first_sample must be .*2\^32, got 4294967296 and 1"),
    "noise mask_shape": (noise(shape=(1, -4)), V, r"mask_shape must not be negative, got \(1, -4\)"),
    "noise pixels": (noise(shape=(2**18, 2**18)), V, r"at most 2\^34 pixels, got 68719476736"),
    "noise dtype": (noise(dtype=torch.int64), T, "dtype must be bool, uint8, float32.*, got torch.int64"),
    "noise backend": (noise(backend="opencl"), V, "backend must be .*got 'opencl'"),
    # ops.q_sample
    "q_sample t dtype": (q_sample(t=SEEDS.float()), V, r"t must be one-dim.* int64, got shape \(2,\) of torch.float32"),
    "q_sample t length": (q_sample(t=SEEDS[:1]), V, r"t must be int64 of shape \(2,\), got .* \(1,\)"),
    "q_sample t too late": (q_sample(t=SEEDS + 1000), V, r"t must be in \[0, 1000\), got values from 1000 to 1000"),
    "q_sample t negative": (q_sample(t=SEEDS - 1), V, r"t must be in \[0, 1000\), got values from -1 to -1"),
    "q_sample y_0": (
        q_sample(y_0=Y.double(), dtype=torch.float32),
        T,
        "y_0 must be bool, uint8, float32, .* got torch.float64",
    ),
    "q_sample dtype": (q_sample(dtype=torch.float64), T, "dtype must be bool, uint8, float32, .* got torch.float64"),
    "q_sample seeds": (q_sample(seeds=SEEDS[:1]), V, "seeds: 1 seeds .*leave 1 masks, and 2 are asked for"),
    # ops.sample_step and ops.posterior
    "step logits shape": (step(logits=Y[..., :3]), V, r"logits must have the shape of y_t, .*4\), got .*3\)"),
    "step logits dtype": (step(logits=Y.double()), T, "logits must be float32, float16 or bfloat16, got torch.float64"),
    "step logits device": (step(logits=Y.to(META)), V, "logits must be on cpu like the masks, got meta"),
    "step seeds device": (step(seeds=SEEDS.to(META)), V, "seeds must be on cpu like the masks, got meta"),
    "step y_t": (step(y_t=Y.long(), dtype=torch.bool), T, "y_t must be bool, uint8, float32, .* got torch.int64"),
    "step coefficients dtype": (
        step(coefficients=torch.ones(4, dtype=torch.float64)),
        V,
        r"coefficients must be float32 of shape \(4,\), got torch.float64",
    ),
    "step coefficients shape": (
        step(coefficients=torch.ones(3, 4)),
        V,
        r"coefficients must be float32 of shape \(4,\), got .* \(3, 4\)",
    ),
    "step timestep": (step(timestep=-1), V, r"timestep must be in \[0, 2\^32\), got -1"),
    "step prediction": (step(prediction="x0"), V, "prediction must be 'epsilon' or 'y_0', got 'x0'"),
    "step seeds": (step(seeds=SEEDS.repeat(2)), V, "samples_per_image must be given .* 2 masks .* 4 seeds"),
    "step nan_flag dtype": (step(nan_flag=torch.zeros(1)), V, r"nan_flag must be int32 of shape \(1,\), got .*float32"),
    "step nan_flag shape": (
        step(nan_flag=torch.zeros(2, dtype=torch.int32)),
        V,
        r"nan_flag must be int32 of shape \(1,\), got .* \(2,\)",
    ),
    "step NaN": (step(logits=Y / 0), FloatingPointError, r"logits contain NaN \(timestep 5\)"),
    "posterior logits": (posterior(logits=Y[:1]), V, r"logits must have the shape of y_t, \(2, .*got \(1, "),
    "posterior y_t": (posterior(y_t=Y.int()), T, "y_t must be bool, uint8, .* got torch.int32"),
    "posterior prediction": (posterior(prediction=None), V, "prediction must be 'epsilon' or 'y_0', got None"),
    "posterior backend": (
        posterior(backend="cuda"),
        BackendUnavailableError,
        "backend 'cuda' cannot run here: .* tensors are on 'cpu'",
    ),
    # ops.diffusion_loss
    "loss logits a list": (loss(logits=[0.0]), T, "logits must be a torch.Tensor, got list"),
    "loss logits dtype": (loss(logits=Y.long()), T, "logits must be float32, .* or float64, got torch.int64"),
    "loss logits float64": (
        loss(logits=Y.double(), backend="cpp"),
        T,
        "logits must be float32, float16 or bfloat16 for backend 'cpp', got float64",
    ),
    "loss logits shape": (loss(logits=Y[..., :3]), V, r"logits must have the shape of y_t, .*4\), got .*3\)"),
    "loss logits device": (loss(logits=Y.to(META)), V, "logits must be on cpu like the masks, got meta"),
    "loss y_t": (loss(y_t=Y.long()), T, "y_t must be bool, uint8, float32, .* got torch.int64"),
    "loss y_0": (loss(y_0=Y.double()), T, "y_0 must be bool, uint8, float32, .* got torch.float64"),
    "loss y_0 shape": (loss(y_0=Y[:1]), V, r"y_0 must have the shape of y_t, \(2, .*got \(1, "),
    "loss t dtype": (loss(t=SEEDS.int()), V, r"t must be one-dimensional int64, got shape \(2,\) of torch.int32"),
    "loss t length": (loss(t=SEEDS[:1]), V, "t must have one timestep for each of the 2 masks of y_t"),
    "loss t too late": (loss(t=SEEDS + 1000), V, r"t must be in \[0, 1000\), got values from 1000 to 1000"),
    "loss schedule": (loss(schedule="cosine2"), T, "schedule must be a NoiseSchedule, got str"),
    "loss prediction": (loss(prediction="x0"), V, "prediction must be 'epsilon' or 'y_0', got 'x0'"),
    "loss kl_weight": (loss(kl_weight=-1), V, "kl_weight must be a finite number of at least 0, got -1"),
    "loss bce_weight": (loss(bce_weight=torch.nan), V, "bce_weight must be a finite number of at least 0, got nan"),
    "loss weights": (loss(weights=torch.ones(999)), V, r"weights must be .*\(1000,\), one for each .*got \(999,\)"),
    "loss weights a list": (loss(weights=[1.0]), V, r"weights must be a tensor of shape \(1000,\), .*got list"),
    "loss ignore": (loss(ignore=Y.int()), T, "ignore must be bool, uint8, float32, .* got torch.int32"),
    "loss ignore a list": (loss(ignore=[True]), T, "ignore must be a torch.Tensor or None, got list"),
    "loss ignore shape": (loss(ignore=Y[0]), V, r"ignore must have the shape of y_t, .*got \(1, 4, 4\)"),
    "loss backend": (loss(backend="cuda"), BackendUnavailableError, "backend 'cuda' cannot run here: .*'cpu'"),
    # NoiseSchedule
    "schedule name": (call(NoiseSchedule, "sigmoid"), V, r"name must be one of \['cosine', .*got 'sigmoid'"),
    "schedule short": (call(NoiseSchedule, timesteps=1), V, "timesteps must be at least 2, got 1"),
    "schedule float": (call(NoiseSchedule, timesteps=1e3), T, "timesteps must be an int, got float"),
    # Scaled to this few timesteps, it would noise more than all of the mask.
    "linear short": (
        call(NoiseSchedule, "linear", 20),
        V,
        "every beta .* between 0 and 1; .*'linear' with 20 timesteps",
    ),
    "betas range": (call(NoiseSchedule.from_betas, [0.5, 1.0]), V, "every beta must lie .* reach from 0.5 to 1"),
    "betas NaN": (call(NoiseSchedule.from_betas, [0.5, torch.nan]), V, "every beta must lie strictly between 0 and 1"),
    "betas shape": (
        call(NoiseSchedule.from_betas, [[0.1, 0.2]]),
        V,
        r"betas must be one-dimensional .*got shape \(1, 2\)",
    ),
    "uniform impossible": (subsequence(700), V, "spacing 'uniform' cannot visit exactly 700 of 1000 .*'trailing'"),
    "quadratic impossible": (subsequence(100, "quadratic"), V, "spacing 'quadratic' with steps=100 falls on .*; use"),
    "steps of texts": (subsequence("10"), T, "steps must be an int or a sequence of ints, got '10'"),
    "steps of floats": (subsequence([0.0, 1.0]), T, r"steps must be an int or a sequence of ints, got \[0.0, 1.0\]"),
    "steps float tensor": (subsequence(torch.tensor([0.5, 7.9])), T, "steps must be an int or a sequence of ints"),
    "steps float32 array": (
        subsequence(np.array([0.5, 7.9], dtype=np.float32)),
        T,
        "steps must be an int or a sequence of ints",
    ),
    "steps generator": (subsequence(t for t in [0.5, 7.9]), T, "steps must be an int or a sequence of ints"),
    "table method": (call(SCHEDULE.step_table, [1, 2], "plms"), V, "method must be one of .*got 'plms'"),
    # BerDiff, Preprocessing, load
    "network": (call(BerDiff, lambda *x: x), T, "network must be a torch.nn.Module, got function"),
    "model schedule": (call(BerDiff, Toy(), 1000), T, "schedule must be a NoiseSchedule or its name, got int"),
    "model prediction": (call(BerDiff, Toy(), prediction="x"), V, "prediction must be 'epsilon' or 'y_0', got 'x'"),
    "model preprocessing": (
        call(BerDiff, Toy(), preprocessing="min-max"),
        T,
        "preprocessing must be a Preprocessing or None, got str",
    ),
    "preprocessing mode": (
        call(Preprocessing, "zscore"),
        V,
        "mode must be 'min-max', 'window' or 'z-score', got 'zscore'",
    ),
    "window missing": (call(Preprocessing, "window"), V, "window must be given exactly when .*got window=None"),
    "window superfluous": (
        call(Preprocessing, window=(0, 1)),
        V,
        r"window must be given exactly .*got window=\(0, 1\)",
    ),
    "window reversed": (call(Preprocessing, "window", (400, -1000)), V, r"window must be .*got \(400, -1000\)"),
    "output_range": (call(Preprocessing, output_range=(1, 1)), V, r"output_range must be .*got \(1, 1\)"),
    "load": (call(bf.load, "no-such-model"), FileNotFoundError, "name_or_path: no file or directory 'no-such-model'"),
    "official argument": (call(bf.load_official, {}, widths=3), T, "unknown argument widths; the known ones are"),
    "official mean_type": (
        call(bf.load_official, {}, mean_type="v"),
        V,
        r"mean_type must be one of \['epsilon', 'xstart'\], got 'v'",
    ),
    "official file": (call(bf.load_official, "no-such.pt"), FileNotFoundError, "no-such.pt is not an existing file"),
    "official empty": (call(bf.load_official, {}), V, "state_dict must map names to tensors, got an empty dict"),
    # image_seeds
    "image_seeds seed": (call(bf.image_seeds, 0.5, 2), T, "seed must be an int, got float"),
    "image_seeds count": (call(bf.image_seeds, 0, -2), V, "count must be at least 0, got -2"),
    # ops.overlap
    "overlap a": (call(ops.overlap, [1]), T, "a must be a torch.Tensor, got list"),
    "overlap b": (call(ops.overlap, RATERS, [1]), T, "b must be a torch.Tensor, got list"),
    "overlap a of ints": (call(ops.overlap, RATERS.long()), T, "a must be bool, uint8, float32, .* got torch.int64"),
    "overlap b of doubles": (call(ops.overlap, RATERS, SAMPLES.double()), T, "b must be bool, .* got torch.float64"),
    "overlap a flat": (call(ops.overlap, Y[0, 0]), V, r"a must be \(N, R, \*shape\), got shape \(4, 4\)"),
    "overlap size": (
        call(ops.overlap, RATERS, SAMPLES[..., :3]),
        V,
        r"b must be .* \(2, 3, 4, 4\), got \(2, 5, 4, 3\)",
    ),
    "overlap images": (call(ops.overlap, RATERS, SAMPLES[:1]), V, r"b must be .* got \(1, 5, 4, 4\)"),
    "overlap b flat": (call(ops.overlap, RATERS, SAMPLES[..., 0]), V, r"b must be .* got \(2, 5, 4\)"),
    "overlap device": (call(ops.overlap, RATERS, SAMPLES.to(META)), V, "b must be on cpu like the masks, got meta"),
    "overlap backend": (call(ops.overlap, RATERS, backend="opencl"), V, "backend must be .*got 'opencl'"),
    # metrics
    "metrics size": (
        call(metrics.hm_iou, RATERS, SAMPLES[..., :3]),
        V,
        "raters and samples must be .*same N and shape",
    ),
    "metrics images": (call(metrics.soft_dice, RATERS, SAMPLES[:1]), V, "raters and samples must be"),
    "metrics flat": (call(metrics.evaluate, Y[0, 0], SAMPLES), V, r"raters must be \(N, masks, .*\(4, 4\)"),
    "metrics no samples": (call(metrics.evaluate, RATERS, SAMPLES[:, :0]), V, "samples must have at least one mask"),
    "metrics no pixels": (call(metrics.evaluate, RATERS[..., :0], SAMPLES), V, "raters must have .* one pixel, got"),
    "metrics list": (call(metrics.evaluate, [[0]], SAMPLES), T, "raters must be a torch.Tensor or a numpy.nd"),
    "metrics complex": (call(metrics.evaluate, RATERS, SAMPLES.cfloat()), T, "samples must be masks of a real type"),
    "metrics device": (call(metrics.evaluate, RATERS, SAMPLES.to(META)), V, "samples must be on cpu like raters"),
    "metrics names": (call(metrics.evaluate, RATERS, SAMPLES, ["miou"]), V, r"names must be of \['ged', .*got 'miou'"),
    "metrics counts": (call(metrics.evaluate_counts, RATERS, SAMPLES, [6]), V, "counts must be at most the 5 samples"),
    "metrics count zero": (call(metrics.evaluate_counts, RATERS, SAMPLES, [0]), V, "counts must be at least 1, got 0"),
    "metrics bins": (call(metrics.calibration_bins, RATERS, SAMPLES, 0), V, "bins must be at least 1, got 0"),
    "iou_distance": (call(metrics.iou_distance, RATERS, SAMPLES[:1]), V, "a and b must be"),
}


@pytest.mark.parametrize("name", CALLS)
def test_refused(name):
    function, error, message = CALLS[name]
    with pytest.raises(error, match=f"(?s){message}") as caught:
        function()
    assert caught.type is error, "not a subclass, which another exception may be by accident"


def test_the_table_is_long_enough():
    assert len(CALLS) >= 45


# Calls that once were not refused, or not in words that name the argument.
ONCE_ACCEPTED: dict[str, tuple[Callable[[], Any], tuple[type[Exception], ...], str]] = {
    "table out of range": (call(SCHEDULE.step_table, [5, 1000]), (V,), "timesteps.*1000"),
    "table not ascending": (call(SCHEDULE.step_table, [5, 3]), (V,), "timesteps.*ascending"),
    "table empty": (call(SCHEDULE.step_table, []), (V,), "timesteps"),
    "betas of text": (call(NoiseSchedule.from_betas, "abc"), (T,), "betas"),
    "steps of bools": (subsequence([False, True]), (T,), "steps must be an int or a sequence of ints"),
    "spacing beside timesteps": (subsequence([1, 2], "even"), (V,), "spacing must be one of"),
    # The image is finite, and no longer so in the network's dtype.
    "img too large for float16": (
        sample(IMG + 1e5, model=BerDiff(Toy(dtype=torch.float16))),
        (V,),
        "img.*float16",
    ),
    "img big-endian": (sample(np.zeros((1, 8, 8), ">i2")), (T, V), "img"),
    "img array of objects": (sample(np.zeros((1, 8, 8), object)), (T,), "img"),
    "model in float64": (sample(model=BerDiff(Toy(dtype=torch.float64))), (T,), "model.*float64"),
    "noise seeds a list": (noise([1, 2]), (T,), "seeds"),
    "noise seeds a scalar": (noise(torch.tensor(1)), (V,), "seeds"),
    "noise first_row too far": (noise(first_row=3), (V,), "first_row"),
    "noise shape an int": (noise(shape=16), (T,), "mask_shape"),
    "q_sample t a list": (q_sample(t=[0, 1]), (T, V), "t must be"),
    "q_sample schedule a name": (q_sample(schedule="cosine2"), (T,), "schedule"),
    "q_sample y_0 of ints": (q_sample(y_0=Y.int()), (T,), "y_0"),
    "step y_t of ints": (step(y_t=Y.int()), (T,), "y_t"),
    "step y_t a scalar": (step(y_t=torch.tensor(0.0), logits=torch.tensor(0.0)), (V,), "y_t"),
    "mask_channels": (call(BerDiff, Toy(), mask_channels=0), (V,), "mask_channels"),
    "spatial_dims": (call(BerDiff, Toy(), spatial_dims=7), (V,), "spatial_dims"),
    "window of one": (call(Preprocessing, "window", (1,)), (T, V), "window"),
    "window a number": (call(Preprocessing, "window", 5), (T, V), "window"),
    "output_range None": (call(Preprocessing, output_range=None), (T, V), "output_range"),
    "output_range infinite": (call(Preprocessing, output_range=(-torch.inf, 0)), (V,), "output_range"),
    "raw empty": (
        lambda: BerDiff(Toy(), preprocessing=Preprocessing()).preprocess(torch.zeros(0, 8)),
        (V,),
        "raw",
    ),
    "raw of text": (lambda: BerDiff(Toy(), preprocessing=Preprocessing()).preprocess("x"), (T,), "raw"),
    "load a number": (call(bf.load, 5), (T,), "name_or_path"),
}


@pytest.mark.parametrize("name", ONCE_ACCEPTED)
def test_refused_now(name):
    function, errors, message = ONCE_ACCEPTED[name]
    with pytest.raises(errors, match=f"(?s){message}"):
        function()
