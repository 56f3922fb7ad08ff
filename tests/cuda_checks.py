# SPDX-License-Identifier: Apache-2.0
"""What the CUDA kernels have to get right, on a CPU, in every way to run a grid: storage offsets, sizes, types, tails.

Not collected by itself: ``test_cuda_emulated.py`` runs it, as it is and under sanitizers, and ``test_cuda_faults.py``
on sources with a fault, which it has to find.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from emulated_cuda import WAYS, run_grids
from test_equal_bits import same
from test_loss import assert_close

from berdiff_fast import NoiseSchedule, image_seeds, ops
from berdiff_fast.backends import select

SCHEDULE = NoiseSchedule("cosine2")
TAUS = SCHEDULE.subsequence(10)
TABLE = SCHEDULE.step_table(TAUS, "ddpm").float()
#: Of the pixels of a mask, for kernels that take 16 at a time: none whole, some whole, a tail of each kind, more than a
#: block of threads has in all.
SIZES = (1, 5, 15, 16, 17, 32, 33, 48, 63, 1000, 1408, 4103)
OFFSETS = range(9)

every_way = pytest.mark.parametrize("way", WAYS)


def at_offset(x: torch.Tensor | None, offset: int) -> torch.Tensor | None:
    """The same values in a contiguous view that begins so many elements into its storage."""
    if x is None or offset == 0:
        return x
    view = torch.empty(x.numel() + offset, dtype=x.dtype)[offset:].view(x.shape)
    view.copy_(x)
    assert view.is_contiguous() and view.storage_offset() == offset
    return view


def random_mask(generator: torch.Generator, *shape: int, density: float = 0.5) -> torch.Tensor:
    return torch.rand(shape, generator=generator) < density


@functools.cache
def step_cases() -> list[tuple]:
    """Every type of mask with every type of logits at every offset, with the results of the reference."""
    cases = []
    sizes = itertools.cycle(SIZES)
    products = itertools.product(ops.MASK_DTYPES, ops.LOGIT_DTYPES, OFFSETS)
    for i, (mask_type, logit_type, offset) in enumerate(products):
        generator = torch.Generator().manual_seed(i)
        shape = (6, next(sizes))
        y = random_mask(generator, *shape).to(mask_type)
        z = (torch.randn(shape, generator=generator) * 4).to(logit_type)
        row = i % 10
        options = dict(
            samples_per_image=3, first_sample=2, prediction=ops.PREDICTIONS[i % 2], threshold=i % 5 == 4,
            dtype=ops.MASK_DTYPES[i % 7 % 5],
        )  # fmt: skip
        seeds = image_seeds(i, 2)
        mask = ops.sample_step(y, z, seeds, TABLE[row], TAUS[row], backend="reference", **options)
        mean = ops.posterior(y, z, TABLE[row], prediction=options["prediction"], backend="reference")
        cases.append((y, z, offset, seeds, row, options, mask, mean))
    return cases


@every_way
def test_steps_of_every_type_at_every_offset(way):
    for y, z, offset, seeds, row, options, mask, mean in step_cases():
        y, z = at_offset(y, offset), at_offset(z, offset)
        with run_grids(way):
            got = ops.sample_step(y, z, seeds, TABLE[row], TAUS[row], backend="cuda", **options)
            got_mean = ops.posterior(y, z, TABLE[row], prediction=options["prediction"], backend="cuda")
        what = (y.dtype, z.dtype, offset, tuple(y.shape), options)
        assert same(mask, got), what
        assert same(mean, got_mean), what


@functools.cache
def noise_cases() -> list[tuple]:
    cases = []
    for i, (dtype, size) in enumerate(itertools.product(ops.MASK_DTYPES, SIZES)):
        options = dict(samples_per_image=3, rows=5, first_row=1 + i % 2, first_sample=i % 3, dtype=dtype)
        seeds = image_seeds(i, 3)
        cases.append((seeds, size, options, ops.initial_noise(seeds, (size,), backend="reference", **options)))
    return cases


@every_way
def test_initial_noise(way):
    for seeds, size, options, expected in noise_cases():
        with run_grids(way):
            assert same(expected, ops.initial_noise(seeds, (size,), backend="cuda", **options)), (size, options)


@functools.cache
def forward_cases() -> list[tuple]:
    cases = []
    sizes = itertools.cycle(SIZES)
    for i, (dtype, offset) in enumerate(itertools.product(ops.MASK_DTYPES, OFFSETS)):
        y_0 = random_mask(torch.Generator().manual_seed(i), 5, next(sizes), density=0.3).to(dtype)
        t, seeds = torch.tensor([0, 1, 60, 500, 999]), image_seeds(i, 5)
        cases.append((y_0, offset, t, seeds, ops.q_sample(y_0, t, seeds, SCHEDULE, backend="reference")))
    return cases


@every_way
def test_q_sample_at_every_offset(way):
    for y_0, offset, t, seeds, expected in forward_cases():
        with run_grids(way):
            got = ops.q_sample(at_offset(y_0, offset), t, seeds, SCHEDULE, backend="cuda")
        assert same(expected, got), (y_0.dtype, offset, tuple(y_0.shape))


@every_way
@pytest.mark.parametrize("dtype", ops.LOGIT_DTYPES, ids=str)
def test_the_nan_flag(way, dtype):
    """A NaN is found wherever it is, and nothing else is taken for one."""
    size = 4103
    y, seeds = torch.zeros(3, size), image_seeds(0, 3)
    for place in (None, 0, 15, 16, size - 8, size - 1, size, 3 * size - 1):
        for threshold in (False, True):
            z = torch.full((3, size), float("inf")).to(dtype)
            if place is not None:
                z.view(-1)[place] = float("nan")
            flag = torch.zeros(2, dtype=torch.int32)
            with run_grids(way):
                ops.sample_step(
                    y, z, seeds, TABLE[4], 400, nan_flag=flag[1:], threshold=threshold, backend="cuda"
                )  # fmt: skip
            assert flag.tolist() == [0, int(place is not None)], (place, threshold)


@functools.cache
def overlap_cases() -> list[tuple]:
    cases = []
    sizes = itertools.cycle((1, 15, 16, 17, 63, 4095, 4096, 4097, 5000, 8200))
    products = itertools.product(((1, 0), (3, 4), (31, 1), (33, 16), (5, 70)), OFFSETS)
    for i, ((rows, columns), offset) in enumerate(products):
        generator, size = torch.Generator().manual_seed(i), next(sizes)
        a = random_mask(generator, 2, rows, size, density=0.4).to(ops.MASK_DTYPES[i % 5])
        b = random_mask(generator, 2, columns, size, density=0.2).to(ops.MASK_DTYPES[i % 3])
        cases.append((a, b, offset, ops.overlap(a, b, backend="reference")))
    return cases


@every_way
def test_overlap_at_every_offset(way):
    for a, b, offset, expected in overlap_cases():
        with run_grids(way):
            got = ops.overlap(at_offset(a, offset), at_offset(b, offset), backend="cuda")
        assert torch.equal(expected, got), (a.shape, b.shape, a.dtype, b.dtype, offset)


@functools.cache
def loss_cases() -> list[tuple]:
    """With results of the reference in float64."""
    cases = []
    sizes = itertools.cycle((1, 3, 4, 5, 63, 1023, 1025, 4095, 4096, 4097, 9001))
    t = torch.tensor([0, 1, 10, 500, 999])
    for i, (logit_type, offset) in enumerate(itertools.product(ops.LOGIT_DTYPES, OFFSETS)):
        generator, size = torch.Generator().manual_seed(i), next(sizes)
        y_t, y_0, ignore = (
            random_mask(generator, 5, size, density=density).to(ops.MASK_DTYPES[(i + k) % 5])
            for k, density in enumerate((0.5, 0.3, 0.2))
        )
        z = (torch.randn(5, size, generator=generator) * 6).to(logit_type)
        arguments = (z, y_t, y_0, SCHEDULE.loss_rows(t), ignore if i % 2 else None)
        prediction = ops.PREDICTIONS[i // 2 % 2]
        op = torch.ops.berdiff_fast.diffusion_loss
        cases.append((arguments, prediction, offset, op(z.double(), *arguments[1:], prediction, "reference")))
    return cases


def emulated_losses(way: str, **settings: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    results = []
    for arguments, prediction, offset, _ in loss_cases():
        moved = [at_offset(x, offset) for x in arguments]
        with run_grids(way, **settings):
            results.append(torch.ops.berdiff_fast.diffusion_loss(*moved, prediction, "cuda"))
    return results


@pytest.mark.parametrize("error", [-1, 0, 1])
def test_the_loss_at_every_offset(error):
    """Also where every approximate reciprocal is off by a unit in its last place."""
    for got, (arguments, prediction, offset, expected) in zip(
        emulated_losses("forward", reciprocal_error=error), loss_cases(), strict=True
    ):
        value, gradient = expected
        if got[1].dtype is torch.bfloat16:
            torch.testing.assert_close(got[1].double(), gradient, rtol=2.0**-8, atol=1e-37)
            got, value = (got[0],) * 2, (value,) * 2
            assert_close(got, value, what=f"{arguments[0].shape} {prediction} {offset}")
        else:
            assert_close(got, (value, gradient), what=f"{arguments[0].shape} {prediction} {offset}")


@pytest.mark.parametrize("way", [w for w in WAYS if w != "forward"])
def test_the_loss_is_the_same_in_every_order(way):
    """Sums are added up in an order that the shape alone fixes."""
    for (value, gradient), (other_value, other_gradient), case in zip(
        emulated_losses("forward"), emulated_losses(way), loss_cases(), strict=True
    ):
        assert torch.equal(value, other_value) and torch.equal(gradient, other_gradient), case[0][0].shape


@every_way
def test_empty_tensors(way):
    seeds = image_seeds(0, 3)
    for dtype, logit_type in itertools.product(ops.MASK_DTYPES, ops.LOGIT_DTYPES):
        for shape in ((0, 7), (3, 0)):
            y, z, flag = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=logit_type), torch.zeros(1).int()
            images = seeds[: shape[0]]
            t = torch.zeros(shape[0], dtype=torch.int64)
            with run_grids(way):
                options = dict(nan_flag=flag, samples_per_image=1, backend="cuda")
                assert ops.sample_step(y, z, images, TABLE[0], 0, **options).shape == shape
                assert ops.posterior(y, z, TABLE[0], backend="cuda").shape == shape
                assert ops.initial_noise(images, shape[1:], samples_per_image=1, backend="cuda").shape == shape
                assert ops.q_sample(y, t, images, SCHEDULE, backend="cuda").shape == shape
                rows = SCHEDULE.loss_rows(t)
                value, gradient = torch.ops.berdiff_fast.diffusion_loss(z, y, y, rows, None, "epsilon", "cuda")
                assert value.tolist() == [0.0] * shape[0] and gradient.shape == shape
                overlap = ops.overlap(y[:, None], y[:, None], backend="cuda")
                assert torch.equal(overlap, torch.zeros(shape[0], 2, 2, dtype=torch.int64))
            assert flag == 0
    # The kernels themselves, which the ops do not ask when there is nothing to do: no launch, and no error.
    module, nothing = select.get("cuda", "cpu").module, torch.zeros(1).double()
    at = nothing.data_ptr()
    with run_grids(way):
        for rows, pixels in ((0, 7), (3, 0)):
            module.initial_noise(at, 0, at, 1, rows, pixels, 1, 0, 0, 0)
            module.q_sample(at, 0, at, 0, at, at, at, 1, rows, pixels, 1, 0, 0, 0)
            module.sample_step(at, 0, at, 0, at, 3, at, at, 0, False, False, at, 1, rows, pixels, 1, 0, 0, 0)
            module.overlap(at, at, 0, 1, at, 0, 1, rows, pixels, 0)
            module.diffusion_loss(at, at, 3, at, at, 3, at, 0, at, 0, 0, 0, at, 0, False, rows, pixels, 0)
        module.posterior(at, at, 0, at, 3, at, False, 0, 0)
    assert nothing.tolist() == [0.0]


def test_chunks_beyond_two_to_the_31():
    locate = select.get("cuda", "cpu").module.locate_chunk
    per_row = (2**31 + 5 + 15) // 16
    last = 16 * (per_row - 1)
    assert locate(4 * per_row - 1, 2**31 + 5) == (3, last, 3 * (2**31 + 5) + last, 5)
    assert locate(2**33, 16) == (2**33, 0, 2**37, 16)
    assert [locate(i, 17) for i in range(3)] == [(0, 0, 0, 16), (0, 16, 16, 1), (1, 0, 17, 16)]
