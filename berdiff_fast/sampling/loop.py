# SPDX-License-Identifier: Apache-2.0
"""The algorithm: BerDiff's second one ("sampling"), on a sub-sequence of the timesteps.

::

    y_T ~ Bernoulli(1/2)                                        initial_noise
    for t in timesteps, the largest first:
        z   = network(y_t, t, x)                                denoiser
        p_0 = P(y_0 = 1), from z and y_t                        sample_step ...
        y_s ~ Bernoulli(q(y_s = 1 | y_t, p_0)), s the next t    ... which draws it, too

``docs/math.md`` derives the four coefficients of a step, and ``docs/draw.md`` says which random bits are drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from berdiff_fast import ops
from berdiff_fast.sampling import arguments
from berdiff_fast.sampling.chunks import Chunk
from berdiff_fast.sampling.denoisers import Denoiser
from berdiff_fast.sampling.plan import Plan


@dataclass(frozen=True)
class Trajectory:
    """The end of it: masks, and what their last step was drawn from."""

    masks: torch.Tensor  # bool (rows, K, *spatial)
    state: torch.Tensor  # of the same shape: y_t of the last step
    logits: torch.Tensor  # what the network predicted from it
    prediction: str  # what these logits are of
    probability: torch.Tensor | None = None  # float32: P(y_0 = 1) of the last step, where asked for


def draw_masks(
    plan: Plan,
    coefficients: torch.Tensor,
    denoiser: Denoiser,
    chunk: Chunk,
    flags: torch.Tensor,
    return_probability: bool = False,
    advance: Callable[[int], object] = lambda mask_steps: None,
) -> Trajectory:
    """Draw the masks of a chunk, one step after another.

    Args:
        plan: the steps.
        coefficients: float32 (S, 4), the plan's table on the device.
        denoiser: the network.
        chunk: which masks, of which images.
        flags: int32 (S,) on the device: one is set where the network returned NaN at that step.
        return_probability: also P(y_0 = 1) of the last step.
        advance: is told of each step how many masks it was.

    Raises:
        ValueError, TypeError: the network returned something else than logits of the shape of y_t.
    """
    condition = denoiser.condition(chunk.img, chunk.images_of_rows)
    probability = None

    y = ops.initial_noise(
        chunk.seeds, chunk.mask_shape, rows=chunk.rows, dtype=chunk.img.dtype, backend=plan.backend, **chunk.numbering
    )
    for step, t in enumerate(plan.timesteps):
        state, logits = y, denoiser(y, step, condition)
        if step == 0:
            arguments.check_logits(logits, y)
        if step == plan.last and return_probability:
            probability = ops.posterior(y, logits, coefficients[step], prediction=plan.prediction, backend=plan.backend)
        y = ops.sample_step(
            y,
            logits,
            chunk.seeds,
            coefficients[step],
            t,
            prediction=plan.prediction,
            threshold=plan.threshold(step),
            dtype=plan.dtype(step, y.dtype),
            nan_flag=flags[step : step + 1],
            backend=plan.backend,
            **chunk.numbering,
        )
        advance(chunk.rows)
    return Trajectory(y, state, logits, plan.prediction, probability)
