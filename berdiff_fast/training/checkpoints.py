# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training run: one safetensors file each, written beside its place and renamed."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from berdiff_fast.files import write_bytes
from berdiff_fast.training.config import TrainConfig

logger = logging.getLogger("berdiff_fast")

FORMAT = 1
_KEY = "berdiff_fast_training"
_PRIORS = ("prior", "prior_ema", "prior_best")
_NAME = re.compile(r"step-(\d+)\.safetensors")

#: Fields that a run may change when it goes on: they touch nothing that is learnt but its rounding, and its length.
_FREE = {"output", "train_data", "val_data", "in_memory", "workers", "device", "compile", "channels_last", "steps"}
_FREE |= {"log_every", "checkpoint_every", "keep", "tensorboard", "quiet", "data_on_device", "accumulation"}
_FREE |= {f"validation_{k}" for k in ("slices", "samples", "steps", "method")} | {"validate_every", "spacing"}


@dataclass
class Checkpoint:
    """What a file held: the step it was taken after, the config, tensors by name, and the rest of the state."""

    path: Path
    step: int
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    extra: dict[str, Any]


def save(
    folder: Path,
    step: int,
    config: TrainConfig,
    network: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: dict[str, Any],
    prior: tuple[nn.Module, ...] = (),
) -> Path:
    """Write the state after ``step`` optimiser steps and delete all but the newest ``config.keep`` checkpoints.

    Args:
        prior: the mode prior, its average and the best one so far, of a model that has one.

    Raises:
        OSError: it cannot be written; earlier checkpoints are as they were.
    """
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    for prefix, module in zip(_PRIORS, prior, strict=False):
        tensors |= {f"{prefix}.{k}": v for k, v in module.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
    header = {"format": FORMAT, "step": step, "config": config.to_dict(), "extra": extra}
    # A copy of each: safetensors refuses tensors that share memory.
    data = safetensors.torch.save(
        {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, metadata={_KEY: json.dumps(header)}
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.safetensors"
    try:
        write_bytes(path, data)
    except OSError as error:
        raise OSError(f"checkpoint {path} cannot be written ({error}); those before it are as they were") from error
    # Those of later steps could not be read, or this one would not have been made; they must not crowd it out.
    later = [old for old in _files(folder) if old.name > path.name]
    for old in [*later, *_files(folder)[len(later) + config.keep :]]:
        old.unlink(missing_ok=True)
    return path


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that can be read, if there is one; those that cannot are named in warnings."""
    for path in _files(folder):
        try:
            return _read(path)
        except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
            logger.warning("%s cannot be read (truncated or damaged?), trying the one before it: %s", path, error)
    return None


def _read(path: Path) -> Checkpoint:
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {})[_KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if header["format"] != FORMAT:
        raise ValueError(f"checkpoint format {header['format']!r} is unknown; this version reads {FORMAT}")
    return Checkpoint(path, header["step"], header["config"], tensors, header["extra"])


def restore(
    checkpoint: Checkpoint,
    config: TrainConfig,
    network: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    prior: tuple[nn.Module, ...] = (),
) -> None:
    """Put a checkpoint's state into a run of the same config.

    Raises:
        ValueError: the config differs where it matters, or the weights do not fit.
    """
    mine = config.to_dict()
    changed = [k for k, v in mine.items() if k not in _FREE and checkpoint.config.get(k, v) != v]
    if "crop_steps" in changed and checkpoint.step <= min(checkpoint.config["crop_steps"], config.crop_steps):
        changed.remove("crop_steps")  # it concerns steps to come
    if changed:
        listed = "; ".join(f"{k} was {checkpoint.config[k]!r} and is {mine[k]!r}" for k in changed)
        raise ValueError(
            f"{checkpoint.path} belongs to another config ({listed}); give another output, or the former values "
            "to resume"
        )
    if config.decay == "cosine" and checkpoint.config["steps"] != config.steps:
        logger.warning(
            "steps was %d and is %d: the cosine goes on as one of the new length",
            checkpoint.config["steps"],
            config.steps,
        )

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in checkpoint.tensors.items() if k.startswith(prefix)}

    try:
        network.load_state_dict(part("network."))
        ema.load_state_dict(part("ema."))
        for prefix, module in zip(_PRIORS, prior, strict=False):
            module.load_state_dict(part(f"{prefix}."))
    except RuntimeError as error:
        raise ValueError(f"{checkpoint.path} is of another architecture: {' '.join(str(error).split())}") from None
    state: dict[int, dict[str, torch.Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in part("optimizer.").items():
        index, _, key = name.partition(".")
        if tensor.shape == (parameter := parameters[int(index)]).shape:
            # In the parameter's order in memory, channels last perhaps: AdamW's fused kernel goes by addresses alone.
            tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed process left of a checkpoint that it was writing."""
    for path in folder.glob(".step-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    """Checkpoints, newest first."""
    if not folder.is_dir():
        return []
    return sorted((folder / name for name in os.listdir(folder) if _NAME.fullmatch(name)), reverse=True)
