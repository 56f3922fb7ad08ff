# SPDX-License-Identifier: Apache-2.0
"""GED taken apart: against loops over its definition, exactly; what is unbiased or a floor, on average over draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import data_path

from berdiff_fast import metrics
from berdiff_fast.data.hdf5 import RaterDataset


def distance(a: np.ndarray, b: np.ndarray) -> float:
    union = np.logical_or(a, b).sum()
    return 1 - np.logical_and(a, b).sum() / union if union else 0.0


def pairs(a, b, keep=lambda i, j: True) -> list[float]:
    return [distance(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if keep(i, j)]


def by_loops(raters: np.ndarray, samples: np.ndarray) -> dict[str, float]:
    R, n = len(raters), len(samples)
    different = lambda i, j: i != j  # noqa: E731
    ged = 2 * np.mean(pairs(raters, samples)) - np.mean(pairs(raters, raters)) - np.mean(pairs(samples, samples))
    d_y = np.mean(pairs(raters, raters, different)) if R > 1 else math.nan
    d_s = np.mean(pairs(samples, samples, different)) if n > 1 else math.nan
    of_raters, of_samples = [float(not m.any()) for m in raters], [float(not m.any()) for m in samples]
    r, e = np.mean(of_raters), np.mean(of_samples)
    # 2 (P_r - P_e)^2 = 2 E|.| over pairs of "empty" as numbers, i = j left out: the energy distance of two coins.
    coin = lambda a, b, keep=lambda i, j: True: np.mean(  # noqa: E731
        [abs(x - y) for i, x in enumerate(a) for j, y in enumerate(b) if keep(i, j)] or [math.nan]
    )
    existence = 2 * coin(of_raters, of_samples) - coin(of_raters, of_raters) - coin(of_samples, of_samples)
    unbiased = (
        2 * coin(of_raters, of_samples)
        - coin(of_raters, of_raters, different)
        - coin(of_samples, of_samples, different)
    )
    # The rest: distances of masks that are both not empty.
    a, b = raters[raters.any((1, 2))], samples[samples.any((1, 2))]
    rest = 2 * sum(pairs(a, b)) / (R * n) - sum(pairs(a, a)) / R**2 - sum(pairs(b, b)) / n**2
    return {
        "ged_floor": d_y * (1 / R + 1 / n),
        "ged_unbiased": 2 * np.mean(pairs(raters, samples)) - d_y - d_s,
        "ged_existence": existence,
        "ged_shape": rest,
        "existence_unbiased": unbiased,
        "shape_unbiased": 2 * np.mean(pairs(raters, samples)) - d_y - d_s - unbiased,
        "empty_raters": r,
        "empty_samples": e,
        "ged": ged,
    }


def sets(raters: int, samples: int, images: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of which many are empty."""
    generator = torch.Generator().manual_seed(100 * raters + samples)
    draw = lambda n: (  # noqa: E731
        (torch.rand(images, n, 6, 6, generator=generator) < 0.3)
        & (torch.rand(images, n, 1, 1, generator=generator) < torch.linspace(0, 1, images).view(-1, 1, 1, 1))
    )
    return draw(raters), draw(samples)


@pytest.mark.parametrize(("raters", "samples"), [(4, 16), (2, 3), (3, 2), (5, 1), (1, 4), (1, 1)])
def test_by_its_definition(raters, samples):
    y, s = sets(raters, samples)
    got = metrics.decompose_ged(y, s)
    assert tuple(got) == metrics.DECOMPOSITION
    ged = metrics.generalized_energy_distance(y, s)
    for i, (a, b) in enumerate(zip(y.numpy(), s.numpy(), strict=True)):
        expected = by_loops(a, b)
        assert ged[i].item() == pytest.approx(expected.pop("ged"), abs=1e-12)
        for name, value in expected.items():
            assert got[name].dtype is torch.float64 and got[name].shape == (6,)
            assert got[name][i].item() == pytest.approx(value, abs=1e-12, nan_ok=True), name
    assert bool(got["ged_floor"].isnan().all()) == (raters == 1)
    assert bool(got["shape_unbiased"].isnan().all()) == (raters == 1 or samples == 1)
    torch.testing.assert_close(got["ged_existence"] + got["ged_shape"], ged, rtol=0, atol=1e-15)
    r, e = got["empty_raters"], got["empty_samples"]
    # In the kernel's form both parts are squares, which is why the shape's is no less than -(r - e)^2.
    assert (got["ged_shape"] + (r - e) ** 2).min() > -1e-12
    torch.testing.assert_close(metrics.ged_floor(y, samples), got["ged_floor"], equal_nan=True)
    torch.testing.assert_close(metrics.unbiased_energy_distance(y, s), got["ged_unbiased"], equal_nan=True)


def test_the_shape_can_be_less_than_nothing():
    """Raters who agree but for one that is empty, samples all empty: the split leaves the shape a negative rest."""
    y = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    y[0, 0, 0, 0] = y[0, 1, 1, 1] = True
    got = metrics.decompose_ged(y, torch.zeros(1, 2, 4, 4))
    assert got["ged_existence"].item() == 2 * (0.5 - 1) ** 2
    assert got["ged_shape"].item() == pytest.approx(-2 / 16)


