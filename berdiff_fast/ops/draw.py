# SPDX-License-Identifier: Apache-2.0
"""Ops that draw masks, or give what they are drawn from: their bits are those of docs/draw.md on every backend."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from berdiff_fast.backends import select
from berdiff_fast.backends.protocol import Rows
from berdiff_fast.ops._checks import (
    MAX_WORD,
    check_devices,
    check_dtype,
    check_extent,
    check_ints,
    check_mask,
    check_memory,
    check_pixels,
    check_rows,
    check_rule,
    check_timesteps,
)
from berdiff_fast.ops._registry import entry, register
from berdiff_fast.schedule import NoiseSchedule


def initial_noise(
    seeds: torch.Tensor,
    mask_shape: Sequence[int],
    *,
    samples_per_image: int = 1,
    rows: int | None = None,
    first_row: int = 0,
    first_sample: int = 0,
    dtype: torch.dtype = torch.bool,
    backend: str = "auto",
) -> torch.Tensor:
    """Masks of fair coin tosses, y_T ~ B(1/2): where sampling starts.

    Args:
        seeds: (B,) int64, one per image, or (B, 2): its seed and its first sample; its device is the output's.
        mask_shape: (K, *spatial).
        samples_per_image: n, masks per image.
        rows: how many masks to draw; all that remain of B x n by default.
        first_row, first_sample: see ``berdiff_fast.ops``.
        dtype: the type of the masks.
        backend: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        (rows, *mask_shape), 0 and 1 in ``dtype``.

    Raises:
        ValueError, TypeError, BackendUnavailableError: naming the argument.
    """
    if not isinstance(seeds, torch.Tensor):
        raise TypeError(f"seeds must be a torch.Tensor, got {type(seeds).__name__}")
    if not isinstance(mask_shape, Sequence):
        raise TypeError(f"mask_shape must be a sequence of ints, got {type(mask_shape).__name__}")
    for size in mask_shape:
        check_ints(mask_shape=size)
    check_ints(samples_per_image=samples_per_image, first_row=first_row, first_sample=first_sample)
    if rows is not None:
        check_ints(rows=rows)
    if rows is None:
        images = seeds.shape[0] if seeds.ndim else 0
        rows = max(images * samples_per_image - first_row, 0)
        if first_row > images * samples_per_image:
            raise ValueError(f"first_row must be at most {images * samples_per_image}, got {first_row}")
    return entry("initial_noise", ("seeds",), seeds)(
        seeds, list(mask_shape), rows, samples_per_image, first_row, first_sample, dtype, backend
    )


def _initial_noise_output(seeds, mask_shape, count, samples_per_image, first_row, first_sample, dtype, backend):
    check_dtype(dtype)
    if count < 0:
        raise ValueError(f"rows must be at least 0, got {count}")
    if any(size < 0 for size in mask_shape):
        raise ValueError(f"mask_shape must not be negative, got {tuple(mask_shape)}")
    check_rows(count, seeds, samples_per_image, first_row, first_sample)
    check_pixels(math.prod(mask_shape))
    return torch.empty((count, *mask_shape), dtype=dtype, device=seeds.device)


def _initial_noise(seeds, mask_shape, count, samples_per_image, first_row, first_sample, dtype, backend):
    out = _initial_noise_output(seeds, mask_shape, count, samples_per_image, first_row, first_sample, dtype, backend)
    kernels = select.get(backend, "cpu" if seeds.is_cpu else seeds.device.type)
    if out.numel():
        kernels.initial_noise(out, Rows(seeds.contiguous(), samples_per_image, first_row, first_sample))
    return out


register(
    "initial_noise(Tensor seeds, SymInt[] mask_shape, SymInt rows, SymInt samples_per_image, SymInt first_row, "
    "SymInt first_sample, ScalarType dtype, str backend) -> Tensor",
    _initial_noise,
    _initial_noise_output,
)


def q_sample(
    y_0: torch.Tensor,
    t: torch.Tensor,
    seeds: torch.Tensor,
    schedule: NoiseSchedule,
    *,
    samples_per_image: int = 1,
    first_row: int = 0,
    first_sample: int = 0,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The forward process: y_t ~ q(y_t | y_0) = B(A_t y_0 + (1 - A_t) / 2) (BerDiff, eq. 2), by flipping bits of y_0.

    Args:
        y_0: (N, K, *spatial) clean masks.
        t: (N,) int64, the timestep of each mask.
        seeds: (B,) int64, or (B, 2); one per mask when ``samples_per_image`` is 1. Noise at another t is other noise.
        schedule: gives the probability to flip.
        samples_per_image, first_row, first_sample: see ``berdiff_fast.ops``.
        dtype: of the result; that of ``y_0`` by default.
        backend: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        (N, K, *spatial), 0 and 1 in ``dtype``.

    Raises:
        ValueError, TypeError, BackendUnavailableError: naming the argument. A timestep outside [0, T) is found before
            any work on the CPU, and by a device-side assertion on a GPU.
    """
    call = entry("q_sample", ("y_0", "t", "seeds"), y_0, t, seeds)
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
    if not type(samples_per_image) is type(first_row) is type(first_sample) is int:
        check_ints(samples_per_image=samples_per_image, first_row=first_row, first_sample=first_sample)
    check_timesteps(t, schedule)
    flip, dtype = schedule.flip_probability(t), y_0.dtype if dtype is None else dtype
    return call(y_0, t, flip, seeds, samples_per_image, first_row, first_sample, dtype, backend)


