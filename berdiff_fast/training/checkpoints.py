# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training run: one safetensors file each, with a checksum, written beside its place and renamed."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from berdiff_fast import digests
from berdiff_fast.files import own_folder, write_bytes
from berdiff_fast.training.config import FLAT, TrainConfig
from berdiff_fast.training.state import MisfitError, RunState
from berdiff_fast.words import line

logger = logging.getLogger("berdiff_fast")

FORMAT = 1
_KEY = "berdiff_fast_training"
_NAME = re.compile(r"step-(\d+)\.safetensors")

#: Settings that a run may change when it goes on, by the flat names that checkpoints have: they touch nothing that is
#: learnt but its rounding, and its length.
_FREE = {"output", "train_data", "val_data", "in_memory", "workers", "device", "compile", "channels_last", "steps"}
_FREE |= {"log_every", "checkpoint_every", "keep", "tensorboard", "quiet", "data_on_device", "accumulation"}
_FREE |= {"log_with", "project", "allow_imports"}
_FREE |= {f"validation_{k}" for k in ("slices", "samples", "steps", "method")} | {"validate_every", "spacing"}


@dataclass
class Checkpoint:
    """What a file held: the step it was taken after, the config by flat names, tensors by name, numbers beside them."""

    path: Path
    step: int
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    extra: dict[str, Any]


def save(folder: Path, config: TrainConfig, state: RunState) -> Path:
    """Write the state of a run and delete all but the newest ``records.keep`` checkpoints.

    Raises:
        OSError: it cannot be written; earlier checkpoints are as they were.
    """
    header = {"format": FORMAT, "step": state.step, "config": config.to_dict(), "extra": state.numbers()}
    # A copy of each: safetensors refuses tensors that share memory.
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in state.tensors().items()}
    data = safetensors.torch.save(tensors, metadata={_KEY: digests.seal(header, tensors)})
    own_folder(folder)
    path = folder / f"step-{state.step:08d}.safetensors"
    try:
        write_bytes(path, data, follow=False)
    except OSError as error:
        raise OSError(f"checkpoint {path} cannot be written ({error}); those before it are as they were") from error
    # Those of later steps could not be read, or this one would not have been made; they must not crowd it out.
    later = [old for old in _files(folder) if old.name > path.name]
    for old in [*later, *_files(folder)[len(later) + config.records.keep :]]:
        old.unlink(missing_ok=True)
    return path


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that can be read, if there is one; those that cannot are named in warnings."""
    return next(_readable(folder), None)


def resume(folder: Path, config: TrainConfig, state: RunState) -> bool:
    """Put the newest checkpoint that is whole into a run of the same config; those that are not are named in warnings.

    Returns:
        Whether there was one.

    Raises:
        ValueError: the config differs where it matters, or no checkpoint that can be read fits the network.
    """
    misfit: MisfitError | None = None
    for checkpoint in _readable(folder):
        try:
            restore(checkpoint, config, state)
            return True
        except MisfitError as error:
            misfit = misfit or error
            logger.warning("%s, trying the checkpoint before it", error)
    if misfit is not None:
        raise misfit
    return False


def _readable(folder: Path) -> Iterator[Checkpoint]:
    """Checkpoints that can be read, newest first; those that cannot are named in warnings."""
    for path in _files(folder):
        try:
            checkpoint = _read(path)
        except Exception as error:  # what is damaged may be anything
            words = line(error)
            logger.warning("%s cannot be read (truncated or damaged?), trying the one before it: %s", path, words)
            continue
        yield checkpoint


def _read(path: Path) -> Checkpoint:
    with safetensors.safe_open(path, framework="pt") as file:
        text = (file.metadata() or {})[_KEY]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = digests.parsed(text)
    digests.check(text, tensors)
    if unknown := header.keys() - {"format", "step", "config", "extra"}:
        raise ValueError(f"its header has the unknown key {min(unknown)!r}")
    if header["format"] != FORMAT:
        raise ValueError(f"checkpoint format {header['format']!r} is unknown; this version reads {FORMAT}")
    for key, kind in (("step", int), ("config", dict), ("extra", dict)):
        if type(header[key]) is not kind:
            raise ValueError(f"its {key} must be {kind.__name__}, got {header[key]!r:.80}")
    if path.name != f"step-{header['step']:08d}.safetensors":
        raise ValueError(f"its header says step {header['step']}")
    extra = header["extra"]
    numbers = [extra.get(key, 0) for key in ("best_ged", "best_step")]
    if not all(type(number) in (int, float) for number in numbers) or not isinstance(extra.get("scaler", {}), dict):
        raise ValueError(f"its extra is of another kind: {extra!r:.80}")
    if type(header["config"].get("steps")) is not int or type(header["config"].get("crop_steps", 0)) is not int:
        raise ValueError("its config says no steps")
    return Checkpoint(path, header["step"], header["config"], tensors, extra)


def restore(checkpoint: Checkpoint, config: TrainConfig, state: RunState) -> None:
    """Put a checkpoint's state into a run of the same config.

    Raises:
        ValueError: the config differs where it matters, or (``MisfitError``) the tensors do not fit.
    """
    former, mine = checkpoint.config, config.to_dict()
    changed = [k for k, v in mine.items() if k not in _FREE and former.get(k, v) != v]
    if "crop_steps" in changed and checkpoint.step <= min(former["crop_steps"], mine["crop_steps"]):
        changed.remove("crop_steps")  # it concerns steps to come
    if changed:
        listed = "; ".join(f"{FLAT.get(k, k)} was {former[k]!r:.200} and is {mine[k]!r}" for k in changed)
        raise ValueError(
            f"{checkpoint.path} belongs to another config ({listed}); give another output, or the former values "
            "to resume"
        )
    if config.optimiser.decay == "cosine" and former["steps"] != mine["steps"]:
        logger.warning(
            "steps was %d and is %d: the cosine goes on as one of the new length", former["steps"], mine["steps"]
        )
    try:
        state.load(checkpoint.step, checkpoint.tensors, checkpoint.extra)
    except MisfitError as error:
        raise MisfitError(f"{checkpoint.path} {error}") from None


def prepare(folder: Path) -> None:
    """Make the folder, and delete what a killed process left of a checkpoint that it was writing."""
    own_folder(folder)
    for path in folder.glob(".step-*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    """Checkpoints, newest first."""
    if not folder.is_dir():
        return []
    return sorted((folder / name for name in os.listdir(folder) if _NAME.fullmatch(name)), reverse=True)
