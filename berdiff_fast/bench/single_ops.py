# SPDX-License-Identifier: Apache-2.0
"""Every op by itself on one thread of a CPU: each instruction set, each kind of input, and what a call costs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

import berdiff_fast as bf
from berdiff_fast import metrics, ops
from berdiff_fast.backends import select
from berdiff_fast.bench import baselines
from berdiff_fast.bench.runner import Case, Contender, Made

SHAPE = (16, 1, 128, 128)
PIXELS = torch.Size(SHAPE).numel()

#: What times of two runs are divided by before they are compared: torch's own work.
UNIT = "rand_like(p) < p alone (no step)"

_STEP = 5


def cases() -> list[Case]:
    """The cases, whose contenders are built when their turn comes."""
    return [
        Case(f"draws, one thread, {SHAPE[0]} masks of 128 x 128", "ops", _draws, UNIT, "pixels", PIXELS, threads=1),
        Case("loss kernel, one thread", "ops", _losses, "reference", "pixels", PIXELS, threads=1),
        *(
            Case(f"{what}, one thread, {kind}", "ops", functools.partial(made, kind), baseline, threads=1, calls=20)
            for kind in ("discs", "noise")
            for what, made, baseline in (
                ("overlap", _overlaps, "reference"),
                ("scores", _scores, "GED and HM-IoU, pair by pair in NumPy (published)"),
            )
        ),
        Case("a call on four pixels, one thread", "ops", _calls, "torch.add", "calls", 1, threads=1, calls=500),
    ]


def _isas() -> list[str]:
    if not select.can_run("cpp", "cpu"):
        return []
    from berdiff_fast.backends import cpp

    return cpp.available_isas()


def _with_isa(isa: str) -> Callable[[], Any]:
    from berdiff_fast.backends import cpp

    return functools.partial(cpp.use_isa, isa)


def _equal(function: Callable[..., torch.Tensor], **options: Any) -> Callable[[], None]:
    """A gate: the bits are the reference's."""

    def gate() -> None:
        assert torch.equal(function(**options), function(backend="reference")), "the bits differ from the reference's"

    return gate


def _close(function: Callable[..., torch.Tensor]) -> Callable[[], None]:
    """A gate, of ops whose sums may be taken in another order: the numbers are the reference's but for rounding."""

    def gate() -> None:
        torch.testing.assert_close(function(), function(backend="reference"), rtol=1e-5, atol=1e-5)

    return gate


# ---------------------------------------------------------------------- draws


def _draws() -> Made:
    schedule = bf.NoiseSchedule()
    taus = schedule.subsequence(10)
    coefficients = schedule.step_table(taus).float()[_STEP]
    seeds, rows = bf.image_seeds(0, 1), bf.image_seeds(0, SHAPE[0])
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(SHAPE, generator=generator) * 3
    bits = torch.rand(SHAPE, generator=generator) < 0.5
    flag = torch.zeros(1, dtype=torch.int32)

    def step(z: torch.Tensor, y: torch.Tensor, backend: str = "auto", **options: Any) -> torch.Tensor:
        return ops.sample_step(y, z, seeds, coefficients, taus[_STEP], nan_flag=flag, backend=backend, **options)

    for isa in _isas():
        for dtypes in ("float32-float32", "float32-bool", "bfloat16-bfloat16"):
            z, y = (x.to(getattr(torch, dtype)) for x, dtype in zip((logits, bits), dtypes.split("-"), strict=True))
            call = functools.partial(step, z, y)
            yield Contender(f"sample_step, {isa}, {dtypes}", call, _equal(call), ours=True, context=_with_isa(isa))
    y = bits.float()
    t = torch.arange(SHAPE[0]) * 60
    others: dict[str, Callable[..., torch.Tensor]] = {
        "sample_step, threshold": functools.partial(step, logits, y, threshold=True, dtype=torch.bool),
        "posterior": functools.partial(ops.posterior, y, logits, coefficients),
        "initial_noise": functools.partial(ops.initial_noise, seeds, SHAPE[1:], samples_per_image=SHAPE[0]),
        "q_sample": functools.partial(ops.q_sample, y, t, rows, schedule),
    }
    for name, function in others.items():
        yield Contender(name, function, _equal(function), ours=True)
    yield Contender("sample_step, reference", functools.partial(step, logits, y, "reference"), lambda: None)
    yield _published_step(schedule, taus, logits, y)
    p = torch.rand(SHAPE, generator=generator)
    yield Contender(UNIT, lambda: torch.rand_like(p) < p, lambda: None)


def _published_step(schedule: bf.NoiseSchedule, taus: list[int], logits: torch.Tensor, y: torch.Tensor) -> Contender:
    """Binomial and table look-ups, as the published code has them."""
    epsilon, t = torch.sigmoid(logits), torch.full((SHAPE[0],), _STEP)
    alphas_cumprod = schedule.alphas_cumprod[torch.tensor(taus)].numpy()
    mean = functools.partial(baselines.published_mean, alphas_cumprod, y, (y - epsilon).abs(), t)

    def gate() -> None:
        ours = ops.posterior(y, logits, schedule.step_table(taus).float()[_STEP])
        off = float((mean() - ours).abs().mean())
        assert off < 1e-4, f"the mean of the posterior is off by {off:.2g}"

    return Contender("plain PyTorch, Binomial (published)", lambda: baselines.binomial(mean(), None, 0, None), gate)


# ---------------------------------------------------------------------- loss