def _q_sample_output(y_0, t, flip, seeds, samples_per_image, first_row, first_sample, dtype, backend):
    check_mask("y_0", y_0)
    check_dtype(dtype)
    count = y_0.shape[0]
    if t.dtype is not torch.int64 or t.shape != (count,):
        raise ValueError(f"t must be int64 of shape ({count},), got {t.dtype} of shape {tuple(t.shape)}")
    if flip.dtype is not torch.float32 or flip.shape != (count, 2):
        raise ValueError(f"flip must be float32 of shape ({count}, 2), got {flip.dtype} of shape {tuple(flip.shape)}")
    check_rows(count, seeds, samples_per_image, first_row, first_sample)
    if not (y_0.is_cpu and t.is_cpu and flip.is_cpu and seeds.is_cpu):
        check_devices(y_0, t=t, flip=flip, seeds=seeds)
    if y_0.numel() > MAX_WORD:
        check_pixels(math.prod(y_0.shape[1:]))
    return torch.empty_like(y_0, dtype=dtype, memory_format=torch.contiguous_format)


def _q_sample(y_0, t, flip, seeds, samples_per_image, first_row, first_sample, dtype, backend):
    out = _q_sample_output(y_0, t, flip, seeds, samples_per_image, first_row, first_sample, dtype, backend)
    check_memory("y_0", y_0)
    kernels = select.get(backend, "cpu" if y_0.is_cpu else y_0.device.type)
    if out.numel():
        rows = Rows(seeds.contiguous(), samples_per_image, first_row, first_sample)
        kernels.q_sample(out, y_0.contiguous(), t.contiguous(), flip.contiguous(), rows)
    return out


register(
    "q_sample(Tensor y_0, Tensor t, Tensor flip, Tensor seeds, SymInt samples_per_image, SymInt first_row, "
    "SymInt first_sample, ScalarType dtype, str backend) -> Tensor",
    _q_sample,
    _q_sample_output,
)


