# SPDX-License-Identifier: Apache-2.0
"""Training: noise a rater's mask, let the network say where the noise is, compare (BerDiff, algorithm 1).

Everything random is a function of the seed and the step, so a run that was stopped and started again ends with the same
weights as one that was not, and processes that share a batch do what one process would.
"""

from __future__ import annotations

import copy
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, gather_object
from torch import nn

from berdiff_fast import ops, rng
from berdiff_fast.data.examples import TrainingExamples
from berdiff_fast.data.hdf5 import RaterDataset, check_disjoint
from berdiff_fast.files import own_folder, write_text
from berdiff_fast.model import BerDiff, load
from berdiff_fast.network.prior import size_class
from berdiff_fast.training import checkpoints, evaluate, feed, on_cpu
from berdiff_fast.training.average import Average
from berdiff_fast.training.config import TrainConfig
from berdiff_fast.training.folder import run_folder
from berdiff_fast.training.precision import fast_arithmetic
from berdiff_fast.training.records import Records

logger = logging.getLogger("berdiff_fast")

#: Slices of a validation that the mode prior is measured on.
_PRIOR_SLICES = 512


def train(config: TrainConfig) -> Path:
    """Train a model, or go on with the run in ``config.output``.

    The folder then holds ``model.safetensors`` (averaged weights, for ``bf.load``), ``best.safetensors`` (those with
    the lowest validation GED), ``checkpoints/``, ``config.yaml``, ``log.jsonl``, TensorBoard's files and ``previews/``.

    Returns:
        The path of ``model.safetensors``; of the newest checkpoint if the run was stopped by SIGTERM.

    Raises:
        BusyError: another run is at work in ``config.output``.
        ValueError, FileNotFoundError: data, config or checkpoint that do not fit; see there.
        FloatingPointError: the loss is not finite.
    """
    if not config.output or not config.train_data:
        raise ValueError(f"{'output' if not config.output else 'train_data'} must be given, got ''")
    slices = RaterDataset(config.train_data, in_memory=config.in_memory)
    # In memory too: what is spread over a compressed file takes seconds to read, at every validation.
    held_out = RaterDataset(config.val_data, in_memory=config.in_memory) if config.val_data else None
    _check_data(config, slices, held_out)

    AcceleratorState._reset_state()  # a process may train again, in another precision
    accelerator = Accelerator(
        mixed_precision=config.precision if config.precision in ("bf16", "fp16") else "no",
        gradient_accumulation_steps=config.accumulation,
        cpu=on_cpu(config.device),
        # Each batch of the loader is one of all processes together; every process takes its slice of it.
        dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
    )
    if config.batch_size % (config.accumulation * accelerator.num_processes):
        raise ValueError(
            f"batch_size must be a multiple of accumulation x processes, {config.accumulation} x "
            f"{accelerator.num_processes}, got {config.batch_size}"
        )
    with run_folder(Path(config.output), accelerator):
        return _train(config, slices, held_out, accelerator)


