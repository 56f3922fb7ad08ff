# SPDX-License-Identifier: Apache-2.0
"""Validation of a training run: masks of the averaged weights against the raters'."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.imaging import shown
from berdiff_fast.model import BerDiff
from berdiff_fast.network.prior import size_class
from berdiff_fast.training import evaluate
from berdiff_fast.training.config import TrainConfig
from berdiff_fast.training.records import Records

#: Slices of a validation that the mode prior is measured on.
_PRIOR_SLICES = 512


def validate(
    config: TrainConfig,
    averaged: BerDiff,
    held_out: RaterDataset,
    records: Records,
    step: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Sample a fixed choice of slices with the averaged weights; numbers on the main process, else nothing."""
    rows: list[dict[str, Any]] = []
    preview = None
    for chosen, images, raters, samples in evaluate.sample_slices(
        averaged,
        held_out,
        evaluate.spread(len(held_out), config.validation.slices),
        n=config.validation.samples,
        seed=config.seed,
        steps=config.validation.steps,
        method=config.validation.method,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    ):
        measured = evaluate.measure(raters, samples, valid=held_out.rater_valid[chosen])
        rows += [{"slice": i, **numbers} for i, numbers in zip(chosen, measured, strict=True)]
        preview = preview or _shown(held_out, images, raters, samples)
    rows = sorted(gather_object(rows), key=lambda row: row.pop("slice"))
    if not accelerator.is_main_process:
        return {}
    numbers = evaluate.summarize(rows)
    if averaged.mode_prior is not None:
        numbers |= validate_prior(averaged, held_out)
    records.validation(step, numbers, preview)
    return numbers


def _shown(
    slices: RaterDataset, images: torch.Tensor, raters: torch.Tensor, samples: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a preview shows of a batch."""
    image = shown.of_images(images, slices.channels, slices.context_slices)
    return image, shown.of_masks(raters), shown.of_masks(samples)


def validate_prior(model: BerDiff, held_out: RaterDataset) -> dict[str, float]:
    """Of the mode prior: cross-entropy in nats, and the mean square of P(empty) less the raters' share.

    Of more slices than masks are drawn of, since it is cheap, and a best one is chosen by it.
    """
    assert model.mode_prior is not None
    device, nats, errors = next(model.parameters()).device, [], []
    chosen = evaluate.spread(len(held_out), _PRIOR_SLICES)
    for start in range(0, len(chosen), 64):
        images, raters = held_out.batch(chosen[start : start + 64])
        assert model.preprocessing is not None
        statistics = held_out.statistics_for(model.preprocessing, chosen[start : start + 64])
        p = model.prior(model.preprocess(images, statistics).to(device)).double().cpu()
        classes = size_class(model.output_window.cut(raters), model.mode_prior.edges)
        read = torch.from_numpy(held_out.rater_valid[chosen[start : start + 64]])[..., None]
        shares = (torch.nn.functional.one_hot(classes, p.shape[1]).double() * read).sum(1) / read.sum(1)
        nats.append(-(shares * p.clamp(min=1e-7).log()).sum(1))
        errors.append((p[:, 0] - shares[:, 0]).square())
    return {
        "prior_cross_entropy": float(torch.cat(nats).mean()),
        "empty_squared_error": float(torch.cat(errors).mean()),
    }
