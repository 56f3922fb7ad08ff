# SPDX-License-Identifier: Apache-2.0
"""``sample``: many plausible masks per image, by batched sub-sequence sampling."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from berdiff_fast import checks, ops, rng
from berdiff_fast.backends import select
from berdiff_fast.model import BerDiff
from berdiff_fast.network import inference
from berdiff_fast.schedule import NoiseSchedule

logger = logging.getLogger("berdiff_fast")

FINALS = ("threshold", "sample")

Model = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def sample(
    model: Model,
    img: torch.Tensor | np.ndarray,
    n: int = 16,
    steps: int | Sequence[int] = 10,
    *,
    method: str = "ddim",
    leave_one_out: bool = False,
    spacing: str | None = None,
    final: str = "threshold",
    seed: int | Sequence[int] | torch.Tensor | None = None,
    first_sample: int = 0,
    max_batch: int | None = None,
    schedule: NoiseSchedule | str | None = None,
    prediction: str | None = None,
    return_probability: bool = False,
    prepare: bool | str = True,
    backend: str = "auto",
    progress: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Draw n plausible masks for each image (BerDiff, algorithm 2, on a sub-sequence of timesteps).

    Mask k of an image depends on its seed, the logits, the step and k alone: not on n, on the batch, on ``max_batch``,
    on threads or on the backend. (Across devices the network's own rounding may still turn a bit.)

    Args:
        model: a ``BerDiff``, or any callable ``model(y_t, t, img) -> logits`` given together with ``schedule`` and
            ``prediction``; y_t is (N, K, *spatial) of 0.0 and 1.0 in the dtype of the model's parameters, t (N,) int64,
            img (N, C, *spatial). A module is run in eval mode and without gradients, and left as it was. K is its
            attribute ``mask_channels``, else 1; its attribute ``spatial_dims`` (2 or 3) tells volumes from batches.
        img: float (B, C, *spatial) or (C, *spatial), scaled as the network expects it (``model.preprocess`` does
            that from raw intensities). A tensor has to be on the model's device; an array is put there.
        n: masks per image.
        steps: how many timesteps to visit, or which ones.
        method: "ddim" (the published sampler), "ddpm" or "d3pm"; see ``NoiseSchedule.step_table``.
        leave_one_out: shift the logit to its leave-one-out version; see there.
        spacing: "uniform", "quadratic", "trailing" or "trailing-quadratic" (``NoiseSchedule.subsequence``). By default,
            the model's own; for a callable that has none "uniform", the published one.
        final: the last step: "threshold" keeps what is more likely than not, as the published code does; "sample"
            draws it.
        seed: an int, from which every image of the batch gets its own seed (``image_seeds``); or one int per image; or
            None for a fresh one from torch's default generator, so that ``torch.manual_seed`` governs.
        first_sample: index of the first mask: ``first_sample=16`` draws masks 16 to 16 + n - 1 of the same sequence.
        max_batch: masks per call of the network, B x n by default. Where a GPU's memory does not suffice, it is halved.
        schedule, prediction: for a model that is not a ``BerDiff``, or to override its own.
        return_probability: also return the probability P(y_0 = 1) of the last step.
        prepare: run a ``UNet`` in its prepared form (``network.inference``), which is faster and equal up to rounding.
            "winograd" has its 3 x 3 convolutions multiply a quarter as often, in float32 on a CPU, for a digit less;
            False runs it as it is, as every other network is run. On a GPU, weights written by way of ``.data`` between
            calls go unnoticed: write in place, or pass False.
        backend: of the draws: "auto", "reference", "cpp", "cuda" or "triton".
        progress: show a progress bar.

    Returns:
        bool (B, n, K, *spatial) on the model's device; with ``return_probability`` also float32 of the same shape.

    Raises:
        ValueError, TypeError: naming the argument, before any work.
        FloatingPointError: the network returned NaN; the message says at which step.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    plan = _Plan.build(
        model,
        img,
        n,
        steps,
        method,
        leave_one_out,
        spacing,
        final,
        seed,
        first_sample,
        max_batch,
        schedule,
        prediction,
        backend,
    )
    with _evaluating(model), torch.no_grad(), _bar(plan, progress) as advance:
        return plan.run(_network(model, plan, prepare), return_probability, advance)


@dataclass
class _Plan:
    """One call of ``sample``, checked and laid out."""

    img: torch.Tensor  # (B, C, *spatial) in the network's dtype, on its device
    mask_shape: tuple[int, ...]  # (K, *spatial)
    n: int
    timesteps: list[int]  # in the order they are visited
    coefficients: torch.Tensor  # (S, 4) float32 on the device, same order
    table: tuple[float, ...]  # the same as numbers, to tell plans apart
    seeds: torch.Tensor  # (B,) int64 on the device
    first_sample: int
    prediction: str
    final: str
    max_batch: int
    backend: str

    @classmethod
    def build(
        cls,
        model: Any,
        img: Any,
        n: int,
        steps: int | Sequence[int],
        method: str,
        leave_one_out: bool,
        spacing: str | None,
        final: str,
        seed: int | Sequence[int] | torch.Tensor | None,
        first_sample: int,
        max_batch: int | None,
        schedule: NoiseSchedule | str | None,
        prediction: str | None,
        backend: str,
    ) -> _Plan:
        if not callable(model):
            raise TypeError(f"model must be a BerDiff or callable as model(y_t, t, img), got {type(model).__name__}")
        n = checks.integer("n", n, 1)
        first_sample = checks.integer("first_sample", first_sample, 0)
        if first_sample + n > 2**32:
            raise ValueError(f"first_sample + n must be at most 2^32, got {first_sample} + {n}")
        schedule = _schedule(model, schedule)
        prediction = getattr(model, "prediction", None) if prediction is None else prediction
        if prediction is None:
            raise ValueError("prediction must be given ('epsilon' or 'y_0') for a model that does not carry it")
        if prediction not in ops.PREDICTIONS:
            raise ValueError(f"prediction must be 'epsilon' or 'y_0', got {prediction!r}")
        if final not in FINALS:
            raise ValueError(f"final must be one of {list(FINALS)}, got {final!r}")
        taus = schedule.subsequence(steps, getattr(model, "spacing", "uniform") if spacing is None else spacing)
        if not isinstance(leave_one_out, bool):
            raise TypeError(f"leave_one_out must be True or False, got {leave_one_out!r}")
        table = schedule.step_table(taus, method, leave_one_out=leave_one_out)
        device, dtype = _device_and_dtype(model)
        img = _image(img, model, device, dtype)
        rows = img.shape[0] * n
        max_batch = rows if max_batch is None else checks.integer("max_batch", max_batch, 1)
        select.get(backend, img.device.type)  # raises here, before any work, if it cannot run
        return cls(
            img=img,
            mask_shape=(getattr(model, "mask_channels", 1), *img.shape[2:]),
            n=n,
            timesteps=taus[::-1],
            coefficients=table.flip(0).float().to(img.device, non_blocking=True),
            table=(*map(float, taus), *table.flatten().tolist()),
            seeds=_seeds(seed, img.shape[0]).to(img.device),
            first_sample=first_sample,
            prediction=prediction,
            final=final,
            max_batch=min(max_batch, rows),
            backend=backend,
        )

    @property
    def rows(self) -> int:
        return self.img.shape[0] * self.n

    def run(
        self, network: _Network, return_probability: bool, advance: Callable[[int], None]
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        device = self.img.device
        masks = torch.empty((self.rows, *self.mask_shape), dtype=torch.bool, device=device)
        probability = torch.empty(masks.shape, dtype=torch.float32, device=device) if return_probability else None
        # One flag per step. The kernels raise it, and it is read once, when all work is queued.
        nan_flags = torch.zeros(len(self.timesteps), dtype=torch.int32, device=device)
        first, size = 0, self.max_batch
        while first < self.rows:
            last = min(first + size, self.rows)
            done = 0

            def count(rows: int) -> None:
                nonlocal done
                done += rows
                advance(rows)

            try:
                self._run_chunk(network, first, last, nan_flags, masks, probability, count)
            except RuntimeError as error:  # torch.OutOfMemoryError is one, and so are the libraries' own
                if last - first == 1 or not _is_out_of_memory(error):
                    raise
                size = (last - first + 1) // 2
            else:
                first = last
                continue
            # Out of the handler, so that nothing of the failed attempt is kept alive. What it drew is drawn again.
            logger.warning("out of memory with %d masks a call; going on with %d", last - first, size)
            advance(-done)
            if device.type == "cuda":
                torch.cuda.empty_cache()

        for step in nan_flags.nonzero().flatten().tolist()[:1]:
            raise FloatingPointError(
                f"the network returned NaN at step {step + 1} of {len(self.timesteps)} (t = {self.timesteps[step]})"
            )
        shape = (self.img.shape[0], self.n, *self.mask_shape)
        if probability is None:
            return masks.view(shape)
        return masks.view(shape), probability.view(shape)

    def _run_chunk(
        self,
        network: _Network,
        first: int,
        last: int,
        nan_flags: torch.Tensor,
        masks: torch.Tensor,
        probability: torch.Tensor | None,
        advance: Callable[[int], None],
    ) -> None:
        """All steps of masks [first, last) of the batch of B x n."""
        chunk = self._chunk(first, last)
        graph = network.graph(self, chunk) if probability is None else None
        if graph is not None:
            drawn, flags = graph.replay(chunk)
            nan_flags.logical_or_(flags)
            masks[first:last] = drawn
            advance((last - first) * len(self.timesteps))
            return
        of_chunk = None if probability is None else probability[first:last]
        masks[first:last] = self.draw(network, chunk, nan_flags, of_chunk, advance)

    def _chunk(self, first: int, last: int) -> _Chunk:
        n, low, high = self.n, first // self.n, (last - 1) // self.n + 1
        img = self.img[low:high]
        if high - low == 1:  # told as a batch of its own, as are whole images: equal work has equal names
            return _Chunk(img, self.seeds[low:high], last - first, last - first, self.first_sample + first % n)
        if first % n == 0 and last % n == 0:
            return _Chunk(img, self.seeds[low:high], last - first, n, self.first_sample)
        of_row = torch.arange(first, last, device=img.device) // n - low
        return _Chunk(img, self.seeds[low:high], last - first, n, self.first_sample, first % n, of_row)

    def draw(
        self,
        network: _Network,
        chunk: _Chunk,
        nan_flags: torch.Tensor,
        probability: torch.Tensor | None = None,
        advance: Callable[[int], None] = lambda rows: None,
    ) -> torch.Tensor:
        """All steps of a chunk: bool (rows, K, *spatial)."""
        images = network.images(chunk.img)
        images = network.repeat(images, chunk.n) if chunk.of_row is None else images[chunk.of_row]
        where: dict[str, Any] = dict(
            samples_per_image=chunk.n,
            first_row=chunk.first_row,
            first_sample=chunk.first_sample,
            backend=self.backend,
        )
        y = ops.initial_noise(chunk.seeds, self.mask_shape, rows=chunk.rows, dtype=self.img.dtype, **where)
        for step, timestep in enumerate(self.timesteps):
            logits = network(y, step, images)
            if step == 0:
                _check_logits(logits, y)
            is_last = step == len(self.timesteps) - 1
            if is_last and probability is not None:
                probability.copy_(
                    ops.posterior(y, logits, self.coefficients[step], prediction=self.prediction, backend=self.backend)
                )
            y = ops.sample_step(
                y,
                logits,
                chunk.seeds,
                self.coefficients[step],
                timestep,
                prediction=self.prediction,
                threshold=is_last and self.final == "threshold",
                dtype=torch.bool if is_last else y.dtype,
                nan_flag=nan_flags[step : step + 1],
                **where,
            )
            advance(chunk.rows)
        return y


@dataclass
class _Chunk:
    """Masks that go through the network together."""

    img: torch.Tensor  # (b, C, *spatial)
    seeds: torch.Tensor  # (b,)
    rows: int
    n: int  # masks per image
    first_sample: int
    first_row: int = 0  # the first one's number among those of these images
    of_row: torch.Tensor | None = None  # (rows,) which image; None: n of each in turn


# ---------------------------------------------------------------------- the network


class _Network:
    """A model as it is, called at the plan's timesteps."""

    def __init__(self, model: Model, plan: _Plan) -> None:
        self.model = model
        self.t = torch.tensor(plan.timesteps, device=plan.img.device)

    def images(self, img: torch.Tensor) -> torch.Tensor:
        """What ``__call__`` wants of images (B, C, *spatial)."""
        return img

    def repeat(self, images: torch.Tensor, n: int) -> torch.Tensor:
        """It for n masks of each image: a view where there is one."""
        return images.expand(n, *images.shape[1:]) if len(images) == 1 else images.repeat_interleave(n, 0)

    def __call__(self, y: torch.Tensor, step: int, images: torch.Tensor) -> torch.Tensor:
        return self.model(y, self.t[step].expand(len(y)), images)

    def graph(self, plan: _Plan, chunk: _Chunk) -> _Graph | None:
        """The captured form of a chunk's work; None where it is run call by call."""
        return None


