# SPDX-License-Identifier: Apache-2.0
"""What one would write without this package, in plain PyTorch: the published way, and the best honest forms of it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch.distributions import Binomial

from berdiff_fast import ops, rng
from berdiff_fast.model import BerDiff
from berdiff_fast.schedule import NoiseSchedule

#: The published LIDC model: 85.6 M parameters, 132 GFLOP a mask of 128 x 128.
PUBLISHED = dict(
    model_channels=128, channel_mult=[1, 1, 2, 3, 4], num_res_blocks=2, attention_resolutions=[8], num_heads=1
)

Network = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

#: Draws masks from their probabilities: ``draw(mean, y_t, first, timestep)`` for masks first, first + 1, ...; y_t and
#: timestep are None for the first noise.
Draw = Callable[[torch.Tensor, "torch.Tensor | None", int, "int | None"], torch.Tensor]


def compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    # Shapes as they come: gates use smaller ones, and code for any shape is slower.
    return torch.compile(function, mode="max-autotune" if device == "cuda" else None, dynamic=False)


def binomial(mean: torch.Tensor, y_t: torch.Tensor | None, first: int, timestep: int | None) -> torch.Tensor:
    """As the published code draws."""
    return Binomial(1, mean).sample()


def rand_less(mean: torch.Tensor, y_t: torch.Tensor | None, first: int, timestep: int | None) -> torch.Tensor:
    """As one would draw who wants it fast."""
    return (torch.rand_like(mean) < mean).to(mean.dtype)


def as_contracted(seed: int) -> Draw:
    """The draws of the draw contract, so that a baseline's masks can be compared with ours, bit by bit."""

    def draw(mean: torch.Tensor, y_t: torch.Tensor | None, first: int, timestep: int | None) -> torch.Tensor:
        n, pixels = len(mean), mean[0].numel()
        stream = rng.STREAM_INITIAL_NOISE if timestep is None else rng.STREAM_SAMPLING_STEP
        samples = torch.arange(first, first + n)
        seeds = rng.image_seeds(seed, 1).expand(n)
        u = rng.uniform(rng.words(seeds, pixels, sample=samples, tag=timestep or 0, stream=stream))
        u = u.view(mean.shape).to(mean.device)
        if y_t is None:
            return (u < mean).to(mean.dtype)
        flip = u < torch.where(y_t != 0, 1 - mean, mean)
        return ((y_t != 0) ^ flip).to(mean.dtype)

    return draw


