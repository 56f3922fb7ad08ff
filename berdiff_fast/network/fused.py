# SPDX-License-Identifier: Apache-2.0
"""The U-Net for a GPU with tensor cores: as ``inference`` prepares it, with as few passes over memory as can be.

cuDNN adds no bias, no skip path and no residual, and says nothing about what it wrote; each of these is a pass over the
activations. Here a convolution does all of them before it writes (``backends.triton.layers``), so that a residual block

    h = conv(silu(norm(x, other)))                         other: the skip connection, never concatenated in memory
    out = conv(silu(norm(h))) + Wx x + Wo other            or + x

is norm, convolution, norm, convolution, where a norm is one launch for its factors (of the sums that the convolution
before left) and one that applies them.

The function is that of the plain network, up to rounding; in half precision it rounds less often, since biases,
projections and residuals are added in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from berdiff_fast.backends import select
from berdiff_fast.network.blocks import AttentionBlock, Downsample, ResBlock, Upsample, timestep_embedding
from berdiff_fast.network.graph import Graph
from berdiff_fast.network.unet import UNet, check_size


def why_not(network: UNet, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a network cannot run in this form on a device; None if it can."""
    config = network.config
    if device.type != "cuda":
        return "it is for GPUs"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "it was measured and tested on GPUs of compute capability 9 only"
    if not select.can_run("triton", "cuda"):
        return "Triton cannot run"
    if dtype is torch.float32:
        return "it is for half precision: TF32 here, cut off where cuDNN rounds, was twice as far from float64"
    return _why_not_shape(config)


def _why_not_shape(config: dict[str, Any]) -> str | None:
    if config["dims"] != 2:
        return "it is for images"
    if config.get("num_classes"):
        return "it is told the size class of each mask"
    if not config["conv_resample"]:
        return "its resolution changes without convolutions"
    widths = [config["model_channels"] * m for m in config["channel_mult"]]
    if any(width % 16 for width in widths):
        return f"its widths {widths} are not all multiples of 16"
    return None


class FusedUNet:
    """A ``UNet`` at a fixed list of timesteps; as ``PreparedUNet``, which has its methods.

    Args:
        network: the trained network; dropout is left out.
        timesteps: (S,) as the network is given them.
        dtype: the type of activations and weights; sums and tables are float32.
        layers: the kernels; ``backends.triton.layers.TritonLayers`` by default.
    """

    def __init__(
        self,
        network: UNet,
        timesteps: torch.Tensor | Sequence[float],
        *,
        dtype: torch.dtype | None = None,
        layers: Any = None,
    ) -> None:
        if (reason := _why_not_shape(network.config)) is not None:
            raise ValueError(f"network cannot be fused: {reason}")
        device = next(network.parameters()).device
        if layers is None:
            from berdiff_fast.backends.triton.layers import TritonLayers

            layers = TritonLayers()
        self.dtype = network.dtype if dtype is None else dtype
        self.mask_channels, self.img_channels = network.mask_channels, network.img_channels
        self.patch_size = network.patch_size
        self._downsampling = network.downsampling
        #: CUDA graphs that the sampler captured of calls with these weights.
        self.graphs: dict[Any, Graph | bool] = {}
        self.steps = len(timesteps)
        self._layers = layers
        self._compiled: set[Any] = set()
        make = _Maker(self.dtype, layers, network.model_channels)
        with torch.no_grad():
            embed = timestep_embedding(torch.as_tensor(timesteps, device=device), network.model_channels)
            for layer in network.time_embed:
                embed = _linear(layer, embed) if isinstance(layer, nn.Linear) else F.silu(embed)
            embed = F.silu(embed)

            parts: Any = network  # torch types what is in a ModuleList as any Module
            first, last = parts.input_blocks[0][0], parts.out[2]
            of_masks = self.mask_channels * self.patch_size**2
            # (rows, outputs), tap by tap the mask channels.
            taps = first.weight[:, :of_masks].permute(2, 3, 1, 0).flatten(0, 2)
            self._stem = F.pad(taps, (0, 0, 0, _padded(len(taps)) - len(taps))).to(self.dtype).contiguous()
            self._img_weight = first.weight[:, of_masks:].detach().to(self.dtype, copy=True)
            self._img_bias = first.bias.detach().to(self.dtype, copy=True)
            self._down = [make.block(block, embed) for block in parts.input_blocks[1:]]
            self._middle = make.block(parts.middle_block, embed)
            self._up = [make.block(block, embed) for block in parts.output_blocks]
            self._norm = make.norm(parts.out[0])
            # (inputs, columns), tap by tap the output channels.
            taps = last.weight.permute(1, 2, 3, 0).flatten(1)
            self._head = F.pad(taps, (0, _padded(taps.shape[1]) - taps.shape[1])).to(self.dtype).contiguous()
            self._head_bias = last.bias.detach().float().clone()

    def encode(self, img: torch.Tensor) -> torch.Tensor:
        """What the first convolution makes of images (B, C, H, W): (B, h, w, channels), with its bias."""
        check_size(img.shape[2:], self._downsampling)
        x = img.to(self.dtype)
        x = F.pixel_unshuffle(x, self.patch_size) if self.patch_size > 1 else x
        return F.conv2d(x, self._img_weight, self._img_bias, padding=1).permute(0, 2, 3, 1).contiguous()

    def __call__(self, y_t: torch.Tensor, step: int | slice, features: torch.Tensor) -> torch.Tensor:
        """Logits (N, K, H, W) for noisy masks.

        Args:
            y_t: (N, K, H, W) of 0 and 1 in ``dtype``.
            step: index into ``timesteps``; or a slice of them, whose masks follow each other, as many at each.
            features: ``encode`` of each mask's image, or of B images with N / B masks each, in turn.
        """
        shapes = (tuple(y_t.shape), features.shape[0])
        if y_t.device.type == "cuda" and shapes not in self._compiled:
            # Some sixty variants of a few kernels, half a second each: together they take a fraction of it.
            with self._layers.compiling():
                self._forward(y_t, step, features)
            self._compiled.add(shapes)
        return self._forward(y_t, step, features)

    def _forward(self, y_t: torch.Tensor, step: int | slice, features: torch.Tensor) -> torch.Tensor:
        h = self._layers.stem(y_t.contiguous(), self._stem, features, self.patch_size)
        skips = [h]
        for block in self._down:
            h = block(h, None, step)
            skips.append(h)
        h = self._middle(h, None, step)
        for block in self._up:
            h = block(h, skips.pop(), step)
        factors = self._norm.factors(h, None, step)
        return self._layers.head(h, factors, self._head, self._head_bias, self.mask_channels, self.patch_size)


