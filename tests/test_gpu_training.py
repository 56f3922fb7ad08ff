# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show of training: examples made there, and steps that wait for nothing."""

from __future__ import annotations

import json

import pytest
import torch
from support import phantom_file

from berdiff_fast.data.batches import Batches, fits
from berdiff_fast.data.examples import Augmentation, TrainingExamples
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.preprocessing import Preprocessing
from berdiff_fast.training.config import TrainConfig

pytest.importorskip("accelerate", reason="the trainer needs accelerate")
from berdiff_fast.training import loop

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return str(phantom_file(tmp_path_factory.mktemp("gpu") / "train.h5", 0, 24))


def config(data, output, **changes) -> TrainConfig:
    values = dict(
        train_data=data,
        output=str(output),
        channel_mult=[1],
        patch_size=4,
        norm_groups=8,
        attention_resolutions=[],
        batch_size=8,
        steps=12,
        warmup=5,
        log_every=12,
        tensorboard=False,
        rotate=10.0,
    )
    return TrainConfig(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("modes", [{}, {"mode_edges": (16, 32), "mode_window": 16}])
@pytest.mark.parametrize("affine", [False, True])
def test_examples_are_those_of_the_cpu(data, affine, modes):
    augmentation = Augmentation(True, True, *((20.0, 0.2) if affine else ()))
    examples = TrainingExamples(
        RaterDataset(data, in_memory=True), Preprocessing(), 1000, 0, augmentation, crop=0 if modes else 16, **modes
    )
    assert fits(examples.slices, torch.device("cuda"))
    here, there = Batches(examples, resident=True)(range(64)), Batches(examples, "cuda", resident=True)(range(64))
    assert here.keys() == there.keys()
    for name, tensor in here.items():
        assert there[name].is_cuda
        found = there[name].cpu()
        if not affine or name in ("t", "noise_seed"):
            assert torch.equal(found, tensor), name
        elif name == "img":
            torch.testing.assert_close(found, tensor, rtol=0, atol=1e-4)
        else:  # a pixel that falls between two may take either
            assert (found != tensor).float().mean() < 0.05, name


@pytest.mark.parametrize(
    "changes",
    [{}, {"precision": "bf16", "channels_last": True}, {"dropout": 0.1, "accumulation": 2}, {"mode_prior": True}],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_no_step_waits_for_the_gpu(data, tmp_path, monkeypatch, changes):
    """But those that log: between two of them, whatever makes the host wait is an error."""
    step, seen = loop.Records.step, []

    def watched(self, number, *arguments):
        if number == 11:
            torch.cuda.set_sync_debug_mode("default")
        step(self, number, *arguments)
        if number == 3:  # what is made once has been made
            torch.cuda.set_sync_debug_mode("error")
        seen.append(torch.cuda.get_sync_debug_mode())

    monkeypatch.setattr(loop.Records, "step", watched)
    try:
        loop.train(config(data, tmp_path, **changes))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen == [0] * 2 + [2] * 8 + [0] * 2


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_a_run_that_goes_on(data, tmp_path, precision):
    """With moments that the file has in another order in memory than the weights."""
    options = dict(precision=precision, channels_last=True, decay="constant")
    loop.train(config(data, tmp_path, **options, steps=6, log_every=3))
    loop.train(config(data, tmp_path, **options, log_every=3))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 4 and all(0 < loss < 2 for loss in losses)
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.benchmark


def test_data_that_stays_on_the_host_trains_the_same(data, tmp_path):
    for where in ("true", "false"):
        loop.train(config(data, tmp_path / where, rotate=0.0, data_on_device=where, log_every=4))
    losses = [(tmp_path / where / "log.jsonl").read_text().splitlines() for where in ("true", "false")]
    for one, other in zip(*losses, strict=True):
        assert json.loads(one)["loss"] == pytest.approx(json.loads(other)["loss"], rel=1e-3)
