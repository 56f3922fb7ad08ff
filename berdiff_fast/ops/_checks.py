# SPDX-License-Identifier: Apache-2.0
"""What the ops check alike: each function raises, naming the argument."""

from __future__ import annotations

import torch

from berdiff_fast import checks
from berdiff_fast.schedule import NoiseSchedule

MASK_DTYPES: tuple[torch.dtype, ...] = (torch.bool, torch.uint8, torch.float32, torch.float16, torch.bfloat16)
LOGIT_DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
PREDICTIONS = ("epsilon", "y_0")

MAX_WORD = 2**32
_FEW = 32


def check_memory(name: str, tensor: torch.Tensor | None) -> None:
    """That a large tensor still has the memory that its shape asks for; an address says it of small ones."""
    if tensor is not None and tensor.untyped_storage().nbytes() < tensor.nbytes:
        check_extent(name, tensor)


def check_extent(name: str, tensor: torch.Tensor) -> None:
    """An expanded tensor has less memory than elements; a freed storage, or one made smaller, less than it reaches."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    wanted = (tensor.storage_offset() + last + 1) * tensor.itemsize
    if wanted > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"{name} has no memory: its storage has {tensor.untyped_storage().nbytes()} bytes of the {wanted} that it "
            f"reaches (it was freed, or resized, since)"
        )


def check_rows(count: int, seeds: torch.Tensor, samples_per_image: int, first_row: int, first_sample: int) -> None:
    """That ``count`` masks are left, and that the seeds are seeds: the numbers of ``backends.protocol.Rows``."""
    columns = seeds.dim()
    if seeds.dtype is not torch.int64 or not (columns == 1 or (columns == 2 and seeds.size(1) == 2)):
        raise ValueError(f"seeds must be (B,) or (B, 2) int64, got shape {tuple(seeds.shape)} of {seeds.dtype}")
    images = seeds.size(0)
    if samples_per_image < 1:
        raise ValueError(f"samples_per_image must be at least 1, got {samples_per_image}")
    if first_row < 0:
        raise ValueError(f"first_row must be at least 0, got {first_row}")
    if first_sample < 0 or first_sample + samples_per_image > MAX_WORD:
        raise ValueError(
            f"first_sample must be at least 0 and first_sample + samples_per_image at most 2^32, got {first_sample} "
            f"and {samples_per_image}"
        )
    if count > images * samples_per_image - first_row:
        raise ValueError(
            f"seeds: {images} seeds with samples_per_image={samples_per_image} and first_row={first_row} leave "
            f"{images * samples_per_image - first_row} masks, and {count} are asked for"
        )


def check_ints(**values: int) -> None:
    for name, value in values.items():
        if type(value) is not int and not isinstance(value, torch.SymInt):
            checks.integer(name, value)


def check_mask(name: str, mask: torch.Tensor) -> None:
    if mask.dtype not in MASK_DTYPES:
        raise TypeError(f"{name} must be bool, uint8, float32, float16 or bfloat16, got {mask.dtype}")
    if mask.ndim < 1:
        raise ValueError(f"{name} must have a first dimension that counts masks, got a scalar")


def check_timesteps(t: torch.Tensor, schedule: NoiseSchedule) -> None:
    if t.dtype != torch.int64 or t.ndim != 1:
        raise ValueError(f"t must be one-dimensional int64, got shape {tuple(t.shape)} of {t.dtype}")
    if t.is_cpu and not torch.compiler.is_compiling() and t.numel():
        # A few are compared in Python, which costs less than an op.
        low, high = (min(few), max(few)) if (few := _few(t)) else torch.aminmax(t)
        if low < 0 or high >= schedule.timesteps:
            raise ValueError(f"t must be in [0, {schedule.timesteps}), got values from {low} to {high}")


def _few(t: torch.Tensor) -> list[int] | None:
    return t.tolist() if type(t) is torch.Tensor and len(t) <= _FEW else None


def check_dtype(dtype: torch.dtype) -> None:
    if dtype not in MASK_DTYPES:
        raise TypeError(f"dtype must be bool, uint8, float32, float16 or bfloat16, got {dtype}")


def check_rule(y_t: torch.Tensor, logits: torch.Tensor, coefficients: torch.Tensor, prediction: str) -> None:
    check_mask("y_t", y_t)
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(f"logits must be float32, float16 or bfloat16, got {logits.dtype}")
    if logits.shape != y_t.shape:
        raise ValueError(f"logits must have the shape of y_t, {tuple(y_t.shape)}, got {tuple(logits.shape)}")
    if coefficients.dtype is not torch.float32 or coefficients.shape != (4,):
        raise ValueError(
            f"coefficients must be float32 of shape (4,), got {coefficients.dtype} of shape {tuple(coefficients.shape)}"
        )
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be 'epsilon' or 'y_0', got {prediction!r}")
    if not (y_t.is_cpu and logits.is_cpu and coefficients.is_cpu):
        check_devices(y_t, logits=logits, coefficients=coefficients)


def check_devices(first: torch.Tensor, **others: torch.Tensor) -> None:
    for name, tensor in others.items():
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on {first.device} like the masks, got {tensor.device}")


def check_pixels(pixels: int) -> None:
    if pixels > 4 * MAX_WORD:
        raise ValueError(f"a mask may have at most 2^34 pixels, got {pixels}")
