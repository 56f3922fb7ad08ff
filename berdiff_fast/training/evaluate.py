# SPDX-License-Identifier: Apache-2.0
"""How well a model's masks agree with the raters', slice by slice over a data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from berdiff_fast import metrics, rng
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.model import BerDiff
from berdiff_fast.sampler import sample


def sample_slices(
    model: BerDiff,
    slices: RaterDataset,
    indices: Sequence[int],
    *,
    n: int,
    seed: int,
    batch: int = 8,
    process_index: int = 0,
    num_processes: int = 1,
    **options: Any,
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Draw n masks for each slice: indices, images, raters and samples of one batch after another.

    Slice i draws with the seed that ``image_seeds(seed, ...)`` gives i, whatever the selection. Processes take whole
    batches in turn, so the network sees the same batches however many there are.
    """
    device = next(model.network.parameters()).device
    for start in range(process_index * batch, len(indices), num_processes * batch):
        chosen = list(indices[start : start + batch])
        images, raters = slices.batch(chosen)
        seeds = [rng.splitmix64(seed, i) for i in chosen]
        samples = sample(model, model.preprocess(images).to(device), n=n, seed=seeds, **options)
        assert isinstance(samples, torch.Tensor)
        yield chosen, images, raters, samples.cpu()


def spread(length: int, count: int) -> list[int]:
    """``count`` indices (or all) evenly spread over ``length``."""
    count = min(length, count)
    return [i * length // count for i in range(count)]


def summarize(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of every number over the slices."""
    return {k: sum(row[k] for row in rows) / len(rows) for k in rows[0]} if rows else {}


def measure(raters: torch.Tensor, samples: torch.Tensor) -> list[dict[str, float]]:
    """One dict of numbers for each image."""
    ged = metrics.generalized_energy_distance(raters, samples)
    return [{"ged": float(g)} for g in ged]
