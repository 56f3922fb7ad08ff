# SPDX-License-Identifier: Apache-2.0
"""A ddim step in plain PyTorch, done the way the published code does it: the baseline of the kernel benchmarks.

Tables stay in NumPy and are looked up, moved and broadcast at every step; the mask is drawn by
``torch.distributions.Binomial``. The network's probability of epsilon is taken as given, so that only the step counts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.distributions import Binomial


def look_up(table: np.ndarray, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The entry of each row's timestep, broadcast over the row."""
    values = torch.from_numpy(table).to(t.device)[t].float()
    return values.reshape(-1, *[1] * (like.ndim - 1)).expand(like.shape)


def ddim_step(alphas_cumprod: np.ndarray, y_t: torch.Tensor, epsilon: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """y at the timestep before ``t`` of a sub-sequence with these A_t; float 0/1 in and out."""
    predicted = (y_t - epsilon).abs()
    before, now = look_up(alphas_cumprod, t - 1, y_t), look_up(alphas_cumprod, t, y_t)
    sigma = (1 - before) / (1 - now)
    mean = sigma * y_t + (before - sigma * now) * predicted
    return Binomial(1, mean).sample()
