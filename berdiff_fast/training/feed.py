# SPDX-License-Identifier: Apache-2.0
"""The batches of a training run: made on its device where the data fits there, else by a ``DataLoader``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import BatchSampler, DataLoader

from berdiff_fast.data.batches import Batches, fits
from berdiff_fast.data.examples import TrainingExamples

if TYPE_CHECKING:
    from accelerate import Accelerator

    from berdiff_fast.training.config import TrainConfig


def batches(
    examples: TrainingExamples, config: TrainConfig, first: int, accelerator: Accelerator
) -> Iterator[dict[str, torch.Tensor]]:
    """This process's part of the batches of steps ``first``, ``first + 1``, ..., ``config.accumulation`` to a step."""
    positions = range(first * config.batch_size, config.steps * config.batch_size)
    size = config.batch_size // config.accumulation
    device = accelerator.device
    if config.data_on_device == "true" or (config.data_on_device == "auto" and fits(examples.slices, device)):
        share = size // accelerator.num_processes
        start = positions.start + accelerator.process_index * share
        parts = (range(p, p + share) for p in range(start, positions.stop, size))
        return Batches(examples, device, resident=True).stream(parts)
    loader = DataLoader(
        Batches(examples, resident=False),
        batch_sampler=BatchSampler(positions, size, drop_last=True),
        num_workers=config.workers,
        collate_fn=_unchanged,
        pin_memory=device.type == "cuda",
        persistent_workers=config.workers > 0,
    )
    return iter(accelerator.prepare(loader))


def _unchanged(batch: Any) -> Any:
    return batch
