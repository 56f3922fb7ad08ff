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


@torch.no_grad()
def overlap(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    # One image at a time: a float64 of every pixel is eight times a byte mask, and exact up to 2^53 pixels.
    for counts, masks_a, masks_b in zip(out, a, b, strict=True):
        masks = torch.cat([masks_a.flatten(1) != 0, masks_b.flatten(1) != 0]).double()
        counts.copy_(masks @ masks.T)
