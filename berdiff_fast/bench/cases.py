# SPDX-License-Identifier: Apache-2.0
"""The registry: what is measured, and against what."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import berdiff_fast as bf
from berdiff_fast import ops
from berdiff_fast.backends import select
from berdiff_fast.bench import baselines, calls, single_ops, training
from berdiff_fast.bench.runner import Case, Contender, Made, assert_close, same_masks


def registry(device: str, *, quick: bool, compile: bool = True, published: str | None = None) -> list[Case]:
    """All cases for a device.

    Args:
        device: "cpu" or "cuda".
        quick: leave out what takes minutes on a laptop.
        compile: with torch.compile among the contenders, which may take minutes to begin.
        published: a checkout of the published code, to be timed too.

    Raises:
        FileNotFoundError: ``published`` is not a checkout of the published code.
    """
    if published is not None:
        baselines.checkout_codes(published)
    cases = [
        _step(device),
        _group_norm(device, compile),
        _loss(device, compile),
        _metrics(device),
        training.case(device),
        calls.case(device, "bundled model", compile=compile),
    ]
    if device == "cpu":
        cases += single_ops.cases()
    if not quick:
        cases.append(calls.case(device, "published U-Net", compile=compile, published=published))
    return cases


def _generator(device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def _backends(device: str) -> list[str]:
    return [b for b in ("cuda", "triton", "cpp", "reference") if select.can_run(b, device)]


# ---------------------------------------------------------------------- kernels


def _step(device: str) -> Case:
    masks, size = (4096, 256) if device == "cuda" else (16, 128)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pixels = masks * size * size

    def contenders() -> Made:
        schedule = bf.NoiseSchedule()
        taus = schedule.subsequence(10)
        step, first = 5, 16
        z = (torch.randn(masks, 1, size, size, device=device, generator=_generator(device)) * 3).to(dtype)
        y = (torch.rand(z.shape, device=device, generator=_generator(device)) < 0.5).to(dtype)
        seeds = bf.image_seeds(0, 1).to(device)
        coefficients = schedule.step_table(taus).float()[step].to(device)
        flag = torch.zeros(1, dtype=torch.int32, device=device)

        def ours(backend: str, rows: int = masks) -> torch.Tensor:
            return ops.sample_step(
                y[:rows],
                z[:rows],
                seeds,
                coefficients,
                taus[step],
                samples_per_image=masks,
                nan_flag=flag,
                backend=backend,
            )

        expected = ours("reference", first)

        def equal_bits(backend: str) -> None:
            assert torch.equal(ours(backend, first), expected), "the bits differ from the reference's"

        A = [1.0, *schedule.alphas_cumprod[taus].tolist()]
        sigma = (1 - A[step]) / (1 - A[step + 1])

        def plain(draw: baselines.Draw, rows: int = masks) -> torch.Tensor:
            before, probability = y[:rows].float(), torch.sigmoid(z[:rows].float())
            mean = sigma * before + (1 - sigma) * (before - probability).abs()
            return draw(mean, before, 0, taus[step]).to(dtype)

        def rand_less(mean: torch.Tensor, *_: Any) -> torch.Tensor:
            return (torch.rand_like(mean) < mean).to(dtype)

        def near() -> dict[str, Any]:
            return same_masks(plain(baselines.as_contracted(0), first).bool(), expected.bool())

        for backend in _backends(device):
            if backend == "reference" and device == "cuda":
                continue  # 64 M pixels of int64 words
            yield Contender(
                f"ours, {backend}",
                functools.partial(ours, backend),
                functools.partial(equal_bits, backend),
                ours=backend != "reference",
            )
        yield Contender("plain PyTorch, rand_like(p) < p", functools.partial(plain, rand_less), near)
        if device == "cpu":
            yield Contender("plain PyTorch, Binomial (published)", functools.partial(plain, baselines.binomial), near)
        p = torch.rand_like(z)
        yield Contender("rand_like(p) < p alone (no step)", lambda: torch.rand_like(p) < p, lambda: None)

    moved = pixels * 3 * torch.finfo(dtype).bits // 8
    name = f"sampling step, {masks} masks of {size} x {size}"
    return Case(name, "kernel", contenders, "plain PyTorch, rand_like(p) < p", "pixels", pixels, bytes=moved)


def _group_norm(device: str, compile: bool) -> Case:
    shape = (64, 256, 64, 64) if device == "cuda" else (4, 128, 64, 64)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    skip = (shape[0], 128, *shape[2:])

    def contenders() -> Made:
        x = torch.randn(shape, device=device, generator=_generator(device)).to(dtype)
        other = torch.randn(skip, device=device, generator=_generator(device)).to(dtype)
        channels = shape[1] + skip[1]
        weight, bias = (torch.randn(channels, device=device, generator=_generator(device)) for _ in range(2))

        def plain(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            return F.silu(F.group_norm(torch.cat([x, other], 1), 32, weight.to(dtype), bias.to(dtype)))

        exact = F.silu(
            F.group_norm(
                torch.cat([x[:1], other[:1]], 1).double().cpu(), 32, weight.double().cpu(), bias.double().cpu()
            )
        )
        tolerance = 5e-6 if dtype is torch.float32 else 2e-2

        def check(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> None:
            assert_close(function(*(i[:1] for i in inputs)).cpu(), exact, tolerance)

        last = [t.to(memory_format=torch.channels_last) for t in (x, other)]

        def ours(backend: str, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            return ops.group_norm_silu(x, weight, bias, 32, other=other, backend=backend)

        for backend in _backends(device):
            if backend in ("cuda", "reference"):  # Triton's kernels, and plain PyTorch
                continue
            call = functools.partial(ours, backend)
            yield Contender(
                f"ours, {backend}", functools.partial(call, *last), functools.partial(check, call, *last), ours=True
            )
        yield Contender("plain PyTorch", functools.partial(plain, x, other), functools.partial(check, plain, x, other))
        yield Contender(
            "plain PyTorch, channels last", functools.partial(plain, *last), functools.partial(check, plain, *last)
        )
        if compile:
            compiled = baselines.compiled(plain, device)
            yield Contender(
                "torch.compile, channels last",
                functools.partial(compiled, *last),
                functools.partial(check, compiled, *last),
            )

    elements = (shape[1] + skip[1]) * shape[0] * shape[2] * shape[3]
    name = f"concatenation, GroupNorm and SiLU, {tuple(shape)} and {tuple(skip)}"
    moved = 3 * elements * torch.finfo(dtype).bits // 8
    return Case(name, "kernel", contenders, "plain PyTorch", "elements", elements, bytes=moved)


# ---------------------------------------------------------------------- loss and metrics


def _loss(device: str, compile: bool) -> Case:
    masks, size = (1024, 256) if device == "cuda" else (16, 128)

    def contenders() -> Made:
        schedule = bf.NoiseSchedule()
        generator = _generator("cpu")
        z = (torch.randn(masks, 1, size, size, generator=generator) * 3).to(device).requires_grad_()
        y_0 = (torch.rand(z.shape, generator=generator) < 0.1).float().to(device)
        # From t = 60 on, where the 1e-7 in the plain chain's logarithms shows little.
        t = torch.linspace(60, 999, masks).long().to(device)
        y_t = ops.q_sample(y_0, t, bf.image_seeds(0, masks).to(device), schedule)

        def both(function: Callable[..., torch.Tensor], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
            value = function(z, y_t, y_0, t, schedule, **options)
            return value, torch.autograd.grad(value.sum(), z)[0]

        few = slice(0, 16)
        exact_z = z[few].detach().double().cpu().requires_grad_()
        value = ops.diffusion_loss(exact_z, y_t[few].cpu(), y_0[few].cpu(), t[few].cpu(), schedule)
        exact = (value, torch.autograd.grad(value.sum(), exact_z)[0])

        def check(function: Callable[..., torch.Tensor], rtol: float, **options: Any) -> None:
            for got, wanted in zip(both(function, **options), exact, strict=True):
                assert_close(got[few].detach().cpu(), wanted.detach(), rtol)

        for backend in _backends(device):
            if backend == "reference" and device == "cuda":
                continue
            yield Contender(
                f"ours, {backend}",
                functools.partial(both, ops.diffusion_loss, backend=backend),
                functools.partial(check, ops.diffusion_loss, 1e-6, backend=backend),
                ours=backend != "reference",
            )
        plain = baselines.plain_loss
        yield Contender("plain PyTorch", functools.partial(both, plain), functools.partial(check, plain, 1e-2))
        if compile:
            compiled = baselines.compiled(plain, device)
            yield Contender(
                "torch.compile", functools.partial(both, compiled), functools.partial(check, compiled, 1e-2)
            )

    pixels = masks * size * size
    name = f"loss, value and gradient, {masks} masks of {size} x {size}"
    return Case(name, "loss", contenders, "plain PyTorch", "pixels", pixels, bytes=pixels * 16)


def _metrics(device: str) -> Case:
    def contenders() -> Made:
        generator = _generator("cpu")
        raters, samples = (torch.rand(1, k, 1, 128, 128, generator=generator) < 0.3 for k in (4, 16))
        on_device = raters.to(device), samples.to(device)

        def ours() -> dict[str, torch.Tensor]:
            return bf.metrics.evaluate(*on_device, ("ged", "hm_iou"))

        def published() -> dict[str, float]:
            a, b = raters[0, :, 0].numpy(), samples[0, :, 0].numpy()
            return {"ged": baselines.ged(a, b), "hm_iou": baselines.hm_iou(a, b)}

        def check() -> None:
            theirs = published()
            for key, value in ours().items():
                assert abs(float(value[0]) - theirs[key]) < 1e-9, f"{key}: {float(value[0])} and {theirs[key]}"

        yield Contender("ours", ours, check, ours=True)
        yield Contender("pair by pair in NumPy (published)", published, check)

    name = "GED and HM-IoU, 4 raters and 16 samples of 128 x 128"
    return Case(name, "metrics", contenders, "pair by pair in NumPy (published)", "images", 1)
