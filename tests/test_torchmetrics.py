# SPDX-License-Identifier: Apache-2.0
"""The metrics over a data set: the same numbers, in one process or in two with unequal shares."""

from __future__ import annotations

import os
import socket

import pytest
import torch

pytest.importorskip("torchmetrics", reason="torchmetrics is not installed (pip install 'berdiff_fast[train]')")

from torchmetrics import MetricCollection
from torchmetrics.wrappers import MetricTracker

from berdiff_fast import metrics
from berdiff_fast.metrics import torchmetrics as accumulated

#: How many images each process sees, batch by batch.
SHARES = [(3, 1), (2,)]


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    chance = torch.rand(6, 1, 16, 16, generator=generator) ** 2
    raters, samples = (torch.rand(6, n, 16, 16, generator=generator) < chance for n in (4, 8))
    raters[1:4, 0], samples[2:5, :3] = False, False  # some that are empty
    return raters, samples


def collection() -> dict[str, accumulated.Metric]:
    return {
        "ged": accumulated.GeneralizedEnergyDistance(),
        "hm_iou": accumulated.HungarianMatchedIoU(),
        "soft_dice": accumulated.SoftDice(),
        "dice_majority": accumulated.DiceMajority(),
        "iou_majority": accumulated.IoUMajority(),
        "sample_diversity": accumulated.SampleDiversity(),
        "pooled ece": accumulated.ExpectedCalibrationError(),
        "all": accumulated.Evaluation(),
        "parts": accumulated.GEDDecomposition(),
        "ged_unbiased": accumulated.UnbiasedEnergyDistance(),
        "existence": accumulated.ExistenceError(),
    }


def expected() -> dict[str, torch.Tensor]:
    raters, samples = data()
    values = {name: value.mean() for name, value in metrics.evaluate(raters, samples).items()}
    values["pooled ece"] = metrics.calibration_error(metrics.calibration_bins(raters, samples).sum(0))
    parts = metrics.decompose_ged(raters, samples)
    values |= {name: value.mean() for name, value in parts.items()}
    values["existence"] = (parts["empty_raters"] - parts["empty_samples"]).square().mean().sqrt()
    return values


def check(found: dict[str, accumulated.Metric]) -> None:
    values = expected()
    for name, metric in found.items():
        result = metric.compute()
        if name in ("all", "parts"):
            assert tuple(result) == (metrics.METRICS if name == "all" else metrics.DECOMPOSITION)
            for key in result:
                torch.testing.assert_close(result[key], values[key], rtol=1e-14, atol=0)
        else:
            torch.testing.assert_close(result, values[name], rtol=1e-14, atol=0)


def test_in_one_process():
    raters, samples = data()
    found = collection()
    for metric in found.values():
        metric.update(raters[:5], samples[:5])
        metric.update(raters[5:], samples[5:])
    check(found)
    calibration = found["existence"].calibration()
    assert calibration.rmse == pytest.approx(found["existence"].compute().item())
    assert 0 < calibration.floor < calibration.floor_of_draws
    found["ged"].reset()
    found["ged"].update(raters[:1], samples[:1, :3])  # another number of samples
    torch.testing.assert_close(
        found["ged"].compute(), metrics.generalized_energy_distance(raters[:1], samples[:1, :3])[0]
    )


def _process(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=len(SHARES))
    raters, samples = data()
    at = sum(map(sum, SHARES[:rank]))
    found = collection()
    for size in SHARES[rank]:
        for metric in found.values():
            metric.update(raters[at : at + size], samples[at : at + size])
        at += size
    check(found)
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
@pytest.mark.slow
def test_in_two_processes_with_unequal_shares():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_process, args=(port,), nprocs=len(SHARES))


def test_which_way_is_better():
    """Of every class, since a tracker of a collection refuses those that do not say."""
    for name in accumulated.__all__:
        if name != "Evaluation":
            assert isinstance(getattr(accumulated, name).higher_is_better, bool), name
    assert set(metrics.HIGHER_IS_BETTER) == set(metrics.METRICS)
    for name, metric in collection().items():
        if name in metrics.METRICS:
            assert metric.higher_is_better is metrics.HIGHER_IS_BETTER[name], name
    assert accumulated.Evaluation().higher_is_better is None
    assert accumulated.Evaluation(["ged", "ece"]).higher_is_better is False
    assert accumulated.Evaluation(["hm_iou", "soft_dice"]).higher_is_better is True

    raters, samples = data()
    simple = {k: m for k, m in collection().items() if k not in ("all", "parts")}
    tracker = MetricTracker(MetricCollection(simple))
    for s in (torch.zeros_like(samples), samples, torch.zeros_like(samples)):
        tracker.increment()
        tracker.update(raters, s)
    _, steps = tracker.best_metric(return_step=True)
    assert set(steps.values()) == {1}, steps


def test_a_collection_keeps_apart_what_begins_alike():
    """Of masks that never meet Dice, IoU and HM-IoU are all 0; what comes later tells them apart."""
    raters, samples = data()
    together = MetricCollection({k: m for k, m in collection().items() if k not in ("all", "parts")})
    alone = collection()
    never = (~raters[4:].any(1, keepdim=True)).expand(-1, 2, -1, -1)
    for y, s in ((raters[4:], never), (raters, samples)):
        together.update(y, s)
        for name in together:
            alone[name].update(y, s)
    for name, value in together.compute().items():
        assert value == alone[name].compute(), name


def test_refused():
    with pytest.raises(ValueError, match=r"names must be of .*got 'miou'"):
        accumulated.Evaluation(["miou"])
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        accumulated.ExpectedCalibrationError(bins=0)
