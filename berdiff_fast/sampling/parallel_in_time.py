# SPDX-License-Identifier: Apache-2.0
"""Sampling that is parallel in time: many steps of a trajectory in one call of the network, and the same masks.

The uniform numbers of a step are a function of counters (docs/draw.md), so a trajectory x_0, x_1, ..., x_S (x_0 the
noise, x_S the mask) is the fixed point of a deterministic map: x_{s+1} = draw_s(x_s, network(x_s)). After ParaDiGMS
(Shih et al., "Parallel sampling of diffusion models", arXiv 2305.16317) a window of steps is guessed, predicted in one
batch, and drawn again, until nothing changes. Three things differ from there:

* States are bits, so "no longer changes" is equality, not a tolerance: the result is the sequential sampler's.
* Drawing is cheap and the network dear. So a round draws the window's steps one after the other, each from the state
  *just drawn*, with the y_0 that the network predicted from the state guessed before. (ParaDiGMS adds up the drifts of
  a window, which does the same for Gaussian noise. Drawn from the guessed state, the news of a changed bit would travel
  one step a round, and most of the gain would be lost: docs/performance.md counts the rounds.)
* Drawing on with the last prediction guesses the steps that come into the window. So the first round has one step only.

A state is *settled* when it is the sequential sampler's. The first one of a window always is. If the ones after it were
drawn as they had been guessed, the network was asked about the true states, and so the state after them is settled,
too. Every round settles one step at least; S rounds are the most there can be.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from berdiff_fast import ops
from berdiff_fast.sampling import arguments
from berdiff_fast.sampling.chunks import Chunk
from berdiff_fast.sampling.denoisers import Denoiser
from berdiff_fast.sampling.loop import Trajectory
from berdiff_fast.sampling.plan import Plan

logger = logging.getLogger("berdiff_fast")

#: The network's logits of P(y_0 = 1) for states of steps first, ..., last - 1: ``predict(states, slice(first, last))``.
#: States and logits are (steps * rows, K, *spatial), the rows of a step beside each other.
Predict = Callable[[torch.Tensor, slice], torch.Tensor]
#: The next state: ``draw(state, logits, step, flag)``, which sets the flag, (1,) int32, where a logit is NaN.
Draw = Callable[[torch.Tensor, torch.Tensor, int, torch.Tensor], torch.Tensor]


def trajectory(
    noise: torch.Tensor,
    steps: int,
    window: int,
    predict: Predict,
    draw: Draw,
    flags: torch.Tensor,
    advance: Callable[[int], object],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs all steps of some masks. The host waits for the device once a round, for the number of settled steps.

    Args:
        noise: (rows, K, *spatial), the first state.
        steps: S.
        window: how many steps go through the network together, at most.
        predict, draw: see there.
        flags: (S,) int32, one a step, set where a logit is NaN. One that was predicted from a wrong guess sets none.
        advance: is told of each round's settled steps, times rows.

    Returns:
        The last state; the one before it; and what was predicted from that. The log tells, at level DEBUG, how many
        calls of the network there were, and how many states they predicted from (of each mask).
    """
    rows, first, calls, predicted = len(noise), 0, 0, 0
    guesses = [noise]  # of the states of steps first, first + 1, ...; the first one is settled
    while True:
        count = len(guesses)
        calls, predicted = calls + 1, predicted + count
        logits = predict(torch.cat(guesses), slice(first, first + count)).split(rows)
        raised = flags.new_zeros(count)
        drawn = [guesses[0]]
        for i in range(count):
            drawn.append(draw(drawn[i], logits[i], first + i, raised[i : i + 1]))
        settled = 1 + _unchanged(guesses[1:], drawn[1:count])
        flags[first : first + settled].logical_or_(raised[:settled])
        first += settled
        advance(settled * rows)
        if first == steps:
            logger.debug("parallel in time: %d steps in %d calls of the network, %d states", steps, calls, predicted)
            return drawn[-1], drawn[-2], logits[-1]
        # The window slides on to the state that was just settled, and is filled up by drawing on.
        drawn = drawn[settled:]
        size = min(window, steps - first)
        while len(drawn) < size:
            drawn.append(draw(drawn[-1], logits[-1], first + len(drawn) - 1, raised[:1]))
        guesses = drawn[:size]


def _unchanged(before: list[torch.Tensor], after: list[torch.Tensor]) -> int:
    """How many states at the beginning of a list are equal, bit by bit, to those of another."""
    if not before:
        return 0
    equal = (torch.stack(before) == torch.stack(after)).flatten(1).all(1)
    return int(equal.cumprod(0).sum())


def draw_masks(
    plan: Plan,
    coefficients: torch.Tensor,
    denoiser: Denoiser,
    chunk: Chunk,
    flags: torch.Tensor,
    window: int,
    return_probability: bool = False,
    advance: Callable[[int], object] = lambda mask_steps: None,
) -> Trajectory:
    """Draw the masks of a chunk, up to ``window`` steps of each in one call of the network.

    Arguments, result and masks are those of ``loop.draw_masks``; logits of the result are of y_0.
    """
    condition = denoiser.condition(chunk.img, chunk.images_of_rows)
    rule: dict[str, Any] = dict(prediction="y_0", backend=plan.backend)

    def predict(states: torch.Tensor, steps: slice) -> torch.Tensor:
        logits = denoiser(states, steps, condition)
        if steps.start == 0:
            arguments.check_logits(logits, states)
        # y_0 = y_t xor epsilon; the rule turns the sign back, so that the bits are those of epsilon's logits.
        return torch.where(states == 0, logits, -logits) if plan.prediction == "epsilon" else logits

    def draw(y: torch.Tensor, logits: torch.Tensor, step: int, flag: torch.Tensor) -> torch.Tensor:
        return ops.sample_step(
            y,
            logits,
            chunk.seeds,
            coefficients[step],
            plan.timesteps[step],
            threshold=plan.threshold(step),
            dtype=plan.dtype(step, y.dtype),
            nan_flag=flag,
            **rule,
            **chunk.numbering,
        )

    noise = ops.initial_noise(
        chunk.seeds, chunk.mask_shape, rows=chunk.rows, dtype=chunk.img.dtype, backend=plan.backend, **chunk.numbering
    )
    masks, state, logits = trajectory(noise, len(plan.timesteps), window, predict, draw, flags, advance)
    probability = ops.posterior(state, logits, coefficients[plan.last], **rule) if return_probability else None
    return Trajectory(masks, state, logits, "y_0", probability)