def test_floor_and_unbiased_on_average_over_all_draws():
    """A distribution of four masks, R = 2 raters and n = 3 samples of it: the means over all 4^5 outcomes are exact."""
    modes = torch.zeros(4, 1, 4, dtype=torch.bool)
    modes[1, 0, :2] = modes[2, 0, 1:] = modes[3, 0, :] = True  # the first is empty
    outcomes = torch.cartesian_prod(*[torch.arange(4)] * 5)
    y, s = modes[outcomes[:, :2]], modes[outcomes[:, 2:]]
    got = metrics.decompose_ged(y, s)
    d = metrics.iou_distance(modes[None], modes[None])[0].mean()  # of two independent draws
    ged = metrics.generalized_energy_distance(y, s).mean()
    assert ged.item() == pytest.approx(d.item() * (1 / 2 + 1 / 3), abs=1e-12)
    assert got["ged_floor"].mean().item() == pytest.approx(ged.item(), abs=1e-12)
    for name in ("ged_unbiased", "existence_unbiased", "shape_unbiased"):
        assert got[name].mean().item() == pytest.approx(0, abs=1e-12), name
    p = 0.25  # of empty
    found = metrics.existence_calibration(got["empty_raters"], got["empty_samples"], 2, 3)
    assert found.rmse**2 == pytest.approx(p * (1 - p) * (1 / 2 + 1 / 3), abs=1e-12)
    assert found.floor**2 == pytest.approx(p * (1 - p) / 2, abs=1e-12)
    assert found.floor_of_draws == pytest.approx(found.rmse, abs=1e-12)
    assert found.constant**2 == pytest.approx(p * (1 - p) / 2, abs=1e-12)


def test_existence_by_loops():
    y, s = sets(4, 5)
    r = [np.mean([not m.any() for m in image]) for image in y.numpy()]
    e = [np.mean([not m.any() for m in image]) for image in s.numpy()]
    found = metrics.existence_calibration(torch.tensor(r), np.array(e), 4, 5)
    assert found.rmse == pytest.approx(math.sqrt(np.mean([(a - b) ** 2 for a, b in zip(r, e, strict=True)])), abs=1e-12)
    assert found.floor == pytest.approx(math.sqrt(np.mean([x * (1 - x) / 3 for x in r])), abs=1e-12)
    assert found.floor_of_draws == pytest.approx(found.floor * math.sqrt(1 + 4 / 5), abs=1e-12)
    assert found.constant == pytest.approx(np.std(r), abs=1e-12)
    sums = metrics.existence_sums(y[:2], s[:2]).sum(0) + metrics.existence_sums(y[2:], s[2:]).sum(0)
    assert metrics.calibration_of_sums(sums) == pytest.approx(found, abs=1e-12)
    assert math.isnan(metrics.existence_calibration(r, e, 1, 5).floor)

    table = metrics.existence_bins(y, s, bins=5).sum(0)
    for k in range(5):
        inside = [i for i, x in enumerate(e) if max(round(x * 5), 1) == k + 1]
        assert table[k].tolist() == pytest.approx(
            [len(inside), sum(e[i] for i in inside), sum(r[i] for i in inside)], abs=1e-12
        )
    assert torch.equal(metrics.existence_table(r, e, 5, bins=5), table)
    ones = metrics.existence_bins(y, s, bins=1).sum(0)
    assert ones.tolist() == [pytest.approx([6, sum(e), sum(r)])]


def test_the_floor_of_real_slices():
    """What the design says of the validation slices of LIDC-IDRI: four raters, sixteen samples."""
    data = RaterDataset(data_path("lidc/val.h5"), in_memory=True)
    parts = []
    for start in range(0, len(data), 200):
        raters = data.batch(range(start, min(start + 200, len(data))))[1]
        empty = (~raters.flatten(2).any(2)).double().mean(1)
        parts.append(torch.stack([metrics.ged_floor(raters, 16), empty]))
    floor, r = torch.cat(parts, dim=1)
    assert floor.mean().item() == pytest.approx(0.162, abs=5e-4)
    found = metrics.existence_calibration(r, r, 4, 16)
    assert found.rmse == 0 and found.floor == pytest.approx(0.218, abs=5e-4)
    assert found.floor_of_draws == pytest.approx(0.244, abs=5e-4)
    assert found.constant == pytest.approx(0.307, abs=5e-4)


def test_of_regions_apart():
    """A mask of K channels is empty where all are; each region has numbers of its own."""
    y = torch.zeros(1, 2, 2, 4, 4, dtype=torch.bool)
    y[0, :, 0, 1, 1] = True
    got = metrics.decompose_ged(y, torch.zeros(1, 3, 2, 4, 4))
    assert got["empty_raters"].item() == 0 and got["ged_existence"].item() == 2
    second = metrics.decompose_ged(y[:, :, 1:], torch.zeros(1, 3, 1, 4, 4))
    assert second["empty_raters"].item() == 1 and second["ged_existence"].item() == 0


def test_refused():
    y, s = sets(4, 5)
    with pytest.raises(ValueError, match=r"raters and samples must be .* got \(6, 4, 6, 6\) and \(6, 5, 6, 5\)"):
        metrics.decompose_ged(y, s[..., :5])
    with pytest.raises(ValueError, match=r"raters must be \(N, masks, \*shape\)"):
        metrics.ged_floor(y[0, 0], 4)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        metrics.ged_floor(y, 0)
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        metrics.existence_bins(y, s, 0)
    with pytest.raises(ValueError, match=r"empty_samples must be \(N,\) shares in \[0, 1\]"):
        metrics.existence_calibration([0.5], [1.5], 4, 5)
    with pytest.raises(ValueError, match="must be .* of the same N >= 1"):
        metrics.existence_calibration([0.5], [0.5, 0.5], 4, 5)
