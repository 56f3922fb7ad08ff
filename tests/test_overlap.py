# SPDX-License-Identifier: Apache-2.0
"""Op ``overlap``: equal integers, whatever counts them, and equal to what NumPy's own logic finds. (What it
refuses is in test_errors.py, how torch sees it in test_torch_citizens.py.)"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from variants import COMPILED, VARIANTS, Variant

from berdiff_fast import ops

every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)


def random_masks(*shape: int, seed: int = 0, density: float = 0.5) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def overlap_on(variant: Variant, a: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    with variant.use():
        on_device = None if b is None else b.to(variant.device)
        return ops.overlap(a.to(variant.device), on_device, backend=variant.backend).cpu()


def counted(a: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    """Pair by pair, in NumPy."""
    parts = [a] if b is None else [a, b]
    masks = np.concatenate([(part.float() != 0).flatten(2).numpy() for part in parts], axis=1)
    counts = [[[np.logical_and(x, y).sum() for x in image] for y in image] for image in masks]
    return torch.tensor(np.array(counts, dtype=np.int64).reshape(len(masks), masks.shape[1], masks.shape[1]))


def test_the_reference():
    a, b = random_masks(2, 3, 5, 7), random_masks(2, 4, 5, 7, seed=1)
    got = ops.overlap(a, b, backend="reference")
    assert got.dtype is torch.int64
    assert torch.equal(got, counted(a, b))
    assert torch.equal(got.diagonal(0, 1, 2)[:, :3], a.flatten(2).sum(2))
    assert torch.equal(got[:, 3:, 3:], ops.overlap(b, backend="reference"))
    assert torch.equal(got, got.mT)


@every_variant
@pytest.mark.parametrize(
    "shape",
    [(1,), (7,), (63,), (64,), (65,), (4095,), (4096,), (4097,), (128, 128), (1, 9, 11, 13), (3, 50, 47)],
    ids=str,
)
def test_odd_sizes(variant, shape):
    a, b = random_masks(2, 3, *shape), random_masks(2, 4, *shape, seed=1, density=0.1)
    assert torch.equal(overlap_on(variant, a, b), counted(a, b))
    assert torch.equal(overlap_on(variant, a), counted(a))


@every_variant
@pytest.mark.parametrize("dtype", ops.MASK_DTYPES, ids=str)
def test_every_dtype(variant, dtype):
    a, b = random_masks(1, 2, 31, 33), random_masks(1, 3, 31, 33, seed=1)
    expected = counted(a, b)
    assert torch.equal(overlap_on(variant, a.to(dtype), b), expected)
    assert torch.equal(overlap_on(variant, a, b.to(dtype)), expected)
    if dtype.is_floating_point:
        odd = torch.where(
            a, torch.tensor([5.0, -1.0, float("inf"), 6e-8]).repeat(31 * 33)[: 31 * 33].view(31, 33), -0.0
        )
        assert torch.equal(overlap_on(variant, odd.to(dtype), b), counted(odd.to(dtype), b))
    elif dtype is torch.uint8:
        assert torch.equal(overlap_on(variant, a.byte() * 128, b.byte() * 3), expected)


@every_variant
@pytest.mark.parametrize("masks", [(1, 1), (31, 1), (32, 0), (16, 17), (33, 40)], ids=str)
def test_numbers_of_masks(variant, masks):
    """Kernels work on groups of 32."""
    a, b = (random_masks(1, count, 70, seed=seed) for seed, count in enumerate(masks))
    assert torch.equal(overlap_on(variant, a, b), counted(a, b))


@every_variant
def test_empty_and_full_masks(variant):
    a = torch.zeros(1, 3, 100, 100, dtype=torch.bool)
    a[:, 1] = True
    a[:, 2, 99, 99] = True  # in a tile that is empty but for its last pixel
    got = overlap_on(variant, a)
    assert got.tolist() == [[[0, 0, 0], [0, 10_000, 1], [0, 1, 1]]]


@every_variant
def test_inputs_that_are_not_contiguous(variant):
    a, b = random_masks(2, 3, 12, 10), random_masks(2, 5, 12, 10, seed=1)
    expected = counted(a, b)
    strided = a.transpose(0, 1).contiguous().transpose(0, 1), b.repeat_interleave(2, 3)[..., ::2]
    assert torch.equal(overlap_on(variant, *strided), expected)
    one = random_masks(2, 1, 12, 10).expand(-1, 3, -1, -1)
    assert torch.equal(overlap_on(variant, one, b), counted(one, b))


@every_variant
def test_nothing_to_count(variant):
    assert overlap_on(variant, torch.zeros(0, 3, 8, 8), torch.zeros(0, 2, 8, 8)).shape == (0, 5, 5)
    assert overlap_on(variant, torch.zeros(2, 0, 8)).shape == (2, 0, 0)
    assert torch.equal(overlap_on(variant, torch.zeros(2, 3, 0, 8)), torch.zeros(2, 3, 3, dtype=torch.int64))


@pytest.mark.parametrize("variant", COMPILED, ids=lambda v: v.name)
def test_thread_counts_change_nothing(variant):
    a, b = random_masks(3, 3, 300, 301), random_masks(3, 4, 300, 301, seed=1)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(overlap_on(variant, a, b))
    assert torch.equal(results[0], ops.overlap(a, b, backend="reference"))
    assert all(torch.equal(results[0], r) for r in results[1:])
