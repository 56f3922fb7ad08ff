# SPDX-License-Identifier: Apache-2.0
"""The kernels in plain PyTorch: what the others must equal bit for bit, and a fallback on any device.

Each eager operation rounds once, so following the order of ``csrc/include/berdiff/draw.h`` gives its bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from berdiff_fast import rng
from berdiff_fast.backends.protocol import Rows
from berdiff_fast.schedule import LOSS_CASE

_SIGN = -0x80000000

#: B^T and A^T of Winograd's F(4 x 4, 3 x 3), for the points 0, 1, -1, 2, -2 and infinity (ops/winograd.py has G).
_TO_TILE = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0],
            [0, 4, 0, -5, 0, 1]]  # fmt: skip
_FROM_TILE = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]


def exp_negative(z: torch.Tensor) -> torch.Tensor:
    """exp(-z) of the draw contract, float32 in and out; see ``docs/draw.md``."""
    z = torch.where(z < 64.0, z, 64.0)
    z = torch.where(z > -64.0, z, -64.0)
    w = z * float.fromhex("-0x1.715476p+0")
    t = w + 12582912.0
    f = w - (t - 12582912.0)
    p = torch.full_like(f, float.fromhex("0x1.5bb9e6p-10"))
    for coefficient in ("0x1.3ceab4p-7", "0x1.c6b754p-5", "0x1.ebf9bcp-3", "0x1.62e42ap-1", "0x1p+0"):
        p = p * f + float.fromhex(coefficient)
    return (p.view(torch.int32) + (t.view(torch.int32) << 23)).view(torch.float32)


def _epsilon_logit(logits: torch.Tensor, flipped: torch.Tensor, predicts_y0: bool) -> torch.Tensor:
    z = logits.float()
    if predicts_y0:
        z = (z.view(torch.int32) ^ (flipped.to(torch.int32) * _SIGN)).view(torch.float32)
    return z


def _images(rows: Rows, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Seed and sample number of each of so many rows."""
    seeds, samples_per_image, first_row, first_sample = rows
    mask = torch.arange(first_row, first_row + count, dtype=torch.int64, device=seeds.device)
    image = torch.div(mask, samples_per_image, rounding_mode="floor")
    first = first_sample if seeds.ndim == 1 else first_sample + seeds[image, 1]
    return seeds.view(seeds.shape[0], -1)[image, 0], first + mask % samples_per_image


@torch.no_grad()
def initial_noise(out: torch.Tensor, rows: Rows) -> None:
    seed, sample = _images(rows, out.shape[0])
    words = rng.words(seed, out[0].numel(), sample=sample, stream=rng.STREAM_INITIAL_NOISE)
    out.copy_((rng.uniform(words) < 0.5).view(out.shape))


@torch.no_grad()
def q_sample(
    out: torch.Tensor,
    y_0: torch.Tensor,
    t: torch.Tensor,
    flip: torch.Tensor,
    rows: Rows,
) -> None:
    seed, sample = _images(rows, out.shape[0])
    words = rng.words(seed, out[0].numel(), sample=sample, tag=t, stream=rng.STREAM_TRAINING_NOISE)
    y = y_0.flatten(1) != 0
    out.copy_((y ^ (rng.uniform(words) < torch.where(y, flip[:, 1:], flip[:, :1]))).view(out.shape))


@torch.no_grad()
def sample_step(
    out: torch.Tensor,
    y_t: torch.Tensor,
    logits: torch.Tensor,
    coefficients: torch.Tensor,
    nan_flag: torch.Tensor,
    timestep: int,
    predicts_y0: bool,
    threshold: bool,
    rows: Rows,
) -> None:
    y = y_t.flatten(1) != 0
    z = _epsilon_logit(logits.flatten(1), y, predicts_y0)
    nan_flag.logical_or_(z.isnan().any())
    if threshold:
        flip = z > 0.0
    else:
        seed, sample = _images(rows, out.shape[0])
        u = rng.uniform(rng.words(seed, out[0].numel(), sample=sample, tag=timestep, stream=rng.STREAM_SAMPLING_STEP))
        P, Q, R, S = coefficients.unbind()
        e = exp_negative(z)
        flip = u * (R + S * e) < P + Q * e
    out.copy_((y ^ flip).view(out.shape))


@torch.no_grad()
def posterior(
    out: torch.Tensor, y_t: torch.Tensor, logits: torch.Tensor, coefficients: torch.Tensor, predicts_y0: bool
) -> None:
    y = y_t != 0
    z = _epsilon_logit(logits, y, predicts_y0)
    P, Q, R, S = coefficients.unbind()
    e = exp_negative(z)
    flip = (P + Q * e) / (R + S * e)
    out.copy_(torch.where(z.isnan(), z, torch.where(y, 1.0 - flip, flip)))


