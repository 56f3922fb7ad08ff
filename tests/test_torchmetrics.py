# SPDX-License-Identifier: Apache-2.0
"""The metrics over a data set: the same numbers, in one process or in two with unequal shares."""

from __future__ import annotations

import os
import socket

import pytest
import torch

pytest.importorskip("torchmetrics", reason="torchmetrics is not installed (pip install 'berdiff_fast[train]')")

from berdiff_fast import metrics
from berdiff_fast.metrics import torchmetrics as accumulated

#: How many images each process sees, batch by batch.
SHARES = [(3, 1), (2,)]


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    chance = torch.rand(6, 1, 16, 16, generator=generator) ** 2
    return (torch.rand(6, 4, 16, 16, generator=generator) < chance), (
        torch.rand(6, 8, 16, 16, generator=generator) < chance
    )


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
    }


def expected() -> dict[str, torch.Tensor]:
    raters, samples = data()
    values = {name: value.mean() for name, value in metrics.evaluate(raters, samples).items()}
    values["pooled ece"] = metrics.calibration_error(metrics.calibration_bins(raters, samples).sum(0))
    return values


def check(found: dict[str, accumulated.Metric]) -> None:
    values = expected()
    for name, metric in found.items():
        result = metric.compute()
        if name == "all":
            assert tuple(result) == metrics.METRICS
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
def test_in_two_processes_with_unequal_shares():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_process, args=(port,), nprocs=len(SHARES))


def test_refused():
    with pytest.raises(ValueError, match=r"names must be of .*got 'miou'"):
        accumulated.Evaluation(["miou"])
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        accumulated.ExpectedCalibrationError(bins=0)
