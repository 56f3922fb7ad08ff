# SPDX-License-Identifier: Apache-2.0
"""Layers of a prepared ``UNet``: as in training, but on channels-last memory and with the timesteps folded in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from berdiff_fast import ops
from berdiff_fast.network.blocks import AttentionBlock, Downsample, ResBlock, Upsample

#
# Each is called with the activations, those of the skip connection that are to be concatenated (or None), and the place
# in the tables: the step or, in a network that is told classes, a row for each mask.


CONVOLUTIONS: dict[int, Callable[..., torch.Tensor]] = {2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., torch.Tensor]] = {2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass
class Rows:
    """Each mask's row of the tables, whose rows are of steps and classes."""

    index: torch.Tensor  # (N,)
    runs: list[tuple[int, int, int]]  # neighbours that have one in common: first, last + 1, row

    @classmethod
    def of(cls, index: torch.Tensor) -> Rows:
        rows, counts = index.unique_consecutive(return_counts=True)
        ends = counts.cumsum(0).tolist()
        return cls(index, list(zip([0, *ends], ends, rows.tolist(), strict=False)))


@dataclass
class Norm:
    """GroupNorm and SiLU; where the timestep scales and shifts, weight and bias have a row per step."""

    weight: torch.Tensor
    bias: torch.Tensor
    groups: int
    eps: float
    silu: bool
    backend: str

    def __call__(self, x: torch.Tensor, other: torch.Tensor | None, step: int | slice | Rows = 0) -> torch.Tensor:
        if self.weight.ndim == 1:
            return self._norm(x, other, self.weight, self.bias)
        if isinstance(step, int):
            return self._norm(x, other, self.weight[step], self.bias[step])
        assert other is None  # a block's second norm
        if isinstance(step, slice):
            steps = range(step.start, step.stop)
            parts = [
                self._norm(part, None, self.weight[s], self.bias[s])
                for s, part in zip(steps, x.chunk(len(steps)), strict=True)
            ]
        else:
            parts = [self._norm(x[a:b], None, self.weight[row], self.bias[row]) for a, b, row in step.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _norm(
        self, x: torch.Tensor, other: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        return ops.group_norm_silu(
            x,
            weight,
            bias,
            self.groups,
            other=other,
            eps=self.eps,
            silu=self.silu,
            backend=self.backend,
        )


@dataclass
class Convolution:
    """A convolution; where it adds the timestep, its bias has a row per step."""

    call: Callable[..., torch.Tensor]
    weight: torch.Tensor
    bias: torch.Tensor
    options: dict[str, Any]

    def __call__(self, x: torch.Tensor, step: int | slice | Rows = 0) -> torch.Tensor:
        if self.bias.ndim == 1:
            return self.call(x, self.weight, self.bias, **self.options)
        if isinstance(step, int):
            return self.call(x, self.weight, self.bias[step], **self.options)
        out = self.unbiased(x)
        if isinstance(step, slice):
            bias = self.bias[step]
            out.unflatten(0, (len(bias), -1)).add_(bias.view(len(bias), 1, -1, *[1] * (x.ndim - 2)))
            return out
        return out.add_(self.bias[step.index].reshape(*out.shape[:2], *[1] * (out.ndim - 2)))

    def unbiased(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x, self.weight, None, **self.options)

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The convolution of x, and ``residual`` added."""
        return self(x).add_(residual)


@dataclass
class Winograd(Convolution):
    """A convolution by ``ops.winograd``."""

    def unbiased(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x, self.weight, torch.zeros_like(self.bias[0]), **self.options)

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.call(x, self.weight, self.bias, residual=residual, **self.options)


@dataclass
class Residual:
    """``ResBlock``: h = conv(norm(conv(norm(x)))), onto which the skip path is added in place."""

    norm_1: Norm
    conv_1: Convolution
    norm_2: Norm
    conv_2: Convolution
    skip: torch.Tensor | None  # (inputs, outputs); its bias is in conv_2's

    def __call__(self, x: torch.Tensor, other: torch.Tensor | None, step: int | slice | Rows) -> torch.Tensor:
        h = self.norm_2(self.conv_1(self.norm_1(x, other), step), None, step)
        if self.skip is None:
            both = x if other is None else channels_last(torch.cat([x, other], dim=1))
            return self.conv_2.plus(h, both)
        h = self.conv_2(h)
        # conv(cat(x, other)) = conv_x(x) + conv_other(other)
        sums = tokens(h)
        sums.addmm_(tokens(x), self.skip[: x.shape[1]])
        if other is not None:
            sums.addmm_(tokens(other), self.skip[x.shape[1] :])
        return h


@dataclass
class Attention:
    """``AttentionBlock``, on (N, positions, channels)."""

    norm: Norm
    qkv: tuple[torch.Tensor, torch.Tensor]
    out: tuple[torch.Tensor, torch.Tensor]
    heads: int

    def __call__(self, x: torch.Tensor, other: torch.Tensor | None, step: int | slice | Rows) -> torch.Tensor:
        n, channels = x.shape[:2]
        qkv = F.linear(tokens(self.norm(x, None)).view(n, -1, channels), *self.qkv)
        # Channels are ordered head first, then q, k, v.
        q, k, v = qkv.unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, -1, channels)
        h = F.linear(h, *self.out).view(n, *x.shape[2:], channels).movedim(-1, 1)
        return h.add_(x)


@dataclass
class Resize:
    """``Downsample`` or ``Upsample``."""

    call: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, x: torch.Tensor, other: torch.Tensor | None, step: int | slice | Rows) -> torch.Tensor:
        return self.call(x)


@dataclass
class Sequence:
    """Layers in a row; the first takes what is concatenated."""

    layers: list[Any]

    def __call__(self, x: torch.Tensor, other: torch.Tensor | None, step: int | slice | Rows) -> torch.Tensor:
        for layer in self.layers:
            x, other = layer(x, other, step), None
        return x


class Maker:
    """Makes the layers above from those of ``unet.py``, which torch types too loosely to be of use here."""

    def __init__(self, dtype: torch.dtype, dims: int, backend: str, winograd: bool) -> None:
        self.dtype, self.dims, self.backend, self.winograd = dtype, dims, backend, winograd

    def block(self, block: Any, embed: torch.Tensor) -> Sequence:
        return Sequence([self.layer(layer, embed) for layer in block])

    def layer(self, layer: Any, embed: torch.Tensor) -> Any:
        if isinstance(layer, ResBlock):
            return self.residual(layer, embed)
        if isinstance(layer, AttentionBlock):
            return Attention(
                self.norm(layer.norm, silu=False),
                (self.matrix(layer.qkv), self.vector(layer.qkv.bias)),
                (self.matrix(layer.proj_out), self.vector(layer.proj_out.bias)),
                layer.heads,
            )
        if isinstance(layer, Downsample):
            return Resize(self.convolution(layer.op) if isinstance(layer.op, _Conv) else layer.op)
        if isinstance(layer, Upsample):
            return Resize(self.upsample(layer))
        raise TypeError(f"network has a layer of type {type(layer).__name__}, which is not prepared")

    def residual(self, block: Any, embed: torch.Tensor) -> Residual:
        norm_1, _, conv_1 = block.in_layers
        norm_2, _, _, conv_2 = block.out_layers
        condition = self.linear(block.emb_layers[1], embed)  # (S, outputs), or (S, 2 outputs)
        first, second = self.convolution(conv_1), self.norm(norm_2)
        if block.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            second.weight = (second.weight * (1 + scale)).contiguous()
            second.bias = (second.bias * (1 + scale) + shift).contiguous()
        else:
            first.bias = (conv_1.bias.float() + condition).to(self.dtype)
        last, skip = self.convolution(conv_2), None
        if not isinstance(block.skip_connection, nn.Identity):
            skip = self.matrix(block.skip_connection).t().contiguous()
            last.bias = (conv_2.bias.float() + block.skip_connection.bias.float()).to(self.dtype)
        return Residual(self.norm(norm_1), first, second, last, skip)

    def upsample(self, layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        if not isinstance(layer.conv, _Conv):
            return lambda x: F.interpolate(x, scale_factor=layer.scale, mode="nearest")
        if self.can_winograd(layer.conv):
            return self.by_winograd(layer.conv, upsample=True)
        steps = [int(scale) for scale in layer.scale]
        # Repetition is a transposed convolution with a kernel of ones; one after the other they are one, whose kernel
        # is the convolution of both. An axis that is not doubled keeps its kernel of 3.
        kernel = layer.conv.weight.float().flip(tuple(range(2, 2 + self.dims))).transpose(0, 1)
        for axis, step in enumerate(steps, start=2):
            if step == 2:
                pad = [0, 0] * self.dims
                pad[2 * (self.dims - 1 - (axis - 2))] = 1
                before = F.pad(kernel, pad)
                kernel = before + before.roll(-1, axis)
        return Convolution(
            _TRANSPOSED[self.dims],
            channels_last(kernel.to(self.dtype)),
            self.vector(layer.conv.bias),
            {"stride": steps, "padding": 1},
        )

    def norm(self, norm: Any, silu: bool = True) -> Norm:
        weight, bias = norm.weight.detach().float().clone(), norm.bias.detach().float().clone()
        return Norm(weight, bias, norm.num_groups, norm.eps, silu, self.backend)

    def convolution(self, conv: Any) -> Convolution:
        if self.can_winograd(conv):
            return self.by_winograd(conv)
        options = {"stride": conv.stride, "padding": conv.padding}
        return Convolution(CONVOLUTIONS[self.dims], self.weight(conv.weight), self.vector(conv.bias), options)

    def can_winograd(self, conv: Any) -> bool:
        """Whether the algorithm is asked for and fits: its kernel takes channels by sixteens."""
        outputs, channels, *size = conv.weight.shape
        fits = size == [3, 3] and conv.stride == (1, 1) and outputs % 16 == 0 and channels % 16 == 0
        return self.winograd and fits

    def by_winograd(self, conv: Any, **options: Any) -> Winograd:
        options["backend"] = "cpp"
        return Winograd(ops.winograd, ops.winograd_weight(conv.weight), self.vector(conv.bias), options)

    def linear(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, layer.weight.float(), layer.bias.float())

    def matrix(self, conv: Any) -> torch.Tensor:
        """(outputs, inputs) of a convolution of size 1."""
        return self.vector(conv.weight.flatten(1))

    def vector(self, parameter: Any) -> torch.Tensor:
        return parameter.detach().to(self.dtype, copy=True)

    def weight(self, parameter: Any) -> torch.Tensor:
        return channels_last(self.vector(parameter))


_Conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    if x.shape[1] == 1:
        # One channel lies in memory in both ways; these strides say which one is meant, for convolutions to follow.
        x = x.contiguous()
        return x.as_strided(x.shape, [x.stride(0), 1, *x.stride()[2:]])
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def tokens(x: torch.Tensor) -> torch.Tensor:
    """(N, C, *spatial), channels last in memory, as a view (N * positions, C)."""
    return x.movedim(1, -1).view(-1, x.shape[1])
