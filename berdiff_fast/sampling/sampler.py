# SPDX-License-Identifier: Apache-2.0
"""``sample``: many plausible masks per image, by batched sub-sequence sampling."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from berdiff_fast import checks, ops
from berdiff_fast.backends import select
from berdiff_fast.model import BerDiff
from berdiff_fast.network import graph, inference
from berdiff_fast.regions import Regions, nest
from berdiff_fast.sampling import arguments, loop, parallel_in_time
from berdiff_fast.sampling.chunks import Chunk, Masks, in_chunks, max_batch
from berdiff_fast.sampling.denoisers import CapturedDenoiser, Denoiser, Model, ModelDenoiser, PreparedDenoiser
from berdiff_fast.sampling.modes import ClassDenoiser, ClassDraw
from berdiff_fast.sampling.plan import FINALS, Plan
from berdiff_fast.sampling.progress import bar_of
from berdiff_fast.schedule import NoiseSchedule

logger = logging.getLogger("berdiff_fast")

_FORWARD = BerDiff.forward


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
    dtype: torch.dtype | None = None,
    parallel: int | None = None,
    mask_channels: int | None = None,
    backend: str = "auto",
    progress: bool = False,
    modes: int | str | Sequence[int] | None = None,
    stratify: bool = True,
    return_modes: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Draw n plausible masks for each image (BerDiff, algorithm 2, on a sub-sequence of timesteps).

    Mask k of an image depends on its seed, the logits, the step and k alone: not on n, on the batch, on ``max_batch``,
    on threads or on the backend. (Across devices the network's own rounding may still turn a bit.)

    Args:
        model: a ``BerDiff``, or any callable ``model(y_t, t, img) -> logits`` given together with ``schedule`` and
            ``prediction``; y_t is (N, K, *spatial) of 0.0 and 1.0 in the dtype of the model's parameters, t (N,) int64,
            img (N, C, *spatial). A module is run in eval mode and without gradients, and left as it was. K is its
            attribute ``mask_channels``, else 1; its attribute ``spatial_dims`` (2 or 3) tells volumes from batches.
            What a module within DataParallel, AveragedModel or torch.compile says of itself counts, too.
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
        max_batch: masks per call of the network; by default all B x n on a GPU, and on a CPU as many as 16 masks of
            128 x 128 have pixels, more being no faster. Where a GPU's memory does not suffice, it is halved. With
            ``parallel``, a mask counts at each step that is in the call.
        schedule, prediction: for a model that is not a ``BerDiff``, or to override its own.
        return_probability: also return the probability P(y_0 = 1) of the last step.
        prepare: run a ``UNet`` in its prepared form (``network.inference``), which is faster and equal up to rounding.
            "winograd" has its 3 x 3 convolutions multiply a quarter as often, in float32 on a CPU, and is about one
            decimal digit less accurate; False runs it as it is, as every other network is run. On a GPU, weights
            written by way of ``.data`` between calls go unnoticed: write in place, or pass False.
        dtype: compute a prepared network in this dtype instead of its own: bfloat16 is fast on GPUs, and changes masks.
        parallel: how many steps of a mask go through the network in one call, guessed ahead and drawn again until they
            no longer change (``parallel_in_time``). The masks are the same, but for what a network's rounding owes to
            its batch, in fewer calls of more masks each: for a GPU that a single mask does not fill, and many steps.
            At every call the host reads how many steps are settled and so waits for the device, and no CUDA graph is
            made. By default one step after another.
        mask_channels: K, for a callable that does not say it.
        backend: of the draws: "auto", "reference", "cpp", "cuda" or "triton".
        progress: show a progress bar.
        modes: of a model with a mode prior, draw masks of these size classes only, in proportion to their probability:
            a class, several, "non-empty" (if there is something, what does it look like?) or "empty".
        stratify: spread the classes of an image's masks evenly over p(c | x): of every aligned block of 2^m masks each
            class has its share, to within one mask. Each mask by itself is still a draw from p, but those of an image
            are no longer independent; False draws each class by itself.
        return_modes: also return the class of each mask, int64 (B, n).

    Returns:
        bool (B, n, K, *spatial) on the model's device; with ``return_probability`` also float32 of the same shape, then
        with ``return_modes`` the classes.

    Raises:
        ValueError, TypeError: naming the argument, before any work.
        FloatingPointError: the network returned NaN; the message says at which step.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    sampler = Sampler(
        model,
        n,
        steps,
        method=method,
        leave_one_out=leave_one_out,
        spacing=spacing,
        final=final,
        max_batch=max_batch,
        schedule=schedule,
        prediction=prediction,
        prepare=prepare,
        dtype=dtype,
        parallel=parallel,
        mask_channels=mask_channels,
        backend=backend,
        modes=modes,
        stratify=stratify,
    )
    return sampler(
        img,
        seed=seed,
        first_sample=first_sample,
        return_probability=return_probability,
        progress=progress,
        return_modes=return_modes,
    )


class Sampler:
    """``sample`` with everything settled but images and seeds, for those who call it again and again.

    Arguments are those of ``sample`` and checked here, once. Weights may change between calls.

    On a GPU all steps of a prepared network are one CUDA graph from the second call with images of a shape on, here and
    in ``sample``. A ``Sampler`` captures other modules too, if they make the host wait for nothing and the graph draws
    the same masks; else the log says why not. A graph repeats what a module did when it was captured: make a new
    ``Sampler`` after changing anything but its weights, or pass ``prepare=False``, which captures nothing.

    >>> sampler = bf.Sampler(model, n=16, steps=10)
    >>> masks = sampler(img, seed=7)   # as sample(model, img, n=16, steps=10, seed=7)
    """

    def __init__(
        self,
        model: Model,
        n: int = 16,
        steps: int | Sequence[int] = 10,
        *,
        method: str = "ddim",
        leave_one_out: bool = False,
        spacing: str | None = None,
        final: str = "threshold",
        max_batch: int | None = None,
        schedule: NoiseSchedule | str | None = None,
        prediction: str | None = None,
        prepare: bool | str = True,
        dtype: torch.dtype | None = None,
        parallel: int | None = None,
        mask_channels: int | None = None,
        backend: str = "auto",
        modes: int | str | Sequence[int] | None = None,
        stratify: bool = True,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be a BerDiff or callable as model(y_t, t, img), got {type(model).__name__}")
        self.model = model
        self.n = checks.integer("n", n, 1)
        self.schedule = arguments.noise_schedule(model, schedule)
        prediction = arguments.carried(model, "prediction") if prediction is None else prediction
        if prediction is None:
            raise ValueError("prediction must be given ('epsilon' or 'y_0') for a model that does not carry it")
        if prediction not in ops.PREDICTIONS:
            raise ValueError(f"prediction must be 'epsilon' or 'y_0', got {prediction!r}")
        if final not in FINALS:
            raise ValueError(f"final must be one of {list(FINALS)}, got {final!r}")
        if not isinstance(leave_one_out, bool):
            raise TypeError(f"leave_one_out must be True or False, got {leave_one_out!r}")
        if prepare not in (True, False, "winograd"):
            raise ValueError(f"prepare must be True, False or 'winograd', got {prepare!r}")
        if dtype is not None and dtype not in ops.LOGIT_DTYPES:
            raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")
        spacing = (arguments.carried(model, "spacing") or "uniform") if spacing is None else spacing
        taus = self.schedule.subsequence(steps, spacing)
        table = self.schedule.step_table(taus, method, leave_one_out=leave_one_out).flip(0)
        own = arguments.carried(model, "mask_channels")
        channels = (1 if own is None else own) if mask_channels is None else mask_channels
        channels = checks.integer("mask_channels", channels, 1)
        if own is not None and channels != own:
            raise ValueError(f"mask_channels must be the model's own {own}, got {mask_channels}")
        self.max_batch = None if max_batch is None else checks.integer("max_batch", max_batch, 1)
        self.parallel = None if parallel is None else checks.integer("parallel", parallel, 1)
        self.prepare, self.dtype = prepare, dtype
        self.classes = ClassDraw.of(model, modes, stratify)
        #: What masks depend on beside images, seeds and weights.
        self.plan = Plan(tuple(taus[::-1]), table, prediction, final, channels, backend)
        self._coefficients: dict[Any, torch.Tensor] = {}
        #: CUDA graphs of a network that is run as it is.
        self.graphs: dict[Any, graph.Graph | bool] = {}

    @property
    def timesteps(self) -> list[int]:
        """In the order they are visited."""
        return list(self.plan.timesteps)

    def __call__(
        self,
        img: torch.Tensor | np.ndarray,
        *,
        seed: int | Sequence[int] | torch.Tensor | None = None,
        first_sample: int = 0,
        return_probability: bool = False,
        progress: bool | Callable[[float], object] = False,
        return_modes: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Masks of these images: see ``sample``.

        ``progress`` may also be a function. It is called on the way with the share of the work that was just done, in
        all 1; a negative share is work that has to be done again.
        """
        first_sample = checks.integer("first_sample", first_sample, 0)
        if first_sample + self.n > 2**32:
            raise ValueError(f"first_sample + n must be at most 2^32, got {first_sample} + {self.n}")
        if return_modes and self.classes is None:
            raise ValueError("return_modes needs a model with a mode prior")
        device, own = arguments.device_and_dtype(self.model)
        dtype = own if self.dtype is None else self.dtype
        given, img = img, arguments.images(img, self.model, device, dtype)
        if isinstance(self.model, BerDiff):
            self.model.output_window.check("img", img.shape)
        select.get(self.plan.backend, img.device.type)  # raises here, before any work, if it cannot run
        seeds = arguments.image_seeds(seed, img.shape[0]).to(img.device, non_blocking=True)
        masks = Masks(img, seeds, self.n, self.plan.mask_channels, first_sample)
        # One flag per step, and one for the images. They are raised on the device and read once, when all is queued.
        flags = torch.zeros(len(self.plan.timesteps) + 1, dtype=torch.int32, device=img.device)
        if self.classes is not None:  # of the image as it was given, whatever dtype the denoiser is to compute in
            exact = img if dtype == own else arguments.images(given, self.model, device, own)
            classes, finite = self.classes.draw(exact, seeds, self.n, first_sample)
            masks = replace(masks, classes=classes)
            flags[:1].logical_or_(finite.logical_not())
        with _evaluating(self.model), torch.no_grad(), bar_of(masks, self.plan, progress) as advance:
            denoiser = self._denoiser(dtype, dtype != own, img.device)
            found = self._run(denoiser, masks, flags, return_probability, advance)
        _raise(flags, self.plan, img.dtype)
        result = [torch.cat(parts).view(masks.shape) for parts in zip(*found, strict=True)]
        regions = getattr(self.model, "regions", None)
        if isinstance(regions, Regions) and regions.inside:
            result = [nest(x, regions.inside, img.ndim - 2) for x in result]
        if return_modes:
            assert masks.classes is not None
            result.append(masks.classes)
        return result[0] if len(result) == 1 else tuple(result)

    def _run(
        self,
        denoiser: CapturedDenoiser,
        masks: Masks,
        flags: torch.Tensor,
        return_probability: bool,
        advance: Callable[[int], object],
    ) -> list[tuple[torch.Tensor, ...]]:
        """Chunk by chunk: masks (rows, K, *spatial) and, where asked for, their probability."""
        plan, coefficients = self.plan, self._coefficients_on(masks.img.device)

        def draw(
            chunk: Chunk,
            flags: torch.Tensor,
            window: int = 1,
            advance: Callable[[int], object] = lambda mask_steps: None,
        ) -> tuple[torch.Tensor, ...]:
            if chunk.img.is_cuda:  # on a CPU it is known before
                flags[-1:].logical_or_(torch.isfinite(chunk.img).all().logical_not_())
            told: ClassDenoiser | None = None
            if chunk.classes is not None:
                assert self.classes is not None
                told = ClassDenoiser(denoiser, chunk.classes, chunk.image_of_row(), self.classes.prior.edges)
            asked: Denoiser = denoiser if told is None else told
            end: loop.Trajectory
            if window == 1:
                end = loop.draw_masks(plan, coefficients, asked, chunk, flags, return_probability, advance)
            else:
                end = parallel_in_time.draw_masks(
                    plan, coefficients, asked, chunk, flags, window, return_probability, advance
                )
            if told is not None:
                end = told.fit(end)
            return (end.masks,) if end.probability is None else (end.masks, end.probability)

        def work(chunk: Chunk, window: int, advance: Callable[[int], object]) -> tuple[torch.Tensor, ...]:
            alone = chunk.whole and chunk.classes is None and window == 1 and not return_probability
            if alone and chunk.img.is_cuda and denoiser.graphs is not None:
                captured = graph.captured(
                    denoiser.graphs,
                    graph_key(plan, denoiser, chunk),
                    # The first sample comes with the seeds.
                    lambda img, seeds, raised: draw(replace(chunk, img=img, seeds=seeds, first_sample=0), raised)[0],
                    chunk.img,
                    chunk.seeds,
                    len(flags),
                    keep_alive=(denoiser.kept_by_graphs, coefficients),
                    check=denoiser.check_graphs,
                )
                if captured is not None:
                    found, raised = captured.replay(chunk.img, chunk.seeds, chunk.first_sample)
                    flags.logical_or_(raised)
                    advance(chunk.rows * len(plan.timesteps))
                    return (found,)
            return draw(chunk, flags, window, advance)

        def free_memory() -> None:
            if masks.img.is_cuda:
                if denoiser.graphs is not None:
                    graph.drop(denoiser.graphs)
                torch.cuda.empty_cache()

        window = min(self.parallel or 1, len(plan.timesteps))
        size = self.max_batch or max_batch(masks.img)
        return in_chunks(masks, work, size=size, window=window, advance=advance, free_memory=free_memory)

    def _coefficients_on(self, device: torch.device) -> torch.Tensor:
        """The table on the device, where nothing waits for its coming: each stream has its own, in its own order."""
        place = (device, torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else device
        if place not in self._coefficients:
            self._coefficients[place] = self.plan.table.float().to(device, non_blocking=True)
        return self._coefficients[place]

    def _denoiser(self, dtype: torch.dtype, converted: bool, device: torch.device) -> CapturedDenoiser:
        model: Any = self.model
        reason: str | None = "prepare is False"
        if self.prepare:
            if type(model) is not BerDiff:
                reason = f"it is a {type(model).__name__}, not a BerDiff"
            elif (change := inference.is_changed(model, _FORWARD)) is not None:
                reason = f"it {change}"
            else:
                reason = inference.why_not(model.network)
        if reason is None:
            scale = 1000.0 / model.schedule.timesteps if model.rescale_timesteps else 1
            timesteps = [t * scale for t in self.plan.timesteps]
            winograd = self.prepare == "winograd"
            prepared = inference.prepare(model.network, timesteps, dtype=dtype, winograd=winograd)
            return PreparedDenoiser(prepared, model.output_window, model.prediction)
        if converted:
            raise ValueError(f"dtype must be the model's own for a network that is run as it is, got {dtype}: {reason}")
        logger.debug("the network is run as it is: %s", reason)
        return ModelDenoiser(model, self.plan.timesteps, device, self.graphs if self.prepare else None)


def graph_key(plan: Plan, denoiser: CapturedDenoiser, chunk: Chunk) -> tuple[Any, ...]:
    """What a CUDA graph of a chunk does, beside the shape of its images: equal keys, one graph."""
    return (*chunk.key, *denoiser.graph_key(), *plan.key)


def _raise(flags: torch.Tensor, plan: Plan, dtype: torch.dtype) -> None:
    """Raise what the flags say; the host waits for the device here."""
    *of_steps, of_images = flags.tolist()
    if of_images:
        raise ValueError(f"img must be finite in {dtype}, got NaN, infinite values or values beyond its range")
    for step, raised in enumerate(of_steps):
        if raised:
            raise FloatingPointError(
                f"the network returned NaN at step {step + 1} of {len(plan.timesteps)} (t = {plan.timesteps[step]})"
            )


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Eval mode, and every submodule back in the mode it had."""
    training = [m for m in inference.modules(model) if m.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
