# SPDX-License-Identifier: Apache-2.0
"""What callers of ``sample`` give, judged before any work; and what their model answers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from berdiff_fast import checks, ops, rng
from berdiff_fast.schedule import NoiseSchedule


def carried(model: Any, name: str) -> Any:
    """What a model says of itself, also from within a wrapper: DataParallel, AveragedModel and the like (``.module``),
    torch.compile (``._orig_mod``). None if neither says anything."""
    seen: list[Any] = []
    while model is not None and all(model is not other for other in seen):
        if (found := getattr(model, name, None)) is not None:
            return found
        seen.append(model)
        inner = getattr(model, "_orig_mod", None)
        model = getattr(model, "module", None) if inner is None else inner
    return None


def noise_schedule(model: Any, schedule: NoiseSchedule | str | None) -> NoiseSchedule:
    """The one given, by itself or by name; else the model's own."""
    if schedule is None:
        schedule = carried(model, "schedule")
        if schedule is None:
            raise ValueError("schedule must be given for a model that does not carry one")
    if isinstance(schedule, str):
        return NoiseSchedule(schedule)
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule or its name, got {type(schedule).__name__}")
    return schedule


def device_and_dtype(model: Any) -> tuple[torch.device | None, torch.dtype]:
    """Where the model is, if it says so, and the dtype it computes in."""
    if isinstance(model, nn.Module):
        # The first of each, without going through all of them at every call.
        first = next(chain(model.parameters(), model.buffers()), None)
        floating = (x for x in chain(model.parameters(), model.buffers()) if x.is_floating_point())
        dtype = torch.float32 if (x := next(floating, None)) is None else x.dtype
        if dtype not in ops.LOGIT_DTYPES:
            raise TypeError(f"model must compute in float32, float16 or bfloat16, got parameters of {dtype}")
        if first is not None:
            return first.device, dtype
    return None, torch.float32


def images(img: Any, model: Any, device: torch.device | None, dtype: torch.dtype) -> torch.Tensor:
    """``img`` of ``sample`` as (B, C, *spatial) on the model's device, in ``dtype``."""
    given, img = img, checks.tensor("img", img)
    if device is not None and img is not given:
        img = img.to(device)
    if not img.is_floating_point():
        raise TypeError(
            f"img must be floating point, scaled as the network expects it, got {img.dtype}; raw intensities go "
            "through model.preprocess first"
        )
    dims = carried(model, "spatial_dims") or (3 if img.ndim == 5 else 2)
    if img.ndim == dims + 1:
        img = img[None]
    if img.ndim != dims + 2:
        raise ValueError(
            f"img must be (B, C, *spatial) or (C, *spatial) with {dims} spatial dimensions, got shape "
            f"{tuple(img.shape)}"
        )
    if 0 in img.shape:
        raise ValueError(f"img must not be empty, got shape {tuple(img.shape)}")
    channels = carried(model, "img_channels")
    if channels is not None and img.shape[1] != channels:
        raise ValueError(f"img must have {channels} channels for this model, got shape {tuple(img.shape)}")
    if device is not None and img.device != device:
        raise ValueError(f"img must be on the model's device {device}, got {img.device}")
    img = img.detach()
    # On a GPU it is found out on the way and said at the end: the host does not wait for it.
    if not img.is_cuda:
        check_finite(img, dtype)
    return img.to(dtype)


def check_finite(img: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError for an image that is not finite, or would not be in ``dtype``."""
    if not bool(torch.isfinite(img).all()):
        raise ValueError("img must be finite, got NaN or infinite values")
    if not bool(torch.isfinite(img.to(dtype)).all()):
        raise ValueError(f"img must be finite in the model's dtype {dtype} too, got values beyond its range")


def image_seeds(seed: int | Sequence[int] | torch.Tensor | None, images: int) -> torch.Tensor:
    """int64 (images,): the seed of each image, from ``seed`` of ``sample``."""
    if seed is None:
        seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
    if isinstance(seed, torch.Tensor):
        seed = seed.tolist()
    if isinstance(seed, (int, np.integer)) and not isinstance(seed, bool):
        return rng.image_seeds(int(seed), images)
    try:
        seeds = [rng.signed64(checks.integer("seed", s, -(2**63))) for s in seed]  # type: ignore[union-attr]
    except TypeError:
        raise TypeError(f"seed must be None, an int, or one int per image, got {seed!r}") from None
    if len(seeds) != images:
        raise ValueError(f"seed must have one int per image, {images} in all, got {len(seeds)}")
    return torch.tensor(seeds, dtype=torch.int64, device="cpu")


def check_logits(logits: Any, y: torch.Tensor) -> None:
    """Raise TypeError or ValueError for what a model returned, unless it is logits of the shape of y_t."""
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"model must return a tensor of logits, got {type(logits).__name__}")
    if logits.shape != y.shape:
        raise ValueError(f"model must return logits of the shape of y_t, {tuple(y.shape)}, got {tuple(logits.shape)}")
    if logits.dtype not in ops.LOGIT_DTYPES:
        raise TypeError(f"model must return float32, float16 or bfloat16 logits, got {logits.dtype}")