# ---------------------------------------------------------------------- layers
#
# Each is called with the activations, those of the skip connection that are to be concatenated (or None), and the step.


@dataclass
class _Norm:
    """GroupNorm; where the timestep scales and shifts, weight and bias have a row per step."""

    layers: Any
    weight: torch.Tensor
    bias: torch.Tensor
    groups: int
    eps: float

    def factors(self, x: Any, other: Any, step: int | slice) -> torch.Tensor:
        weight = self.weight[step] if self.weight.ndim == 2 else self.weight
        bias = self.bias[step] if self.bias.ndim == 2 else self.bias
        return self.layers.factors(x, other, weight, bias, self.groups, self.eps)

    def __call__(self, x: Any, other: Any, step: int | slice, silu: bool = True) -> torch.Tensor:
        return self.layers.norm(x, other, self.factors(x, other, step), silu)


@dataclass
class _Residual:
    """``ResBlock``."""

    norm_1: _Norm
    conv_1: Any
    norm_2: _Norm
    conv_2: Any  # with the skip path's projection, where there is one

    def __call__(self, x: Any, other: Any, step: int | slice) -> Any:
        layers = self.norm_1.layers
        bias = self.conv_1.bias[step] if self.conv_1.bias.ndim == 2 else self.conv_1.bias
        h = layers.convolution(self.norm_1(x, other, step), self.conv_1, bias)
        h = self.norm_2(h, None, step)
        sources = (x.x,) if other is None else (x.x, other.x)
        if self.conv_2.projected:
            return layers.convolution(h, self.conv_2, self.conv_2.bias, projected=sources)
        residual = sources[0] if other is None else torch.cat(sources, dim=-1)
        return layers.convolution(h, self.conv_2, self.conv_2.bias, residual=residual)


@dataclass
class _Attention:
    """``AttentionBlock``. Heads are wide (384 and 512 channels in the published network), too wide for fused
    attention, and positions few, so the products of matrices are launched one by one."""

    norm: _Norm
    qkv: tuple[torch.Tensor, torch.Tensor]  # queries scaled by 1 / sqrt(channels of a head)
    out: Any
    heads: int

    def __call__(self, x: Any, other: Any, step: int | slice) -> Any:
        n, height, width, channels = x.x.shape
        tokens = self.norm(x, other, step, silu=False).view(n, height * width, channels)
        # Channels are ordered head first, then q, k, v.
        qkv = F.linear(tokens, *self.qkv).unflatten(-1, (self.heads, 3, -1))
        q, k, v = qkv.permute(3, 0, 2, 1, 4).flatten(1, 2).unbind(0)
        h = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1), v)
        h = h.view(n, self.heads, height * width, -1).transpose(1, 2).reshape(x.x.shape)
        return self.norm.layers.convolution(h, self.out, self.out.bias, residual=x.x)


@dataclass
class _Resize:
    """``Downsample`` or ``Upsample``."""

    layers: Any
    weight: Any

    def __call__(self, x: Any, other: Any, step: int | slice) -> Any:
        return self.layers.convolution(x.x, self.weight, self.weight.bias)