def sample_step(
    y_t: torch.Tensor,
    logits: torch.Tensor,
    seeds: torch.Tensor,
    coefficients: torch.Tensor,
    timestep: int,
    *,
    samples_per_image: int | None = None,
    first_row: int = 0,
    first_sample: int = 0,
    prediction: str = "epsilon",
    threshold: bool = False,
    dtype: torch.dtype | None = None,
    nan_flag: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The next mask: a bit of y_t is flipped when u (R + S E) < P + Q E, with E = exp(-z) and u uniform.

    One rule serves ddim, ddpm and d3pm; the four numbers come from ``NoiseSchedule.step_table``. Not differentiable.

    Args:
        y_t: (N, K, *spatial) masks.
        logits: of the same shape, the network's output z.
        seeds: (B,) int64, one per image, or (B, 2): its seed and its first sample.
        coefficients: (4,) float32: P, Q, R, S; one row of ``schedule.step_table(...).float()``.
        timestep: t of y_t, the third counter word of the draw.
        samples_per_image: n; N / B by default.
        first_row, first_sample: see ``berdiff_fast.ops``.
        prediction: what the logits say: "epsilon", P(y_t xor y_0 = 1), or "y_0", P(y_0 = 1).
        threshold: draw nothing and flip where epsilon's logit is positive: the published last step.
        dtype: of the result, as the network reads it next; that of ``y_t`` by default.
        nan_flag: (1,) int32, set to 1 where a logit is NaN and left alone otherwise; a NaN counts as 64. Without it
            the call itself raises on NaN, which makes the host wait for a GPU.
        backend: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        (N, K, *spatial), 0 and 1 in ``dtype``: y at the step's next timestep.

    Raises:
        FloatingPointError: a logit is NaN and no ``nan_flag`` was given.
        ValueError, TypeError, BackendUnavailableError: naming the argument.
    """
    flag = () if nan_flag is None else (nan_flag,)
    call = entry(
        "sample_step_checked" if nan_flag is None else "sample_step",
        ("y_t", "logits", "seeds", "coefficients", "nan_flag"),
        y_t,
        logits,
        seeds,
        coefficients,
        *flag,
    )
    if samples_per_image is None:
        samples_per_image = _samples_per_image(y_t, seeds, first_row)
    if not type(timestep) is type(samples_per_image) is type(first_row) is type(first_sample) is int:
        check_ints(
            timestep=timestep, samples_per_image=samples_per_image, first_row=first_row, first_sample=first_sample
        )
    return call(
        y_t,
        logits,
        seeds,
        coefficients,
        *flag,
        timestep,
        samples_per_image,
        first_row,
        first_sample,
        prediction,
        threshold,
        y_t.dtype if dtype is None else dtype,
        backend,
    )


def _samples_per_image(y_t: torch.Tensor, seeds: torch.Tensor, first_row: int) -> int:
    rows, images = y_t.size(0) if y_t.ndim else 1, seeds.shape[0] if seeds.ndim else 0
    if first_row or not images or rows % images:
        raise ValueError(
            f"samples_per_image must be given when first_row is not 0 or the {rows} masks of y_t do not divide evenly "
            f"among the {images} seeds"
        )
    return max(rows // images, 1)


def _sample_step_output(
    y_t, logits, seeds, coefficients, nan_flag, timestep, samples_per_image, first_row, first_sample, prediction,
    threshold, dtype, backend,
):  # fmt: skip
    check_rule(y_t, logits, coefficients, prediction)
    check_dtype(dtype)
    check_rows(y_t.size(0), seeds, samples_per_image, first_row, first_sample)
    # The kernel writes into it: a copy would lose what it says.
    if nan_flag.dtype is not torch.int32 or nan_flag.shape != (1,):
        raise ValueError(f"nan_flag must be int32 of shape (1,), got {nan_flag.dtype} of shape {tuple(nan_flag.shape)}")
    if not 0 <= timestep < MAX_WORD:
        raise ValueError(f"timestep must be in [0, 2^32), got {timestep}")
    if not (y_t.is_cpu and seeds.is_cpu and nan_flag.is_cpu):
        check_devices(y_t, seeds=seeds, nan_flag=nan_flag)
    if y_t.numel() > 4 * MAX_WORD:
        check_pixels(math.prod(y_t.shape[1:]))
    return torch.empty_like(y_t, dtype=dtype, memory_format=torch.contiguous_format)


def _sample_step(
    y_t, logits, seeds, coefficients, nan_flag, timestep, samples_per_image, first_row, first_sample, prediction,
    threshold, dtype, backend,
):  # fmt: skip
    out = _sample_step_output(
        y_t, logits, seeds, coefficients, nan_flag, timestep, samples_per_image, first_row, first_sample, prediction,
        threshold, dtype, backend,
    )  # fmt: skip
    kernels = select.get(backend, "cpu" if y_t.is_cpu else y_t.device.type)
    if count := out.numel():
        # As check_memory does, in less time, which a small step would notice.
        if y_t.untyped_storage().nbytes() < count:
            check_extent("y_t", y_t)
        if logits.untyped_storage().nbytes() < count:
            check_extent("logits", logits)
        kernels.sample_step(
            out,
            y_t.contiguous(),
            logits.contiguous(),
            coefficients.contiguous(),
            nan_flag,
            timestep,
            prediction == "y_0",
            threshold,
            Rows(seeds.contiguous(), samples_per_image, first_row, first_sample),
        )
    return out


def _sample_step_checked(y_t, logits, seeds, coefficients, *rest):
    """With a flag of its own, which it reads: inside the op, so that compilers and exporters need not look into it."""
    flag = _own_flag(y_t)
    out = _sample_step(y_t, logits, seeds, coefficients, flag, *rest)
    if flag.item():
        raise FloatingPointError(f"logits contain NaN (timestep {rest[0]})")
    return out


def _sample_step_checked_output(y_t, logits, seeds, coefficients, *rest):
    return _sample_step_output(y_t, logits, seeds, coefficients, _own_flag(y_t), *rest)


def _own_flag(y_t: torch.Tensor) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int32, device=y_t.device)


register(
    "sample_step(Tensor y_t, Tensor logits, Tensor seeds, Tensor coefficients, Tensor(a!) nan_flag, SymInt timestep, "
    "SymInt samples_per_image, SymInt first_row, SymInt first_sample, str prediction, bool threshold, "
    "ScalarType dtype, str backend) -> Tensor",
    _sample_step,
    _sample_step_output,
)
register(
    "sample_step_checked(Tensor y_t, Tensor logits, Tensor seeds, Tensor coefficients, SymInt timestep, "
    "SymInt samples_per_image, SymInt first_row, SymInt first_sample, str prediction, bool threshold, "
    "ScalarType dtype, str backend) -> Tensor",
    _sample_step_checked,
    _sample_step_checked_output,
)


def posterior(
    y_t: torch.Tensor,
    logits: torch.Tensor,
    coefficients: torch.Tensor,
    *,
    prediction: str = "epsilon",
    backend: str = "auto",
) -> torch.Tensor:
    """The probability that ``sample_step`` draws a one: P(y_{t-1} = 1), of which (P + Q E) / (R + S E) is the flip.

    With row 0 of a step table it is P(y_0 = 1). Not differentiable.

    Args:
        y_t: (N, K, *spatial) masks.
        logits: of the same shape. NaN gives NaN.
        coefficients: (4,) float32.
        prediction: "epsilon" or "y_0".
        backend: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        float32 of the shape of ``y_t``, in [0, 1].

    Raises:
        ValueError, TypeError, BackendUnavailableError: naming the argument.
    """
    return entry("posterior", ("y_t", "logits", "coefficients"), y_t, logits, coefficients)(
        y_t, logits, coefficients, prediction, backend
    )


def _posterior_output(y_t, logits, coefficients, prediction, backend):
    check_rule(y_t, logits, coefficients, prediction)
    return torch.empty_like(y_t, dtype=torch.float32, memory_format=torch.contiguous_format)


def _posterior(y_t, logits, coefficients, prediction, backend):
    out = _posterior_output(y_t, logits, coefficients, prediction, backend)
    check_memory("y_t", y_t)
    check_memory("logits", logits)
    kernels = select.get(backend, "cpu" if y_t.is_cpu else y_t.device.type)
    if out.numel():
        kernels.posterior(out, y_t.contiguous(), logits.contiguous(), coefficients.contiguous(), prediction == "y_0")
    return out


register(
    "posterior(Tensor y_t, Tensor logits, Tensor coefficients, str prediction, str backend) -> Tensor",
    _posterior,
    _posterior_output,
)
