# SPDX-License-Identifier: Apache-2.0
"""What a Bernoulli scheduler does, in the words that diffusers and MONAI share; neither is needed here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from berdiff_fast import checks, ops
from berdiff_fast.sampling import FINALS
from berdiff_fast.schedule import SPACINGS, NoiseSchedule

#: Names of ``NoiseSchedule``.
SCHEDULES = ("linear", "cosine", "cosine2")

#: diffusers' and MONAI's word for a network that predicts the clean mask is "sample".
PREDICTION_TYPES = {"epsilon": "epsilon", "y_0": "y_0", "sample": "y_0"}

Generators = torch.Generator | Sequence[torch.Generator]


class StepOutput(NamedTuple):
    """What ``step`` returns: a tuple, whose parts have diffusers' names too.

    Attributes:
        prev_sample: (N, K, *spatial) in the dtype of ``sample``: the mask of the next timestep, 0 and 1.
        pred_original_sample: float32 of the same shape: the network's P(y_0 = 1) at this timestep.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class BernoulliSteps:
    """The scheduler without its constructor, to be mixed into a class of diffusers or of MONAI.

    ``step`` keeps no place in the sub-sequence: a step depends on its timestep and its arguments alone.

    Attributes:
        schedule: the ``NoiseSchedule``; ``ops.diffusion_loss`` wants it.
        prediction: "epsilon" or "y_0".
        timesteps: (S,) int64 in the order visited, from the largest down; all of them before ``set_timesteps``.
        num_inference_steps: S; None before ``set_timesteps``.
    """

    #: What pipelines ask of a scheduler: calls of the network per step, and the scale of the initial noise.
    order = 1
    init_noise_sigma = 1.0

    schedule: NoiseSchedule
    prediction: str
    timesteps: torch.Tensor
    num_inference_steps: int | None

    def _set_up(
        self,
        schedule: NoiseSchedule,
        prediction_type: str,
        method: str,
        timestep_spacing: str,
        final: str,
        leave_one_out: bool,
    ) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type must be one of {list(PREDICTION_TYPES)}, got {prediction_type!r}")
        if timestep_spacing not in SPACINGS:
            raise ValueError(f"timestep_spacing must be one of {list(SPACINGS)}, got {timestep_spacing!r}")
        if final not in FINALS:
            raise ValueError(f"final must be one of {list(FINALS)}, got {final!r}")
        if not isinstance(leave_one_out, bool):
            raise TypeError(f"leave_one_out must be True or False, got {leave_one_out!r}")
        self.schedule = schedule
        self.prediction = PREDICTION_TYPES[prediction_type]
        self._method, self._spacing, self._final, self._leave_one_out = method, timestep_spacing, final, leave_one_out
        self._visit(list(range(schedule.timesteps)), None, None)
        self.num_inference_steps = None

    def __len__(self) -> int:
        return self.schedule.timesteps

    # ------------------------------------------------------------------ timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        *,
        timesteps: Sequence[int] | None = None,
        seeds: torch.Tensor | None = None,
    ) -> None:
        """Choose the timesteps to visit, and maybe the seeds of all that is drawn on the way.

        Args:
            num_inference_steps: how many, spaced as the scheduler was told.
            device: where ``timesteps`` shall be; MONAI's inferers want them on the CPU, the default.
            timesteps: which ones, instead of how many.
            seeds: (B,) int64, one per image, for ``initial_noise`` and ``step`` where these are given neither seeds
                nor a generator: for loops that are somebody else's. Until the next call of ``set_timesteps``.

        Raises:
            ValueError, TypeError: naming the argument; see ``NoiseSchedule.subsequence``.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                f"give num_inference_steps or timesteps, and not both, got {num_inference_steps!r} and {timesteps!r}"
            )
        if timesteps is None:
            steps: int | Sequence[int] = checks.integer("num_inference_steps", num_inference_steps, 1)
        elif isinstance(timesteps, torch.Tensor):
            steps = timesteps.tolist()
        else:
            steps = timesteps
        _check_seeds(seeds)
        self._visit(self.schedule.subsequence(steps, self._spacing), device, seeds)
        self.num_inference_steps = len(self.timesteps)

    def _visit(self, ascending: list[int], device: str | torch.device | None, seeds: torch.Tensor | None) -> None:
        table = self.schedule.step_table(ascending, self._method, leave_one_out=self._leave_one_out)
        #: (S, 4) in ascending order; the first row, that of the last step, is also what makes P(y_0 = 1).
        self._table = table.float()
        self._row = {t: row for row, t in enumerate(ascending)}
        self._seeds = seeds
        self.timesteps = torch.tensor(ascending[::-1], dtype=torch.int64).to(device or "cpu")

    # ------------------------------------------------------------------ noise

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """``sample`` itself: a mask has no scale."""
        return sample

    def initial_noise(
        self,
        shape: Sequence[int],
        generator: Generators | None = None,
        *,
        seeds: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
    ) -> torch.Tensor:
        """Masks of fair coin tosses: where sampling starts, instead of ``torch.randn``.

        Args:
            shape: (N, K, *spatial).
            generator, seeds: as in ``step``.
            dtype: the type of the masks.
            device: where they shall be; that of the seeds, else the CPU, by default.

        Returns:
            ``shape`` in ``dtype``, 0 and 1.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        rows, *mask_shape = (checks.integer("shape", size, 1) for size in shape)
        if not mask_shape:
            raise ValueError(f"shape must be (N, K, *spatial), got {tuple(shape)}")
        chosen = self._seeds_for(rows, generator, seeds)
        chosen = chosen.to(device if device is not None else chosen.device)
        return ops.initial_noise(chosen, mask_shape, samples_per_image=rows // len(chosen), dtype=dtype)

    def add_noise(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor | Generators,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        """The forward process: y_t ~ B(A_t y_0 + (1 - A_t) / 2) (BerDiff, eq. 2), by flipping bits of y_0.

        A Bernoulli process adds nothing: it flips a bit with probability p = (1 - A_t) / 2. So ``noise`` is not what is
        added but what decides: ``torch.rand_like(original_samples)``, where diffusers and MONAI have ``randn_like``.

        Args:
            original_samples: (N, K, *spatial) clean masks, 0 and 1.
            noise: uniform numbers in [0, 1) of the same shape, float32 or float64, a bit being flipped where they are
                below p; or (N,) int64 seeds, with which the bits are those of ``ops.q_sample``; or a generator that
                seeds are drawn from (or one for each mask).
            timesteps: (N,) int64.

        Returns:
            (N, K, *spatial) in the dtype of ``original_samples``, 0 and 1.

        Raises:
            ValueError, TypeError: naming the argument; among others for Gaussian noise.
        """
        y_0 = _masks("original_samples", original_samples)
        if not isinstance(timesteps, torch.Tensor):
            raise TypeError(f"timesteps must be a torch.Tensor, got {type(timesteps).__name__}")
        if timesteps.dtype is not torch.int64 or timesteps.shape != (len(y_0),):
            raise ValueError(
                f"timesteps must be int64 of shape ({len(y_0)},), got {timesteps.dtype} of shape "
                f"{tuple(timesteps.shape)}"
            )
        t = _plain(timesteps)
        low, high = (int(x) for x in torch.aminmax(t))
        if low < 0 or high >= len(self):
            raise ValueError(f"timesteps must be in [0, {len(self)}), got values from {low} to {high}")
        t = t.to(y_0.device)
        if not isinstance(noise, torch.Tensor):
            return ops.q_sample(y_0, t, _drawn(len(y_0), noise, "noise").to(y_0.device), self.schedule)
        u = _plain(noise).to(y_0.device)
        if u.dtype is torch.int64 and u.shape == t.shape:
            return ops.q_sample(y_0, t, u, self.schedule)
        # bfloat16's uniform numbers are multiples of 2^-8: far too many of them are below a p of the first timesteps.
        if u.dtype not in (torch.float32, torch.float64) or u.shape != y_0.shape:
            raise ValueError(
                f"noise must be float32 or float64 of shape {tuple(y_0.shape)}, or int64 seeds of shape {(len(y_0),)}, "
                f"got {u.dtype} of shape {tuple(u.shape)}"
            )
        if not bool(((u >= 0) & (u < 1)).all()):
            raise ValueError(
                "noise must be uniform in [0, 1), as torch.rand_like draws it (not randn_like), got values from "
                f"{u.min():g} to {u.max():g}"
            )
        # The schedule is never the released one: a 0 and a 1 are flipped alike.
        p = self.schedule.flip_probability(t)[:, 0].reshape(-1, *[1] * (y_0.ndim - 1))
        return (y_0.bool() ^ (u < p)).to(y_0.dtype)

    # ------------------------------------------------------------------ a step

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: Generators | None = None,
        return_dict: bool = True,
        *,
        seeds: torch.Tensor | None = None,
    ) -> StepOutput | tuple[torch.Tensor, torch.Tensor]:
        """From y_t to the mask of the next timestep, by ``ops.sample_step``; the last step as ``final`` says.

        What governs the draw: ``seeds`` or ``generator``, else the seeds of ``set_timesteps``, else torch's default
        generator, so that ``torch.manual_seed`` governs. With seeds, mask k of image b depends on seeds[b], its
        logits, the timestep and k alone, and a loop over ``timesteps`` from ``initial_noise`` of the same seeds draws
        the masks of ``berdiff_fast.sample``. From one generator every call draws a fresh seed for each mask.

        Args:
            model_output: (N, K, *spatial) **logits**, not probabilities, of what ``prediction_type`` says; float32,
                float16 or bfloat16. Probabilities would be taken for logits between 0 and 1, and go unnoticed.
            timestep: one of ``timesteps``: an int, or a tensor of one.
            sample: (N, K, *spatial) the masks y_t, 0 and 1.
            generator: a ``torch.Generator`` or, as in diffusers, one for each mask.
            return_dict: False for a plain tuple; the object unpacks as one anyway.
            seeds: (B,) int64, one per image, as from ``image_seeds``. The N masks are N / B of each image in turn.

        Returns:
            ``StepOutput``: prev_sample and pred_original_sample.

        Raises:
            FloatingPointError: a logit is NaN.
            ValueError, TypeError: naming the argument.
        """
        t = self._known(timestep)
        y_t = _masks("sample", sample)
        logits = self._logits(model_output, y_t)
        chosen = self._seeds_for(len(y_t), generator, seeds).to(y_t.device)
        if self._table.device != y_t.device:
            self._table = self._table.to(y_t.device)
        row = self._row[t]
        threshold = row == 0 and self._final == "threshold"
        previous = ops.sample_step(
            y_t, logits, chosen, self._table[row], t, prediction=self.prediction, threshold=threshold
        )
        clean = ops.posterior(y_t, logits, self._table[0], prediction=self.prediction)
        return StepOutput(previous, clean) if return_dict else (previous, clean)

    def _known(self, timestep: Any) -> int:
        if isinstance(timestep, torch.Tensor):
            if timestep.numel() != 1:
                raise ValueError(f"timestep must be one for the whole batch, got shape {tuple(timestep.shape)}")
            timestep = timestep.item()
        t = checks.integer("timestep", timestep)
        if t not in self._row:
            raise ValueError(
                f"timestep must be one of the {len(self._row)} of timesteps, from {max(self._row)} down to "
                f"{min(self._row)}, got {t}; set_timesteps chooses them"
            )
        return t

    def _logits(self, model_output: Any, y_t: torch.Tensor) -> torch.Tensor:
        if not isinstance(model_output, torch.Tensor):
            raise TypeError(f"model_output must be a torch.Tensor, got {type(model_output).__name__}")
        if model_output.dtype not in ops.LOGIT_DTYPES:
            raise TypeError(f"model_output must be float32, float16 or bfloat16, got {model_output.dtype}")
        if model_output.shape != y_t.shape:
            raise ValueError(
                f"model_output must have the shape of sample, {tuple(y_t.shape)}, got {tuple(model_output.shape)}"
            )
        if model_output.device != y_t.device:
            raise ValueError(f"model_output must be on {y_t.device} like sample, got {model_output.device}")
        return _plain(model_output)

    def _seeds_for(self, rows: int, generator: Any, seeds: torch.Tensor | None) -> torch.Tensor:
        """(B,) int64, B a divisor of ``rows``."""
        if seeds is not None and generator is not None:
            raise ValueError("give seeds or generator, not both")
        if generator is not None:
            return _drawn(rows, generator)
        _check_seeds(seeds)
        chosen = self._seeds if seeds is None else seeds
        if chosen is None:
            return _drawn(rows, None)
        if rows % len(chosen):
            raise ValueError(f"seeds must be one per image: {rows} masks do not divide among {len(chosen)} seeds")
        return chosen


def schedule_of(name: str, value: Any, timesteps: int, input_scale: float = 1.0) -> NoiseSchedule:
    """The named schedule; ``name`` is what its argument is called, for errors."""
    if value not in SCHEDULES:
        raise ValueError(f"{name} must be one of {list(SCHEDULES)}, got {value!r}")
    return NoiseSchedule(value, checks.integer("num_train_timesteps", timesteps, 2), input_scale=input_scale)


def _plain(x: torch.Tensor) -> torch.Tensor:
    """Without a graph and without what a subclass (MONAI's MetaTensor) carries along."""
    x = x.detach()
    return x if type(x) is torch.Tensor else x.as_subclass(torch.Tensor)


def _masks(name: str, x: Any) -> torch.Tensor:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in ops.MASK_DTYPES:
        raise TypeError(f"{name} must be bool, uint8, float32, float16 or bfloat16, got {x.dtype}")
    if x.ndim < 2 or not x.numel():
        raise ValueError(f"{name} must be (N, K, *spatial) and not empty, got shape {tuple(x.shape)}")
    x = _plain(x)
    # The ops take whatever is not zero for one, so that the Gaussian noise other pipelines start from would pass.
    if x.dtype is not torch.bool and not bool(((x == 0) | (x == 1)).all()):
        raise ValueError(
            f"{name} must be masks of 0 and 1, got values from {x.min().item():g} to {x.max().item():g} (sampling "
            "starts from scheduler.initial_noise, not from Gaussian noise)"
        )
    return x


def _check_seeds(seeds: Any) -> None:
    if seeds is None:
        return
    if not isinstance(seeds, torch.Tensor):
        raise TypeError(f"seeds must be a torch.Tensor, as from image_seeds, got {type(seeds).__name__}")
    if seeds.dtype is not torch.int64 or seeds.ndim != 1 or not len(seeds):
        raise ValueError(f"seeds must be int64 of shape (B,), got {seeds.dtype} of shape {tuple(seeds.shape)}")


def _drawn(rows: int, generator: Any, name: str = "generator") -> torch.Tensor:
    """A fresh seed for each mask: (rows,) int64 on the generator's device."""
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        return torch.empty(rows, dtype=torch.int64, device=device).random_(generator=generator)
    generators = list(generator) if isinstance(generator, Iterable) else [None]
    if not all(isinstance(one, torch.Generator) for one in generators):
        raise TypeError(f"{name} must be a torch.Generator or one for each mask, got {type(generator).__name__}")
    if len(generators) != rows:
        raise ValueError(f"{name} must be one, or one for each of the {rows} masks, got {len(generators)}")
    return torch.cat([_drawn(1, one).cpu() for one in generators])
