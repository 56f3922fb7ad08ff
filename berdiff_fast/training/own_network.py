# SPDX-License-Identifier: Apache-2.0
"""A network of the user's own in a training run: made from the config, and tried before the run begins."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.model import BerDiff
from berdiff_fast.network import described
from berdiff_fast.training.sections import Network
from berdiff_fast.words import line

_NAME = "network.class_path"


def arguments(config: Network) -> dict[str, Any]:
    """The keyword arguments of the class."""
    return json.loads(config.arguments or "{}")


def build(config: Network) -> nn.Module:
    """The untrained network.

    Raises:
        ValueError: its class cannot be imported, is no ``nn.Module``, does not take the arguments, or has nothing to
            train.
    """
    network = described.build(_NAME, config.class_path, arguments(config))
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError(f"{_NAME}: {config.class_path} has no parameters to train")
    return network


def check(model: BerDiff, path: str, slices: RaterDataset, crop: int) -> None:
    """That the network takes what the run will show it, and answers in logits: one call, of two blank images each.

    Args:
        model: untrained.
        path: of the network's class.
        slices: the run's.
        crop: side of the middle square that it is trained on at first; 0: whole slices.

    Raises:
        ValueError: it raises an error, or its answer is of another shape or type, or not finite.
    """
    window, training = model.output_window, model.network.training
    model.network.eval()
    for size in {(crop or slices.image_size[0], crop or slices.image_size[1]), slices.image_size}:
        y_t = window.cut(torch.zeros(2, slices.mask_channels, *size))
        img = window.view(torch.zeros(2, slices.img_channels, *size))
        t = torch.tensor([0, model.schedule.timesteps - 1])
        told = () if model.mode_prior is None else (torch.ones(2, dtype=torch.int64),)
        shapes = f"y_t {tuple(y_t.shape)}, t (2,), img {tuple(img.shape)}{' and mode (2,)' if told else ''}"
        try:
            with torch.no_grad():
                logits = model.network(y_t, t, img, *told)
        except Exception as error:  # the network's own code
            raise ValueError(f"{_NAME}: {path} failed with {shapes}: {line(error)}") from error
        if not isinstance(logits, torch.Tensor) or logits.shape != y_t.shape or not logits.is_floating_point():
            got = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise ValueError(
                f"{_NAME}: {path} must return float logits of the shape of y_t, {tuple(y_t.shape)}, got {got}"
            )
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(f"{_NAME}: {path} returns NaN or infinite logits with blank {shapes}")
    model.network.train(training)