class _Prepared(_Network):
    """A ``UNet`` in its prepared form."""

    def __init__(self, prepared: inference.PreparedUNet) -> None:
        self.prepared = prepared

    def graph(self, plan: _Plan, chunk: _Chunk) -> _Graph | None:
        if not plan.img.is_cuda or chunk.of_row is not None:
            return None
        graphs = self.prepared.graphs
        key = (
            tuple(chunk.img.shape),
            chunk.n,
            chunk.first_sample,
            plan.table,
            plan.prediction,
            plan.final,
            plan.backend,
        )
        if key not in graphs:
            while len(graphs) >= _GRAPHS:
                graphs.pop(next(iter(graphs)))
            try:
                graphs[key] = _Graph(plan, self, chunk)
            except RuntimeError as error:
                if _is_out_of_memory(error):
                    raise
                logger.warning("no CUDA graph, so every kernel is launched by itself: %s", error)
                graphs[key] = None
        return graphs[key]

    def images(self, img: torch.Tensor) -> torch.Tensor:
        return self.prepared.encode(img)

    def repeat(self, images: torch.Tensor, n: int) -> torch.Tensor:
        return images  # they are added to those of n masks each

    def __call__(self, y: torch.Tensor, step: int, images: torch.Tensor) -> torch.Tensor:
        return self.prepared(y, step, images)


