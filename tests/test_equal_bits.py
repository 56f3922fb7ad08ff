# SPDX-License-Identifier: Apache-2.0
"""The promise: equal logits give equal bits, whatever computes them. All comparisons are exact."""

from __future__ import annotations

import functools

import pytest
import torch
from variants import COMPILED, VARIANTS, Variant

from berdiff_fast import NoiseSchedule, image_seeds, ops

METHODS = ("ddim", "ddpm", "d3pm")
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
every_compiled = pytest.mark.parametrize("variant", COMPILED, ids=lambda v: v.name)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    b = b.cpu()
    if a.dtype is not b.dtype or a.shape != b.shape:
        return False
    if a.is_floating_point():
        bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
        return bool(((a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())).all())
    return torch.equal(a, b)


def step_on(variant: Variant, y, z, seeds, coefficients, timestep, **options):
    """sample_step on a variant's device; returns the mask and the NaN flag."""
    device = variant.device
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    out = ops.sample_step(
        y.to(device),
        z.to(device),
        seeds.to(device),
        coefficients.to(device),
        timestep,
        nan_flag=flag,
        backend=variant.backend,
        **options,
    )
    return out, int(flag)


REFERENCE = Variant("reference", "reference")


def bfloat16_logits() -> torch.Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).reshape(1, 65536)


def random_bits(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


# ---------------------------------------------------------------------- every logit, every step


def compare_all_steps(variants: list[Variant], schedule: str, steps: int) -> None:
    z, y, seeds = bfloat16_logits(), random_bits((1, 65536), 1), image_seeds(11, 1)
    noise = NoiseSchedule(schedule)
    taus = noise.subsequence(steps)
    for method in METHODS:
        table = noise.step_table(taus, method).float()
        for row, timestep in enumerate(taus):
            # Both predictions, both kinds of last step and both kinds of output, in turn: each meets every logit.
            options = dict(
                prediction=ops.PREDICTIONS[row % 2],
                threshold=row == 0,
                dtype=(torch.bool, torch.bfloat16, torch.float32)[row % 3],
            )
            expected, flag = step_on(REFERENCE, y, z, seeds, table[row], timestep, **options)
            assert flag == 1  # some bfloat16 are NaN
            for variant in variants:
                with variant.use():
                    got, got_flag = step_on(variant, y, z, seeds, table[row], timestep, **options)
                assert same(expected, got), (variant.name, schedule, steps, method, timestep)
                assert got_flag == flag


@pytest.mark.parametrize("schedule", ["linear", "cosine", "cosine2"])
@pytest.mark.parametrize("steps", [10, 50, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_bfloat16_logit_at_every_step(schedule, steps):
    compare_all_steps(COMPILED, schedule, steps)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "cosine2"])
def test_every_bfloat16_logit_at_every_step_interpreted(schedule):
    interpreted = [v for v in VARIANTS if v.is_interpreted]
    if not interpreted:
        pytest.skip("Triton is compiled on this machine, or not installed")
    compare_all_steps(interpreted, schedule, 10)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "cosine2"])
@pytest.mark.parametrize("steps", [10, 50, pytest.param(1000, marks=pytest.mark.slow)])
def test_posterior_of_every_bfloat16_logit(schedule, steps):
    z, y = bfloat16_logits(), random_bits((1, 65536), 2)
    noise = NoiseSchedule(schedule)
    for method in METHODS:
        table = noise.step_table(noise.subsequence(steps), method).float()
        for row in range(steps):
            prediction = ops.PREDICTIONS[row % 2]
            expected = ops.posterior(y, z, table[row], prediction=prediction, backend="reference")
            finite = expected[~z.isnan()]
            assert bool(((finite >= 0) & (finite <= 1)).all())
            assert bool(expected[z.isnan()].isnan().all())
            for variant in VARIANTS:
                if variant.is_interpreted and steps > 10:
                    continue
                with variant.use():
                    got = ops.posterior(
                        y.to(variant.device),
                        z.to(variant.device),
                        table[row].to(variant.device),
                        prediction=prediction,
                        backend=variant.backend,
                    )
                assert same(expected, got), (variant.name, method, row)


def ten_million(count: int) -> torch.Tensor:
    """Half Gaussian, half random bit patterns (with infinities, subnormals and NaNs among them)."""
    generator = torch.Generator().manual_seed(3)
    half = count // 2
    gaussian = torch.randn(half, generator=generator) * 6
    patterns = torch.randint(-(2**31), 2**31, (count - half,), generator=generator).to(torch.int32)
    return torch.cat([gaussian, patterns.view(torch.float32)]).reshape(4, -1)


