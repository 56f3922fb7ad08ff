# SPDX-License-Identifier: Apache-2.0
"""Phantoms: reproducible, plausible, and with raters whose distribution is what it is said to be."""

from __future__ import annotations

import dataclasses
import hashlib
import math

import pytest
import torch
from torch import Tensor

from berdiff_fast import rng
from berdiff_fast.data.phantom import Phantom, expected_ged, generate


@pytest.fixture(scope="module")
def batch() -> Phantom:
    return generate(64, seed=11)


def fields(phantom: Phantom) -> list[tuple[str, Tensor]]:
    return [(field.name, getattr(phantom, field.name)) for field in dataclasses.fields(phantom)]


def equal(left: Phantom, right: Phantom) -> bool:
    return all(torch.equal(x, y) for (_, x), (_, y) in zip(fields(left), fields(right), strict=True))


def part(phantom: Phantom, indices: slice) -> Phantom:
    return Phantom(**{name: value[indices] for name, value in fields(phantom)})


@pytest.mark.parametrize(("count", "size", "raters"), [(1, 32, 1), (3, 64, 4), (2, 97, 5)])
def test_shapes_and_types(count: int, size: int, raters: int) -> None:
    phantom = generate(count, size, raters=raters)
    plane = (1, size, size)
    assert phantom.images.shape == (count, *plane)
    assert phantom.images.dtype == torch.float32
    assert phantom.modes.shape == (count, 4, *plane)
    assert phantom.modes.dtype == torch.bool
    assert phantom.probabilities.shape == (count, 4)
    assert phantom.probabilities.dtype == torch.float64
    assert phantom.raters.shape == (count, raters, *plane)
    assert phantom.raters.dtype == torch.bool
    assert phantom.rater_modes.shape == (count, raters)
    assert phantom.rater_modes.dtype == torch.int64


def test_intensities(batch: Phantom) -> None:
    assert batch.images.abs().max() <= 1
    # Nothing saturates: clipped tissue would have lost its texture.
    assert (batch.images.abs() == 1).double().mean() < 1e-3
    core = batch.modes[:, 0]
    lung = ~batch.modes[:, 3]
    assert (batch.images[core].mean() - batch.images[lung].median()) > 0.9


def test_an_image_depends_on_seed_and_index_alone() -> None:
    many = generate(9, seed=5)
    assert equal(generate(9, seed=5), many)
    assert equal(generate(1, seed=5), part(many, slice(0, 1)))
    assert equal(generate(4, seed=5, first=3), part(many, slice(3, 7)))
    assert equal(generate(1, seed=5 - 2**64, first=8), part(many, slice(8, 9)))
    assert equal(generate(2, seed=5, first=10**12), part(generate(3, seed=5, first=10**12 - 1), slice(1, 3)))


def test_the_sequence_is_that_of_image_seeds() -> None:
    # Entering the sequence late must not differ from walking there.
    seeds = rng.image_seeds(5, 9)
    assert torch.equal(rng.image_seeds(5 + 6 * 0x9E3779B97F4A7C15, 3), seeds[6:])


def test_a_rater_does_not_depend_on_the_others() -> None:
    few, many = generate(3, raters=2, seed=8), generate(3, raters=7, seed=8)
    assert torch.equal(few.raters, many.raters[:, :2])
    assert torch.equal(few.images, many.images)


def test_threads_and_machine_do_not_change_a_bit() -> None:
    # Every operation is correctly rounded, so these bytes are the same wherever floats are IEEE 754.
    phantom = generate(2, 48, seed=2024)
    digest = hashlib.sha256()
    for value in (phantom.images, phantom.modes, phantom.raters):
        digest.update(value.contiguous().numpy().tobytes())
    assert digest.hexdigest() == "a7500cf26b3ece10f9863cbabc428c7e36636e22f5f942046298ff509ddf1aee"


def test_seeds_and_indices_give_different_images() -> None:
    images = torch.cat([generate(3, seed=seed).images for seed in (0, 1, -1)]).flatten(1)
    assert torch.cdist(images, images).add(torch.eye(9) * 100).min() > 1


