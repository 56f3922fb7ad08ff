# SPDX-License-Identifier: Apache-2.0
"""The config of a training run: pure data, in sections, from which YAML files and the command line are derived.

Nothing here imports torch. ``training.setup`` makes models and schedules of a config, and checks it against data.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from berdiff_fast.training.fields import arrange, flatten
from berdiff_fast.training.sections import (
    FLAT,
    Augmentation,
    Data,
    Diffusion,
    Loss,
    Network,
    Optimiser,
    Prior,
    Records,
    Settings,
    Validation,
)
from berdiff_fast.training.yaml_files import bundled_configs, dump, read_yaml

__all__ = [
    "FLAT",
    "Augmentation",
    "Data",
    "Diffusion",
    "Loss",
    "Network",
    "Optimiser",
    "Prior",
    "Records",
    "TrainConfig",
    "Validation",
    "bundled_configs",
    "read_yaml",
]


@dataclass(frozen=True, init=False)
class TrainConfig(Settings):
    """A training run: its settings in sections, frozen, checked.

    A section is given as an object or a mapping, and a setting of it also by its flat name (``FLAT``):

    >>> TrainConfig(output="runs/a", network=Network(model_channels=64), optimiser={"steps": 100}).optimiser.steps
    100
    >>> TrainConfig(output="runs/a", model_channels=64, steps=100).network.model_channels
    64

    ``config.steps`` reads ``config.optimiser.steps``, and so on: scripts from before there were sections go on working.
    ``dataclasses.replace(config, steps=200)`` changes one setting.

    Raises:
        ValueError: an unknown name, for which the nearest is suggested, a value out of range, or values that do not fit
            each other; the message names the setting.
        TypeError: a value of another type.
    """

    def __init__(self, **values: Any) -> None:
        for name, value in arrange(Settings, FLAT, values).items():
            object.__setattr__(self, name, value)
        _check(self)

    if not TYPE_CHECKING:  # a type checker sees the sections alone

        def __getattr__(self, name):
            if name in FLAT:
                section, _, setting = FLAT[name].partition(".")
                return getattr(getattr(self, section), setting)
            raise AttributeError(f"{type(self).__name__!r} has no setting {name!r}")

    def learning_rate_at(self, step: int) -> float:
        """The rate of step 0, 1, ...: linear warm-up, then constant or half a cosine to 0."""
        return self._rate_at(step, self.optimiser.learning_rate, self.optimiser.steps)

    def prior_rate_at(self, step: int) -> float:
        """The mode prior's: the same, over its own steps."""
        return self._rate_at(step, self.prior.learning_rate, self.prior_last)

    @property
    def prior_last(self) -> int:
        """After how many steps the mode prior is left as it is."""
        return min(self.prior.steps or self.optimiser.steps, self.optimiser.steps)

    def _rate_at(self, step: int, peak: float, steps: int) -> float:
        warmup = self.optimiser.warmup
        if step < warmup:
            return peak * (step + 1) / warmup
        if self.optimiser.decay == "constant":
            return peak
        done = (step - warmup) / max(steps - warmup, 1)
        return peak * 0.5 * (1 + math.cos(math.pi * done))

    def to_dict(self) -> dict[str, Any]:
        """All settings by their flat names, as checkpoints keep them; ``from_dict`` of it is an equal run."""
        return flatten(self, FLAT)

    def to_yaml(self) -> str:
        """The file that ``--config`` reads back, in sections."""
        return dump(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """A run from a mapping: of sections, of flat names, or of both.

        Raises:
            ValueError, TypeError: as ``TrainConfig``.
        """
        return cls(**arrange(Settings, FLAT, values))


_LEAST = {
    1: (
        *("optimiser.steps", "optimiser.batch_size", "optimiser.accumulation"),
        *("validation.every", "validation.slices", "validation.samples", "validation.steps"),
        *("records.log_every", "records.checkpoint_every", "records.keep"),
    ),
    0: ("seed", "data.workers", "optimiser.warmup", "augmentation.crop", "augmentation.crop_steps", "prior.steps"),
}
_FINITE = (
    *("optimiser.learning_rate", "optimiser.weight_decay", "optimiser.clip", "loss.kl_weight", "loss.bce_weight"),
    *("augmentation.rotate", "augmentation.scale", "prior.weight", "prior.learning_rate", "prior.weight_decay"),
)
_BELOW_ONE = ("optimiser.ema_decay", "optimiser.beta2", "network.dropout", "prior.ema_decay")


def _check(config: TrainConfig) -> None:
    """Raise a ValueError where a value is out of range, or values do not fit each other."""

    def at(place: str) -> Any:
        return functools.reduce(getattr, place.split("."), config)

    for least, places in _LEAST.items():
        for place in places:
            if at(place) < least:
                raise ValueError(f"{place} must be at least {least}, got {at(place)}")
    for place in _FINITE:
        if not 0 <= at(place) < math.inf:
            raise ValueError(f"{place} must be a finite number of at least 0, got {at(place)}")
    for place in _BELOW_ONE:
        if not 0 <= at(place) < 1:
            raise ValueError(f"{place} must be in [0, 1), got {at(place)}")
    loss, optimiser, network, augmentation = config.loss, config.optimiser, config.network, config.augmentation
    if loss.kl_weight == loss.bce_weight == 0:
        raise ValueError("loss.kl_weight and loss.bce_weight must not both be 0")
    if optimiser.batch_size % optimiser.accumulation:
        raise ValueError(
            "optimiser.batch_size must be a multiple of accumulation, got "
            f"{optimiser.batch_size} and {optimiser.accumulation}"
        )
    if not config.records.project.strip():
        raise ValueError(f"records.project must be a name, got {config.records.project!r}")
    window = config.data.window
    if len(window) % 2:
        raise ValueError(f"data.window must be LOW HIGH, that of each channel, or nothing, got {list(window)}")
    if not all(-math.inf < low < high < math.inf for low, high in zip(window[::2], window[1::2], strict=True)):
        raise ValueError(f"data.window must be LOW HIGH with LOW below HIGH, got {list(window)}")
    if bool(window) != (config.data.scaling == "window") and config.data.scaling != "auto":
        raise ValueError(
            f"data.window must be given exactly with scaling 'window' (or 'auto'), got {list(window)} with "
            f"{config.data.scaling!r}"
        )
    if augmentation.crop % network.halvings:
        raise ValueError(
            f"augmentation.crop must be a multiple of {network.halvings}, which the network halves down to, got "
            f"{augmentation.crop}"
        )
    if network.output_crop and augmentation.crop:
        raise ValueError(
            "augmentation.crop must be 0 with network.output_crop, which trains on the window already and shows what "
            f"is around it; got {augmentation.crop}"
        )
    if augmentation.crop_steps and not augmentation.crop:
        raise ValueError(f"augmentation.crop_steps needs crop, which is 0; got {augmentation.crop_steps}")