def _train(config: TrainConfig, slices: RaterDataset, held_out: RaterDataset | None, accelerator: Accelerator) -> Path:
    """``train``, once the data are checked and the folder is ours alone."""
    torch.manual_seed(rng.signed64(rng.splitmix64(config.seed, 0)))
    model = config.build_model(slices.mask_channels, slices.img_channels, slices.image_size)
    assert model.preprocessing is not None
    if config.initial_weights:
        _start_from(config.initial_weights, model)
    model.to(accelerator.device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    window, prior = model.output_window, model.mode_prior
    groups: list[dict[str, Any]] = [{"params": list(model.network.parameters())}]
    if prior is not None:
        groups.append({"params": list(prior.parameters()), "weight_decay": config.prior_weight_decay})
    optimizer = torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(0.9, config.beta2),
        weight_decay=config.weight_decay,
        fused=accelerator.device.type in ("cpu", "cuda"),
    )
    averages = [Average(model.network, config.ema_decay)]
    priors: tuple[nn.Module, ...] = ()  # as it is trained, averaged, and at its best validation
    if prior is not None:
        averages.append(Average(prior, config.prior_ema_decay))
        priors = prior, averages[1].model, copy.deepcopy(prior)
    ema = averages[0].model

    output = Path(config.output)
    folder = output / "checkpoints"
    first, extra = 0, {}
    if (checkpoint := checkpoints.resume(folder, config, model.network, ema, optimizer, priors)) is not None:
        first, extra = checkpoint.step, checkpoint.extra
    if accelerator.is_main_process:
        own_folder(folder)
        checkpoints.remove_unfinished(folder)
        write_text(output / "config.yaml", config.to_yaml(), follow=False)

    examples = TrainingExamples(
        slices,
        model.preprocessing,
        config.timesteps,
        config.seed,
        config.augmentation(),
        crop=config.crop,
        crop_before=config.crop_steps * config.batch_size or None,
        mode_edges=None if prior is None else prior.edges,
        mode_window=window.size,
    )
    batches = feed.batches(examples, config, first, accelerator)
    network = torch.compile(model.network) if config.compile else model.network
    network, optimizer = accelerator.prepare(network, optimizer)
    modules: list[Any] = [network] if prior is None else [network, accelerator.prepare(prior)]
    parameters = [p for group in groups for p in group["params"]]
    if accelerator.scaler is not None and "scaler" in extra:
        accelerator.scaler.load_state_dict(extra["scaler"])

    def save(step: int) -> Path | None:
        """The state after ``step`` steps, by the main process."""
        extra["scaler"] = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
        path = None
        if accelerator.is_main_process:
            path = checkpoints.save(folder, step, config, model.network, ema, optimizer.optimizer, extra, priors)
        accelerator.wait_for_everyone()
        return path

    averaged = model.with_weights(ema.module, averages[1].model.module if priors else None)  # type: ignore[arg-type]
    for module in modules:
        module.train()
    with (
        fast_arithmetic(config, accelerator.device),
        Records(output, config, first, enabled=accelerator.is_main_process) as records,
        _stop_signal() as stop,
    ):
        for step in range(first, config.steps):
            rates = config.learning_rate_at(step), config.prior_rate_at(step)
            for group, rate in zip(optimizer.param_groups, rates, strict=False):
                group["lr"] = rate
            norm = torch.zeros((), device=accelerator.device)
            loss = torch.zeros(() if prior is None else 2, device=accelerator.device)
            for part in range(config.accumulation):
                batch = next(batches)
                # For dropout; after the batch's making, which may draw from this generator too.
                number = (step * config.accumulation + part) * accelerator.num_processes + accelerator.process_index
                torch.manual_seed(rng.signed64(rng.splitmix64(config.seed, number + 1)))
                with accelerator.accumulate(*modules):
                    y_0, t = window.cut(batch["y_0"]).contiguous(), batch["t"]
                    told = () if prior is None else (batch["mode"],)
                    # y_t ~ q(y_t | y_0), eq. 2
                    y_t = ops.q_sample(y_0, t, batch["noise_seed"], model.schedule)
                    logits = network(y_t, t, window.view(batch["img"]), *told)
                    # KL(q(y_{t-1} | y_t, y_0) || p(y_{t-1} | y_t)) + lambda BCE, eq. 8
                    bits = ops.diffusion_loss(
                        logits,
                        y_t,
                        y_0,
                        t,
                        model.schedule,
                        prediction=config.prediction,
                        kl_weight=config.kl_weight,
                        bce_weight=config.bce_weight,
                        leave_one_out=config.leave_one_out,
                    )
                    if prior is None:
                        both = total = bits.mean()
                    else:
                        # There is nothing to learn from empty masks: those are the prior's.
                        denoiser, nats = (bits * (batch["mode"] > 0)).mean(), torch.zeros_like(loss[1])
                        if step < config.prior_last:  # -sum_c share(c) log p(c | x), over the classes of all raters
                            nats = modules[1](batch["img"], batch["mode_target"]).mean()
                        total, both = denoiser + config.prior_weight * nats, torch.stack([denoiser, nats])
                    accelerator.backward(total)
                    if accelerator.sync_gradients and config.clip:
                        norm = accelerator.clip_grad_norm_(parameters, config.clip)
                    optimizer.step()
                    optimizer.zero_grad()
                    loss = loss + both.detach() / config.accumulation
            for average in averages if step < config.prior_last else averages[:1]:
                average.update()
            done = step + 1
            records.step(done, loss, norm, config.learning_rate_at(step), accelerator)

            if held_out is not None and (done % config.validate_every == 0 or done == config.steps):
                numbers = _validate(config, averaged, held_out, records, done, accelerator)
                if numbers and numbers["ged"] < extra.get("best_ged", float("inf")):
                    extra |= {"best_ged": numbers["ged"], "best_step": done}
                    averaged.save(output / "best.safetensors", follow=False)
                if priors and numbers and numbers["prior_cross_entropy"] < extra.get("best_prior", float("inf")):
                    extra |= {"best_prior": numbers["prior_cross_entropy"], "best_prior_step": done}
                    priors[2].load_state_dict(averages[1].model.module.state_dict())
            stopped = _agreed(stop, accelerator, done)
            if stopped or done % config.checkpoint_every == 0 or done == config.steps:
                path = save(done)
            if stopped and done < config.steps:
                records.say(f"stopped after step {done} of {config.steps}; the same command goes on from there")
                return path or folder
        if accelerator.is_main_process:
            if config.prior_keep_best and "best_prior" in extra:
                averaged.mode_prior = priors[2]  # type: ignore[assignment]
            averaged.save(output / "model.safetensors", follow=False)
    accelerator.wait_for_everyone()
    return output / "model.safetensors"


