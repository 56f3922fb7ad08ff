# SPDX-License-Identifier: Apache-2.0
"""The training loss, with its gradient."""

from __future__ import annotations

import math
from typing import Any

import torch

from berdiff_fast.backends import select
from berdiff_fast.ops._checks import LOGIT_DTYPES, PREDICTIONS, check_devices, check_mask, check_memory, check_timesteps
from berdiff_fast.ops._registry import entry, library, register
from berdiff_fast.schedule import LOSS_COLUMNS, NoiseSchedule


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
    check_timesteps(t, schedule)
    columns = schedule.loss_rows(t, kl_weight=kl_weight, bce_weight=bce_weight, leave_one_out=leave_one_out)
    if weights is not None:
        if not isinstance(weights, torch.Tensor) or weights.shape != (schedule.timesteps,):
            raise ValueError(
                f"weights must be a tensor of shape ({schedule.timesteps},), one for each timestep, got "
                f"{tuple(weights.shape) if isinstance(weights, torch.Tensor) else type(weights).__name__}"
            )
        columns = torch.cat([columns[:, :-2], columns[:, -2:] * weights.detach().to(columns)[t][:, None]], dim=1)
    if backend == "auto" and logits.dtype is torch.float64:
        backend = "reference"
    # The registered function knows of no gradient: where one is asked for, autograd has to see the op.
    if logits.requires_grad and torch.is_grad_enabled():
        call: Any = torch.ops.berdiff_fast.diffusion_loss
    else:
        tensors = (logits, y_t, y_0, t) if ignore is None else (logits, y_t, y_0, t, ignore)
        call = entry("diffusion_loss", ("logits", "y_t", "y_0", "t", "ignore"), *tensors)
    return call(logits, y_t, y_0, columns, ignore, prediction, backend)[0]


def _diffusion_loss_output(
    logits: torch.Tensor,
    y_t: torch.Tensor,
    y_0: torch.Tensor,
    columns: torch.Tensor,
    ignore: torch.Tensor | None,
    prediction: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_mask("y_t", y_t)
    check_mask("y_0", y_0)
    if logits.dtype not in (*LOGIT_DTYPES, torch.float64):
        raise TypeError(f"logits must be float32, float16, bfloat16 or float64, got {logits.dtype}")
    if logits.dtype is torch.float64 and backend != "reference":
        raise TypeError(f"logits must be float32, float16 or bfloat16 for backend {backend!r}, got float64")
    if ignore is not None:
        check_mask("ignore", ignore)
    others = {"logits": logits, "y_0": y_0} if ignore is None else {"logits": logits, "y_0": y_0, "ignore": ignore}
    shape, on_cpu = y_t.shape, y_t.is_cpu and columns.is_cpu
    for name, tensor in others.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must have the shape of y_t, {tuple(shape)}, got {tuple(tensor.shape)}")
        on_cpu = on_cpu and tensor.is_cpu
    if not on_cpu:
        check_devices(y_t, **others, t=columns)
    if columns.dtype is not torch.float64 or columns.shape != (shape[0], len(LOSS_COLUMNS)):
        raise ValueError(
            f"t must have one timestep for each of the {y_t.shape[0]} masks of y_t: rows must be float64 of shape "
            f"({y_t.shape[0]}, {len(LOSS_COLUMNS)}), got {columns.dtype} of shape {tuple(columns.shape)}"
        )
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be 'epsilon' or 'y_0', got {prediction!r}")
    dtype = torch.float64 if logits.dtype is torch.float64 else torch.float32
    value = logits.new_empty(logits.shape[0], dtype=dtype)
    # Divided by the number of pixels, a gradient is below what float16 resolves: it is rounded when it has been scaled.
    slope = torch.float32 if logits.dtype is torch.float16 else logits.dtype
    return value, torch.empty_like(logits, dtype=slope, memory_format=torch.contiguous_format)


def _diffusion_loss(*arguments):
    value, gradient = _diffusion_loss_output(*arguments)
    logits, y_t, y_0, columns, ignore, prediction, backend = arguments
    for name, tensor in (("logits", logits), ("y_t", y_t), ("y_0", y_0), ("t", columns), ("ignore", ignore)):
        check_memory(name, tensor)
    kernels = select.get(backend, "cpu" if y_t.is_cpu else y_t.device.type)
    if gradient.numel():
        kernels.diffusion_loss(
            value,
            gradient,
            logits.contiguous(),
            y_t.contiguous(),
            y_0.contiguous(),
            columns.contiguous(),
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


register(
    "diffusion_loss(Tensor logits, Tensor y_t, Tensor y_0, Tensor rows, Tensor? ignore, str prediction, str backend) "
    "-> (Tensor, Tensor)",
    _diffusion_loss,
    _diffusion_loss_output,
)
torch.library.register_autograd(
    "berdiff_fast::diffusion_loss", _scale_gradient, setup_context=_save_gradient, lib=library
)
