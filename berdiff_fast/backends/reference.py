# SPDX-License-Identifier: Apache-2.0
"""The kernels in plain PyTorch: what the others must equal bit for bit, and a fallback on any device.

Each eager operation rounds once, so following the order of ``csrc/include/berdiff/draw.h`` gives its bits.
"""

from __future__ import annotations

import torch

from berdiff_fast import rng

_SIGN = -0x80000000


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


def _rows(
    seeds: torch.Tensor, rows: int, samples_per_image: int, first_row: int, first_sample: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Seed and sample index of each row."""
    mask = torch.arange(first_row, first_row + rows, dtype=torch.int64, device=seeds.device)
    image = torch.div(mask, samples_per_image, rounding_mode="floor")
    return seeds[image], first_sample + mask % samples_per_image


@torch.no_grad()
def noise(out: torch.Tensor, seeds: torch.Tensor, samples_per_image: int, first_row: int, first_sample: int) -> None:
    seed, sample = _rows(seeds, out.shape[0], samples_per_image, first_row, first_sample)
    words = rng.words(seed, out[0].numel(), sample=sample, stream=rng.STREAM_INITIAL_NOISE)
    out.copy_((rng.uniform(words) < 0.5).view(out.shape))


@torch.no_grad()
def q_sample(
    out: torch.Tensor,
    y_0: torch.Tensor,
    t: torch.Tensor,
    flip: torch.Tensor,
    seeds: torch.Tensor,
    samples_per_image: int,
    first_row: int,
    first_sample: int,
) -> None:
    seed, sample = _rows(seeds, out.shape[0], samples_per_image, first_row, first_sample)
    words = rng.words(seed, out[0].numel(), sample=sample, tag=t, stream=rng.STREAM_TRAINING_NOISE)
    y = y_0.flatten(1) != 0
    out.copy_((y ^ (rng.uniform(words) < torch.where(y, flip[:, 1:], flip[:, :1]))).view(out.shape))


@torch.no_grad()
def step(
    out: torch.Tensor,
    y_t: torch.Tensor,
    logits: torch.Tensor,
    coefficients: torch.Tensor,
    nan_flag: torch.Tensor,
    timestep: int,
    predicts_y0: bool,
    threshold: bool,
    seeds: torch.Tensor,
    samples_per_image: int,
    first_row: int,
    first_sample: int,
) -> None:
    y = y_t.flatten(1) != 0
    z = _epsilon_logit(logits.flatten(1), y, predicts_y0)
    nan_flag.logical_or_(z.isnan().any())
    if threshold:
        flip = z > 0.0
    else:
        seed, sample = _rows(seeds, out.shape[0], samples_per_image, first_row, first_sample)
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


def _log(x: torch.Tensor, one_plus_x: torch.Tensor) -> torch.Tensor:
    """log(1 + x) of a number known both ways: x is exact near 0, 1 + x near -1."""
    return torch.where(x.abs() < 0.5, torch.log1p(x), torch.log(one_plus_x))


@torch.no_grad()
def diffusion_loss(
    value: torch.Tensor,
    gradient: torch.Tensor,
    logits: torch.Tensor,
    y_t: torch.Tensor,
    y_0: torch.Tensor,
    rows: torch.Tensor,
    ignore: torch.Tensor | None,
    predicts_y0: bool,
) -> None:
    dtype = value.dtype
    y = (y_t != 0).flatten(1)
    epsilon = y ^ (y_0 != 0).flatten(1)
    z = logits.flatten(1).to(dtype)
    sign = torch.where(y, -1.0, 1.0).to(dtype) if predicts_y0 else torch.ones((), dtype=dtype, device=z.device)
    z = z * sign
    P, Q, R, S, P_not, Q_not, determinant, f1, f0, f1_not, f0_not, kl_weight, bce_weight = rows.to(dtype)[
        :, :, None
    ].unbind(1)

    small = torch.exp(-z.abs())
    rest = small / (1 + small)
    large = 1 / (1 + small)
    e = torch.where(z > 0, large, rest)
    e_not = torch.where(z > 0, rest, large)
    wrong = torch.where(epsilon, e_not, e)  # the probability of what is not so
    bce = _log(small, 1 + small) + torch.where((z > 0) == epsilon, 0.0, z.abs())

    # KL(B(f_true) || B(f)), f = N / D; the ratios f / f_true and (1 - f) / (1 - f_true) also as 1 + x.
    N, M, D = P * e + Q * e_not, P_not * e + Q_not * e_not, R * e + S * e_not
    total = torch.where(epsilon, R, S)
    flip, stay = torch.where(epsilon, P, Q), torch.where(epsilon, P_not, Q_not)
    toward = torch.where(epsilon, -wrong, wrong)
    change = toward * determinant / D
    kl = -(
        torch.where(epsilon, f1, f0) * _log(change / flip, N * total / (flip * D))
        + torch.where(epsilon, f1_not, f0_not) * _log(-change / stay, M * total / (stay * D))
    )
    slope = toward * (bce_weight + kl_weight * determinant**2 * (e * e_not) / (total * D * N * M))
    bits = kl_weight * kl + bce_weight * bce
    if ignore is None:
        pixels = torch.full((), max(bits.shape[1], 1), dtype=dtype, device=bits.device)
    else:
        kept = (ignore == 0).flatten(1)
        pixels = kept.sum(1, dtype=torch.int64).clamp(min=1).to(dtype)
        bits, slope = torch.where(kept, bits, 0.0), torch.where(kept, slope, 0.0)
    value.copy_(bits.sum(1) / pixels)
    gradient.copy_((slope * sign / pixels.reshape(-1, 1)).view(gradient.shape))


@torch.no_grad()
def overlap(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    # One image at a time: a float64 of every pixel is eight times a byte mask, and exact up to 2^53 pixels.
    for counts, masks_a, masks_b in zip(out, a, b, strict=True):
        masks = torch.cat([masks_a.flatten(1) != 0, masks_b.flatten(1) != 0]).double()
        counts.copy_(masks @ masks.T)
