# SPDX-License-Identifier: Apache-2.0
"""Seeds with a second column: each image's own first sample, as device data."""

from __future__ import annotations

import pytest
import torch
from variants import VARIANTS

from berdiff_fast import NoiseSchedule, image_seeds, ops

SCHEDULE = NoiseSchedule("cosine2")
TAUS = SCHEDULE.subsequence(10)
SHAPE = (1, 9, 11)


@pytest.fixture(params=VARIANTS, ids=lambda v: v.name)
def variant(request):
    with request.param.use():
        yield request.param


def chain(seeds, z, variant, **rows):
    """Noise, two sampling steps and training noise of rows."""
    options = dict(backend=variant.backend, **rows)
    table, flag = SCHEDULE.step_table(TAUS).float().to(z.device), torch.zeros(1, dtype=torch.int32, device=z.device)
    y = ops.initial_noise(seeds, SHAPE, rows=len(z), **options)
    found = [y]
    for row in (9, 5):
        y = ops.sample_step(y, z, seeds, table[row], TAUS[row], nan_flag=flag, **options)
        found.append(y)
    t = torch.full((len(z),), 500, device=z.device)
    return [*found, ops.q_sample(y, t, seeds, SCHEDULE, **options)]


def test_samples_of_each_image_start_where_its_seeds_say(variant):
    n, device = 6, variant.device
    z = torch.randn(2 * n, *SHAPE, generator=torch.Generator().manual_seed(0)).to(device)
    seeds = image_seeds(3, 2).to(device)
    plain = chain(seeds, z, variant, samples_per_image=n, first_sample=2)
    started = torch.stack([seeds, torch.full_like(seeds, 2)], dim=1)
    for a, b in zip(plain, chain(started, z, variant, samples_per_image=n), strict=True):
        assert torch.equal(a, b)
    both = torch.stack([seeds, torch.ones_like(seeds)], dim=1)
    for a, b in zip(plain, chain(both, z, variant, samples_per_image=n, first_sample=1), strict=True):
        assert torch.equal(a, b)


def test_rows_may_be_any_selection_of_samples(variant):
    n, device = 6, variant.device
    z = torch.randn(2 * n, *SHAPE, generator=torch.Generator().manual_seed(0)).to(device)
    seeds = image_seeds(3, 2).to(device)
    plain = chain(seeds, z, variant, samples_per_image=n)
    chosen = torch.tensor([0, 3, 4, 7, 11], device=device)
    own = torch.stack([seeds[chosen // n], chosen % n], dim=1)
    for a, b in zip(plain, chain(own, z[chosen], variant, samples_per_image=1), strict=True):
        assert torch.equal(a[chosen], b)
    swapped = own[:, [0, 1]].clone()
    swapped[0, 1] = 1
    assert not torch.equal(chain(swapped, z[chosen], variant, samples_per_image=1)[0][0], plain[0][0])
