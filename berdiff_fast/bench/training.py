# SPDX-License-Identifier: Apache-2.0
"""A training step: noise, network, loss, gradients, optimiser and averages, from a batch that is at hand."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import berdiff_fast as bf
from berdiff_fast import ops
from berdiff_fast.bench import baselines
from berdiff_fast.bench.runner import Case, Contender, Made, assert_close

#: For a CPU: two levels, 1.9 GFLOP a forward pass of one mask.
SMALL = dict(model_channels=32, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[], num_heads=1)


def case(device: str) -> Case:
    """The published recipe, which runs the network twice a step, and what the trainer does."""
    gpu = device == "cuda"
    batch, size, config = (128, 128, baselines.PUBLISHED) if gpu else (8, 64, SMALL)

    def contenders() -> Made:
        generator = torch.Generator(device).manual_seed(0)
        img = torch.randn(batch, 1, size, size, device=device, generator=generator)
        y_0 = (torch.rand(img.shape, device=device, generator=generator) < 0.1).float()
        few = (img[:4], y_0[:4])

        @functools.cache
        def expected() -> torch.Tensor:
            return baselines.PublishedStep(_model(config, device)).gradients(*few)

        def contender(name: str, step: Any, rtol: float, **options: Any) -> Contender:
            return Contender(
                name,
                functools.partial(step, img, y_0),
                lambda: assert_close(step.gradients(*few), expected(), rtol),
                **options,
            )

        yield contender(
            "plain PyTorch, two forwards (published)", baselines.PublishedStep(_model(config, device)), 1e-4
        )
        once = baselines.PublishedStep(_model(config, device), forwards=1)
        yield contender("plain PyTorch, one forward", once, 1e-4)
        yield contender("ours", Step(_model(config, device)), 1e-2, ours=True)
        last = Step(_model(config, device), channels_last=True)
        yield contender("ours, channels last", last, 1e-2, ours=True)
        if gpu:
            half = Step(_model(config, device), channels_last=True, dtype=torch.bfloat16)
            yield contender("ours, channels last, bfloat16", half, 0.1, ours=True)

    name = f"training step, {batch} images of {size} x {size}, {'published' if gpu else 'small'} U-Net"
    return Case(name, "training", contenders, "plain PyTorch, two forwards (published)", "images", batch)


def _model(config: dict[str, Any], device: str) -> bf.BerDiff:
    torch.manual_seed(0)
    network = bf.UNet(**config)
    with torch.no_grad():
        for p in network.parameters():  # zeros would keep gradients from most of the network
            p.add_(torch.randn_like(p) * 0.02)
    return bf.BerDiff(network, prediction="epsilon").to(device)


class Step:
    """What ``training.loop`` does in a step, data loading apart."""

    def __init__(self, model: bf.BerDiff, *, channels_last: bool = False, dtype: torch.dtype | None = None) -> None:
        self.model, self.dtype = model, dtype
        if channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        gpu = next(model.parameters()).is_cuda
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=gpu, foreach=not gpu)
        self.average = AveragedModel(model.network, multi_avg_fn=get_ema_multi_avg_fn(0.9999))
        self.seed = 0

    def __call__(self, img: torch.Tensor, y_0: torch.Tensor) -> None:
        self.seed += 1
        t = torch.randint(self.model.schedule.timesteps, (len(img),), device=img.device)
        self._backward(img, y_0, t, ops.q_sample(y_0, t, self._seeds(img), self.model.schedule))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update_parameters(self.model.network)

    def gradients(self, img: torch.Tensor, y_0: torch.Tensor) -> torch.Tensor:
        """All gradients in one vector, at fixed timesteps and noise."""
        return baselines.fixed_gradients(self.model, self._backward, img, y_0)

    def _seeds(self, img: torch.Tensor) -> torch.Tensor:
        return bf.image_seeds(self.seed, len(img)).to(img.device, non_blocking=True)

    def _backward(self, img: torch.Tensor, y_0: torch.Tensor, t: torch.Tensor, y_t: torch.Tensor) -> None:
        with torch.autocast(img.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            logits = self.model(y_t, t, img)
        ops.diffusion_loss(logits, y_t, y_0, t, self.model.schedule).mean().backward()