@functools.cache
def expected_of_many(count: int, row: int) -> torch.Tensor:
    z = ten_million(count)
    noise = NoiseSchedule("cosine2")
    taus = noise.subsequence(10)
    coefficients = noise.step_table(taus, METHODS[row % 3]).float()[row]
    return step_on(REFERENCE, random_bits(tuple(z.shape), 4), z, image_seeds(5, 1), coefficients, taus[row])[0]


@every_variant
@pytest.mark.slow
def test_many_float32_logits(variant):
    slow = variant.is_interpreted or variant.is_emulated
    z = ten_million(1_000_000 if slow else 10_000_000)
    y, seeds = random_bits(tuple(z.shape), 4), image_seeds(5, 1)
    noise = NoiseSchedule("cosine2")
    taus = noise.subsequence(10)
    for row, timestep in enumerate(taus):
        method = METHODS[row % 3]
        coefficients = noise.step_table(taus, method).float()[row]
        expected = expected_of_many(z.numel(), row)
        with variant.use():
            got, flag = step_on(variant, y, z, seeds, coefficients, timestep)
        assert same(expected, got), (variant.name, method, timestep)
        assert flag == 1
    with variant.use():
        assert same(_posterior(REFERENCE, y, z, coefficients), _posterior(variant, y, z, coefficients))


SPECIAL = [
    0.0, -0.0, 1e-45, -1e-45, 1e-40, -1e-40, 1.17549435e-38, 63.99999, 64.0, 64.00001, -63.99999, -64.0, -64.00001,
    87.0, -87.0, 88.0, -88.0, 88.7, -88.8, 89.0, -89.0, 104.0, -104.0, 1e30, -1e30, 3.4e38, -3.4e38, float("inf"),
    float("-inf"), 0.34657, -0.34657, 0.34658, 0.6931472, -0.6931472,
]  # fmt: skip


@every_variant
@pytest.mark.parametrize("dtype", ops.LOGIT_DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [False, True])
@pytest.mark.parametrize("prediction", ops.PREDICTIONS)
def test_special_logits(variant, dtype, threshold, prediction):
    z = torch.tensor(SPECIAL).repeat(8).reshape(1, -1).to(dtype)
    y, seeds = random_bits(tuple(z.shape), 6), image_seeds(6, 1)
    noise = NoiseSchedule("cosine2")
    coefficients = noise.step_table(noise.subsequence(10), "ddpm").float()[4]
    options = dict(threshold=threshold, prediction=prediction)
    expected, flag = step_on(REFERENCE, y, z, seeds, coefficients, 400, **options)
    assert flag == 0
    with variant.use():
        got, got_flag = step_on(variant, y, z, seeds, coefficients, 400, **options)
    assert same(expected, got)
    assert got_flag == 0


@every_compiled
def test_every_float16_logit(variant):
    z = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).reshape(1, -1)
    y, seeds = random_bits((1, 65536), 7), image_seeds(7, 1)
    coefficients = torch.tensor([0.1, 0.02, 0.5, 0.7])
    with variant.use():
        assert same(
            step_on(REFERENCE, y, z, seeds, coefficients, 3)[0], step_on(variant, y, z, seeds, coefficients, 3)[0]
        )


# ---------------------------------------------------------------------- noise, the forward process


@every_variant
@pytest.mark.parametrize("dtype", ops.MASK_DTYPES, ids=str)
def test_initial_noise(variant, dtype):
    seeds = image_seeds(8, 3)
    options = dict(samples_per_image=5, first_sample=7, dtype=dtype)
    expected = ops.initial_noise(seeds, (2, 33, 31), backend="reference", **options)
    with variant.use():
        got = ops.initial_noise(seeds.to(variant.device), (2, 33, 31), backend=variant.backend, **options)
    assert same(expected, got)
    assert 0.4 < expected.float().mean() < 0.6


@every_variant
@pytest.mark.parametrize("as_released", [False, True])
def test_q_sample(variant, as_released):
    schedule = NoiseSchedule("cosine2", as_released=as_released)
    t = torch.cat([torch.arange(0, 1000, 97), torch.tensor([999])])
    y_0 = random_bits((len(t), 1, 40, 41), 9)
    seeds = image_seeds(9, len(t))
    for dtype in (torch.bool, torch.float32, torch.bfloat16):
        expected = ops.q_sample(y_0.to(dtype), t, seeds, schedule, backend="reference")
        with variant.use():
            got = ops.q_sample(
                y_0.to(dtype).to(variant.device),
                t.to(variant.device),
                seeds.to(variant.device),
                schedule,
                backend=variant.backend,
            )
        assert same(expected, got)
    if as_released:
        assert not bool((expected.bool() & ~y_0).any())  # their background is never noised


# ---------------------------------------------------------------------- shapes and layouts


