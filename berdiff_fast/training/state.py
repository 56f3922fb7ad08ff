# SPDX-License-Identifier: Apache-2.0
"""What a training run is made of: network, averages, optimiser, position; saved and restored as one thing."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from berdiff_fast.model import BerDiff
from berdiff_fast.network.prior import ModePrior
from berdiff_fast.training.average import Average
from berdiff_fast.training.config import TrainConfig


class MisfitError(ValueError):
    """The tensors are not those of this run."""


class RunState:
    """All that a run changes while it trains, and therefore all that a checkpoint holds.

    Args:
        config: the run.
        model: the model to be trained, on its device.
        scaler: of gradients in fp16; None for other precisions.

    Attributes:
        step: how many optimiser steps are done.
        model: with the weights as they are trained.
        averages: the running averages of the network's weights and, of a model that has one, of the mode prior's.
        optimizer: AdamW over both; a group of parameters each.
        best: the least validation GED so far and its step, as ``best_ged`` and ``best_step``; the least cross-entropy
            of the mode prior, as ``best_prior`` and ``best_prior_step``.
        best_prior: the averaged mode prior of that validation, or None.
    """

    def __init__(self, config: TrainConfig, model: BerDiff, scaler: Any = None) -> None:
        optimiser, prior = config.optimiser, model.mode_prior
        self.step = 0
        self.model = model
        self.scaler = scaler
        self.best: dict[str, float] = {}
        groups: list[dict[str, Any]] = [{"params": list(model.network.parameters())}]
        if prior is not None:
            groups.append({"params": list(prior.parameters()), "weight_decay": config.prior.weight_decay})
        self.parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=optimiser.learning_rate,
            betas=(0.9, optimiser.beta2),
            weight_decay=optimiser.weight_decay,
            fused=self.parameters[0].device.type in ("cpu", "cuda"),
        )
        self.averages = [Average(model.network, optimiser.ema_decay)]
        self.best_prior: ModePrior | None = None
        if prior is not None:
            self.averages.append(Average(prior, config.prior.ema_decay))
            self.best_prior = copy.deepcopy(prior)

    def set_rates(self, config: TrainConfig) -> float:
        """Set the learning rates of the step to come; the network's is returned."""
        rates = config.learning_rate_at(self.step), config.prior_rate_at(self.step)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=False):
            group["lr"] = rate
        return rates[0]

    @property
    def averaged(self) -> BerDiff:
        """The model with averaged weights, which it shares: what is validated and saved for use."""
        network, *prior = (average.model.module for average in self.averages)
        return self.model.with_weights(network, prior[0] if prior else None)  # type: ignore[arg-type]

    def note_validation(self, numbers: Mapping[str, float]) -> bool:
        """Take the numbers of a validation into account; whether its GED is the least so far."""
        if numbers and self.best_prior is not None and numbers["prior_cross_entropy"] < self._least("best_prior"):
            self.best |= {"best_prior": numbers["prior_cross_entropy"], "best_prior_step": self.step}
            self.best_prior.load_state_dict(self.averages[1].model.module.state_dict())
        better = bool(numbers) and numbers["ged"] < self._least("best_ged")
        if better:
            self.best |= {"best_ged": numbers["ged"], "best_step": self.step}
        return better

    def put_best_prior(self, averaged: BerDiff, config: TrainConfig) -> None:
        """Give a model the mode prior of its best validation, if there was one and ``prior.keep_best`` wants it."""
        if config.prior.keep_best and "best_prior" in self.best:
            averaged.mode_prior = self.best_prior

    def _least(self, name: str) -> float:
        return self.best.get(name, float("inf"))

    def _modules(self) -> dict[str, nn.Module]:
        """Modules by the prefix that their tensors have in a checkpoint."""
        modules = {"network": self.model.network, "ema": self.averages[0].model}
        if self.model.mode_prior is not None and self.best_prior is not None:
            modules |= {"prior": self.model.mode_prior, "prior_ema": self.averages[1].model}
            modules["prior_best"] = self.best_prior
        return modules

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the state by name, where they lie."""
        tensors = {f"{prefix}.{k}": v for prefix, m in self._modules().items() for k, v in m.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
        return tensors

    def numbers(self) -> dict[str, Any]:
        """The rest of the state, as JSON has it."""
        return {**self.best, "scaler": self.scaler.state_dict() if self.scaler is not None else {}}

    def load(self, step: int, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Take the state that ``tensors`` and ``numbers`` were read of, after ``step`` steps.

        Raises:
            MisfitError: the tensors are of another architecture or optimiser; what is loaded by then stays loaded.
        """

        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}

        try:
            for prefix, module in self._modules().items():
                module.load_state_dict(part(prefix))
        except RuntimeError as error:
            raise MisfitError(f"is of another architecture: {' '.join(str(error).split())}") from None
        self._load_optimizer(part("optimizer"))
        self.best = {k: v for k, v in numbers.items() if k != "scaler"}
        if self.scaler is not None and "scaler" in numbers:
            self.scaler.load_state_dict(numbers["scaler"])
        self.step = step

    def _load_optimizer(self, tensors: Mapping[str, torch.Tensor]) -> None:
        parameters = self.parameters
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            index, _, key = name.partition(".")
            fits = index.isdecimal() and int(index) < len(parameters)
            if not fits or tensor.shape not in ((), parameters[int(index)].shape):
                raise MisfitError(f"has a state of another optimizer: optimizer.{name} {tuple(tensor.shape)}")
            if tensor.shape == (parameter := parameters[int(index)]).shape:
                # In the parameter's order in memory (channels last?): AdamW's fused kernel goes by addresses alone.
                tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
            state.setdefault(int(index), {})[key] = tensor
        if len({frozenset(of) for of in state.values()}) > 1 or len(state) not in (0, len(parameters)):
            raise MisfitError("lacks a part of the optimizer's state")
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
