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
    """This process's part of the batches of steps ``first``, ``first + 1``, ..., ``accumulation`` to a step."""
    positions = range(first * config.optimiser.batch_size, config.optimiser.steps * config.optimiser.batch_size)
    size = config.optimiser.batch_size // config.optimiser.accumulation
    device = accelerator.device
    if config.data.on_device == "true" or (config.data.on_device == "auto" and fits(examples.slices, device)):
        share = size // accelerator.num_processes
        start = positions.start + accelerator.process_index * share
        parts = (range(p, p + share) for p in range(start, positions.stop, size))
        return Batches(examples, device, resident=True).stream(parts)
    loader = DataLoader(
        Batches(examples, resident=False),
        batch_sampler=BatchSampler(positions, size, drop_last=True),
        num_workers=config.data.workers,
        collate_fn=_unchanged,
        pin_memory=device.type == "cuda",
        persistent_workers=config.data.workers > 0,
    )
    return iter(accelerator.prepare(loader))


def _unchanged(batch: Any) -> Any:
    return batch
