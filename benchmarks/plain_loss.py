# SPDX-License-Identifier: Apache-2.0
"""The training loss in plain PyTorch, as one would write it from the paper: the baseline of the kernel benchmarks.

Batched, in float32, its gradient by autograd, with the published 1e-7 inside the logarithms of the KL term.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from berdiff_fast import NoiseSchedule


def q_posterior(y_0: torch.Tensor, y_t: torch.Tensor, alpha: torch.Tensor, A_prev: torch.Tensor) -> torch.Tensor:
    """P(y_{t-1} = 1 | y_t, y_0) (BerDiff, eq. 4); y_0 may be a probability."""
    one = (alpha * y_t + (1 - alpha) / 2) * (A_prev * y_0 + (1 - A_prev) / 2)
    zero = (alpha * (1 - y_t) + (1 - alpha) / 2) * (A_prev * (1 - y_0) + (1 - A_prev) / 2)
    return one / (one + zero)


def bernoulli_kl(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    def term(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return q * (torch.log(q + 1e-7) - torch.log(p + 1e-7))

    return term(q, p) + term(1 - q, 1 - p)


def plain_loss(
    logits: torch.Tensor, y_t: torch.Tensor, y_0: torch.Tensor, t: torch.Tensor, schedule: NoiseSchedule
) -> torch.Tensor:
    """KL + BCE in bits per pixel (BerDiff, eq. 8) of masks (N, ...) in float32; (N,)."""
    shape = (-1, *[1] * (logits.ndim - 1))
    A_prev = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alphas_cumprod[:-1]])
    alpha, A_prev = (table[t].float().reshape(shape) for table in (schedule.alphas, A_prev))
    epsilon = (y_t - y_0).abs()
    bce = F.binary_cross_entropy_with_logits(logits, epsilon, reduction="none")
    predicted = (y_t - torch.sigmoid(logits)).abs()
    kl = bernoulli_kl(q_posterior(y_0, y_t, alpha, A_prev), q_posterior(predicted, y_t, alpha, A_prev))
    bits = (torch.where(t.reshape(shape) == 0, bce, kl) + bce) / math.log(2)
    return bits.flatten(1).mean(1)
