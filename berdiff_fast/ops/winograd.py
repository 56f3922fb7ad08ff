# SPDX-License-Identifier: Apache-2.0
"""A 3 x 3 convolution with a quarter of the multiplications, for inference on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from berdiff_fast.backends import select
from berdiff_fast.ops._checks import check_devices, check_memory
from berdiff_fast.ops._registry import entry, register

#: Channels and outputs come by so many.
MULTIPLE = 16
#: Outputs of a panel of transformed weights: ``winograd_panel`` in csrc/include/berdiff/arguments.h.
PANEL = 64

#: 24 G of F(4 x 4, 3 x 3): the points 0, 1, -1, 2, -2 and infinity.
_G = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]


def winograd_weight(weight: torch.Tensor) -> torch.Tensor:
    """The weights that ``winograd`` takes: transformed in float64, G w G^T, and laid out in panels of outputs.

    Args:
        weight: (O, C, 3, 3) of a convolution.

    Returns:
        (36, panels, C, 64) float32 on the CPU, with zeros behind the last output.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight must be a torch.Tensor, got {type(weight).__name__}")
    if weight.ndim != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"weight must be (O, C, 3, 3), got shape {tuple(weight.shape)}")
    outputs, channels = weight.shape[:2]
    g = torch.tensor(_G, dtype=torch.float64) / 24
    transformed = torch.einsum("ia,ocab,jb->ijco", g, weight.detach().double().cpu(), g)
    panels = -(-outputs // PANEL)
    padded = F.pad(transformed.reshape(36, channels, outputs), (0, panels * PANEL - outputs))
    return padded.view(36, channels, panels, PANEL).transpose(1, 2).float().contiguous()


def winograd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    upsample: bool = False,
    residual: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """A 3 x 3 convolution with padding 1 by Winograd's F(4 x 4, 3 x 3) (Lavin & Gray, arXiv 1509.09308).

    It multiplies a quarter as often as the plain algorithm and loses a digit: results are within 3e-5 of float64's,
    relative to the largest one, where torch's are within 3e-6. On "cpp" an image's result does not depend on its batch
    or on the number of threads. For inference: not differentiable.

    Args:
        x: (N, C, H, W) float32, C a multiple of 16. Best channels last in memory: others are copied.
        weight: ``winograd_weight`` of (O, C, 3, 3), O a multiple of 16.
        bias: (O,) float32.
        upsample: repeat every pixel twice along both axes first.
        residual: (N, O, H', W') float32, added to the result; none by default. Its memory as that of x.
        backend: "auto", "reference" or "cpp"; "cuda" and "triton" have no kernel of this op.

    Returns:
        (N, O, H', W') float32, channels last in memory; H' = H, W' = W, or twice these with ``upsample``.

    Raises:
        ValueError, TypeError, BackendUnavailableError: naming the argument.
    """
    tensors = (x, weight, bias) if residual is None else (x, weight, bias, residual)
    call = entry("winograd", ("x", "weight", "bias", "residual"), *tensors)
    return call(x, weight, bias, residual, upsample, backend)


def _winograd_output(x, weight, bias, residual, upsample, backend):
    for name, tensor, dimensions in (("x", x, 4), ("weight", weight, 4), ("bias", bias, 1), ("residual", residual, 4)):
        if tensor is not None and (tensor.dtype is not torch.float32 or tensor.ndim != dimensions):
            raise ValueError(
                f"{name} must be float32 of {dimensions} dimensions, got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
    images, channels, height, width = x.shape
    outputs = bias.shape[0]
    if channels % MULTIPLE or not channels:
        raise ValueError(f"x must have channels by sixteens, got {channels}")
    if outputs % MULTIPLE or not outputs:
        raise ValueError(f"bias must have outputs by sixteens, got {outputs}")
    expected = (36, -(-outputs // PANEL), channels, PANEL)
    if weight.shape != expected:
        raise ValueError(
            f"weight must be ops.winograd_weight of a weight ({outputs}, {channels}, 3, 3), of shape {expected}, got "
            f"{tuple(weight.shape)}"
        )
    if upsample:
        height, width = 2 * height, 2 * width
    if residual is not None and residual.shape != (images, outputs, height, width):
        raise ValueError(
            f"residual must have the result's shape {(images, outputs, height, width)}, got {tuple(residual.shape)}"
        )
    if not (x.is_cpu and weight.is_cpu and bias.is_cpu and (residual is None or residual.is_cpu)):
        check_devices(x, weight=weight, bias=bias, **({} if residual is None else {"residual": residual}))
    return torch.empty(
        (images, outputs, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )


def _winograd(x, weight, bias, residual, upsample, backend):
    out = _winograd_output(x, weight, bias, residual, upsample, backend)
    check_memory("x", x)
    check_memory("residual", residual)
    kernels = select.get(backend, "cpu" if x.is_cpu else x.device.type, "winograd")
    if out.numel():
        kernels.winograd(
            out,
            x.contiguous(memory_format=torch.channels_last),
            weight.contiguous(),
            bias.contiguous(),
            None if residual is None else residual.contiguous(memory_format=torch.channels_last),
            upsample,
        )
    return out


register(
    "winograd(Tensor x, Tensor weight, Tensor bias, Tensor? residual, bool upsample, str backend) -> Tensor",
    _winograd,
    _winograd_output,
)