def _log_gap(x: torch.Tensor, one_plus_x: torch.Tensor) -> torch.Tensor:
    """x - log(1 + x) >= 0 of a number known both ways: x is exact near 0, 1 + x near -1."""
    series = torch.zeros_like(x)
    for k in range(14, 1, -1):
        series = 1 / k - x * series
    log = torch.where(x.abs() < 0.5, torch.log1p(x), torch.log(one_plus_x))
    return torch.where(x.abs() < 0.1, x * x * series, x - log)


@torch.no_grad()
def diffusion_loss(
    value: torch.Tensor,
    gradient: torch.Tensor,
    logits: torch.Tensor,
    y_t: torch.Tensor,
    y_0: torch.Tensor,
    columns: torch.Tensor,
    ignore: torch.Tensor | None,
    kept: torch.Tensor | None,
    predicts_y0: bool,
) -> None:
    dtype = value.dtype
    clean = (y_0 != 0).flatten(1)
    epsilon = (y_t != 0).flatten(1) ^ clean
    # The logit of what is so: where it is 0, the sign turns.
    sign = torch.where(clean if predicts_y0 else epsilon, 1.0, -1.0).to(dtype)
    z = logits.flatten(1).to(dtype) * sign
    zero, one, weights = columns.to(dtype)[:, :, None].split([LOSS_CASE, LOSS_CASE, 2], 1)
    total, ratio, over, under, p_over, p_under = torch.where(epsilon[:, None], one, zero).unbind(1)
    kl_weight, bce_weight = weights.unbind(1)

    small = torch.exp(-z.abs())
    rest = small / (1 + small)
    most = 1 / (1 + small)
    wrong, right = torch.where(z > 0, rest, most), torch.where(z > 0, most, rest)
    bce = torch.log1p(small) + (-z).clamp(min=0)

    # KL = -(p_over log(1 + more) + p_under log(1 + less)), and p_over more + p_under less = 0.
    D, N = right + total * wrong, right + ratio * wrong
    more, less = over * wrong / D, under * wrong / D
    kl = p_over * _log_gap(more, 1 + more) + p_under * _log_gap(less, N / D)
    slope = wrong * (bce_weight - kl_weight * right * more * under / ((1 + more) * D * N))
    bits = kl_weight * kl + bce_weight * bce
    if ignore is None or kept is None:
        pixels = torch.full((1, 1), bits.shape[1], dtype=dtype, device=bits.device)
    else:
        dropped = (ignore != 0).flatten(1)
        pixels = kept.clamp(min=1).to(dtype)[:, None]
        bits, slope = bits.masked_fill(dropped, 0.0), slope.masked_fill(dropped, 0.0)
    value.copy_((bits / pixels).sum(1))
    gradient.copy_((-sign * slope / pixels).view(gradient.shape))


@torch.no_grad()
def overlap(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    # One image at a time: a float64 of every pixel is eight times a byte mask, and exact up to 2^53 pixels.
    for counts, masks_a, masks_b in zip(out, a, b, strict=True):
        masks = torch.cat([masks_a.flatten(1) != 0, masks_b.flatten(1) != 0]).double()
        counts.copy_(masks @ masks.T)


@torch.no_grad()
def group_norm_silu(
    out: torch.Tensor,
    x: torch.Tensor,
    other: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> None:
    both = x if other is None else torch.cat([x, other], dim=1)
    # Channels first: torch's kernel for channels last loses a digit and a half (2.13, on the CPU).
    y = F.group_norm(both.float().contiguous(), groups, weight, bias, eps)
    out.copy_(F.silu(y) if silu else y)


@torch.no_grad()
def winograd(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    upsample: bool,
) -> None:
    _, outputs, height, width = out.shape
    x = x.permute(0, 2, 3, 1)
    if upsample:
        x = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
    # Tiles of 6 x 6 inputs, of which the outer ring is shared with the neighbours, give 4 x 4 outputs.
    x = F.pad(x, (0, 0, 1, 1 + -width % 4, 1, 1 + -height % 4))
    tiles = x.unfold(1, 6, 4).unfold(2, 6, 4)  # (N, rows, columns, C, 6, 6)
    to, back = (torch.tensor(matrix, dtype=x.dtype, device=x.device) for matrix in (_TO_TILE, _FROM_TILE))
    weights = weight.transpose(1, 2).flatten(2)[:, :, :outputs].unflatten(0, (6, 6))  # (6, 6, C, O)
    products = torch.einsum("iy,nrscyx,jx,ijco->nrsijo", to, tiles, to, weights)
    y = torch.einsum("yi,nrsijo,xj->nrysxo", back, products, back)
    y = y.flatten(3, 4).flatten(1, 2)[:, :height, :width] + bias
    y = y.permute(0, 3, 1, 2)
    out.copy_(y if residual is None else y + residual)
