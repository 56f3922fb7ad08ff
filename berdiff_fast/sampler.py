# SPDX-License-Identifier: Apache-2.0
"""``sample``: many plausible masks per image, by batched sub-sequence sampling."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from berdiff_fast import checks, mode_draws, ops, parallel_in_time, rng
from berdiff_fast.backends import select
from berdiff_fast.model import BerDiff
from berdiff_fast.network import graph, inference
from berdiff_fast.network.prior import ModePrior
from berdiff_fast.network.window import Window
from berdiff_fast.schedule import NoiseSchedule

logger = logging.getLogger("berdiff_fast")

FINALS = ("threshold", "sample")

_FORWARD = BerDiff.forward

Model = Callable[..., torch.Tensor]


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
            "winograd" has its 3 x 3 convolutions multiply a quarter as often, in float32 on a CPU, for a digit less;
            False runs it as it is, as every other network is run. On a GPU, weights written by way of ``.data`` between
            calls go unnoticed: write in place, or pass False.
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
        self.schedule = _schedule(model, schedule)
        prediction = _carried(model, "prediction") if prediction is None else prediction
        if prediction is None:
            raise ValueError("prediction must be given ('epsilon' or 'y_0') for a model that does not carry it")
        if prediction not in ops.PREDICTIONS:
            raise ValueError(f"prediction must be 'epsilon' or 'y_0', got {prediction!r}")
        self.prediction: str = prediction
        if final not in FINALS:
            raise ValueError(f"final must be one of {list(FINALS)}, got {final!r}")
        if not isinstance(leave_one_out, bool):
            raise TypeError(f"leave_one_out must be True or False, got {leave_one_out!r}")
        if prepare not in (True, False, "winograd"):
            raise ValueError(f"prepare must be True, False or 'winograd', got {prepare!r}")
        if dtype is not None and dtype not in ops.LOGIT_DTYPES:
            raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")
        spacing = (_carried(model, "spacing") or "uniform") if spacing is None else spacing
        taus = self.schedule.subsequence(steps, spacing)
        #: In the order they are visited.
        self.timesteps = taus[::-1]
        # (S, 4) in that order.
        self._table = self.schedule.step_table(taus, method, leave_one_out=leave_one_out).flip(0)
        self.final = final
        own = _carried(model, "mask_channels")
        channels = (1 if own is None else own) if mask_channels is None else mask_channels
        self.mask_channels = checks.integer("mask_channels", channels, 1)
        if own is not None and self.mask_channels != own:
            raise ValueError(f"mask_channels must be the model's own {own}, got {mask_channels}")
        self.max_batch = None if max_batch is None else checks.integer("max_batch", max_batch, 1)
        self.parallel = None if parallel is None else checks.integer("parallel", parallel, 1)
        self.prepare, self.dtype, self.backend = prepare, dtype, backend
        self.classes = _Classes.of(model, modes, stratify)
        self._on_device: dict[Any, torch.Tensor] = {}
        #: Graphs of a network that is run as it is.
        self.graphs: dict[Any, graph.Graph | bool] = {}
        #: What masks depend on beside images, seeds and weights.
        self.key = (*self.timesteps, *self._table.flatten().tolist(), prediction, final, backend)

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
        device, own = _device_and_dtype(self.model)
        dtype = own if self.dtype is None else self.dtype
        given, img = img, _image(img, self.model, device, dtype)
        if isinstance(self.model, BerDiff):
            self.model.output_window.check("img", img.shape)
        select.get(self.backend, img.device.type)  # raises here, before any work, if it cannot run
        seeds = _seeds(seed, img.shape[0]).to(img.device, non_blocking=True)
        drawn = None
        if self.classes is not None:  # of the image as it was given, whatever dtype the denoiser is to compute in
            exact = img if dtype == own else _image(given, self.model, device, own)
            drawn = self.classes.draw(exact, seeds, self.n, first_sample)
        call = _Call(self, img, seeds, first_sample, self._coefficients(img.device), drawn)
        with _evaluating(self.model), torch.no_grad(), _bar(call, progress) as advance:
            found = call.run(self._network(dtype, dtype != own, img.device), return_probability, advance)
        if not return_modes:
            return found
        assert drawn is not None
        return (*found, drawn[0]) if isinstance(found, tuple) else (found, drawn[0])

    def _coefficients(self, device: torch.device) -> torch.Tensor:
        """The table on the device, where nothing waits for its coming: each stream has its own, in its own order."""
        where = (device, torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else device
        if where not in self._on_device:
            self._on_device[where] = self._table.float().to(device, non_blocking=True)
        return self._on_device[where]

    def _network(self, dtype: torch.dtype, converted: bool, device: torch.device) -> _Network:
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
            timesteps = [t * scale for t in self.timesteps]
            winograd = self.prepare == "winograd"
            prepared = inference.prepare(model.network, timesteps, dtype=dtype, winograd=winograd)
            return _Prepared(prepared, model.output_window, model.prediction)
        if converted:
            raise ValueError(f"dtype must be the model's own for a network that is run as it is, got {dtype}: {reason}")
        logger.debug("the network is run as it is: %s", reason)
        return _Network(model, self.timesteps, device, capture=bool(self.prepare))


@dataclass(frozen=True)
class _Classes:
    """Of a model with a mode prior: which size classes are drawn, and how."""

    prior: ModePrior
    allowed: tuple[int, ...]
    stratify: bool

    @classmethod
    def of(cls, model: Any, wanted: Any, stratify: Any) -> _Classes | None:
        if not isinstance(stratify, bool):
            raise TypeError(f"stratify must be True or False, got {stratify!r}")
        prior = _carried(model, "mode_prior")
        if prior is not None:
            return cls(prior, mode_draws.allowed_classes(wanted, prior.classes), stratify)
        if wanted is not None:
            raise ValueError(f"modes needs a model with a mode prior, got modes={wanted!r}")
        return None

    def draw(
        self, img: torch.Tensor, seeds: torch.Tensor, n: int, first_sample: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The class of each mask, (B, n), and whether the prior's logits are finite, one bool on the device."""
        logits = mode_draws.logits(self.prior, img)
        finite = torch.isfinite(logits).all()
        if not finite.is_cuda and not bool(finite):
            raise FloatingPointError("the mode prior returned NaN or infinite logits")
        weights = mode_draws.weights(logits, self.allowed)
        return mode_draws.draw(weights, seeds, n, first_sample=first_sample, stratify=self.stratify), finite


