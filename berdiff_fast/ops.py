# SPDX-License-Identifier: Apache-2.0
"""The kernels: what they compute, on what, and what they refuse. Everything else is a backend.

Every op is registered with ``torch.library`` under ``torch.ops.berdiff_fast``, works on a CPU and on an NVIDIA GPU,
with FakeTensor and under ``torch.compile(fullgraph=True)``. Those that draw give equal bits on every backend
(docs/draw.md); the loss does not promise bits.

**Rows.** The first dimension of a mask tensor counts masks. Row r of a call is mask number ``first_row + r`` of a batch
in which every image has ``samples_per_image`` masks, so it belongs to image ``(first_row + r) // samples_per_image``,
takes that image's seed, and is sample number ``first_sample + (first_row + r) % samples_per_image`` of it. Where
seeds are (B, 2), their second column is added to the sample number of each image: device data, so that a captured
CUDA graph draws any samples, and, with a row of seeds per mask, a call any selection of them. It is not checked: sums
wrap at 2^32.
The other dimensions, (K, *spatial), are flattened; pixel i of them takes word ``i & 3`` of Philox block ``i >> 2``.

**Masks** are bool, uint8 (0/1), float32, float16 or bfloat16 (0.0/1.0; any other value than zero counts as one).
**Logits** are float32, float16 or bfloat16. Tensors that are not contiguous are copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from berdiff_fast import checks
from berdiff_fast.backends import select
from berdiff_fast.backends.select import BackendUnavailableError
from berdiff_fast.schedule import LOSS_COLUMNS, NoiseSchedule

__all__ = [
    "BackendUnavailableError",
    "diffusion_loss",
    "group_norm_silu",
    "initial_noise",
    "overlap",
    "posterior",
    "q_sample",
    "sample_step",
]

MASK_DTYPES: tuple[torch.dtype, ...] = (torch.bool, torch.uint8, torch.float32, torch.float16, torch.bfloat16)
LOGIT_DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
PREDICTIONS = ("epsilon", "y_0")

_MAX_WORD = 2**32

# ---------------------------------------------------------------------- public functions


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
        first_row, first_sample: see the module's text.
        dtype: of the masks.
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
        _check_ints(mask_shape=size)
    _check_ints(samples_per_image=samples_per_image, first_row=first_row, first_sample=first_sample)
    if rows is not None:
        _check_ints(rows=rows)
    if rows is None:
        images = seeds.shape[0] if seeds.ndim else 0
        rows = max(images * samples_per_image - first_row, 0)
        if first_row > images * samples_per_image:
            raise ValueError(f"first_row must be at most {images * samples_per_image}, got {first_row}")
    return _call("initial_noise", seeds, seeds=seeds)(
        seeds, list(mask_shape), rows, samples_per_image, first_row, first_sample, dtype, backend
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
        samples_per_image, first_row, first_sample: see the module's text.
        dtype: of the result; that of ``y_0`` by default.
        backend: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        (N, K, *spatial), 0 and 1 in ``dtype``.

    Raises:
        ValueError, TypeError, BackendUnavailableError: naming the argument. A timestep outside [0, T) is found before
            any work on the CPU, and by a device-side assertion on a GPU.
    """
    call = _call("q_sample", y_0, y_0=y_0, t=t, seeds=seeds)
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
    _check_mask("y_0", y_0)
    _check_ints(samples_per_image=samples_per_image, first_row=first_row, first_sample=first_sample)
    _check_timesteps(t, schedule)
    return call(
        y_0,
        t,
        schedule.flip_probability(t),
        seeds,
        samples_per_image,
        first_row,
        first_sample,
        y_0.dtype if dtype is None else dtype,
        backend,
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
        first_row, first_sample: see the module's text.
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
    flag: tuple[torch.Tensor, ...]
    if nan_flag is None:
        call = _call("sample_step_checked", y_t, y_t=y_t, logits=logits, seeds=seeds, coefficients=coefficients)
        flag = ()
    else:
        flag = (nan_flag,)
        call = _call(
            "sample_step", y_t, y_t=y_t, logits=logits, seeds=seeds, coefficients=coefficients, nan_flag=nan_flag
        )
    if samples_per_image is None:
        samples_per_image = _samples_per_image(y_t, seeds, first_row)
    if not type(timestep) is type(samples_per_image) is type(first_row) is type(first_sample) is int:
        _check_ints(
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
    return _call("posterior", y_t, y_t=y_t, logits=logits, coefficients=coefficients)(
        y_t, logits, coefficients, prediction, backend
    )


def diffusion_loss(
    logits: torch.Tensor,
    y_t: torch.Tensor,
    y_0: torch.Tensor,
    t: torch.Tensor,
    schedule: NoiseSchedule,
    *,
    prediction: str = "epsilon",
    kl_weight: float = 1.0,
    bce_weight: float = 1.0,
    leave_one_out: bool = False,
    weights: torch.Tensor | None = None,
    ignore: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The training loss: KL(q(y_{t-1} | y_t, y_0) || p(y_{t-1} | y_t)) + lambda BCE(epsilon, e) (BerDiff, eq. 8).

    In bits per pixel, as the published code reports it. Value and gradient come from one pass over the logits, so the
    network runs once. Differentiable once, with respect to ``logits``. Both are within 1e-6, relatively, of what
    float64 gives (for |z| up to 80), on every backend; a mask's do not depend on its batch or on the number of threads.
    A NaN logit gives NaN.

    Args:
        logits: (N, K, *spatial) float32, float16, bfloat16, or float64 (on "reference" alone, which auto then takes).
        y_t, y_0: of the same shape, noisy and clean masks.
        t: (N,) int64, the timestep of each mask.
        schedule: that y_t was drawn with.
        prediction: what the logits say: "epsilon", P(y_t xor y_0 = 1), or "y_0", P(y_0 = 1).
        kl_weight, bce_weight: of the two terms; the paper's are 1 and lambda = 1. At t = 0 the KL term is the decoder's
            negative log-likelihood.
        leave_one_out: put the leave-one-out shift into the KL term, see ``NoiseSchedule.loss_table``.
        weights: (T,), multiplies the loss of each timestep.
        ignore: masks of the shape of y_0 that are not zero where a pixel does not count. A mask of which nothing counts
            has loss 0.
        backend: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        (N,) float32 (float64 for float64 logits): each mask's mean over the pixels that count.

    Raises:
        ValueError, TypeError, BackendUnavailableError: naming the argument; timesteps as in ``q_sample``.
    """
    for name, tensor in (("logits", logits), ("y_t", y_t), ("y_0", y_0), ("t", t)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if ignore is not None and not isinstance(ignore, torch.Tensor):
        raise TypeError(f"ignore must be a torch.Tensor or None, got {type(ignore).__name__}")
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
    for name, weight in (("kl_weight", kl_weight), ("bce_weight", bce_weight)):
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {weight!r}")
    _check_timesteps(t, schedule)
    rows = schedule.loss_rows(t, kl_weight=kl_weight, bce_weight=bce_weight, leave_one_out=leave_one_out)
    if weights is not None:
        if not isinstance(weights, torch.Tensor) or weights.shape != (schedule.timesteps,):
            raise ValueError(
                f"weights must be a tensor of shape ({schedule.timesteps},), one for each timestep, got "
                f"{tuple(weights.shape) if isinstance(weights, torch.Tensor) else type(weights).__name__}"
            )
        rows = torch.cat([rows[:, :-2], rows[:, -2:] * weights.detach().to(rows)[t][:, None]], dim=1)
    if backend == "auto" and logits.dtype is torch.float64:
        backend = "reference"
    return torch.ops.berdiff_fast.diffusion_loss(logits, y_t, y_0, rows, ignore, prediction, backend)[0]


def overlap(a: torch.Tensor, b: torch.Tensor | None = None, *, backend: str = "auto") -> torch.Tensor:
    """How many pixels any two masks of an image share: all that GED, HM-IoU and their like need to know of the masks.

    The masks of an image are those of ``a`` and after them those of ``b``, each read once. Row and column R + j of the
    result belong to mask j of ``b``; the diagonal has the areas. Exact integers; not differentiable.

    Args:
        a: (N, R, *shape) masks of N images.
        b: (N, n, *shape) masks of the same images, perhaps of another dtype; none by default.
        backend: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        (N, R + n, R + n) int64, symmetric.

    Raises:
        ValueError, TypeError, BackendUnavailableError: naming the argument.
    """
    if b is None:
        return _call("overlap", a, a=a)(a, None, backend)
    return _call("overlap", a, a=a, b=b)(a, b, backend)


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    *,
    other: torch.Tensor | None = None,
    eps: float = 1e-5,
    silu: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """GroupNorm (Wu & He, arXiv 1803.08494), then SiLU, of one tensor or of two concatenated, channels last throughout.

    Where memory is the limit this is one pass to read and one to read and write, instead of the seven passes of
    ``silu(group_norm(cat([x, other], 1)))``. For inference: not differentiable. Results are within 1e-6 of float64's
    relative to the largest one, not equal bits: sums may be taken in another order. The tensors' memory is best
    channels last (``torch.channels_last``); others are copied.

    Args:
        x: (N, C, *spatial) float32, float16 or bfloat16.
        weight, bias: (C + C') float32.
        groups: a divisor of C + C'.
        other: (N, C', *spatial) in the dtype of x: channels after those of x, none by default.
        eps: added to the variance.
        silu: apply y sigmoid(y) to the result.
        backend: "auto", "reference", "cpp" (float32) or "triton"; "cuda" has no kernel of this op.

    Returns:
        (N, C + C', *spatial) in the dtype of x, channels last in memory.

    Raises:
        ValueError, TypeError, BackendUnavailableError: naming the argument.
    """
    tensors = {"x": x, "weight": weight, "bias": bias} | ({} if other is None else {"other": other})
    if backend == "auto" and x.is_cpu and x.dtype is not torch.float32:
        backend = "reference"
    return _call("group_norm_silu", x, **tensors)(x, other, weight, bias, groups, eps, silu, backend)


def _samples_per_image(y_t: torch.Tensor, seeds: torch.Tensor, first_row: int) -> int:
    rows, images = y_t.size(0) if y_t.ndim else 1, seeds.shape[0] if seeds.ndim else 0
    if first_row or not images or rows % images:
        raise ValueError(
            f"samples_per_image must be given when first_row is not 0 or the {rows} masks of y_t do not divide evenly "
            f"among the {images} seeds"
        )
    return max(rows // images, 1)


def _call(name: str, first: torch.Tensor, **tensors: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The registered op, or the function behind it where nobody would see the difference.

    The dispatcher costs several times what a small kernel does. It is needed by compilers, tracers, transforms,
    subclasses, views with a pending negation and the profiler; an eager call on plain tensors goes without it.
    """
    if torch.compiler.is_compiling():
        return getattr(torch.ops.berdiff_fast, name)
    plain = not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd._profiler_enabled()
        or getattr(first, "is_meta", False)
    )
    for argument, tensor in tensors.items():
        if type(tensor) is not torch.Tensor:
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{argument} must be a torch.Tensor, got {type(tensor).__name__}")
            plain = False
        elif tensor.is_neg():
            plain = False
    return _KERNELS[name] if plain else getattr(torch.ops.berdiff_fast, name)


# ---------------------------------------------------------------------- checks


def _check_memory(name: str, tensor: torch.Tensor | None) -> None:
    """That a large tensor still has the memory that its shape asks for; an address says it of small ones."""
    if tensor is not None and tensor.untyped_storage().nbytes() < tensor.nbytes:
        _check_extent(name, tensor)


def _check_extent(name: str, tensor: torch.Tensor) -> None:
    """An expanded tensor has less memory than elements; a freed storage, or one made smaller, less than it reaches."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    wanted = (tensor.storage_offset() + last + 1) * tensor.itemsize
    if wanted > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"{name} has no memory: its storage has {tensor.untyped_storage().nbytes()} bytes of the {wanted} that it "
            f"reaches (it was freed, or resized, since)"
        )


def _check_seeds(seeds: torch.Tensor, rows: int, samples_per_image: int, first_row: int, first_sample: int) -> None:
    columns = seeds.dim()
    if seeds.dtype is not torch.int64 or not (columns == 1 or (columns == 2 and seeds.size(1) == 2)):
        raise ValueError(f"seeds must be (B,) or (B, 2) int64, got shape {tuple(seeds.shape)} of {seeds.dtype}")
    images = seeds.size(0)
    if samples_per_image < 1:
        raise ValueError(f"samples_per_image must be at least 1, got {samples_per_image}")
    if first_row < 0:
        raise ValueError(f"first_row must be at least 0, got {first_row}")
    if first_sample < 0 or first_sample + samples_per_image > _MAX_WORD:
        raise ValueError(
            f"first_sample must be at least 0 and first_sample + samples_per_image at most 2^32, got {first_sample} "
            f"and {samples_per_image}"
        )
    if rows > images * samples_per_image - first_row:
        raise ValueError(
            f"seeds: {images} seeds with samples_per_image={samples_per_image} and first_row={first_row} leave "
            f"{images * samples_per_image - first_row} masks, and {rows} are asked for"
        )


def _check_ints(**values: int) -> None:
    for name, value in values.items():
        if type(value) is not int and not isinstance(value, torch.SymInt):
            checks.integer(name, value)


def _check_mask(name: str, mask: torch.Tensor) -> None:
    if mask.dtype not in MASK_DTYPES:
        raise TypeError(f"{name} must be bool, uint8, float32, float16 or bfloat16, got {mask.dtype}")
    if mask.ndim < 1:
        raise ValueError(f"{name} must have a first dimension that counts masks, got a scalar")


def _check_timesteps(t: torch.Tensor, schedule: NoiseSchedule) -> None:
    if t.dtype != torch.int64 or t.ndim != 1:
        raise ValueError(f"t must be one-dimensional int64, got shape {tuple(t.shape)} of {t.dtype}")
    if t.device.type == "cpu" and not torch.compiler.is_compiling() and t.numel():
        low, high = torch.aminmax(t)
        if low < 0 or high >= schedule.timesteps:
            raise ValueError(f"t must be in [0, {schedule.timesteps}), got values from {low} to {high}")


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in MASK_DTYPES:
        raise TypeError(f"dtype must be bool, uint8, float32, float16 or bfloat16, got {dtype}")


def _check_rule(y_t: torch.Tensor, logits: torch.Tensor, coefficients: torch.Tensor, prediction: str) -> None:
    _check_mask("y_t", y_t)
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
        _check_devices(y_t, logits=logits, coefficients=coefficients)


def _check_devices(first: torch.Tensor, **others: torch.Tensor) -> None:
    for name, tensor in others.items():
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on {first.device} like the masks, got {tensor.device}")


def _initial_noise_output(
    seeds: torch.Tensor,
    mask_shape: Sequence[int],
    rows: int,
    samples_per_image: int,
    first_row: int,
    first_sample: int,
    dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    _check_dtype(dtype)
    if rows < 0:
        raise ValueError(f"rows must be at least 0, got {rows}")
    if any(size < 0 for size in mask_shape):
        raise ValueError(f"mask_shape must not be negative, got {tuple(mask_shape)}")
    _check_seeds(seeds, rows, samples_per_image, first_row, first_sample)
    _check_pixels(math.prod(mask_shape))
    return torch.empty((rows, *mask_shape), dtype=dtype, device=seeds.device)


def _check_pixels(pixels: int) -> None:
    if pixels > 4 * _MAX_WORD:
        raise ValueError(f"a mask may have at most 2^34 pixels, got {pixels}")


def _q_sample_output(
    y_0: torch.Tensor,
    t: torch.Tensor,
    flip: torch.Tensor,
    seeds: torch.Tensor,
    samples_per_image: int,
    first_row: int,
    first_sample: int,
    dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    _check_mask("y_0", y_0)
    _check_dtype(dtype)
    rows = y_0.shape[0]
    if t.dtype is not torch.int64 or t.shape != (rows,):
        raise ValueError(f"t must be int64 of shape ({rows},), got {t.dtype} of shape {tuple(t.shape)}")
    if flip.dtype is not torch.float32 or flip.shape != (rows, 2):
        raise ValueError(f"flip must be float32 of shape ({rows}, 2), got {flip.dtype} of shape {tuple(flip.shape)}")
    _check_seeds(seeds, rows, samples_per_image, first_row, first_sample)
    _check_devices(y_0, t=t, flip=flip, seeds=seeds)
    _check_pixels(math.prod(y_0.shape[1:]))
    return torch.empty_like(y_0, dtype=dtype, memory_format=torch.contiguous_format)


def _sample_step_output(
    y_t: torch.Tensor,
    logits: torch.Tensor,
    seeds: torch.Tensor,
    coefficients: torch.Tensor,
    nan_flag: torch.Tensor,
    timestep: int,
    samples_per_image: int,
    first_row: int,
    first_sample: int,
    prediction: str,
    threshold: bool,
    dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    _check_rule(y_t, logits, coefficients, prediction)
    _check_dtype(dtype)
    _check_seeds(seeds, y_t.size(0), samples_per_image, first_row, first_sample)
    # The kernel writes into it: a copy would lose what it says.
    if nan_flag.dtype is not torch.int32 or nan_flag.shape != (1,):
        raise ValueError(f"nan_flag must be int32 of shape (1,), got {nan_flag.dtype} of shape {tuple(nan_flag.shape)}")
    if not 0 <= timestep < _MAX_WORD:
        raise ValueError(f"timestep must be in [0, 2^32), got {timestep}")
    if not (y_t.is_cpu and seeds.is_cpu and nan_flag.is_cpu):
        _check_devices(y_t, seeds=seeds, nan_flag=nan_flag)
    if y_t.numel() > 4 * _MAX_WORD:
        _check_pixels(math.prod(y_t.shape[1:]))
    return torch.empty_like(y_t, dtype=dtype, memory_format=torch.contiguous_format)


def _posterior_output(
    y_t: torch.Tensor, logits: torch.Tensor, coefficients: torch.Tensor, prediction: str, backend: str
) -> torch.Tensor:
    _check_rule(y_t, logits, coefficients, prediction)
    return torch.empty_like(y_t, dtype=torch.float32, memory_format=torch.contiguous_format)


def _diffusion_loss_output(
    logits: torch.Tensor,
    y_t: torch.Tensor,
    y_0: torch.Tensor,
    rows: torch.Tensor,
    ignore: torch.Tensor | None,
    prediction: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_mask("y_t", y_t)
    _check_mask("y_0", y_0)
    if logits.dtype not in (*LOGIT_DTYPES, torch.float64):
        raise TypeError(f"logits must be float32, float16, bfloat16 or float64, got {logits.dtype}")
    if logits.dtype is torch.float64 and backend != "reference":
        raise TypeError(f"logits must be float32, float16 or bfloat16 for backend {backend!r}, got float64")
    if ignore is not None:
        _check_mask("ignore", ignore)
    for name, tensor in (("logits", logits), ("y_0", y_0), ("ignore", ignore)):
        if tensor is not None and tensor.shape != y_t.shape:
            raise ValueError(f"{name} must have the shape of y_t, {tuple(y_t.shape)}, got {tuple(tensor.shape)}")
        if tensor is not None:
            _check_devices(y_t, **{name: tensor})
    if rows.dtype is not torch.float64 or rows.shape != (y_t.shape[0], len(LOSS_COLUMNS)):
        raise ValueError(
            f"t must have one timestep for each of the {y_t.shape[0]} masks of y_t: rows must be float64 of shape "
            f"({y_t.shape[0]}, {len(LOSS_COLUMNS)}), got {rows.dtype} of shape {tuple(rows.shape)}"
        )
    _check_devices(y_t, t=rows)
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be 'epsilon' or 'y_0', got {prediction!r}")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    value = torch.empty(logits.shape[0], dtype=dtype, device=logits.device)
    # Divided by the number of pixels, a gradient is below what float16 resolves: it is rounded when it has been scaled.
    slope = torch.float32 if logits.dtype is torch.float16 else logits.dtype
    return value, torch.empty_like(logits, dtype=slope, memory_format=torch.contiguous_format)


def _overlap_output(a: torch.Tensor, b: torch.Tensor | None, backend: str) -> torch.Tensor:
    _check_mask("a", a)
    images, masks, *shape = a.shape if a.ndim > 2 else (0, 0)
    if not shape:
        raise ValueError(f"a must be (N, R, *shape), got shape {tuple(a.shape)}")
    if b is not None:
        _check_mask("b", b)
        images_of_b, masks_of_b, *shape_of_b = b.shape if b.ndim > 2 else (0, 0)
        if images_of_b != images or shape_of_b != shape:
            raise ValueError(f"b must be (N, n, *shape) with N and shape of a, {tuple(a.shape)}, got {tuple(b.shape)}")
        if not (a.is_cpu and b.is_cpu):
            _check_devices(a, b=b)
        masks += masks_of_b
    # Zero, because kernels add what they find in their part of the pixels.
    return torch.zeros((images, masks, masks), dtype=torch.int64, device=a.device)


def _group_norm_silu_output(
    x: torch.Tensor,
    other: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
    backend: str,
) -> torch.Tensor:
    if x.ndim < 3:
        raise ValueError(f"x must be (N, C, *spatial), got shape {tuple(x.shape)}")
    if x.dtype not in LOGIT_DTYPES:
        raise TypeError(f"x must be float32, float16 or bfloat16, got {x.dtype}")
    if backend == "cpp" and x.dtype is not torch.float32:
        raise TypeError(f"x must be float32 for backend 'cpp', got {x.dtype}")
    channels = x.shape[1]
    if other is not None:
        if other.dtype is not x.dtype:
            raise TypeError(f"other must have the dtype of x, {x.dtype}, got {other.dtype}")
        if other.ndim != x.ndim or (other.shape[0], *other.shape[2:]) != (x.shape[0], *x.shape[2:]):
            raise ValueError(
                f"other must have the shape of x, {tuple(x.shape)}, but for channels, got {tuple(other.shape)}"
            )
        channels += other.shape[1]
    _check_ints(groups=groups)
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must be a divisor of the {channels} channels, got {groups}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector.dtype is not torch.float32 or vector.shape != (channels,):
            raise ValueError(
                f"{name} must be float32 of shape ({channels},), got {vector.dtype} of shape {tuple(vector.shape)}"
            )
    _check_devices(x, weight=weight, bias=bias, **({} if other is None else {"other": other}))
    return x.new_empty((x.shape[0], *x.shape[2:], channels)).movedim(-1, 1)


# ---------------------------------------------------------------------- registration
#
# Plain Python functions behind torch.library schemas. `_op_output` has the op's arguments, checks them and makes the
# tensor to be filled; that is all FakeTensor, meta tensors and torch.compile need to know. `_op` then fills it.

_KERNELS: dict[str, Callable[..., Any]] = {}
_library = torch.library.Library("berdiff_fast", "DEF")
_DEVICES = ("CPU", "CUDA")


def _register(schema: str, kernel, fake) -> None:
    name = schema.split("(")[0]
    _KERNELS[name] = kernel
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in _DEVICES:
        _library.impl(name, kernel, device)
    torch.library.register_fake(f"berdiff_fast::{name}", fake, lib=_library)


def _initial_noise(*arguments):
    out = _initial_noise_output(*arguments)
    seeds, _mask_shape, _rows, samples_per_image, first_row, first_sample, _dtype, backend = arguments
    kernels = select.get(backend, seeds.device.type)
    if out.numel():
        kernels.noise(out, seeds.contiguous(), samples_per_image, first_row, first_sample)
    return out


def _q_sample(*arguments):
    out = _q_sample_output(*arguments)
    y_0, t, flip, seeds, *rows, _dtype, backend = arguments
    _check_memory("y_0", y_0)
    kernels = select.get(backend, y_0.device.type)
    if out.numel():
        kernels.q_sample(out, y_0.contiguous(), t.contiguous(), flip.contiguous(), seeds.contiguous(), *rows)
    return out


def _sample_step(*arguments):
    out = _sample_step_output(*arguments)
    y_t, logits, seeds, coefficients, nan_flag, timestep, *rows, prediction, threshold, _dtype, backend = arguments
    kernels = select.get(backend, "cpu" if y_t.is_cpu else y_t.device.type)
    if count := out.numel():
        # As _check_memory does, in less time, which a small step would notice.
        if y_t.untyped_storage().nbytes() < count:
            _check_extent("y_t", y_t)
        if logits.untyped_storage().nbytes() < count:
            _check_extent("logits", logits)
        kernels.step(
            out,
            y_t.contiguous(),
            logits.contiguous(),
            coefficients.contiguous(),
            nan_flag,
            timestep,
            prediction == "y_0",
            threshold,
            seeds.contiguous(),
            *rows,
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


def _posterior(*arguments):
    out = _posterior_output(*arguments)
    y_t, logits, coefficients, prediction, backend = arguments
    _check_memory("y_t", y_t)
    _check_memory("logits", logits)
    kernels = select.get(backend, "cpu" if y_t.is_cpu else y_t.device.type)
    if out.numel():
        kernels.posterior(out, y_t.contiguous(), logits.contiguous(), coefficients.contiguous(), prediction == "y_0")
    return out


def _diffusion_loss(*arguments):
    value, gradient = _diffusion_loss_output(*arguments)
    logits, y_t, y_0, rows, ignore, prediction, backend = arguments
    for name, tensor in (("logits", logits), ("y_t", y_t), ("y_0", y_0), ("t", rows), ("ignore", ignore)):
        _check_memory(name, tensor)
    kernels = select.get(backend, y_t.device.type)
    if gradient.numel():
        kernels.diffusion_loss(
            value,
            gradient,
            logits.contiguous(),
            y_t.contiguous(),
            y_0.contiguous(),
            rows.contiguous(),
            None if ignore is None else ignore.contiguous(),
            None if ignore is None else (ignore == 0).flatten(1).sum(1),
            prediction == "y_0",
        )
    else:
        value.zero_()
    return value, gradient


def _save_gradient(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])
    ctx.logits_dtype = inputs[0].dtype


def _scale_gradient(ctx, grad_value, _grad_gradient):
    # To the graph of a second derivative the stored gradient would be a constant.
    if torch.is_grad_enabled():
        raise RuntimeError("diffusion_loss can be differentiated once; create_graph=True asks for more")
    if grad_value is None:
        return (None,) * 7
    (gradient,) = ctx.saved_tensors
    # Each mask's loss depends on its own logits alone.
    scaled = gradient * grad_value.reshape(-1, *[1] * (gradient.ndim - 1))
    return (scaled.to(ctx.logits_dtype), *[None] * 6)


def _overlap(*arguments):
    out = _overlap_output(*arguments)
    a, b, backend = arguments
    _check_memory("a", a)
    _check_memory("b", b)
    kernels = select.get(backend, "cpu" if a.is_cpu else a.device.type)
    if out.numel():
        kernels.overlap(out, a.contiguous(), a[:, :0] if b is None else b.contiguous())
    return out


def _group_norm_silu(*arguments):
    out = _group_norm_silu_output(*arguments)
    x, other, weight, bias, groups, eps, silu, backend = arguments
    _check_memory("x", x)
    _check_memory("other", other)
    kernels = select.get(backend, x.device.type, "group_norm_silu")
    if out.numel():
        kernels.group_norm_silu(
            out.movedim(1, -1),
            x.movedim(1, -1).contiguous(),
            None if other is None else other.movedim(1, -1).contiguous(),
            weight.contiguous(),
            bias.contiguous(),
            groups,
            eps,
            silu,
        )
    return out


_register(
    "initial_noise(Tensor seeds, SymInt[] mask_shape, SymInt rows, SymInt samples_per_image, SymInt first_row, "
    "SymInt first_sample, ScalarType dtype, str backend) -> Tensor",
    _initial_noise,
    _initial_noise_output,
)
_register(
    "q_sample(Tensor y_0, Tensor t, Tensor flip, Tensor seeds, SymInt samples_per_image, SymInt first_row, "
    "SymInt first_sample, ScalarType dtype, str backend) -> Tensor",
    _q_sample,
    _q_sample_output,
)
_register(
    "sample_step(Tensor y_t, Tensor logits, Tensor seeds, Tensor coefficients, Tensor(a!) nan_flag, SymInt timestep, "
    "SymInt samples_per_image, SymInt first_row, SymInt first_sample, str prediction, bool threshold, "
    "ScalarType dtype, str backend) -> Tensor",
    _sample_step,
    _sample_step_output,
)
_register(
    "sample_step_checked(Tensor y_t, Tensor logits, Tensor seeds, Tensor coefficients, SymInt timestep, "
    "SymInt samples_per_image, SymInt first_row, SymInt first_sample, str prediction, bool threshold, "
    "ScalarType dtype, str backend) -> Tensor",
    _sample_step_checked,
    _sample_step_checked_output,
)
_register(
    "posterior(Tensor y_t, Tensor logits, Tensor coefficients, str prediction, str backend) -> Tensor",
    _posterior,
    _posterior_output,
)
_register(
    "diffusion_loss(Tensor logits, Tensor y_t, Tensor y_0, Tensor rows, Tensor? ignore, str prediction, str backend) "
    "-> (Tensor, Tensor)",
    _diffusion_loss,
    _diffusion_loss_output,
)
torch.library.register_autograd(
    "berdiff_fast::diffusion_loss", _scale_gradient, setup_context=_save_gradient, lib=_library
)
_register("overlap(Tensor a, Tensor? b, str backend) -> Tensor", _overlap, _overlap_output)
_register(
    "group_norm_silu(Tensor x, Tensor? other, Tensor weight, Tensor bias, int groups, float eps, bool silu, "
    "str backend) -> Tensor",
    _group_norm_silu,
    _group_norm_silu_output,
)