def _look_up(table: np.ndarray, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    values = torch.from_numpy(table).to(t.device)[t].float()
    return values.reshape(-1, *[1] * (like.ndim - 1)).expand(like.shape)


def published_mean(A: np.ndarray, y_t: torch.Tensor, predicted: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """P(y = 1) before index ``t`` of a sub-sequence with these A_t, its tables looked up as the published code does.

    ``predicted`` is P(y_0 = 1). In float32 the published mean can exceed 1, which ``Binomial`` refuses.
    """
    before, now = _look_up(A, t - 1, y_t), _look_up(A, t, y_t)
    sigma = (1 - before) / (1 - now)
    return (sigma * y_t + (before - sigma * now) * predicted).clamp(0, 1)


@torch.no_grad()
def one_after_another(
    network: Network,
    img: torch.Tensor,
    n: int,
    timesteps: Sequence[int],
    schedule: NoiseSchedule,
    *,
    predicts_y0: bool = False,
    draw: Draw = binomial,
) -> torch.Tensor:
    """``ddim`` as the published code does it: one mask after another, tables in NumPy looked up at every step.

    Args:
        network: returns logits.
        img: (1, C, H, W).
        n: masks.
        timesteps: ascending.
        schedule: the noise schedule.
        predicts_y0: what the logits are of.
        draw: the random draws.

    Returns:
        (n, 1, H, W) of 0.0 and 1.0.
    """
    A = np.append(1.0, schedule.alphas_cumprod[list(timesteps)].numpy())
    masks = []
    for k in range(n):
        y = draw(torch.full_like(img[:, :1], 0.5), None, k, None)
        for step in range(len(timesteps), 0, -1):
            index = torch.full((1,), step, device=img.device)
            t = torch.full((1,), timesteps[step - 1], device=img.device)
            probability = torch.sigmoid(network(y, t, img))
            predicted = probability if predicts_y0 else (y - probability).abs()
            if step == 1:
                masks.append((predicted > 0.5).float())
                break
            y = draw(published_mean(A, y, predicted, index), y, k, timesteps[step - 1])
    return torch.cat(masks)


@torch.no_grad()
def batched(
    network: Network,
    img: torch.Tensor,
    n: int,
    timesteps: Sequence[int],
    schedule: NoiseSchedule,
    *,
    predicts_y0: bool = False,
    draw: Draw = rand_less,
) -> torch.Tensor:
    """The same with all n masks in one batch and the coefficients as Python numbers."""
    A = [1.0, *schedule.alphas_cumprod[list(timesteps)].tolist()]
    rows = img.expand(n, *img.shape[1:])
    y = draw(torch.full_like(rows[:, :1], 0.5), None, 0, None)
    for step in range(len(timesteps), 0, -1):
        t = torch.full((n,), timesteps[step - 1], device=img.device)
        probability = torch.sigmoid(network(y, t, rows).float())
        predicted = probability if predicts_y0 else (y - probability).abs()
        if step == 1:
            y = (predicted > 0.5).to(img.dtype)
        else:
            sigma = (1 - A[step - 1]) / (1 - A[step])
            mean = (sigma * y + (1 - sigma) * predicted).to(img.dtype)
            y = draw(mean, y, 0, timesteps[step - 1])
    return y


def checkout_codes(folder: str) -> Path:
    """Where the published code lies in a checkout.

    Raises:
        FileNotFoundError: it is not a checkout.
    """
    codes = Path(folder, "codes")
    if not (codes / "scripts" / "script_util.py").is_file():
        raise FileNotFoundError(f"published must be a checkout of BerDiff, and {codes} has no scripts/script_util.py")
    return codes


def checkout(folder: str, state_dict: dict[str, torch.Tensor], steps: int) -> tuple[Any, Any]:
    """Network and diffusion of a checkout of the published code (github.com/takimailto/BerDiff), whose code is run.

    Args:
        folder: the checkout.
        state_dict: weights of ``UNet(**PUBLISHED)``.
        steps: sampling steps, a divisor of 1000.

    Raises:
        FileNotFoundError: it is not a checkout.
    """
    codes = checkout_codes(folder)
    sys.modules.setdefault("blobfile", ModuleType("blobfile"))  # imported there, for reading checkpoints only
    sys.path.insert(0, str(codes))
    try:
        from scripts.script_util import create_model_and_diffusion, model_and_diffusion_defaults  # type: ignore
    finally:
        sys.path.remove(str(codes))
    options = model_and_diffusion_defaults() | {
        "num_heads": 1,
        "attention_resolutions": "16",
        "noise_schedule": "cosine2",
        "timestep_respacing": f"ddimuni{steps}",
        "ltype": "mix",
        "mean_type": "epsilon",
        "rescale_timesteps": False,
        "use_scale_shift_norm": False,
    }
    network, diffusion = create_model_and_diffusion(**options)
    network.load_state_dict(state_dict)
    return network.eval(), diffusion


# ---------------------------------------------------------------------- training


class PublishedStep:
    """A step of the published recipe: float32, a forward pass for each term of the loss, one small operation after
    another, averages parameter by parameter.

    Args:
        model: is trained.
        forwards: 2; with 1, what both terms have in common is computed once, as anybody would who looks for speed.
    """

    def __init__(self, model: BerDiff, forwards: int = 2) -> None:
        self.model, self.forwards = model, forwards
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self.averages = [p.detach().clone() for p in model.parameters()]

    def __call__(self, img: torch.Tensor, y_0: torch.Tensor) -> None:
        t = torch.randint(self.model.schedule.timesteps, (len(img),), device=img.device)
        self._backward(img, y_0, t, torch.bernoulli(self.model.schedule.q_mean(y_0, t).float()))
        self.optimizer.step()
        self.optimizer.zero_grad()
        for average, parameter in zip(self.averages, self.model.parameters(), strict=True):
            average.mul_(0.9999).add_(parameter.detach(), alpha=1e-4)

    def gradients(self, img: torch.Tensor, y_0: torch.Tensor) -> torch.Tensor:
        """All gradients in one vector, at fixed timesteps and noise."""
        return fixed_gradients(self.model, self._backward, img, y_0)

    def _backward(self, img: torch.Tensor, y_0: torch.Tensor, t: torch.Tensor, y_t: torch.Tensor) -> None:
        schedule = self.model.schedule
        true = schedule.q_posterior_mean(y_0, y_t, t).float()
        probability = torch.sigmoid(self.model(y_t, t, img))
        predicted = (y_t - probability).abs()
        at_zero = t.view(-1, 1, 1, 1) == 0
        found = torch.where(at_zero, predicted, schedule.q_posterior_mean(predicted, y_t, t).float())
        if self.forwards == 2:
            probability = torch.sigmoid(self.model(y_t, t, img))
        bce = F.binary_cross_entropy(probability, (y_t - y_0).abs())
        loss = (bernoulli_kl(true, found).mean() + bce) / math.log(2)
        loss.backward()


def fixed_gradients(
    model: BerDiff, backward: Callable[..., None], img: torch.Tensor, y_0: torch.Tensor
) -> torch.Tensor:
    """What ``backward(img, y_0, t, y_t)`` leaves in the parameters, for a fixed t and y_t; cleared again."""
    t = torch.linspace(60, 940, len(img)).long().to(img.device)
    backward(img, y_0, t, ops.q_sample(y_0, t, rng.image_seeds(0, len(img)).to(img.device), model.schedule))
    found = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


# ---------------------------------------------------------------------- the loss


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
    alpha, A_prev = (table.to(t.device)[t].float().reshape(shape) for table in (schedule.alphas, A_prev))
    epsilon = (y_t - y_0).abs()
    bce = F.binary_cross_entropy_with_logits(logits, epsilon, reduction="none")
    predicted = (y_t - torch.sigmoid(logits)).abs()
    kl = bernoulli_kl(q_posterior(y_0, y_t, alpha, A_prev), q_posterior(predicted, y_t, alpha, A_prev))
    bits = (torch.where(t.reshape(shape) == 0, bce, kl) + bce) / math.log(2)
    return bits.flatten(1).mean(1)


# ---------------------------------------------------------------------- metrics, one pair after another


def distance(a: np.ndarray, b: np.ndarray) -> float:
    union = np.logical_or(a, b).sum()
    return 1 - np.logical_and(a, b).sum() / union if union else 0.0


def mean_distance(a: np.ndarray, b: np.ndarray) -> float:
    total = 0.0
    for x in a:
        for y in b:
            total += distance(x, y)
    return total / (len(a) * len(b))


def ged(raters: np.ndarray, samples: np.ndarray) -> float:
    """Of bool (R, H, W) and (n, H, W)."""
    within = mean_distance(raters, raters) + mean_distance(samples, samples)
    return 2 * mean_distance(raters, samples) - within


def hm_iou(raters: np.ndarray, samples: np.ndarray) -> float:
    """Of bool (R, H, W) and (n, H, W), n a multiple of R."""
    repeated = np.repeat(raters, len(samples) // len(raters), axis=0)
    distances = np.zeros((len(repeated), len(samples)))
    for i, x in enumerate(repeated):
        for j, y in enumerate(samples):
            distances[i, j] = distance(x, y)
    return float((1 - distances)[linear_sum_assignment(distances)].mean())