@dataclass
class _Call:
    """One call of a sampler, its images checked."""

    sampler: Sampler
    img: torch.Tensor  # (B, C, *spatial) in the dtype computed in, on the device
    seeds: torch.Tensor  # (B,) int64 on the device
    first_sample: int
    coefficients: torch.Tensor  # (S, 4) float32 on the device, in the order visited
    classes: tuple[torch.Tensor, torch.Tensor] | None = None  # (B, n) of the masks; whether they could be drawn

    @property
    def rows(self) -> int:
        return self.img.shape[0] * self.sampler.n

    @property
    def mask_shape(self) -> tuple[int, ...]:
        return (self.sampler.mask_channels, *self.img.shape[2:])

    def run(
        self, network: _Network, return_probability: bool, advance: Callable[[int], object]
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        device, timesteps = self.img.device, self.sampler.timesteps
        # One flag per step, and one for the images. They are raised on the device and read once, when all is queued.
        flags = torch.zeros(len(timesteps) + 1, dtype=torch.int32, device=device)
        if self.classes is not None:
            flags[:1].logical_or_(self.classes[1].logical_not())
        parts: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        window = min(self.sampler.parallel or 1, len(timesteps))
        # Masks a call of the network; each may be there at several steps.
        first, size = 0, min(self.sampler.max_batch or _max_batch(self.img), self.rows * window)
        while first < self.rows:
            last = min(first + max(1, size // window), self.rows)
            called = min(size, (last - first) * window)
            done = 0

            def count(rows: int) -> None:
                nonlocal done
                done += rows
                advance(rows)

            try:
                chunk = replace(self._chunk(first, last), window=min(window, size))
                parts.append(self._run_chunk(network, chunk, flags, return_probability, count))
            except RuntimeError as error:  # torch.OutOfMemoryError is one, and so are the libraries' own
                if called == 1 or not graph.is_out_of_memory(error):
                    raise
                size = (called + 1) // 2
            else:
                first = last
                continue
            # Out of the handler, so that nothing of the failed attempt is kept alive. What it drew is drawn again.
            logger.warning("out of memory with %d masks a call; going on with %d", called, size)
            advance(-done)
            if device.type == "cuda":
                network.forget_graphs(self)
                torch.cuda.empty_cache()

        *of_steps, of_images = flags.tolist()
        if of_images:
            raise ValueError(
                f"img must be finite in {self.img.dtype}, got NaN, infinite values or values beyond its range"
            )
        for step, raised in enumerate(of_steps):
            if raised:
                raise FloatingPointError(
                    f"the network returned NaN at step {step + 1} of {len(timesteps)} (t = {timesteps[step]})"
                )
        shape = (self.img.shape[0], self.sampler.n, *self.mask_shape)
        masks = torch.cat([part for part, _ in parts]).view(shape)
        if not return_probability:
            return masks
        return masks, torch.cat([part for _, part in parts if part is not None]).view(shape)

    def _run_chunk(
        self,
        network: _Network,
        chunk: _Chunk,
        flags: torch.Tensor,
        return_probability: bool,
        advance: Callable[[int], object],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All steps of a chunk: masks (rows, K, *spatial) and, where asked for, their probability."""

        def draw(img: torch.Tensor, seeds: torch.Tensor, raised: torch.Tensor) -> torch.Tensor:
            # The first sample comes with the seeds.
            return self.draw(network, replace(chunk, img=img, seeds=seeds, first_sample=0), raised)[0]

        captured = None
        alone = chunk.of_row is None and chunk.modes is None and chunk.window == 1
        if chunk.img.is_cuda and alone and not return_probability:
            captured = network.graph(draw, chunk, self)
        if captured is None:
            return self.draw(network, chunk, flags, return_probability, advance)
        masks, raised = captured.replay(chunk.img, chunk.seeds, chunk.first_sample)
        flags.logical_or_(raised)
        advance(chunk.rows * len(self.sampler.timesteps))
        return masks, None

    def _chunk(self, first: int, last: int) -> _Chunk:
        """Masks [first, last) of the B x n."""
        chunk = self._chunk_of_images(first, last)
        if self.classes is None:
            return chunk
        assert self.sampler.classes is not None
        return replace(chunk, modes=self.classes[0].flatten()[first:last], edges=self.sampler.classes.prior.edges)

    def _chunk_of_images(self, first: int, last: int) -> _Chunk:
        n = self.sampler.n
        low, high = first // n, (last - 1) // n + 1
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
        flags: torch.Tensor,
        return_probability: bool = False,
        advance: Callable[[int], object] = lambda rows: None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As ``_run_chunk``, call by call."""
        sampler, probability = self.sampler, None
        if chunk.img.is_cuda:  # on a CPU it is known before
            flags[-1:].logical_or_(torch.isfinite(chunk.img).all().logical_not_())
        told = None
        if chunk.modes is not None:
            told = mode_draws.Told(network, chunk.modes, chunk.image_of_row, chunk.edges)
            ask: Callable[..., torch.Tensor] = told
            images = told.images(chunk.img)
        else:
            ask, images = network, network.images(chunk.img)
            images = network.repeat(images, chunk.n) if chunk.of_row is None else images[chunk.of_row]
        where: dict[str, Any] = dict(
            samples_per_image=chunk.n,
            first_row=chunk.first_row,
            first_sample=chunk.first_sample,
            backend=sampler.backend,
        )
        y = ops.initial_noise(chunk.seeds, self.mask_shape, rows=chunk.rows, dtype=self.img.dtype, **where)
        if chunk.window > 1:
            y, before, logits, probability = self._draw_in_parallel(
                ask, chunk, images, y, where, flags, return_probability, advance
            )
            return self._fitted(told, y, before, logits, "y_0", probability)
        for step, timestep in enumerate(sampler.timesteps):
            logits = ask(y, step, images)
            if step == 0:
                _check_logits(logits, y)
            before = y
            is_last = step == len(sampler.timesteps) - 1
            if is_last and return_probability:
                probability = ops.posterior(
                    y, logits, self.coefficients[step], prediction=sampler.prediction, backend=sampler.backend
                )
            y = ops.sample_step(
                y,
                logits,
                chunk.seeds,
                self.coefficients[step],
                timestep,
                prediction=sampler.prediction,
                threshold=is_last and sampler.final == "threshold",
                dtype=torch.bool if is_last else y.dtype,
                nan_flag=flags[step : step + 1],
                **where,
            )
            advance(chunk.rows)
        return self._fitted(told, y, before, logits, sampler.prediction, probability)

    @staticmethod
    def _fitted(
        told: mode_draws.Told | None,
        masks: torch.Tensor,
        before: torch.Tensor,
        logits: torch.Tensor,
        prediction: str,
        probability: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Masks of the last step, and their probability, of their size class if they have one (``Told.fit``)."""
        if told is None:
            return masks, probability
        masks = told.fit(masks, before, logits, prediction)
        if probability is not None:
            probability = torch.where((told.modes > 0).view(-1, *[1] * (masks.ndim - 1)), probability, 0.0)
        return masks, probability

    def _draw_in_parallel(
        self,
        ask: Callable[..., torch.Tensor],
        chunk: _Chunk,
        images: torch.Tensor,
        noise: torch.Tensor,
        where: dict[str, Any],
        flags: torch.Tensor,
        return_probability: bool,
        advance: Callable[[int], object],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The steps of ``draw``, several at a time: masks, the state before, its logits of y_0, and probability."""
        sampler, last = self.sampler, len(self.sampler.timesteps) - 1
        rule: dict[str, Any] = dict(prediction="y_0", backend=sampler.backend)

        def predict(states: torch.Tensor, steps: slice) -> torch.Tensor:
            logits = ask(states, steps, images)
            if steps.start == 0:
                _check_logits(logits, states)
            # y_0 = y_t xor epsilon; the rule turns the sign back, so that the bits are those of epsilon's logits.
            return torch.where(states == 0, logits, -logits) if sampler.prediction == "epsilon" else logits

        def draw(y: torch.Tensor, logits: torch.Tensor, step: int, raised: torch.Tensor) -> torch.Tensor:
            threshold = step == last and sampler.final == "threshold"
            dtype = torch.bool if step == last else y.dtype
            options = where | rule | dict(threshold=threshold, dtype=dtype, nan_flag=raised)
            return ops.sample_step(y, logits, chunk.seeds, self.coefficients[step], sampler.timesteps[step], **options)

        masks, y, logits = parallel_in_time.trajectory(noise, last + 1, chunk.window, predict, draw, flags, advance)
        probability = ops.posterior(y, logits, self.coefficients[last], **rule) if return_probability else None
        return masks, y, logits, probability


@dataclass
class _Chunk:
    """Masks that go through the network together."""

    img: torch.Tensor  # (b, C, *spatial)
    seeds: torch.Tensor  # (b,), or (b, 2) with the first sample of each
    rows: int
    n: int  # masks per image
    first_sample: int
    first_row: int = 0  # the first one's number among those of these images
    of_row: torch.Tensor | None = None  # (rows,) which image; None: n of each in turn
    window: int = 1  # steps of each that go through the network together
    modes: torch.Tensor | None = None  # (rows,) the size class, for a model with a mode prior
    edges: tuple[int, ...] = ()  # of the classes

    @property
    def image_of_row(self) -> torch.Tensor:
        if self.of_row is not None:
            return self.of_row
        return torch.arange(self.rows, device=self.img.device) // self.n

    @property
    def key(self) -> tuple[Any, ...]:
        """Chunks of images of one shape with the same key are the same work, on other samples."""
        return self.rows, self.n


# ---------------------------------------------------------------------- the network


class _Network:
    """A model as it is, called at a sampler's timesteps."""

    def __init__(self, model: Model, timesteps: list[int], device: torch.device, capture: bool) -> None:
        self.model = model
        self.t = torch.tensor(timesteps).to(device, non_blocking=True)
        self.capture = capture and isinstance(model, nn.Module)

    def images(self, img: torch.Tensor) -> torch.Tensor:
        """What ``__call__`` wants of images (B, C, *spatial)."""
        return img

    def repeat(self, images: torch.Tensor, n: int) -> torch.Tensor:
        """It for n masks of each image: a view where there is one."""
        return images.expand(n, *images.shape[1:]) if len(images) == 1 else images.repeat_interleave(n, 0)

    def __call__(
        self, y: torch.Tensor, step: int | slice, images: torch.Tensor, classes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of masks at a step; or, in one batch, of the same masks at several steps, one after the other.

        Classes are those of the masks, once.
        """
        t = self.t[step]
        if isinstance(step, slice):
            images, t = _at_each(step, images), t.repeat_interleave(len(images))
            classes = None if classes is None else _at_each(step, classes)
        told = () if classes is None else (classes,)
        return self.model(y, t.expand(len(y)), images, *told)

    def graph(self, draw: graph.Draw, chunk: _Chunk, call: _Call) -> graph.Graph | None:
        """The captured form of ``draw``; None where it is run call by call."""
        model: Any = self.model
        if not self.capture:
            return None
        # A graph reads weights where they lay when it was captured.
        places = tuple(x.data_ptr() for x in (*model.parameters(), *model.buffers()))
        key, sampler = (*chunk.key, places), call.sampler
        keep = (self, call.coefficients)
        return graph.captured(sampler.graphs, key, draw, chunk.img, chunk.seeds, len(self.t) + 1, keep, check=True)

    def forget_graphs(self, call: _Call) -> None:
        """For the memory that they hold."""
        graph.drop(call.sampler.graphs)


class _Prepared(_Network):
    """A ``UNet`` in its prepared form."""

    def __init__(self, prepared: inference.Prepared, window: Window, prediction: str) -> None:
        self.prepared, self.window, self.prediction = prepared, window, prediction

    def graph(self, draw: graph.Draw, chunk: _Chunk, call: _Call) -> graph.Graph | None:
        # Kept with the prepared weights, so that calls of ``sample`` share them and new weights have none.
        prepared, key = self.prepared, (*chunk.key, call.sampler.key, self.window)
        keep = call.coefficients
        return graph.captured(prepared.graphs, key, draw, chunk.img, chunk.seeds, prepared.steps + 1, keep, check=False)

    def forget_graphs(self, call: _Call) -> None:
        graph.drop(self.prepared.graphs)

    def images(self, img: torch.Tensor) -> torch.Tensor:
        return self.prepared.encode(self.window.view(img))

    def repeat(self, images: torch.Tensor, n: int) -> torch.Tensor:
        return images  # they are added to those of n masks each

    def __call__(
        self, y: torch.Tensor, step: int | slice, images: torch.Tensor, classes: torch.Tensor | None = None
    ) -> torch.Tensor:
        if isinstance(step, slice) and len(images) > 1:
            images = _at_each(step, images)
        told: Any = () if classes is None else (classes,)
        return self.window.fill(self.prepared(self.window.cut(y), step, images, *told), y, self.prediction)


def _at_each(steps: slice, images: torch.Tensor) -> torch.Tensor:
    return images.repeat(steps.stop - steps.start, *[1] * (images.ndim - 1))


# ---------------------------------------------------------------------- arguments


def _carried(model: Any, name: str) -> Any:
    """What a model says of itself, also from within a wrapper: DataParallel, AveragedModel and the like (``.module``),
    torch.compile (``._orig_mod``). None if neither says anything."""
    seen: list[Any] = []
    while model is not None and all(model is not other for other in seen):
        if (found := getattr(model, name, None)) is not None:
            return found
        seen.append(model)
        inner = getattr(model, "_orig_mod", None)
        model = getattr(model, "module", None) if inner is None else inner
    return None


def _schedule(model: Any, schedule: NoiseSchedule | str | None) -> NoiseSchedule:
    if schedule is None:
        schedule = _carried(model, "schedule")
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
        # The first of each, without going through all of them at every call.
        first = next(chain(model.parameters(), model.buffers()), None)
        floating = (x for x in chain(model.parameters(), model.buffers()) if x.is_floating_point())
        dtype = torch.float32 if (x := next(floating, None)) is None else x.dtype
        if dtype not in ops.LOGIT_DTYPES:
            raise TypeError(f"model must compute in float32, float16 or bfloat16, got parameters of {dtype}")
        if first is not None:
            return first.device, dtype
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
    dims = _carried(model, "spatial_dims") or (3 if img.ndim == 5 else 2)
    if img.ndim == dims + 1:
        img = img[None]
    if img.ndim != dims + 2:
        raise ValueError(
            f"img must be (B, C, *spatial) or (C, *spatial) with {dims} spatial dimensions, got shape "
            f"{tuple(img.shape)}"
        )
    if 0 in img.shape:
        raise ValueError(f"img must not be empty, got shape {tuple(img.shape)}")
    channels = _carried(model, "img_channels")
    if channels is not None and img.shape[1] != channels:
        raise ValueError(f"img must have {channels} channels for this model, got shape {tuple(img.shape)}")
    if device is not None and img.device != device:
        raise ValueError(f"img must be on the model's device {device}, got {img.device}")
    img = img.detach()
    # On a GPU it is found out on the way and said at the end: the host does not wait for it.
    if not img.is_cuda:
        _check_finite(img, dtype)
    return img.to(dtype)


def _check_finite(img: torch.Tensor, dtype: torch.dtype) -> None:
    if not bool(torch.isfinite(img).all()):
        raise ValueError("img must be finite, got NaN or infinite values")
    if not bool(torch.isfinite(img.to(dtype)).all()):
        raise ValueError(f"img must be finite in the model's dtype {dtype} too, got values beyond its range")


def _max_batch(img: torch.Tensor) -> int:
    """Masks per call of the network: on a CPU 2^18 pixels; see docs/performance.md."""
    return 2**62 if img.is_cuda else max(1, 2**18 // img[0, 0].numel())


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


@contextmanager
def _bar(call: _Call, show: bool | Callable[[float], object]) -> Iterator[Callable[[int], object]]:
    total = call.rows * len(call.sampler.timesteps)
    if callable(show):
        yield lambda rows: show(rows / total)
        return
    if not show:
        yield lambda rows: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="sampling", unit="mask-step") as bar:
        yield bar.update
