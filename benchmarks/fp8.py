# SPDX-License-Identifier: Apache-2.0
"""Convolutions as tensor cores compute them from 8-bit floating point, in the arithmetic of a CPU.

Whatever calls ``F.conv2d`` or ``F.conv_transpose2d`` inside ``Rounded`` has its inputs and weights rounded to e4m3
(four bits of exponent, three of mantissa, at most 448), each divided by its scale. Products of two such numbers and a
float32 sum of them are what is left: exact products, as on a GPU, but a sum in full float32, where Hopper's tensor
cores keep fewer bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max

#: What one scale of the activations is shared by; weights have one for each output channel.
SCALES = ("tensor", "mask", "none")

#: Kernels up to which a convolution is not a 3 x 3 one; the transposed ones of upsampling have 4 x 4.
_SMALLEST = 3


def rounded(x: torch.Tensor, over: tuple[int, ...] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of e4m3 as float32, and the scale to multiply them by: the largest over axes is 448; None scales by 1."""
    if over is None:
        scale = torch.ones((), device=x.device)
    else:
        scale = x.abs().amax(over, keepdim=True).float().clamp_min(1e-30) / LARGEST
    # A conversion does not saturate: what is beyond the largest becomes NaN.
    return (x.float() / scale).clamp_(-LARGEST, LARGEST).to(E4M3).float(), scale


class Rounded(TorchFunctionMode):
    """Rounds what convolutions of 3 x 3 and more read, while it is entered.

    Args:
        scale: of ``SCALES``, what shares a scale of the activations: "tensor", "mask" (each of the batch has its own),
            or "none", where numbers are rounded as they are.
        ends: round also convolutions of few channels, as the first and the last of a U-Net.

    Attributes:
        count: convolutions that were rounded.
        kept: convolutions of 3 x 3 and more that were not.
    """

    def __init__(self, scale: str = "tensor", ends: bool = False) -> None:
        super().__init__()
        if scale not in SCALES:
            raise ValueError(f"scale must be one of {list(SCALES)}, got {scale!r}")
        self.scale, self.ends = scale, ends
        self.count = self.kept = 0
        self._weights: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function not in (F.conv2d, F.conv_transpose2d):
            return function(*args, **kwargs)
        x, weight = args[:2]
        if weight.shape[-1] < _SMALLEST:
            return function(*args, **kwargs)
        transposed = function is F.conv_transpose2d
        if not self.ends and min(weight.shape[:2]) < 16:
            self.kept += 1
            return function(*args, **kwargs)
        self.count += 1
        bias = args[2] if len(args) > 2 else kwargs.pop("bias", None)
        # Weights are (outputs, inputs, ...), those of transposed convolutions (inputs, outputs, ...).
        w, w_scale = self._weight(weight, 1 if transposed else 0)
        q, scale = rounded(x, {"tensor": (0, 1, 2, 3), "mask": (1, 2, 3), "none": None}[self.scale])
        out = function(q, w, None, *args[3:], **kwargs) * (scale * w_scale)
        return (out if bias is None else out + bias.float().view(1, -1, 1, 1)).to(x.dtype)

    def _weight(self, weight: torch.Tensor, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = self._weights.get(id(weight))
        if found is None or found[0] is not weight:
            w, scale = rounded(weight, tuple(axis for axis in range(4) if axis != outputs))
            found = self._weights[id(weight)] = (weight, w, scale.reshape(1, -1, 1, 1))
        return found[1:]
