# SPDX-License-Identifier: Apache-2.0
"""GroupNorm and SiLU in one op, for inference."""

from __future__ import annotations

import torch

from berdiff_fast.backends import select
from berdiff_fast.ops._checks import LOGIT_DTYPES, check_devices, check_ints, check_memory
from berdiff_fast.ops._registry import entry, register


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
    tensors = (x, weight, bias) if other is None else (x, weight, bias, other)
    call = entry("group_norm_silu", ("x", "weight", "bias", "other"), *tensors)
    if backend == "auto" and x.is_cpu and x.dtype is not torch.float32:
        backend = "reference"
    return call(x, other, weight, bias, groups, eps, silu, backend)


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
    size = tuple(x.shape)
    channels = size[1]
    if other is not None:
        if other.dtype is not x.dtype:
            raise TypeError(f"other must have the dtype of x, {x.dtype}, got {other.dtype}")
        if other.ndim != x.ndim or (other.shape[0], *other.shape[2:]) != (x.shape[0], *x.shape[2:]):
            raise ValueError(
                f"other must have the shape of x, {tuple(x.shape)}, but for channels, got {tuple(other.shape)}"
            )
        channels += other.shape[1]
    check_ints(groups=groups)
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must be a divisor of the {channels} channels, got {groups}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector.dtype is not torch.float32 or vector.shape != (channels,):
            raise ValueError(
                f"{name} must be float32 of shape ({channels},), got {vector.dtype} of shape {tuple(vector.shape)}"
            )
    if not (x.is_cpu and weight.is_cpu and bias.is_cpu and (other is None or other.is_cpu)):
        check_devices(x, weight=weight, bias=bias, **({} if other is None else {"other": other}))
    if x.ndim == 4:
        return torch.empty(
            (size[0], channels, *size[2:]), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
        )
    return x.new_empty((size[0], *size[2:], channels)).movedim(-1, 1)


def _channels_last(x):
    if x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _group_norm_silu(*arguments):
    out = _group_norm_silu_output(*arguments)
    x, other, weight, bias, groups, eps, silu, backend = arguments
    check_memory("x", x)
    check_memory("other", other)
    kernels = select.get(backend, x.device.type, "group_norm_silu")
    if out.numel():
        kernels.group_norm_silu(
            out,
            _channels_last(x),
            None if other is None else _channels_last(other),
            weight.contiguous(),
            bias.contiguous(),
            groups,
            eps,
            silu,
        )
    return out


register(
    "group_norm_silu(Tensor x, Tensor? other, Tensor weight, Tensor bias, int groups, float eps, bool silu, "
    "str backend) -> Tensor",
    _group_norm_silu,
    _group_norm_silu_output,
)