#: Captured graphs that a prepared network keeps, each with the memory of its activations.
_GRAPHS = 4


class _Graph:
    """All steps of a chunk as one CUDA graph, whose inputs are images and seeds: the host launches once."""

    def __init__(self, plan: _Plan, network: _Network, chunk: _Chunk) -> None:
        self.chunk = replace(chunk, img=chunk.img.clone(), seeds=chunk.seeds.clone())
        self.flags = torch.zeros(len(plan.timesteps), dtype=torch.int32, device=chunk.img.device)
        aside = torch.cuda.Stream(chunk.img.device)
        aside.wait_stream(torch.cuda.current_stream(chunk.img.device))
        with torch.cuda.stream(aside):
            for _ in range(2):  # libraries choose their algorithms and Triton compiles before anything is recorded
                plan.draw(network, self.chunk, self.flags)
        torch.cuda.current_stream(chunk.img.device).wait_stream(aside)
        # A plan is one call's; the graph keeps what of it the kernels read.
        self.kept = (plan.coefficients, network)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.flags.zero_()
            self.masks = plan.draw(network, self.chunk, self.flags)

    def replay(self, chunk: _Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks and NaN flags, which the next replay overwrites."""
        self.chunk.img.copy_(chunk.img)
        self.chunk.seeds.copy_(chunk.seeds)
        self.graph.replay()
        return self.masks, self.flags


def _network(model: Model, plan: _Plan, prepare: bool | str) -> _Network:
    if prepare not in (True, False, "winograd"):
        raise ValueError(f"prepare must be True, False or 'winograd', got {prepare!r}")
    if not prepare or type(model) is not BerDiff or model._forward_hooks or model._forward_pre_hooks:
        return _Network(model, plan)
    network: Any = model.network
    reason = inference.why_not(network)
    if reason is not None:
        logger.debug("the network is run as it is: %s", reason)
        return _Network(model, plan)
    scale = 1000.0 / model.schedule.timesteps if model.rescale_timesteps else 1
    timesteps = [t * scale for t in plan.timesteps]
    return _Prepared(inference.prepare(network, timesteps, winograd=prepare == "winograd"))


# ---------------------------------------------------------------------- arguments


def _schedule(model: Any, schedule: NoiseSchedule | str | None) -> NoiseSchedule:
    if schedule is None:
        schedule = getattr(model, "schedule", None)
        if schedule is None:
            raise ValueError("schedule must be given for a model that does not carry one")
    if isinstance(schedule, str):
        return NoiseSchedule(schedule)
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule or its name, got {type(schedule).__name__}")
    return schedule


def _device_and_dtype(model: Any) -> tuple[torch.device | None, torch.dtype]:
    """Where the model is, if it says so, and the dtype it computes in."""
    if isinstance(model, nn.Module):
        tensors = [*model.parameters(), *model.buffers()]
        floating = [x.dtype for x in tensors if x.is_floating_point()]
        dtype = floating[0] if floating else torch.float32
        if dtype not in ops.LOGIT_DTYPES:
            raise TypeError(f"model must compute in float32, float16 or bfloat16, got parameters of {dtype}")
        if tensors:
            return tensors[0].device, dtype
    return None, torch.float32


def _image(img: Any, model: Any, device: torch.device | None, dtype: torch.dtype) -> torch.Tensor:
    given, img = img, checks.tensor("img", img)
    if device is not None and img is not given:
        img = img.to(device)
    if not img.is_floating_point():
        raise TypeError(
            f"img must be floating point, scaled as the network expects it, got {img.dtype}; raw intensities go "
            "through model.preprocess first"
        )
    dims = getattr(model, "spatial_dims", None) or (3 if img.ndim == 5 else 2)
    if img.ndim == dims + 1:
        img = img[None]
    if img.ndim != dims + 2:
        raise ValueError(
            f"img must be (B, C, *spatial) or (C, *spatial) with {dims} spatial dimensions, got shape "
            f"{tuple(img.shape)}"
        )
    if 0 in img.shape:
        raise ValueError(f"img must not be empty, got shape {tuple(img.shape)}")
    channels = getattr(model, "img_channels", None)
    if channels is not None and img.shape[1] != channels:
        raise ValueError(f"img must have {channels} channels for this model, got shape {tuple(img.shape)}")
    if device is not None and img.device != device:
        raise ValueError(f"img must be on the model's device {device}, got {img.device}")
    if not bool(torch.isfinite(img).all()):
        raise ValueError("img must be finite, got NaN or infinite values")
    img = img.detach().to(dtype)
    if not bool(torch.isfinite(img).all()):
        raise ValueError(f"img must be finite in the model's dtype {dtype} too, got values beyond its range")
    return img


def _seeds(seed: int | Sequence[int] | torch.Tensor | None, images: int) -> torch.Tensor:
    if seed is None:
        seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
    if isinstance(seed, torch.Tensor):
        seed = seed.tolist()
    if isinstance(seed, (int, np.integer)) and not isinstance(seed, bool):
        return rng.image_seeds(int(seed), images)
    try:
        seeds = [rng.signed64(checks.integer("seed", s, -(2**63))) for s in seed]  # type: ignore[union-attr]
    except TypeError:
        raise TypeError(f"seed must be None, an int, or one int per image, got {seed!r}") from None
    if len(seeds) != images:
        raise ValueError(f"seed must have one int per image, {images} in all, got {len(seeds)}")
    return torch.tensor(seeds, dtype=torch.int64, device="cpu")


def _check_logits(logits: Any, y: torch.Tensor) -> None:
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"model must return a tensor of logits, got {type(logits).__name__}")
    if logits.shape != y.shape:
        raise ValueError(f"model must return logits of the shape of y_t, {tuple(y.shape)}, got {tuple(logits.shape)}")
    if logits.dtype not in ops.LOGIT_DTYPES:
        raise TypeError(f"model must return float32, float16 or bfloat16 logits, got {logits.dtype}")


# ---------------------------------------------------------------------- surroundings


def _is_out_of_memory(error: RuntimeError) -> bool:
    words = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "CUDNN_STATUS_ALLOC_FAILED" in words
        or "CUBLAS_STATUS_ALLOC_FAILED" in words
    )


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Eval mode, and every submodule back in the mode it had."""
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _bar(plan: _Plan, show: bool) -> Iterator[Callable[[int], None]]:
    if not show:
        yield lambda rows: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=plan.rows * len(plan.timesteps), desc="sampling", unit="mask-step") as bar:
        yield lambda rows: bar.update(rows) and None
