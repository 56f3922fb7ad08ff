# SPDX-License-Identifier: Apache-2.0
"""Training: noise a rater's mask, let the network say where the noise is, compare (BerDiff, algorithm 1).

Everything random is a function of the seed and the step, so a run that was stopped and started again ends with the same
weights as one that was not, and processes that share a batch do what one process would.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from berdiff_fast import ops, rng
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.files import write_text
from berdiff_fast.model import BerDiff
from berdiff_fast.training import checkpoints, feed, setup, trackers
from berdiff_fast.training.config import TrainConfig
from berdiff_fast.training.folder import run_folder
from berdiff_fast.training.precision import fast_arithmetic
from berdiff_fast.training.records import Records
from berdiff_fast.training.state import RunState
from berdiff_fast.training.stopping import agreed, stop_signal
from berdiff_fast.training.validate import validate


def train(config: TrainConfig) -> Path:
    """Train a model, or go on with the run in ``config.output``.

    The folder then holds ``model.safetensors`` (averaged weights, for ``bf.load``), ``best.safetensors`` (those with
    the lowest validation GED), ``checkpoints/``, ``config.yaml``, ``log.jsonl``, ``previews/``, and what trackers
    keep there (TensorBoard's files).

    Returns:
        The path of ``model.safetensors``; of the newest checkpoint if the run was stopped by SIGTERM.

    Raises:
        BusyError: another run is at work in ``config.output``.
        ValueError, FileNotFoundError: data, config or checkpoint that do not fit; see there.
        FloatingPointError: the loss is not finite.
    """
    if not config.output or not config.data.train:
        raise ValueError(f"{'output' if not config.output else 'data.train (--train-data)'} must be given, got ''")
    setup.check(config)
    trackers.check(config)
    slices, held_out = setup.read_data(config)
    setup.check_network(config, slices)
    accelerator = setup.accelerator(config)
    with run_folder(Path(config.output), accelerator):
        return _train(config, slices, held_out, accelerator)


def _train(config: TrainConfig, slices: RaterDataset, held_out: RaterDataset | None, accelerator: Accelerator) -> Path:
    """``train``, once the data are checked and the folder is ours alone."""
    output, folder = Path(config.output), Path(config.output) / "checkpoints"
    recipe, last, main = config.optimiser, config.optimiser.steps, accelerator.is_main_process

    # ------------------------------------------------------------ the model as it starts, or where a former run stopped
    model = setup.initial_model(config, slices, accelerator.device)
    state = RunState(config, model, accelerator.scaler)
    checkpoints.resume(folder, config, state)

    # ------------------------------------------------------------ batches, and modules that share work among processes
    batches = feed.batches(setup.training_examples(config, slices, model), config, state.step, accelerator)
    network = torch.compile(model.network) if recipe.compile else model.network
    network, optimizer = accelerator.prepare(network, state.optimizer)
    prior = None if model.mode_prior is None else accelerator.prepare(model.mode_prior)
    modules = [module.train() for module in (network, prior) if module is not None]
    averaged = state.averaged

    with (
        fast_arithmetic(config, accelerator.device),
        Records(output, config, state.step, enabled=main) as records,
        stop_signal() as stop,
    ):
        if main:
            checkpoints.prepare(folder)
            write_text(output / "config.yaml", config.to_yaml(), follow=False)
        while state.step < last:
            step, learn_prior = state.step, state.step < config.prior_last

            # ------------------------------------------------ one optimiser step, in one part or several
            rate = state.set_rates(config)
            norm = torch.zeros((), device=accelerator.device)
            noted = torch.zeros(() if prior is None else 2, device=accelerator.device)
            for part in range(recipe.accumulation):
                batch = next(batches)
                # For dropout; after the batch's making, which may draw from this generator too.
                number = (step * recipe.accumulation + part) * accelerator.num_processes + accelerator.process_index
                torch.manual_seed(rng.signed64(rng.splitmix64(config.seed, number + 1)))
                with accelerator.accumulate(*modules):
                    total, losses = _losses(config, model, network, prior if learn_prior else None, batch)
                    accelerator.backward(total)
                    if accelerator.sync_gradients and recipe.clip:
                        norm = accelerator.clip_grad_norm_(state.parameters, recipe.clip)
                    optimizer.step()
                    optimizer.zero_grad()
                    noted = noted + losses.detach() / recipe.accumulation
            for average in state.averages if learn_prior else state.averages[:1]:
                average.update()
            state.step = done = step + 1
            records.step(done, noted, norm, rate, accelerator)

            # ------------------------------------------------ validation, now and then
            if held_out is not None and (done % config.validation.every == 0 or done == last):
                numbers = validate(config, averaged, held_out, records, done, accelerator)
                if state.note_validation(numbers):
                    averaged.save(output / "best.safetensors", follow=False)

            # ------------------------------------------------ a checkpoint, now and then and before stopping
            stopped, path = agreed(stop, accelerator, done), folder
            if stopped or done % config.records.checkpoint_every == 0 or done == last:
                if main:
                    path = checkpoints.save(folder, config, state)
                accelerator.wait_for_everyone()
            if stopped and done < last:
                records.say(f"stopped after step {done} of {last}; the same command goes on from there")
                return path

        # ---------------------------------------------------- what the run was for
        if main:
            state.put_best_prior(averaged, config)
            averaged.save(output / "model.safetensors", follow=False)
    accelerator.wait_for_everyone()
    return output / "model.safetensors"


def _losses(
    config: TrainConfig, model: BerDiff, network: nn.Module, prior: nn.Module | None, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is minimised on a batch, and what of it is noted: the denoiser's loss, and of a model with a mode prior
    (2,) with the prior's, which is 0 where ``prior`` is None since it learns no more."""
    window = model.output_window
    y_0, t = window.cut(batch["y_0"]).contiguous(), batch["t"]
    classes = () if model.mode_prior is None else (batch["mode"],)
    y_t = ops.q_sample(y_0, t, batch["noise_seed"], model.schedule)  # y_t ~ q(y_t | y_0), eq. 2
    logits = network(y_t, t, window.view(batch["img"]), *classes)  # z of epsilon_hat(y_t, t, x), or of y_0
    # KL(q(y_{t-1} | y_t, y_0) || p(y_{t-1} | y_t)) + lambda BCE(epsilon, epsilon_hat), in bits, eq. 8
    ignore = None if "ignore" not in batch else window.cut(batch["ignore"]).contiguous()
    bits = ops.diffusion_loss(
        logits,
        y_t,
        y_0,
        t,
        model.schedule,
        prediction=config.diffusion.prediction,
        ignore=ignore,
        **asdict(config.loss),
    )
    if model.mode_prior is None:
        return bits.mean(), bits.mean()
    # There is nothing to learn from empty masks: those are the prior's.
    denoiser, nats = (bits * (batch["mode"] > 0)).mean(), torch.zeros((), device=bits.device)
    if prior is not None:  # -sum_c share(c) log p(c | x), over the classes of all raters
        nats = prior(batch["img"], batch["mode_target"]).mean()
    return denoiser + config.prior.weight * nats, torch.stack([denoiser, nats])