def _check_data(config: TrainConfig, slices: RaterDataset, held_out: RaterDataset | None) -> None:
    factor = 1 if config.output_crop else config.patch_size * 2 ** (len(config.channel_mult) - 1)
    for data in filter(None, (slices, held_out)):
        for name in ("output_crop", "prior_crop"):
            if getattr(config, name) > min(data.image_size):
                raise ValueError(
                    f"{name} must be at most the images of {data.path}, {data.image_size}, got {getattr(config, name)}"
                )
        if any(size % factor for size in data.image_size):
            raise ValueError(f"{data.path}: images must have sides divisible by {factor}, got {data.image_size}")
        if config.crop > min(data.image_size):
            raise ValueError(
                f"crop must be at most the images of {data.path}, {data.image_size}, got {config.crop} (--crop 0 or "
                "crop: 0 in the config trains on whole slices)"
            )
        if data.image_size[0] != data.image_size[1] and config.rotate90 and data is slices:
            raise ValueError(f"rotate90 needs square images, and {data.path} has {data.image_size}")
    if held_out is not None:
        check_disjoint(slices, held_out)
        for name in ("img_channels", "mask_channels"):
            if getattr(slices, name) != getattr(held_out, name):
                raise ValueError(
                    f"val_data must have the {name} of train_data, {getattr(slices, name)}, got "
                    f"{getattr(held_out, name)}"
                )


def _start_from(name_or_path: str, model: BerDiff) -> None:
    former = load(name_or_path)
    if former.prediction != model.prediction:
        raise ValueError(f"initial_weights: {name_or_path} predicts {former.prediction}, the config {model.prediction}")
    try:
        model.network.load_state_dict(former.network.state_dict())
        if model.mode_prior is not None and former.mode_prior is not None:
            model.mode_prior.load_state_dict(former.mode_prior.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"initial_weights: {name_or_path} is of another architecture: {' '.join(str(error).split())}"
        ) from None


def _validate(
    config: TrainConfig,
    averaged: BerDiff,
    held_out: RaterDataset,
    records: Records,
    step: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Sample a fixed choice of slices with the averaged weights; numbers on the main process, else nothing."""
    rows: list[dict[str, Any]] = []
    preview = None
    for chosen, images, raters, samples in evaluate.sample_slices(
        averaged,
        held_out,
        evaluate.spread(len(held_out), config.validation_slices),
        n=config.validation_samples,
        seed=config.seed,
        steps=config.validation_steps,
        method=config.validation_method,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    ):
        rows += [{"slice": i, **numbers} for i, numbers in zip(chosen, evaluate.measure(raters, samples), strict=True)]
        preview = preview or (images, raters, samples)
    rows = sorted(gather_object(rows), key=lambda row: row.pop("slice"))
    if not accelerator.is_main_process:
        return {}
    numbers = evaluate.summarize(rows)
    if averaged.mode_prior is not None:
        numbers |= _of_prior(averaged, held_out)
    records.validation(step, numbers, preview)
    return numbers


def _of_prior(model: BerDiff, held_out: RaterDataset) -> dict[str, float]:
    """Of the mode prior: cross-entropy in nats, and the mean square of P(empty) less the raters' share.

    Of more slices than masks are drawn of, since it is cheap, and a best one is chosen by it.
    """
    assert model.mode_prior is not None
    device, nats, errors = next(model.parameters()).device, [], []
    chosen = evaluate.spread(len(held_out), _PRIOR_SLICES)
    for start in range(0, len(chosen), 64):
        images, raters = held_out.batch(chosen[start : start + 64])
        p = model.prior(model.preprocess(images).to(device)).double().cpu()
        classes = size_class(model.output_window.cut(raters), model.mode_prior.edges)
        shares = torch.nn.functional.one_hot(classes, p.shape[1]).double().mean(1)
        nats.append(-(shares * p.clamp(min=1e-7).log()).sum(1))
        errors.append((p[:, 0] - shares[:, 0]).square())
    return {
        "prior_cross_entropy": float(torch.cat(nats).mean()),
        "empty_squared_error": float(torch.cat(errors).mean()),
    }


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set, so that the step at hand is finished and saved.

    A second Ctrl-C interrupts at once.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals are the main thread's
        return
    previous: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, _: Any) -> None:
        stop.set()
        if number == signal.SIGINT:
            signal.signal(number, previous[number])

    for number in previous:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _agreed(stop: threading.Event, accelerator: Accelerator, step: int) -> bool:
    """Whether any process was told to stop; several of them ask each other every tenth step."""
    if accelerator.num_processes == 1:
        return stop.is_set()
    if step % 10:
        return False
    if stop.is_set():
        accelerator.set_trigger()
    return accelerator.check_trigger()
