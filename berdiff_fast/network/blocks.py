# SPDX-License-Identifier: Apache-2.0
"""Building blocks of the published U-Net."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def timestep_embedding(timesteps: torch.Tensor, dim: int, max_period: float = 10000.0) -> torch.Tensor:
    """Sinusoidal embedding: ``dim / 2`` cosines, then as many sines, of geometrically falling frequency.

    Args:
        timesteps: (N,) int or float; fractions are allowed.
        dim: length of the embedding, even.
        max_period: the longest period is just below ``2 pi max_period`` timesteps.

    Returns:
        (N, dim) float32.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    # The order of these operations is the published one: at t = 1000 one ulp here is 1e-4 in the embedding.
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * index / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Float32GroupNorm(nn.GroupNorm):
    """GroupNorm, computed in (at least) float32 and returned in the dtype of its input."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(groups, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        y = F.group_norm(x.to(wide), self.num_groups, self.weight.to(wide), self.bias.to(wide), self.eps)
        return y.to(x.dtype)


def conv(dims: int, inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Module:
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    return kind(inputs, outputs, size, padding=size // 2, **options)


def zeroed(module: nn.Module) -> nn.Module:
    # Every branch ends in one of these, so the untrained network is its skip path and predicts logit 0.
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _halving(dims: int) -> tuple[int, ...]:
    # Volumes keep their slices: only the inner two axes change resolution.
    return (1, 2, 2) if dims == 3 else (2, 2)


class Downsample(nn.Module):
    """Halves height and width, by a strided convolution or by averaging."""

    def __init__(self, channels: int, learned: bool, dims: int) -> None:
        super().__init__()
        step = _halving(dims)
        if learned:
            self.op = conv(dims, channels, channels, stride=step)
        else:
            self.op = (nn.AvgPool3d if dims == 3 else nn.AvgPool2d)(step)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Doubles height and width by repetition, followed by a convolution if ``learned``."""

    def __init__(self, channels: int, learned: bool, dims: int) -> None:
        super().__init__()
        self.scale = tuple(float(step) for step in _halving(dims))
        self.conv = conv(dims, channels, channels) if learned else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=self.scale, mode="nearest"))


class ResBlock(nn.Module):
    """Residual block with a timestep embedding.

    The embedding is added between the two convolutions or, with ``scale_shift``, scales and shifts the output
    of the second normalisation.
    """

    def __init__(
        self, inputs: int, outputs: int, embedding: int, dropout: float, dims: int, scale_shift: bool, groups: int
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(Float32GroupNorm(inputs, groups), nn.SiLU(), conv(dims, inputs, outputs))
        conditions = 2 * outputs if scale_shift else outputs
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, conditions))
        self.out_layers = nn.Sequential(
            Float32GroupNorm(outputs, groups), nn.SiLU(), nn.Dropout(dropout), zeroed(conv(dims, outputs, outputs))
        )
        self.skip_connection = nn.Identity() if inputs == outputs else conv(dims, inputs, outputs, size=1)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        h = self.in_layers(x)
        condition = self.emb_layers(embedding).to(h.dtype)
        condition = condition.reshape(*condition.shape, *[1] * (h.ndim - 2))
        if self.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + condition)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    """Residual self-attention over all positions."""

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = Float32GroupNorm(channels, groups)
        self.qkv = conv(1, channels, 3 * channels, size=1)
        self.proj_out = zeroed(conv(1, channels, channels, size=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, channels = x.shape[:2]
        flat = x.flatten(2)
        # Channels are ordered head first, then q, k, v. One copy puts the features last, as fused attention
        # kernels require.
        qkv = self.qkv(self.norm(flat)).reshape(n, self.heads, 3, channels // self.heads, -1)
        q, k, v = qkv.permute(2, 0, 1, 4, 3).contiguous().unbind(0)
        h = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(flat.shape)
        return (flat + self.proj_out(h)).reshape(x.shape)


class EmbeddingSequential(nn.Sequential):
    """A sequence of layers in which the residual blocks also receive the timestep embedding."""

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResBlock) else layer(x)
        return x
