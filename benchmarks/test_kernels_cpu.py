# SPDX-License-Identifier: Apache-2.0
"""The kernels on a CPU, one thread unless the name says otherwise, on 16 masks of 1 x 128 x 128.

    pytest benchmarks --benchmark-json benchmarks/results/cpu.json
    python benchmarks/summarize.py benchmarks/results/cpu.json

Every case checks its result against the reference before it is timed.
"""

from __future__ import annotations

import functools
import time

import pytest
import torch

from berdiff_fast import NoiseSchedule, image_seeds, ops
from berdiff_fast.backends import cpp
from berdiff_fast.bench.baselines import binomial, plain_loss, published_mean

SHAPE = (16, 1, 128, 128)
SCHEDULE = NoiseSchedule("cosine2")
TAUS = SCHEDULE.subsequence(10)
STEP = 5
COEFFICIENTS = SCHEDULE.step_table(TAUS).float()[STEP]
SEEDS = image_seeds(0, 1)


def ddim_step(alphas_cumprod, y_t, epsilon, t):
    """A step as the published code does it, given the network's probability of epsilon."""
    return binomial(published_mean(alphas_cumprod, y_t, (y_t - epsilon).abs(), t), None, 0, None)


def inputs(dtype: torch.dtype, mask_dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    z = (torch.randn(SHAPE, generator=generator) * 3).to(dtype)
    y = (torch.rand(SHAPE, generator=generator) < 0.5).to(mask_dtype)
    return y, z, torch.zeros(1, dtype=torch.int32)


def step(y, z, flag, backend="cpp", **options):
    return ops.sample_step(y, z, SEEDS, COEFFICIENTS, TAUS[STEP], nan_flag=flag, backend=backend, **options)


def timed(benchmark, function, rounds=200):
    benchmark.extra_info["pixels"] = torch.Size(SHAPE).numel()
    return benchmark.pedantic(function, rounds=rounds, warmup_rounds=min(rounds, 20))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def loss_inputs(dtype: torch.dtype = torch.float32):
    """Logits, y_t, y_0 and t as a training step has them; from t = 60 on, where the plain chain's 1e-7 shows little."""
    y_0, z, _ = inputs(dtype, torch.float32)
    t = torch.arange(60, 1000, 60)
    return z.requires_grad_(), ops.q_sample(y_0, t, image_seeds(0, 16), SCHEDULE), y_0, t


def loss_and_gradient(function, z, *arguments):
    """Forward and backward, through autograd."""
    value = function(z, *arguments, SCHEDULE)
    return value, torch.autograd.grad(value.sum(), z)[0]


def assert_close_loss(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2 * float(b.detach().abs().mean()))


@pytest.fixture(scope="module")
def compiled_plain_loss():
    """The plain chain by torch.compile, or why not."""
    compiled = torch.compile(plain_loss)
    try:
        loss_and_gradient(compiled, *loss_inputs())
    except Exception as error:  # no C++ compiler that it finds, as a rule
        pytest.skip(f"torch.compile failed: {type(error).__name__}: {error}")
    return compiled


@pytest.mark.parametrize("isa", cpp.available_isas())
@pytest.mark.parametrize("dtypes", ["float32-float32", "float32-bool", "bfloat16-bfloat16"])
def test_step(benchmark, isa, dtypes):
    """Logits and masks of these types."""
    logits, masks = (getattr(torch, name) for name in dtypes.split("-"))
    y, z, flag = inputs(logits, masks)
    with cpp.use_isa(isa):
        assert torch.equal(step(y, z, flag), step(y, z, flag, "reference"))
        timed(benchmark, lambda: step(y, z, flag))


@pytest.mark.parametrize("threads", [1, 2])
def test_step_on_threads(benchmark, threads):
    y, z, flag = inputs(torch.float32, torch.float32)
    torch.set_num_threads(threads)
    timed(benchmark, lambda: step(y, z, flag))


def test_threshold(benchmark):
    y, z, flag = inputs(torch.float32, torch.float32)
    assert torch.equal(step(y, z, flag, threshold=True), step(y, z, flag, "reference", threshold=True))
    timed(benchmark, lambda: step(y, z, flag, threshold=True, dtype=torch.bool))


def test_posterior(benchmark):
    y, z, _ = inputs(torch.float32, torch.float32)
    assert torch.equal(ops.posterior(y, z, COEFFICIENTS), ops.posterior(y, z, COEFFICIENTS, backend="reference"))
    timed(benchmark, lambda: ops.posterior(y, z, COEFFICIENTS))


def test_initial_noise(benchmark):
    timed(benchmark, lambda: ops.initial_noise(SEEDS, SHAPE[1:], samples_per_image=16))


def test_q_sample(benchmark):
    y, _, _ = inputs(torch.float32, torch.float32)
    t, seeds = torch.arange(16) * 60, image_seeds(0, 16)
    timed(benchmark, lambda: ops.q_sample(y, t, seeds, SCHEDULE))


def test_step_reference(benchmark):
    y, z, flag = inputs(torch.float32, torch.float32)
    timed(benchmark, lambda: step(y, z, flag, "reference"), rounds=10)


def test_step_as_published(benchmark):
    """Binomial and table look-ups; the mean is first checked against ours."""
    y, z, _ = inputs(torch.float32, torch.float32)
    epsilon = torch.sigmoid(z)
    alphas_cumprod = SCHEDULE.alphas_cumprod[torch.tensor(TAUS)].numpy()
    t = torch.full((SHAPE[0],), STEP)
    drawn = torch.stack([ddim_step(alphas_cumprod, y, epsilon, t) for _ in range(5)]).mean()
    assert abs(drawn - ops.posterior(y, z, COEFFICIENTS).mean()) < 5e-3
    timed(benchmark, lambda: ddim_step(alphas_cumprod, y, epsilon, t), rounds=20)


def test_rand_less_than_p(benchmark):
    """The least that PyTorch can do to draw bits of given probability: no posterior, no logits."""
    p = torch.rand(SHAPE)
    timed(benchmark, lambda: torch.rand_like(p) < p)


@pytest.mark.parametrize("isa", cpp.available_isas())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss(benchmark, isa, dtype):
    """The kernel alone: value and gradient, float32 masks."""
    z, y_t, y_0, t = loss_inputs(getattr(torch, dtype))
    rows, op = SCHEDULE.loss_rows(t), torch.ops.berdiff_fast.diffusion_loss
    expected = op(z.detach().double(), y_t, y_0, rows, None, "epsilon", "reference")
    with cpp.use_isa(isa), torch.no_grad():
        value, gradient = op(z, y_t, y_0, rows, None, "epsilon", "cpp")
        torch.testing.assert_close(value.double(), expected[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient.double(), expected[1], rtol=1e-6 if dtype == "float32" else 4e-3, atol=0)
        timed(benchmark, lambda: op(z, y_t, y_0, rows, None, "epsilon", "cpp"))


@pytest.mark.parametrize("case", ["ours", "reference", "plain", "compiled"])
def test_loss_forward_and_backward(benchmark, case, request):
    """Through autograd: the op, its reference, the plain PyTorch chain, and that chain compiled."""
    inputs = loss_inputs()
    functions = {
        "ours": ops.diffusion_loss,
        "reference": functools.partial(ops.diffusion_loss, backend="reference"),
        "plain": plain_loss,
    }
    function = functions[case] if case in functions else request.getfixturevalue("compiled_plain_loss")
    assert_close_loss(loss_and_gradient(function, *inputs), loss_and_gradient(ops.diffusion_loss, *inputs))
    timed(benchmark, lambda: loss_and_gradient(function, *inputs), rounds=100 if case == "ours" else 20)


def test_loss_ratios(benchmark, compiled_plain_loss):
    """Forward and backward against the baselines, taken in turns. Medians of the ratios."""
    inputs = loss_inputs()
    in_turns(
        benchmark,
        lambda: loss_and_gradient(ops.diffusion_loss, *inputs),
        {
            "plain PyTorch": lambda: loss_and_gradient(plain_loss, *inputs),
            "plain PyTorch, compiled": lambda: loss_and_gradient(compiled_plain_loss, *inputs),
        },
    )


def test_ratios(benchmark):
    """The step against its baselines, taken in turns: what a noisy machine can still say. Medians of the ratios."""
    y, z, flag = inputs(torch.float32, torch.float32)
    p, epsilon = torch.rand(SHAPE), torch.sigmoid(z)
    alphas_cumprod = SCHEDULE.alphas_cumprod[torch.tensor(TAUS)].numpy()
    t = torch.full((SHAPE[0],), STEP)
    baselines = {
        "rand_like(p) < p": lambda: torch.rand_like(p) < p,
        "as published": lambda: ddim_step(alphas_cumprod, y, epsilon, t),
        "plain PyTorch reference": lambda: step(y, z, flag, "reference"),
    }
    in_turns(benchmark, lambda: step(y, z, flag), baselines)


def in_turns(benchmark, ours, baselines) -> None:
    ratios: dict[str, list[float]] = {name: [] for name in baselines}
    for _ in range(30):
        for name, baseline in baselines.items():
            before, middle, after = seconds(ours), seconds(baseline), seconds(ours)
            ratios[name].append(2 * middle / (before + after))
    benchmark.extra_info["ratios"] = {name: sorted(r)[len(r) // 2] for name, r in ratios.items()}
    timed(benchmark, ours, rounds=20)


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def test_call_overhead(benchmark):
    """A step on four pixels."""
    y, z, flag = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.int32)
    benchmark.extra_info["pixels"] = 0
    benchmark.pedantic(
        lambda: ops.sample_step(y, z, SEEDS, COEFFICIENTS, 500, nan_flag=flag), rounds=500, iterations=100
    )
