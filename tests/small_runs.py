# SPDX-License-Identifier: Apache-2.0
"""Training runs of seconds and the commands around them, for tests of what files may hold."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch

import berdiff_fast as bf
from berdiff_fast import cli
from berdiff_fast.scans import sample as scan_sampling
from berdiff_fast.training.config import TrainConfig
from berdiff_fast.training.loop import train


def trained(folder: Path, data: Path, validation: Path | str = "", **settings) -> bf.BerDiff:
    """The model of a run of two steps in a folder."""
    usual = dict(
        model_channels=8,
        norm_groups=4,
        channel_mult=(1, 2),
        attention_resolutions=(),
        prediction="y_0",
        steps=2,
        batch_size=2,
        warmup=1,
        ema_decay=0.5,
        validate_every=2,
        validation_slices=2,
        validation_samples=2,
        validation_steps=2,
        tensorboard=False,
        quiet=True,
    )
    settings = {**usual, **settings}
    path = train(TrainConfig(output=str(folder), train_data=str(data), val_data=str(validation), **settings))
    return bf.load(path)


def network_inputs(model: bf.BerDiff, given: Any, **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """What ``sample_volume`` hands the network of a scan, one row after the other, and its plan."""
    seen = []

    class Spy(bf.Sampler):
        def __call__(self, img, **rest):
            seen.append(img.clone())
            return super().__call__(img, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_sampling, "Sampler", Spy)
        sampled = bf.sample_volume(model, given, n=1, steps=1, **options)
    return torch.cat(seen), sampled.plan


def command(*words: object) -> tuple[int, str]:
    """Exit status and what a command said on stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as error:
            status = int(error.code or 0)
    return status, said.getvalue()