def test_sizes_show_the_same_anatomy() -> None:
    small, large = generate(3, 64, seed=3), generate(3, 128, seed=3)
    assert torch.equal(small.rater_modes, large.rater_modes)
    assert torch.equal(small.probabilities, large.probabilities)
    share = [phantom.modes.double().mean((2, 3, 4)) for phantom in (small, large)]
    torch.testing.assert_close(share[0], share[1], rtol=0.03, atol=0)


@pytest.mark.parametrize("size", [32, 64])
def test_modes(size: int) -> None:
    modes = generate(120, size, raters=1, seed=21).modes.squeeze(2)
    core, with_rim, with_lobe, whole = modes.unbind(1)
    assert torch.equal(with_rim | with_lobe, whole)
    assert not (core & ~(with_rim & with_lobe)).any()
    edge = torch.ones(size, size, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    assert not (whole & edge).any()

    pixel = (64 / size) ** 2  # areas in pixels of a 64 x 64 slice
    parts = (core, with_rim & ~core, with_lobe & ~core, whole & ~with_rim)
    core_area, rim_area, lobe_area, lobe_beyond_rim = (part.double().sum((1, 2)) * pixel for part in parts)
    assert 90 < core_area.min() < core_area.max() < 290
    assert rim_area.min() > 80
    assert lobe_area.min() > 40
    assert lobe_beyond_rim.min() > 15
    assert (whole.double().mean((1, 2)) < 0.25).all()


def test_modes_are_connected() -> None:
    # Flood each mode from one of its pixels, four neighbours at a time, until nothing is added.
    modes = generate(30, 32, seed=6, raters=1).modes.flatten(0, 2)
    first = modes.flatten(1).int().argmax(1)
    reached = torch.zeros_like(modes).flatten(1).scatter(1, first.unsqueeze(1), True).view_as(modes)
    for _ in range(100):
        grown = reached.clone()
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown[:, :, 1:] |= reached[:, :, :-1]
        grown[:, :, :-1] |= reached[:, :, 1:]
        grown &= modes
        if torch.equal(grown, reached):
            break
        reached = grown
    assert torch.equal(reached, modes)


def test_raters_draw_their_modes(batch: Phantom) -> None:
    for image in range(8):
        for rater in range(4):
            mode = int(batch.rater_modes[image, rater])
            assert torch.equal(batch.raters[image, rater], batch.modes[image, mode])


def test_probabilities_are_exact_products(batch: Phantom) -> None:
    p = batch.probabilities
    assert torch.equal(p.sum(1), torch.ones(64, dtype=torch.float64))
    rim, lobe = p[:, 1] + p[:, 3], p[:, 2] + p[:, 3]
    for value in (rim, lobe):
        assert value.min() >= 0.1 - 2**-24
        assert value.max() <= 0.9 + 2**-24
        assert value.std() > 0.15
        # Multiples of 2^-24, as the uniforms they are compared with.
        assert torch.equal(value * 2**24, (value * 2**24).round())
    assert torch.equal(p[:, 3], rim * lobe)


def test_rater_frequencies_match_the_probabilities() -> None:
    images, raters = 12, 2000
    phantom = generate(images, 32, raters=raters, seed=77)
    counts = torch.nn.functional.one_hot(phantom.rater_modes, 4).sum(1).double()
    expected = phantom.probabilities * raters
    statistic = ((counts - expected) ** 2 / expected).sum()
    # Chi-square with 3 degrees of freedom for each image; the seed is fixed, alpha = 1e-6.
    tail = torch.special.gammaincc(torch.tensor(images * 3 / 2).double(), statistic / 2)
    assert tail > 1e-6


@pytest.mark.parametrize(("mode", "column"), [(1, 0), (2, 1)])
def test_likelihood_is_visible_as_brightness(mode: int, column: int) -> None:
    phantom = generate(100, seed=4, raters=1)
    p = phantom.probabilities
    likelihood = (p[:, 1] + p[:, 3], p[:, 2] + p[:, 3])[column]
    # Pixels of this part alone: neither core nor the other part.
    alone = phantom.modes[:, mode] & ~phantom.modes[:, 3 - mode]
    pairs = zip(phantom.images, alone, strict=True)
    brightness = torch.stack([image[mask].median() for image, mask in pairs])
    ranks = torch.stack([value.argsort().argsort().double() for value in (likelihood, brightness)])
    assert torch.corrcoef(ranks)[0, 1] > 0.95
    # Sorted into ten groups, every group is brighter than the one before.
    groups = brightness[likelihood.argsort()].view(10, -1).mean(1)
    assert (groups.diff() > 0).all()


def direct_ged(raters: Tensor, samples: Tensor) -> float:
    """GED of (R, P) and (n, P) bool masks, pair by pair from its definition."""

    def mean(left: Tensor, right: Tensor) -> float:
        total = 0.0
        for x in left:
            for y in right:
                union = int((x | y).sum())
                total += 1 - int((x & y).sum()) / union if union else 0.0
        return total / (len(left) * len(right))

    return 2 * mean(raters, samples) - mean(raters, raters) - mean(samples, samples)


def test_expected_ged_is_the_mean_over_draws() -> None:
    raters, n, draws = 2, 3, 300
    phantom = generate(1, 32, raters=draws * (raters + n), seed=31)
    masks = phantom.raters.flatten(2).view(draws, raters + n, -1)
    values = torch.tensor([direct_ged(m[:raters], m[raters:]) for m in masks], dtype=torch.float64)
    error = values.std() / math.sqrt(draws)
    assert abs(values.mean() - expected_ged(phantom, n, raters=raters)[0]) < 4 * error
    assert error < 0.1 * values.mean()


def test_expected_ged_by_hand() -> None:
    # Two masks of two and one pixels that share one: d = 1/2, D = 2 * 0.25 * 0.75 * 0.5 = 0.1875.
    masks = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool).view(1, 2, 1, 2, 2)
    p = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    phantom = Phantom(torch.zeros(1, 1, 2, 2), masks, p, masks[:, [0, 0, 1]], torch.tensor([[0, 0, 1]]))
    assert expected_ged(phantom, 4).item() == pytest.approx(0.1875 * (1 / 3 + 1 / 4), rel=1e-15)
    assert expected_ged(phantom, 4).dtype == torch.float64
    # Two empty masks are the same mask; an empty one and another share nothing.
    empty = dataclasses.replace(phantom, modes=torch.zeros_like(masks))
    assert expected_ged(empty, 1).item() == 0
    half = dataclasses.replace(phantom, modes=masks & torch.tensor([True, False]).view(1, 2, 1, 1, 1))
    assert expected_ged(half, 1, raters=1).item() == pytest.approx(2 * 2 * 0.25 * 0.75, rel=1e-15)


