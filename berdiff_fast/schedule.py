# SPDX-License-Identifier: Apache-2.0
"""Noise schedules, sub-sequences of timesteps, and the four numbers of every sampling step; all in float64.

Notation (docs/math.md): beta_t is the probability scale of one noising step, alpha_t = 1 - beta_t, A_t the product of
alpha_s for s <= t, A_{-1} = 1. Timestep 0 is one step of noise, as in the published code.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import torch

from berdiff_fast import checks, choices

#: Samplers: each is a rule to flip bits, see ``NoiseSchedule.step_table``.
METHODS = get_args(choices.Method)
#: Columns of ``NoiseSchedule.loss_table``: six for epsilon = 0, the same for epsilon = 1, and two weights.
LOSS_COLUMNS = (
    *("total_0", "ratio_0", "over_0", "under_0", "p_over_0", "p_under_0"),
    *("total_1", "ratio_1", "over_1", "under_1", "p_over_1", "p_under_1"),
    *("kl_weight", "bce_weight"),
)
#: Columns of one epsilon.
LOSS_CASE = LOSS_COLUMNS.index("total_1")
SPACINGS = get_args(choices.Spacing)

_OFFSET = 0.008
_MAX_BETA = 0.999


def _linear(timesteps: int) -> list[float]:
    scale = 1000 / timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64, device="cpu").tolist()


def _from_alpha_bar(alpha_bar: Callable[[float], float], timesteps: int) -> list[float]:
    return [min(1 - alpha_bar((t + 1) / timesteps) / alpha_bar(t / timesteps), _MAX_BETA) for t in range(timesteps)]


def _quarter_cosine(u: float) -> float:
    return math.cos((u + _OFFSET) / (1 + _OFFSET) * math.pi / 2)


_SCHEDULES: dict[str, Callable[[int], list[float]]] = {
    "linear": _linear,
    "cosine": lambda timesteps: _from_alpha_bar(_quarter_cosine, timesteps),
    "cosine2": lambda timesteps: _from_alpha_bar(lambda u: _quarter_cosine(u) ** 2, timesteps),
}


#: Tables are made of all of them, whatever a file asks for.
_MOST_TIMESTEPS = 10**6


class NoiseSchedule:
    """The Bernoulli forward process: q(y_t | y_0) = B(A_t y_0 + (1 - A_t) / 2) (BerDiff, eq. 2).

    Args:
        name: the published names. "cosine2" is cos^2 with s = 0.008 and beta <= 0.999, the paper's. "cosine" is the
            same without the square. "linear" is Ho et al.'s, scaled to the number of timesteps. (MONAI's "cosine"
            is cos^2 shifted by one timestep: its A_t is our A_{t-1}, so its first timestep has no noise.)
        timesteps: T, from 2 to a million.
        input_scale: b multiplies the odds A_t / (1 - A_t) by b^2: below 1 there is more noise at every timestep (input
            scaling, Chen, arXiv 2301.10972; found to help on LIDC with Gaussian noise, arXiv 2504.05977).
        as_released: reproduce a fault of the published code, whose forward process drops the term (1 - A_t) / 2,
            so that background is never noised. For comparisons only; it changes ``flip_probability`` and nothing else.

    Attributes:
        betas, alphas, alphas_cumprod: (T,) float64 on the CPU; alphas_cumprod[t] = A_t.

    Raises:
        ValueError: an unknown name, fewer than 2 timesteps.
        TypeError: timesteps is not an int.
    """

    def __init__(
        self,
        name: str = "cosine2",
        timesteps: int = 1000,
        *,
        input_scale: float = 1.0,
        as_released: bool = False,
    ) -> None:
        if name not in _SCHEDULES:
            raise ValueError(f"name must be one of {sorted(_SCHEDULES)}, got {name!r}")
        timesteps = checks.integer("timesteps", timesteps, 2)
        if timesteps > _MOST_TIMESTEPS:
            raise ValueError(f"timesteps must be at most {_MOST_TIMESTEPS:,}, got {timesteps}")
        if isinstance(input_scale, bool) or not isinstance(input_scale, (int, float)) or not 0 < input_scale < math.inf:
            raise ValueError(f"input_scale must be a finite number above 0, got {input_scale!r}")
        betas = torch.tensor(_SCHEDULES[name](timesteps), dtype=torch.float64, device="cpu")
        if input_scale != 1:
            A = torch.cumprod(1 - betas, dim=0)
            A = input_scale**2 * A / ((input_scale**2 - 1) * A + 1)
            betas = 1 - A / torch.cat([A.new_ones(1), A[:-1]])
        self._build(name, betas, as_released, float(input_scale))

    @classmethod
    def from_betas(cls, betas: torch.Tensor | Sequence[float], *, as_released: bool = False) -> NoiseSchedule:
        """A schedule of one's own: betas (T,), each in (0, 1)."""
        try:
            betas = torch.as_tensor(betas, dtype=torch.float64).detach().cpu().clone()
        except (TypeError, ValueError):
            raise TypeError(f"betas must be a tensor or a sequence of floats, got {type(betas).__name__}") from None
        if betas.ndim != 1 or len(betas) < 2:
            raise ValueError(f"betas must be one-dimensional with at least 2 entries, got shape {tuple(betas.shape)}")
        schedule = cls.__new__(cls)
        schedule._build("custom", betas, as_released)
        return schedule

    def _build(self, name: str, betas: torch.Tensor, as_released: bool, input_scale: float = 1.0) -> None:
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(
                f"every beta must lie strictly between 0 and 1; those of schedule {name!r} with {len(betas)} timesteps "
                f"reach from {betas.min():g} to {betas.max():g}"
            )
        self.name = name
        self.timesteps = len(betas)
        self.as_released = as_released
        self.input_scale = input_scale
        self.betas = betas
        self.alphas = 1.0 - betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        keep = (1 - self.alphas_cumprod) / 2
        # Probability to flip a 0 and a 1.
        flips = (torch.zeros_like(keep), 2 * keep) if as_released else (keep, keep)
        self._flip = torch.stack(flips, dim=1).float()
        self._flip_on: dict[torch.device, torch.Tensor] = {}
        self._loss_on: dict[tuple[Any, ...], torch.Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_flip_on": {}, "_loss_on": {}}  # copies on devices do not travel

    def __repr__(self) -> str:
        scale = f", input_scale={self.input_scale:g}" if self.input_scale != 1 else ""
        released = ", as_released=True" if self.as_released else ""
        return f"NoiseSchedule({self.name!r}, {self.timesteps}{scale}{released})"

    def to_config(self) -> dict[str, Any]:
        """What ``from_config`` needs to build this schedule again; JSON-able."""
        config: dict[str, Any] = {"name": self.name, "timesteps": self.timesteps, "as_released": self.as_released}
        if self.input_scale != 1:
            config["input_scale"] = self.input_scale
        if self.name == "custom":
            config["betas"] = self.betas.tolist()
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NoiseSchedule:
        """The schedule that ``to_config`` described."""
        if config["name"] == "custom":
            return cls.from_betas(config["betas"], as_released=config.get("as_released", False))
        options = {name: config[name] for name in ("as_released", "input_scale") if name in config}
        return cls(config["name"], config["timesteps"], **options)

    # ------------------------------------------------------------------ timesteps

    def subsequence(self, steps: int | Sequence[int] = 10, spacing: str = "uniform") -> list[int]:
        """The timesteps that a sampler visits, ascending.

        Args:
            steps: how many, or an explicit collection of distinct timesteps in [0, T).
            spacing: "uniform": every s-th timestep from 0 on, s the smallest stride that gives this number (the
                published "ddimuni"; with 10 steps of 1000 it starts at t = 900). "quadratic": floor(x^2) for x evenly
                spaced to sqrt(0.8 T) (the published "ddimqua"). "trailing": evenly spaced, ending at T - 1 (Lin et al.,
                arXiv 2305.08891), so that sampling starts where y_t is noise. "trailing-quadratic": T (1 - (i / S)^2)
                - 1 for i = 0, 1, ... S - 1, and at least one apart: also from T - 1, but closer together the more noise
                there is, where the pixels have to settle on one mask (docs/training.md). A single step is at T - 1
                with each of them.

        Returns:
            ``steps`` distinct ints, ascending.

        Raises:
            ValueError: more steps than timesteps, a number that the spacing cannot give, a timestep out of range or
                twice, an unknown spacing.
            TypeError: steps is neither an int nor a sequence of ints.
        """
        T = self.timesteps
        if spacing not in SPACINGS:
            raise ValueError(f"spacing must be one of {list(SPACINGS)}, got {spacing!r}")
        if not isinstance(steps, (int, np.integer)) or isinstance(steps, bool):
            return self._explicit(steps)
        steps = checks.integer("steps", steps, 1)
        if steps > T:
            raise ValueError(f"steps must be at most the schedule's {T} timesteps, got {steps}")
        if steps == 1:  # the one at which y_t is noise, as it is where sampling starts
            return [T - 1]
        if spacing == "uniform":
            for stride in range(1, T):
                taken = range(0, T, stride)
                if len(taken) == steps:
                    return list(taken)
            raise ValueError(
                f"spacing 'uniform' cannot visit exactly {steps} of {T} timesteps with one stride; "
                "use spacing='trailing' or another number of steps"
            )
        if spacing == "quadratic":
            end = math.sqrt(T * 0.8)
            squares = torch.linspace(0, end, steps, dtype=torch.float64, device="cpu") ** 2
            found = sorted({int(x) for x in squares.tolist()})
            if len(found) != steps:
                raise ValueError(
                    f"spacing 'quadratic' with steps={steps} falls on {len(found)} distinct timesteps of {T}; "
                    f"use steps={len(found)} or fewer, or another spacing"
                )
            return found
        power = 2 if spacing == "trailing-quadratic" else 1
        found = [T]
        for i in range(steps):
            found.append(min(round(T - T * i**power / steps**power), found[-1]) - 1)
        return found[:0:-1]

    def _explicit(self, steps: Any) -> list[int]:
        try:
            given = list(steps)
            if isinstance(steps, (str, bytes)) or any(isinstance(t, (bool, np.bool_)) for t in given):
                raise TypeError
            found = [operator.index(t) for t in given]
        except TypeError:
            raise TypeError(f"steps must be an int or a sequence of ints, got {steps!r}") from None
        if not found:
            raise ValueError("steps must name at least one timestep, got an empty sequence")
        for t in found:
            if not 0 <= t < self.timesteps:
                raise ValueError(f"steps: every timestep must be in [0, {self.timesteps}), got {t}")
        if len(set(found)) != len(found):
            raise ValueError("steps: every timestep may appear once")
        return sorted(found)

    # ------------------------------------------------------------------ the sampling rule

    def step_table(
        self, timesteps: Sequence[int], method: str = "ddim", *, leave_one_out: bool = False
    ) -> torch.Tensor:
        """P, Q, R, S of each step: a bit is flipped when u (R + S E) < P + Q E, E = exp(-z) (DESIGN, section 2).

        Args:
            timesteps: ascending, as from ``subsequence``.
            method: "ddim" (the published sampler), "ddpm" (ancestral; the predicted probability is plugged into the
                posterior, as in the paper) or "d3pm" (ancestral; y_0 marginalised: the exact reverse of a network that
                predicts P(y_0 | y_t)).
            leave_one_out: add log((1 + A_t) / (1 - A_t)) to the logit, which turns P(epsilon | y_t) into its
                leave-one-out version (arXiv 2605.22765); it only rescales Q and S. "ddpm" with it is "d3pm".

        Returns:
            (S, 4) float64; row s belongs to timesteps[s]. Row 0, the last step drawn, flips with P(epsilon = 1) for
            every method, as the published code does.

        Raises:
            ValueError: an unknown method, or timesteps that are not ascending in [0, T).
        """
        if method not in METHODS:
            raise ValueError(f"method must be one of {list(METHODS)}, got {method!r}")
        taus = list(timesteps)
        if not taus or any(a >= b for a, b in pairwise(taus)) or taus[0] < 0 or taus[-1] >= self.timesteps:
            raise ValueError(
                f"timesteps must be ascending and in [0, {self.timesteps}), as subsequence gives them, got {taus}"
            )
        A = self.alphas_cumprod[torch.tensor(taus, device="cpu")]
        A_prev = torch.cat([A.new_ones(1), A[:-1]])
        alpha = A / A_prev
        zero, one = torch.zeros_like(A), torch.ones_like(A)
        if method == "ddim":
            sigma = (1 - A_prev) / (1 - A)
            rows = [1 - sigma, zero, one, one]
        else:
            b, k, c = (1 - alpha) / 2, (1 + alpha) / 2, (1 - A_prev) / 2
            P, Q = b * (A_prev + c), b * c
            R, S = P + k * c, Q + k * (A_prev + c)
            rows = [P, Q, R, S] if method == "ddpm" else [P / R, Q / S, one, one]
        table = torch.stack(rows, dim=1)
        table[0] = torch.tensor([1.0, 0.0, 1.0, 1.0], device="cpu")
        if leave_one_out:
            table[1:, 1::2] *= ((1 - A) / (1 + A))[1:, None]
        return table

    # ------------------------------------------------------------------ the training loss

    def loss_table(
        self, *, kl_weight: float = 1.0, bce_weight: float = 1.0, leave_one_out: bool = False
    ) -> torch.Tensor:
        """What the loss needs to know of each timestep: one row of ``LOSS_COLUMNS`` (docs/math.md, "Loss").

        With w the probability that the network gives to the wrong epsilon, a step flips with probability N / D, both
        linear in w, and so is M = D - N. Of the two outcomes, to flip and to stay, the network makes one likelier than
        it is ("over") and one less likely ("under"). Divided by their values at w = 0: D is 1 - w + total w, the N or M
        of "under" is 1 - w + ratio w, and predicted / true probability is 1 + over w / D and 1 + under w / D. The true
        ones are p_over and p_under. Weights come in bits.

        Args:
            kl_weight, bce_weight: of the two terms (BerDiff, eq. 8: 1 and lambda). At t = 0 the KL term is the
                decoder's negative log-likelihood, which is the BCE.
            leave_one_out: the logit's leave-one-out shift inside the KL term (arXiv 2605.22765), with which both terms
                have the same minimum, P(epsilon | y_t).

        Returns:
            (T, 14) float64.
        """
        A = self.alphas_cumprod
        A_prev = torch.cat([A.new_ones(1), A[:-1]])
        b, k, c = (1 - self.alphas) / 2, (1 + self.alphas) / 2, (1 - A_prev) / 2
        shift = (1 - A) / (1 + A) if leave_one_out else torch.ones_like(A)
        # Of the ddpm row of ``step_table``: P and Q, what R and S have besides, and P S - Q R, which rounding would
        # spoil: A_prev + 2 c = 1.
        P, Q, P_not, Q_not = b * (A_prev + c), b * c * shift, k * c, k * (A_prev + c) * shift
        R, S = P + P_not, Q + Q_not
        determinant = b * k * A_prev * shift
        zero = [R / S, P_not / Q_not, determinant / (Q * S), -determinant / (Q_not * S), Q / S, Q_not / S]
        one = [S / R, Q / P, determinant / (P_not * R), -determinant / (P * R), P_not / R, P / R]
        bits = torch.full_like(A, 1 / math.log(2))
        table = torch.stack([*zero, *one, bits * kl_weight, bits * bce_weight], dim=1)
        # No KL at t = 0: numbers that are harmless, weight nothing, and leave the decoder's likelihood to the BCE.
        table[0] = torch.tensor([1, 1, 0, 0, 0.5, 0.5] * 2 + [0, 0], dtype=torch.float64)
        table[0, -1] = (kl_weight + bce_weight) / math.log(2)
        return table

    def loss_rows(
        self, t: torch.Tensor, *, kl_weight: float = 1.0, bce_weight: float = 1.0, leave_one_out: bool = False
    ) -> torch.Tensor:
        """Rows of ``loss_table`` for timesteps t (N,) int64, on the device of t: (N, 14) float64.

        The first call on a GPU copies a table there: make it before a graph is captured.
        """
        key = (float(kl_weight), float(bce_weight), bool(leave_one_out), t.device)
        table = self._loss_on.get(key)
        if table is None:
            table = self.loss_table(kl_weight=kl_weight, bce_weight=bce_weight, leave_one_out=leave_one_out)
            table = table.to(t.device)
            if type(table) is torch.Tensor:  # a tracer's fake must not outlive its trace
                self._loss_on[key] = table
        return table.index_select(0, t)

    # ------------------------------------------------------------------ the forward process

    def flip_probability(self, t: torch.Tensor) -> torch.Tensor:
        """Probability that noising to timestep t flips a 0, and a 1: (1 - A_t) / 2 both, unless ``as_released``.

        Args:
            t: (N,) int64, on any device.

        Returns:
            (N, 2) float32 on the device of ``t``. The first call on a GPU copies a table there: make it before a graph
            is captured.
        """
        table = self._flip_on.get(t.device)
        if table is None:
            table = self._flip.to(t.device)
            if type(table) is torch.Tensor:  # a tracer's fake must not outlive its trace
                self._flip_on[t.device] = table
        return table.index_select(0, t)

    def q_mean(self, y_0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """P(y_t = 1 | y_0) in float64: A_t y_0 + (1 - A_t) / 2 (BerDiff, eq. 2); (N, ...) for t of (N,)."""
        flip = torch.stack(
            [torch.zeros_like(self.alphas_cumprod), 1 - self.alphas_cumprod]
            if self.as_released
            else [(1 - self.alphas_cumprod) / 2] * 2
        )
        zero, one = (_column(f, t, y_0) for f in flip)
        y_0 = y_0.double()
        return (1 - y_0) * zero + y_0 * (1 - one)

    def q_posterior_mean(self, y_0: torch.Tensor, y_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """P(y_{t-1} = 1 | y_t, y_0) in float64 (BerDiff, eq. 4); y_0 may be a probability that is plugged in.

        Args:
            y_0, y_t: (N, ...), in [0, 1].
            t: (N,) int64. At t = 0 there is no noise left, and the result is y_0 where y_0 is a bit.
        """
        A_prev = torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod[:-1]])
        y_0, y_t = y_0.double(), y_t.double()
        alpha, A = _column(self.alphas, t, y_0), _column(A_prev, t, y_0)
        one = (alpha * y_t + (1 - alpha) / 2) * (A * y_0 + (1 - A) / 2)
        zero = (alpha * (1 - y_t) + (1 - alpha) / 2) * (A * (1 - y_0) + (1 - A) / 2)
        return one / (one + zero)


def _column(table: torch.Tensor, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    values = table.to(t.device)[t]
    return values.reshape(-1, *[1] * (like.ndim - 1))