def _losses() -> Made:
    schedule = bf.NoiseSchedule()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(SHAPE, generator=generator) * 3
    y_0 = (torch.rand(SHAPE, generator=generator) < 0.5).float()
    t = torch.arange(SHAPE[0]) * 60 + 60
    y_t = ops.q_sample(y_0, t, bf.image_seeds(0, SHAPE[0]), schedule)
    rows, op = schedule.loss_rows(t), torch.ops.berdiff_fast.diffusion_loss

    def call(z: torch.Tensor, backend: str = "cpp") -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return op(z, y_t, y_0, rows, None, "epsilon", backend)

    exact = call(logits.double(), "reference")

    def gate(z: torch.Tensor, rtol: float) -> None:
        wanted = exact if z.dtype is torch.float32 else call(z.double(), "reference")
        for got, expected, allowed in zip(call(z), wanted, (1e-6, rtol), strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=allowed, atol=0)

    for isa in _isas():
        for dtype, rtol in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
            z = logits.to(dtype)
            name = f"diffusion_loss, {isa}, {str(dtype).removeprefix('torch.')}"
            run, check = functools.partial(call, z), functools.partial(gate, z, rtol)
            yield Contender(name, run, check, ours=True, context=_with_isa(isa))
    yield Contender("reference", functools.partial(call, logits, "reference"), lambda: None)


# ---------------------------------------------------------------------- metrics


def masks(kind: str, raters: int = 4, samples: int = 16, size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Raters (1, R, H, W) and samples (1, n, H, W) as bool: discs that cover about a hundredth of the image, as nodules
    do, or noise, of which no tile is empty."""
    generator = torch.Generator().manual_seed(0)
    every = raters + samples
    if kind == "noise":
        found = torch.rand(every, size, size, generator=generator) < 0.5
    else:
        centre = 60 + 8 * torch.rand(every, 2, 1, 1, generator=generator)
        radius = 5 + 5 * torch.rand(every, 1, 1, generator=generator)
        y, x = torch.arange(size)[:, None], torch.arange(size)
        found = (y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2 < radius**2
    return found[None, :raters], found[None, raters:]


def _overlaps(kind: str) -> Made:
    call = functools.partial(ops.overlap, *masks(kind))
    for isa in _isas():
        yield Contender(f"overlap, {isa}", call, _equal(call), ours=True, context=_with_isa(isa))
    yield Contender("reference", functools.partial(call, backend="reference"), lambda: None)


def _scores(kind: str) -> Made:
    raters, samples = masks(kind)
    raters_8, samples_8 = (x.expand(8, -1, -1, -1).contiguous() for x in (raters, samples))
    both = ("ged", "hm_iou")

    def published() -> dict[str, float]:
        arrays = raters[0].numpy(), samples[0].numpy()
        return {"ged": baselines.ged(*arrays), "hm_iou": baselines.hm_iou(*arrays)}

    def gate(values: Callable[[], dict[str, torch.Tensor]]) -> None:
        theirs, ours = published(), values()
        for name in both:
            off = float((ours[name] - theirs[name]).abs().max())
            assert off < 1e-12, f"{name} is off by {off:.2g}"

    calls = {
        "GED and HM-IoU": functools.partial(metrics.evaluate, raters, samples, both),
        "GED and HM-IoU of eight images": functools.partial(metrics.evaluate, raters_8, samples_8, both),
        "every metric": functools.partial(metrics.evaluate, raters, samples),
    }
    for name, call in calls.items():
        yield Contender(name, call, functools.partial(gate, call), ours=True)
    yield Contender("GED and HM-IoU, pair by pair in NumPy (published)", published, lambda: None)


# ---------------------------------------------------------------------- calls


def _calls() -> Made:
    """What a call costs before a kernel has anything to do."""
    schedule = bf.NoiseSchedule()
    taus = schedule.subsequence(10)
    coefficients = schedule.step_table(taus).float()[_STEP]
    y, z = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    flag, seeds, t = torch.zeros(1, dtype=torch.int32), bf.image_seeds(0, 1), torch.tensor([500])
    found: dict[str, Callable[..., torch.Tensor]] = {
        "sample_step": functools.partial(ops.sample_step, y, z, seeds, coefficients, 500, nan_flag=flag),
        "posterior": functools.partial(ops.posterior, y, z, coefficients),
        "initial_noise": functools.partial(ops.initial_noise, seeds, (1, 2, 2)),
        "q_sample": functools.partial(ops.q_sample, y, t, seeds, schedule),
        "overlap": functools.partial(ops.overlap, y[:, 0, None].bool(), y[:, 0, None].bool()),
    }
    x, one, zero = torch.randn(1, 16, 2, 2).to(memory_format=torch.channels_last), torch.ones(16), torch.zeros(16)
    close: dict[str, Callable[..., torch.Tensor]] = {
        "diffusion_loss": functools.partial(ops.diffusion_loss, z, y, y, t, schedule),
        "group_norm_silu": functools.partial(ops.group_norm_silu, x, one, zero, 4),
        "winograd": functools.partial(ops.winograd, x, ops.winograd_weight(torch.randn(16, 16, 3, 3)), zero),
    }
    for name, call in found.items():
        yield Contender(name, call, _equal(call), ours=True)
    for name, call in close.items():
        yield Contender(name, call, _close(call), ours=True)
    yield Contender("torch.add", functools.partial(torch.add, y, z), lambda: None)
