# SPDX-License-Identifier: Apache-2.0
"""The metrics: by hand, against loops written out from their definitions, and against the published code.

What they refuse is in test_errors.py.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from support import golden

from berdiff_fast import metrics

# ---------------------------------------------------------------------- the definitions, written out


def iou(a: np.ndarray, b: np.ndarray) -> float:
    union = np.logical_or(a, b).sum()
    return np.logical_and(a, b).sum() / union if union else 1.0


def mean_distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean([[1 - iou(x, y) for y in b] for x in a]))


def ged(raters: np.ndarray, samples: np.ndarray) -> float:
    within = mean_distance(raters, raters) + mean_distance(samples, samples)
    return 2 * mean_distance(raters, samples) - within


def best_matching(raters: np.ndarray, samples: np.ndarray) -> float:
    """Every matching of the sets repeated to equal size, one by one."""
    size = math.lcm(len(raters), len(samples))
    left, right = np.repeat(raters, size // len(raters), 0), np.repeat(samples, size // len(samples), 0)
    pairs = np.array([[iou(x, y) for y in right] for x in left])
    return max(pairs[range(size), order].mean() for order in itertools.permutations(range(size)))


def dice(a: np.ndarray, b: np.ndarray, smooth: float = 0.0) -> float:
    total = a.sum() + b.sum() + smooth
    return (2 * np.logical_and(a, b).sum() + smooth) / total if total else 1.0


def calibration(raters: np.ndarray, samples: np.ndarray, bins: int) -> float:
    p, q = samples.mean(0).ravel(), raters.mean(0).ravel()
    edges = np.ceil(np.round(p * bins, 9)).clip(min=1)
    return sum(abs((p - q)[edges == k].sum()) for k in range(1, bins + 1)) / p.size


def sets(raters: int, samples: int, images: int = 3, size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(raters * 100 + samples)
    chance = torch.rand(images, 1, size, size, generator=generator) ** 2
    draw = lambda n: torch.rand(images, n, size, size, generator=generator) < chance  # noqa: E731
    return draw(raters), draw(samples)


@pytest.mark.parametrize(("raters", "samples"), [(4, 16), (4, 1), (1, 5), (3, 7), (5, 3)])
def test_every_metric_by_its_definition(raters, samples):
    y, s = sets(raters, samples)
    got = metrics.evaluate(y, s)
    assert tuple(got) == metrics.METRICS
    for i, (a, b) in enumerate(zip(y.numpy(), s.numpy(), strict=True)):
        expected = {
            "ged": ged(a, b),
            "sample_diversity": mean_distance(b, b),
            "soft_dice": np.mean([dice(a.mean(0) > t, b.mean(0) > t, 1e-6) for t in (0.1, 0.3, 0.5, 0.7, 0.9)]),
            "dice_majority": dice(a.mean(0) > 0.5, b.mean(0) > 0.5),
            "iou_majority": iou(a.mean(0) > 0.5, b.mean(0) > 0.5),
            "ece": calibration(a, b, 10),
        }
        for name, value in expected.items():
            assert got[name].dtype is torch.float64 and got[name].shape == (3,)
            assert got[name][i].item() == pytest.approx(value, abs=1e-12), name
    torch.testing.assert_close(metrics.iou_distance(y, s)[0, 0, 0].item(), 1 - iou(y[0, 0].numpy(), s[0, 0].numpy()))


@pytest.mark.parametrize(("raters", "samples"), [(2, 4), (4, 2), (2, 3), (3, 2), (1, 1), (3, 6), (1, 5)])
def test_hm_iou_is_the_best_of_all_matchings(raters, samples):
    y, s = sets(raters, samples, size=6)
    got = metrics.hm_iou(y, s)
    for i, (a, b) in enumerate(zip(y.numpy(), s.numpy(), strict=True)):
        assert got[i].item() == pytest.approx(best_matching(a, b), abs=1e-12)
    torch.testing.assert_close(metrics.hm_iou(s, y), got)
    torch.testing.assert_close(metrics.hm_iou(y.flip(1), s), got)


def test_by_hand():
    """Two raters, two samples, four pixels."""
    y = torch.tensor([[[1, 1, 0, 0], [1, 0, 0, 0]]])
    s = torch.tensor([[[1, 0, 0, 0], [0, 1, 1, 0]]])
    got = {name: value.item() for name, value in metrics.evaluate(y, s).items()}
    # IoU of raters (rows) and samples: 1/2 1/3, 1 0; of the raters: 1/2; of the samples: 0.
    assert got["ged"] == pytest.approx(2 * (1 / 2 + 2 / 3 + 0 + 1) / 4 - (1 / 2) / 2 - 1 / 2)
    assert got["hm_iou"] == pytest.approx((1 / 3 + 1) / 2)
    assert got["sample_diversity"] == pytest.approx(1 / 2)
    # Votes: raters 2 1 0 0, samples 1 1 1 0. A tie is no majority: raters 1 0 0 0, samples none.
    assert got["dice_majority"] == got["iou_majority"] == 0
    # Above 0.1 and 0.3: 1 1 0 0 and 1 1 1 0; above 0.5, 0.7 and 0.9: 1 0 0 0 and none.
    assert got["soft_dice"] == pytest.approx((2 * 4 / 5) / 5, abs=1e-5)
    # p = 1/2 where the raters' mean is 1, 1/2 and 0; p = 0 where it is 0.
    assert got["ece"] == 0
    bins = metrics.calibration_bins(y, s, bins=2)
    assert bins.tolist() == [[[4.0, 1.5, 1.5], [0.0, 0.0, 0.0]]]
    assert metrics.expected_calibration_error(y[:, :1], s, bins=2).item() == pytest.approx((2 - 1.5) / 4)


def test_values_of_the_published_code():
    values = golden("metrics_lidc")
    raters, samples = values["masks_raters"], values["masks_samples"]
    for function in (metrics.generalized_energy_distance, metrics.hm_iou, metrics.soft_dice):
        name = "ged" if function is metrics.generalized_energy_distance else function.__name__
        torch.testing.assert_close(function(raters, samples), values[name], rtol=0, atol=1e-6)
    for dtype in (torch.bool, torch.bfloat16, torch.int64):
        both = metrics.evaluate(raters.to(dtype), samples, ("ged", "hm_iou", "soft_dice"))
        for name, value in both.items():
            torch.testing.assert_close(value, values[name], rtol=0, atol=1e-6)


def test_empty_masks_agree():
    empty = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    assert metrics.iou_distance(empty, empty).abs().max() == 0
    assert metrics.generalized_energy_distance(empty, ~empty).item() == 2
    agreed = metrics.evaluate(empty, empty)
    assert {name: value.item() for name, value in agreed.items()} == dict(
        ged=0, hm_iou=1, sample_diversity=0, soft_dice=1, dice_majority=1, iou_majority=1, ece=0
    )
    opposite = metrics.evaluate(empty, ~empty)
    assert opposite["hm_iou"].item() == opposite["dice_majority"].item() == opposite["iou_majority"].item() == 0
    assert opposite["ece"].item() == 1


def test_perfect_samples():
    y, _ = sets(4, 1)
    got = metrics.evaluate(y, y.repeat(1, 4, 1, 1))
    torch.testing.assert_close(got["ged"], torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-15)
    for name in ("hm_iou", "soft_dice", "dice_majority", "iou_majority"):
        torch.testing.assert_close(got[name], torch.ones(3, dtype=torch.float64))
    assert got["ece"].max() < 1e-15


def test_several_counts_from_one_overlap(monkeypatch):
    y, s = sets(4, 16)
    calls = []
    overlap = metrics.functional.ops.overlap
    monkeypatch.setattr(metrics.functional.ops, "overlap", lambda *a: calls.append(1) or overlap(*a))
    results = metrics.evaluate_counts(y, s, (1, 4, 16))
    assert len(calls) == 1
    for n, values in results.items():
        for name, expected in metrics.evaluate(y, s[:, :n]).items():
            torch.testing.assert_close(values[name], expected)


def test_arrays_volumes_and_batches():
    y, s = sets(2, 3, images=4, size=8)
    volumes = y.view(4, 2, 1, 4, 4, 4), s.view(4, 3, 1, 4, 4, 4)
    for name, value in metrics.evaluate(y.numpy(), s.numpy().astype(np.int32)).items():
        torch.testing.assert_close(metrics.evaluate(*volumes)[name], value)
        torch.testing.assert_close(metrics.evaluate(y[1:2], s[1:2])[name], value[1:2])
    assert all(value.shape == (0,) for value in metrics.evaluate(y[:0], s[:0]).values())


def test_pooled_calibration_is_that_of_all_pixels():
    y, s = sets(3, 5)
    pooled = metrics.calibration_error(metrics.calibration_bins(y, s).sum(0))
    as_one = metrics.expected_calibration_error(y.transpose(0, 1)[None].flatten(2), s.transpose(0, 1)[None].flatten(2))
    torch.testing.assert_close(pooled, as_one[0])
