# SPDX-License-Identifier: Apache-2.0
"""A scheduler for diffusers: its constructor, configuration and files around the steps of ``scheduling.py``.

    pip install "berdiff_fast[diffusers]"

>>> from berdiff_fast.integrations.diffusers import BernoulliScheduler
>>> scheduler = BernoulliScheduler(beta_schedule="cosine2", timestep_spacing="trailing")
>>> scheduler.set_timesteps(10)
>>> y = scheduler.initial_noise((4, 1, 64, 64), generator)
>>> for t in scheduler.timesteps:
...     y = scheduler.step(network(torch.cat([y, img], 1), t).sample, t, y, generator).prev_sample
"""

from __future__ import annotations

from collections.abc import Sequence

try:
    from diffusers import ConfigMixin, SchedulerMixin
    from diffusers.configuration_utils import register_to_config
except ImportError as error:
    raise ImportError(
        f'berdiff_fast.integrations.diffusers needs diffusers: pip install "berdiff_fast[diffusers]" ({error})'
    ) from None

from berdiff_fast.integrations.scheduling import BernoulliSteps, StepOutput, schedule_of
from berdiff_fast.schedule import NoiseSchedule

__all__ = ["BernoulliScheduler", "StepOutput"]


class BernoulliScheduler(BernoulliSteps, SchedulerMixin, ConfigMixin):
    """Bernoulli diffusion as a diffusers scheduler; ``config``, ``save_pretrained`` and ``from_pretrained`` are theirs.

    Masks are 0 and 1, the network's output is logits, and noise is uniform or comes from seeds: see ``step``,
    ``add_noise`` and ``initial_noise``.

    Args:
        num_train_timesteps: T, at least 2.
        beta_schedule: "cosine2" (the paper's), "cosine" or "linear"; see ``NoiseSchedule``.
        trained_betas: (T,) betas of one's own, each in (0, 1), instead of a name; a list, so that it can be saved.
        prediction_type: what the logits say: "epsilon", P(y_t xor y_0 = 1), or "y_0", P(y_0 = 1), which diffusers
            calls "sample".
        method: "ddim", "ddpm" or "d3pm"; see ``NoiseSchedule.step_table``.
        timestep_spacing: "uniform", "quadratic", "trailing" or "trailing-quadratic"; see ``NoiseSchedule.subsequence``.
        final: the last step: "threshold" or "sample".
        leave_one_out: shift the logit to its leave-one-out version; see ``NoiseSchedule.step_table``.
        input_scale: below 1 for more noise at every timestep; see ``NoiseSchedule``.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_schedule: str = "cosine2",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        method: str = "ddim",
        timestep_spacing: str = "uniform",
        final: str = "threshold",
        leave_one_out: bool = False,
        input_scale: float = 1.0,
    ) -> None:
        if trained_betas is None:
            schedule = schedule_of("beta_schedule", beta_schedule, num_train_timesteps, input_scale)
        elif input_scale != 1:
            raise ValueError(f"input_scale must be 1 with trained_betas, got {input_scale!r}")
        elif len(trained_betas) != num_train_timesteps:
            raise ValueError(
                f"trained_betas must be num_train_timesteps = {num_train_timesteps!r} numbers, got {len(trained_betas)}"
            )
        else:
            schedule = NoiseSchedule.from_betas(trained_betas)
        self._set_up(schedule, prediction_type, method, timestep_spacing, final, leave_one_out)