@every_variant
@pytest.mark.parametrize("pixels", [0, 1, 2, 3, 4, 5, 31, 32, 33, 63, 64, 65, 127, 129, 4095, 4096, 4097, 10007])
def test_odd_sizes(variant, pixels):
    rows = 3
    y, seeds = random_bits((rows, pixels), pixels), image_seeds(pixels, rows)
    z = torch.randn(rows, pixels, generator=torch.Generator().manual_seed(pixels))
    coefficients = torch.tensor([0.2, 0.1, 0.6, 0.9])
    for dtype in (torch.bool, torch.float32, torch.float16):
        expected, _ = step_on(REFERENCE, y.to(dtype), z, seeds, coefficients, 77)
        with variant.use():
            got, _ = step_on(variant, y.to(dtype), z, seeds, coefficients, 77)
        assert same(expected, got)
    assert same(ops.posterior(y, z, coefficients, backend="reference"), _posterior(variant, y, z, coefficients))


def _posterior(variant, y, z, coefficients):
    with variant.use():
        return ops.posterior(
            y.to(variant.device), z.to(variant.device), coefficients.to(variant.device), backend=variant.backend
        )


@every_variant
def test_no_rows(variant):
    y = torch.zeros(0, 1, 8, 8)
    got, flag = step_on(variant, y, y, image_seeds(0, 0), torch.ones(4), 0, samples_per_image=1)
    assert got.shape == y.shape
    assert flag == 0


@every_variant
def test_inputs_that_are_not_contiguous(variant):
    y = random_bits((16, 2, 12, 10), 10)
    z = torch.randn(16, 2, 12, 10, generator=torch.Generator().manual_seed(10))
    seeds, coefficients = image_seeds(10, 2), torch.tensor([0.2, 0.1, 0.6, 0.9])
    expected, _ = step_on(REFERENCE, y, z, seeds, coefficients, 5)
    strided = [
        (y.to(memory_format=torch.channels_last), z.to(memory_format=torch.channels_last)),
        (y.transpose(2, 3).contiguous().transpose(2, 3), z.repeat_interleave(2, dim=3)[..., ::2]),
        (y, z[:, :, :, :1].expand(-1, -1, -1, 10)),
    ]
    for y_, z_ in strided[:2]:
        with variant.use():
            assert same(expected, step_on(variant, y_, z_, seeds, coefficients, 5)[0])
    y_, z_ = strided[2]
    with variant.use():
        assert same(
            step_on(REFERENCE, y_, z_.contiguous(), seeds, coefficients, 5)[0],
            step_on(variant, y_, z_, seeds, coefficients, 5)[0],
        )


@every_variant
def test_mask_values_of_every_dtype_mean_the_same(variant):
    y = random_bits((4, 100), 12)
    z = torch.randn(4, 100, generator=torch.Generator().manual_seed(12))
    seeds, coefficients = image_seeds(12, 4), torch.tensor([0.2, 0.1, 0.6, 0.9])
    expected, _ = step_on(REFERENCE, y, z, seeds, coefficients, 9)
    for dtype in ops.MASK_DTYPES:
        with variant.use():
            got, _ = step_on(variant, y.to(dtype), z, seeds, coefficients, 9)
        assert got.dtype is dtype
        assert same(expected, got.bool())
    negative_zero = torch.where(y, 1.0, -0.0)
    with variant.use():
        assert same(expected, step_on(variant, negative_zero, z, seeds, coefficients, 9, dtype=torch.bool)[0])


# ---------------------------------------------------------------------- index arithmetic beyond 2^31


@every_variant
def test_rows_beyond_two_to_the_31(variant):
    seeds = image_seeds(13, 3)
    n = 2**31 + 5
    first_row = 2 * n - 2  # the last masks of image 1 and the first of image 2
    options = dict(samples_per_image=n, rows=4, first_row=first_row, first_sample=9)
    expected = ops.initial_noise(seeds, (65,), backend="reference", **options)
    with variant.use():
        got = ops.initial_noise(seeds.to(variant.device), (65,), backend=variant.backend, **options)
    assert same(expected, got)
    alone = ops.initial_noise(seeds[1:2], (65,), first_sample=9 + n - 2, samples_per_image=2)
    assert torch.equal(expected[:2], alone)
    alone = ops.initial_noise(seeds[2:], (65,), first_sample=9, samples_per_image=2)
    assert torch.equal(expected[2:], alone)


@every_compiled
def test_thread_counts_change_nothing(variant):
    y, seeds = random_bits((16, 1, 128, 128), 14), image_seeds(14, 2)
    z = torch.randn(y.shape, generator=torch.Generator().manual_seed(14))
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        with variant.use():
            results.append(step_on(variant, y, z, seeds, torch.tensor([0.2, 0.1, 0.6, 0.9]), 9)[0].cpu())
    assert all(torch.equal(results[0], r) for r in results[1:])