@dataclass
class _Sequence:
    """Layers in a row; the first takes what is concatenated."""

    layers: list[Any]

    def __call__(self, x: Any, other: Any, step: int | slice) -> Any:
        for layer in self.layers:
            x, other = layer(x, other, step), None
        return x


class _Maker:
    """Makes the layers above from those of ``unet.py``, which torch types too loosely to be of use here."""

    def __init__(self, dtype: torch.dtype, layers: Any, channels: int) -> None:
        self.dtype, self.layers = dtype, layers
        #: Channels of the tensors that the next block is given: the skip path's projection is split by them.
        self.channels = channels

    def block(self, block: Any, embed: torch.Tensor) -> _Sequence:
        return _Sequence([self.layer(layer, embed) for layer in block])

    def layer(self, layer: Any, embed: torch.Tensor) -> Any:
        if isinstance(layer, ResBlock):
            return self.residual(layer, embed)
        if isinstance(layer, AttentionBlock):
            return self.attention(layer)
        if isinstance(layer, Downsample):
            return _Resize(self.layers, self.weight(layer.op, stride=2))
        if isinstance(layer, Upsample):
            return _Resize(self.layers, self.upsample(layer.conv))
        raise TypeError(f"network has a layer of type {type(layer).__name__}, which cannot be fused")

    def residual(self, block: Any, embed: torch.Tensor) -> _Residual:
        norm_1, _, conv_1 = block.in_layers
        norm_2, _, _, conv_2 = block.out_layers
        condition = _linear(block.emb_layers[1], embed)  # (S, outputs), or (S, 2 outputs)
        first, second = self.weight(conv_1), self.norm(norm_2)
        if block.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            second.weight = (second.weight * (1 + scale)).contiguous()
            second.bias = (second.bias * (1 + scale) + shift).contiguous()
        else:
            first.bias = (first.bias + condition).contiguous()
        skip = block.skip_connection
        before, self.channels = self.channels, conv_2.weight.shape[0]
        last = self.weight(conv_2, None if isinstance(skip, nn.Identity) else skip, before)
        return _Residual(self.norm(norm_1), first, second, last)

    def attention(self, block: Any) -> _Attention:
        width = block.proj_out.weight.shape[0] // block.heads
        scale = block.qkv.weight.new_ones(block.heads, 3, width, dtype=torch.float32)
        scale[:, 0] = width**-0.5
        scale = scale.view(-1, 1)
        qkv = (block.qkv.weight.flatten(1).float() * scale).to(self.dtype)
        bias = (block.qkv.bias.float() * scale[:, 0]).to(self.dtype)
        return _Attention(self.norm(block.norm), (qkv, bias), self.weight(block.proj_out), block.heads)

    def weight(self, conv: Any, skip: Any = None, before: int = 0, stride: int = 1) -> Any:
        """(outputs, taps inputs + projected inputs): tap by tap the input channels, then those of the skip path."""
        from berdiff_fast.backends.triton.convolution import Weight

        kernel = conv.weight.detach().float()
        inputs, taps = kernel.shape[1], kernel.flatten(2).shape[2]
        matrix = kernel.flatten(2).transpose(1, 2).flatten(1)
        bias = conv.bias.detach().float().clone()
        projected: tuple[int, ...] = ()
        if skip is not None:
            matrix = torch.cat([matrix, skip.weight.detach().float().flatten(1)], dim=1)
            bias = bias + skip.bias.detach().float()
            total = skip.weight.shape[1]
            projected = (total,) if total == before else (before, total - before)
        return Weight(matrix.to(self.dtype).contiguous(), bias, inputs, projected, taps, stride)

    def upsample(self, conv: Any) -> Any:
        """Repetition of each pixel, 2 x 2 times, and 3 x 3 convolution: for each of four phases, 2 x 2 taps."""
        from berdiff_fast.backends.triton.convolution import Weight

        kernel = conv.weight.detach().float()
        # Which of three taps fall on the first and on the second of the two pixels that a phase sees, along one axis.
        taps = {0: ([0], [1, 2]), 1: ([0, 1], [2])}
        phases = [
            torch.stack([kernel[:, :, a][:, :, :, b].sum((2, 3)) for a in taps[y] for b in taps[x]], dim=1)
            for y in (0, 1)
            for x in (0, 1)
        ]
        matrix = torch.cat([phase.flatten(1) for phase in phases])
        return Weight(matrix.to(self.dtype).contiguous(), conv.bias.detach().float().clone(), kernel.shape[1], taps=4)

    def norm(self, norm: Any) -> _Norm:
        weight, bias = norm.weight.detach().float().clone(), norm.bias.detach().float().clone()
        return _Norm(self.layers, weight, bias, norm.num_groups, norm.eps)


def _padded(count: int) -> int:
    """What a product of matrices takes: a power of two, at least 16."""
    return max(16, 1 << (count - 1).bit_length())


def _linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, layer.weight.float(), layer.bias.float())