def test_expected_ged_falls_with_more_draws(batch: Phantom) -> None:
    few, many = expected_ged(batch, 4), expected_ged(batch, 16)
    assert torch.allclose(few * (1 / 4 + 1 / 16) / (1 / 4 + 1 / 4), many, rtol=1e-14)
    assert (many > 0.01).all()
    assert (many < 0.3).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"count": 0}, ValueError, "count must be at least 1, got 0"),
        ({"count": 2.0}, TypeError, "count must be an int, got float"),
        ({"count": True}, TypeError, "count must be an int, got bool"),
        ({"size": 31}, ValueError, "size must be at least 32, got 31"),
        ({"size": (64, 64)}, TypeError, "size must be an int, got tuple"),
        ({"raters": 0}, ValueError, "raters must be at least 1, got 0"),
        ({"raters": None}, TypeError, "raters must be an int, got NoneType"),
        ({"seed": "1"}, TypeError, "seed must be an int, got str"),
        ({"seed": True}, TypeError, "seed must be an int, got bool"),
        ({"first": -1}, ValueError, "first must be at least 0, got -1"),
        ({"first": 1.5}, TypeError, "first must be an int, got float"),
    ],
)
def test_generate_refuses(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        generate(**{"count": 1, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n": 0}, ValueError, "n must be at least 1, got 0"),
        ({"n": 1.0}, TypeError, "n must be an int, got float"),
        ({"raters": 0}, ValueError, "raters must be at least 1, got 0"),
        ({"raters": "4"}, TypeError, "raters must be an int, got str"),
    ],
)
def test_expected_ged_refuses(batch: Phantom, arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        expected_ged(batch, **{"n": 1, **arguments})
