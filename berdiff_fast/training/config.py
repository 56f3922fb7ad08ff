# SPDX-License-Identifier: Apache-2.0
"""One typed description of a training run, from which the YAML file and the command line are both derived."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from berdiff_fast import checks, limits, words
from berdiff_fast.data.examples import Augmentation
from berdiff_fast.model import BerDiff, Preprocessing
from berdiff_fast.network.prior import EDGES, ModePrior
from berdiff_fast.network.unet import UNet
from berdiff_fast.network.window import Window
from berdiff_fast.schedule import METHODS, SPACINGS, NoiseSchedule

_BUNDLED = Path(__file__).parent / "configs"


def _option(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class TrainConfig:
    """A training run. Every field is a key of the YAML file and, with dashes, an option of ``berdiff-fast train``.

    Raises:
        ValueError: a value out of range, or values that do not fit each other; the message names the field.
        TypeError: a value of another type.
    """

    # Files
    train_data: str = _option("", "HDF5 file to train on")
    val_data: str = _option("", "HDF5 file to validate on; none: no validation")
    output: str = _option("", "folder of the run; running again with the same one resumes")
    in_memory: bool = _option(True, "read the data files at once")
    data_on_device: str = _option("auto", "keep the slices where the model trains: auto (if they fit), true or false")
    workers: int = _option(0, "processes that prepare batches of other slices; 0: the training process itself")
    initial_weights: str = _option(
        "", "model to start from, of the same architecture: a file, directory or bundled name"
    )

    # Network (the published U-Net)
    model_channels: int = _option(32, "width of the first level, a multiple of norm_groups")
    channel_mult: list[int] = _option([1, 1, 2, 3], "width of each level in units of model_channels")
    num_res_blocks: int = _option(1, "residual blocks per level")
    attention_resolutions: list[int] = _option([8], "downsampling factors at which there is attention")
    num_heads: int = _option(2, "attention heads")
    dropout: float = _option(0.0, "dropout probability")
    use_scale_shift_norm: bool = _option(False, "the timestep scales and shifts instead of being added")
    norm_groups: int = _option(32, "groups of GroupNorm; fewer in a narrow network")
    patch_size: int = _option(1, "p x p pixels become channels on the way in: p^2 times cheaper")

    # Where to look
    output_crop: int = _option(0, "masks are denoised in the middle square of this many pixels; 0: everywhere")
    context: bool = _option(False, "with output_crop: show the surroundings too, at half the resolution")
    distance: bool = _option(False, "show each pixel's distance from the middle")

    # Mode prior: whether there is anything, and how large (docs/math.md)
    mode_prior: bool = _option(False, "predict the size class of the masks, and tell the network the class")
    mode_edges: list[int] = _option(list(EDGES), "areas in pixels between the classes; class 0 is the empty mask")
    prior_channels: list[int] = _option([32, 64, 96, 128], "widths of the prior's levels, multiples of 8")
    prior_crop: int = _option(0, "side of the middle square that the prior sees in full; 0: all of the image")
    prior_context: bool = _option(False, "with prior_crop: it sees the surroundings too, at half the resolution")
    prior_members: int = _option(1, "networks that are trained side by side and averaged")
    prior_dropout: float = _option(0.1, "dropout probability of the prior")
    prior_shift: int = _option(0, "in training, its middle square is up to so many pixels off")
    prior_jitter: float = _option(0.1, "in training, it sees intensities scaled and moved by up to this fraction")
    prior_weight: float = _option(
        0.01, "weight of its cross-entropy (nats) beside the denoiser's loss (bits per pixel)"
    )
    prior_learning_rate: float = _option(1e-3, "its peak rate of AdamW")
    prior_weight_decay: float = _option(0.05, "its weight decay")
    prior_ema_decay: float = _option(0.998, "of its averaged weights")
    prior_keep_best: bool = _option(
        True, "the saved prior is that of the validation with the least cross-entropy; else the last one"
    )
    prior_steps: int = _option(0, "steps after which it is left as it is, since it overfits sooner; 0: all steps")

    # Diffusion
    schedule: str = _option("cosine2", "noise schedule: linear, cosine, cosine2")
    timesteps: int = _option(1000, "T")
    input_scale: float = _option(1.0, "b < 1: more noise at every timestep; see NoiseSchedule")
    as_released: bool = _option(False, "the published code's noise, which leaves background clean (comparisons)")
    prediction: str = _option("epsilon", "what the network predicts: epsilon or y_0")
    window: list[float] = _option([], "LOW HIGH: clip intensities to this window; none: each image's own range")

    # Loss (BerDiff, eq. 8)
    kl_weight: float = _option(1.0, "weight of the KL term")
    bce_weight: float = _option(1.0, "lambda, weight of the BCE term")
    leave_one_out: bool = _option(False, "the leave-one-out shift in the KL term; see docs/math.md")

    # Augmentation
    flip: bool = _option(True, "random mirror images")
    rotate90: bool = _option(True, "random multiples of 90 degrees")
    rotate: float = _option(0.0, "random rotation by up to this many degrees")
    scale: float = _option(0.0, "random zoom by up to this fraction")
    crop: int = _option(0, "train on the middle square of this many pixels; 0: whole slices")
    crop_steps: int = _option(0, "so many steps at first, then on whole slices; 0: all steps")

    # Optimisation
    steps: int = _option(4000, "optimiser steps")
    batch_size: int = _option(16, "images per optimiser step, over all processes and accumulations")
    accumulation: int = _option(1, "forward passes per optimiser step")
    learning_rate: float = _option(1e-3, "peak rate of AdamW")
    beta2: float = _option(0.99, "of AdamW; with 0.999 a sudden gradient can throw a small network far off")
    weight_decay: float = _option(1e-4, "of AdamW")
    warmup: int = _option(200, "steps in which the rate rises linearly")
    decay: str = _option("cosine", "the rate after warm-up: cosine (to 0) or constant")
    clip: float = _option(1.0, "largest norm of the gradient; 0: no clipping")
    ema_decay: float = _option(0.999, "of the averaged weights, which are the ones that are saved")
    precision: str = _option("fp32", "fp32, tf32, or bf16 or fp16 (automatic mixed precision)")
    channels_last: bool = _option(False, "channels last in memory")
    compile: bool = _option(False, "torch.compile the network")
    device: str = _option("auto", "auto (a GPU if there is one) or cpu")
    seed: int = _option(0, "of weights, order, raters, augmentation, noise and validation samples")

    # Records
    log_every: int = _option(50, "steps between lines of log.jsonl")
    validate_every: int = _option(1000, "steps between validations")
    validation_slices: int = _option(64, "slices of a validation, evenly spread over the file")
    validation_samples: int = _option(16, "masks per slice of a validation")
    validation_steps: int = _option(10, "sampling steps of a validation")
    validation_method: str = _option("ddim", "sampler of a validation: " + ", ".join(METHODS))
    spacing: str = _option(
        "trailing-quadratic", "spacing of its timesteps, and of the saved model's: " + ", ".join(SPACINGS)
    )
    checkpoint_every: int = _option(500, "steps between checkpoints")
    keep: int = _option(2, "checkpoints to keep, the newest ones")
    tensorboard: bool = _option(True, "write TensorBoard files, where it is installed")
    quiet: bool = _option(False, "no progress bar, no words but errors and warnings")

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        if isinstance(self.data_on_device, bool):  # as YAML reads true and false
            self.data_on_device = str(self.data_on_device).lower()
        for f in dataclasses.fields(self):
            setattr(self, f.name, _coerce(f.name, getattr(self, f.name), kinds[f.name]))
        least = {
            **dict.fromkeys(("steps", "batch_size", "accumulation", "log_every", "validate_every", "keep"), 1),
            **dict.fromkeys(("validation_slices", "validation_samples", "validation_steps", "checkpoint_every"), 1),
            **dict.fromkeys(("workers", "warmup", "seed", "crop", "crop_steps", "prior_steps"), 0),
        }
        for name, minimum in least.items():
            checks.integer(name, getattr(self, name), minimum)
        finite = ["learning_rate", "weight_decay", "clip", "kl_weight", "bce_weight", "rotate", "scale"]
        for name in (*finite, "prior_weight", "prior_learning_rate", "prior_weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {getattr(self, name)}")
        choices = {
            "decay": ("cosine", "constant"),
            "precision": ("fp32", "tf32", "bf16", "fp16"),
            "data_on_device": ("auto", "true", "false"),
            "device": ("auto", "cpu"),
            "validation_method": METHODS,
            "spacing": SPACINGS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {list(allowed)}, got {getattr(self, name)!r}")
        for name in ("ema_decay", "beta2", "dropout", "prior_ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.kl_weight == self.bce_weight == 0:
            raise ValueError("kl_weight and bce_weight must not both be 0")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size must be a multiple of accumulation, got {self.batch_size} and {self.accumulation}"
            )
        if len(self.window) not in (0, 2):
            raise ValueError(f"window must be LOW HIGH or nothing, got {self.window}")
        factor = self.patch_size * 2 ** (len(self.channel_mult) - 1)
        if self.crop % factor:
            raise ValueError(f"crop must be a multiple of {factor}, which the network halves down to, got {self.crop}")
        if self.output_crop and self.crop:
            raise ValueError(
                f"crop must be 0 with output_crop, which trains on the window already and shows what is around it; got "
                f"{self.crop}"
            )
        if self.crop_steps and not self.crop:
            raise ValueError(f"crop_steps needs crop, which is 0; got {self.crop_steps}")
        # What the parts themselves check: names and numbers of the schedule, the network and the window.
        self.build_schedule().subsequence(self.validation_steps, self.spacing)
        self.build_model(mask_channels=1, img_channels=1, meta=True)

    def build_schedule(self) -> NoiseSchedule:
        """The noise schedule."""
        return NoiseSchedule(self.schedule, self.timesteps, input_scale=self.input_scale, as_released=self.as_released)

    def build_model(
        self, mask_channels: int, img_channels: int, size: tuple[int, int] | None = None, *, meta: bool = False
    ) -> BerDiff:
        """The untrained model; with ``meta``, without memory for its weights."""
        import torch

        view = Window(self.output_crop, self.context, self.distance)
        with torch.device("meta" if meta else "cpu"):
            network = UNet(
                in_channels=mask_channels,
                img_channels=view.channels(img_channels),
                model_channels=self.model_channels,
                channel_mult=self.channel_mult,
                num_res_blocks=self.num_res_blocks,
                attention_resolutions=self.attention_resolutions,
                num_heads=self.num_heads,
                dropout=self.dropout,
                use_scale_shift_norm=self.use_scale_shift_norm,
                norm_groups=self.norm_groups,
                patch_size=self.patch_size,
                num_classes=len(self.mode_edges) + 2 if self.mode_prior else 0,
            )
            prior = self._build_prior(img_channels) if self.mode_prior else None
        window = (self.window[0], self.window[1]) if self.window else None
        preprocessing = Preprocessing("window" if window else "min-max", window, size=size)
        return BerDiff(
            network,
            self.build_schedule(),
            self.prediction,
            preprocessing=preprocessing,
            spacing=self.spacing,
            output_crop=self.output_crop,
            context=self.context,
            distance=self.distance,
            mode_prior=prior,
        )

    def _build_prior(self, img_channels: int) -> ModePrior:
        # What the images are mirrored and turned by in training is what may be averaged over.
        symmetries = (8 if self.rotate90 else 4) if self.flip else 1
        return ModePrior(
            img_channels,
            self.mode_edges,
            channels=self.prior_channels,
            crop=self.prior_crop,
            context=self.prior_context,
            dropout=self.prior_dropout,
            members=self.prior_members,
            symmetries=symmetries,
            shift=self.prior_shift,
            jitter=self.prior_jitter,
        )

    def augmentation(self) -> Augmentation:
        """The random changes of training images."""
        return Augmentation(self.flip, self.rotate90, self.rotate, self.scale)

    def learning_rate_at(self, step: int) -> float:
        """The rate of step 0, 1, ...: linear warm-up, then constant or half a cosine to 0."""
        return self._rate_at(step, self.learning_rate, self.steps)

    def prior_rate_at(self, step: int) -> float:
        """The mode prior's: the same, over its own steps."""
        return self._rate_at(step, self.prior_learning_rate, self.prior_last)

    @property
    def prior_last(self) -> int:
        """After how many steps the mode prior is left as it is."""
        return min(self.prior_steps or self.steps, self.steps)

    def _rate_at(self, step: int, peak: float, steps: int) -> float:
        if step < self.warmup:
            return peak * (step + 1) / self.warmup
        if self.decay == "constant":
            return peak
        done = (step - self.warmup) / max(steps - self.warmup, 1)
        return peak * 0.5 * (1 + math.cos(math.pi * done))

    def to_dict(self) -> dict[str, Any]:
        """All fields; ``from_dict`` of it is an equal run."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The file that ``--config`` reads back."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """A run from a mapping of fields.

        Raises:
            ValueError: an unknown key; the message suggests the nearest one.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
                raise ValueError(f"unknown key {key!r} in the training config{hint}")
        return cls(**values)


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of a YAML file, or of a config that comes with the package (``bundled_configs()``).

    Raises:
        FileNotFoundError: neither a file nor a bundled name.
        ValueError: not a YAML mapping, or one that says more than a config can.
    """
    import yaml

    file = Path(path)
    if not file.is_file():
        if str(path) not in bundled_configs():
            raise FileNotFoundError(
                f"config: no file {str(path)!r}, and no bundled config of that name (there are {bundled_configs()})"
            )
        file = _BUNDLED / f"{path}.yaml"
    if file.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{file} must have at most {_MOST_BYTES} bytes, got {file.stat().st_size}")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        said = limits.count(values, {})
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{file} is not YAML: {words.line(error)}") from error
    if said > _MOST_VALUES:
        raise ValueError(f"{file} must say at most {_MOST_VALUES} values, got {said:.3g} (aliases of aliases?)")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold keys and values, got a {type(values).__name__}")
    return values


#: Of a YAML file, and of what it says once each alias is written out: far more than a config has.
_MOST_BYTES, _MOST_VALUES = 2**20, 10_000


def bundled_configs() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(p.stem for p in _BUNDLED.glob("*.yaml"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each field of ``TrainConfig``; those not given stay unset."""
    parser.add_argument("--config", help="YAML file of options, or one of: " + ", ".join(bundled_configs()))
    kinds = get_type_hints(TrainConfig)
    for f in dataclasses.fields(TrainConfig):
        kind = kinds[f.name]
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        options: dict[str, Any] = {"help": f.metadata["help"] + (f" (default: {shown})" if shown != "" else "")}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind in (list[int], list[float]):
            options |= {"nargs": "*", "type": kind.__args__[0], "metavar": "N"}
        else:
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **options)


def from_arguments(options: argparse.Namespace) -> TrainConfig:
    """The run that was asked for: defaults, then the YAML file, then the command line."""
    values = read_yaml(options.config) if options.config else {}
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(TrainConfig) if hasattr(options, f.name)}
    try:
        return TrainConfig.from_dict({**values, **given})
    except (TypeError, ValueError) as error:
        try:
            TrainConfig.from_dict(given)
        except (TypeError, ValueError):
            raise error from None  # of the command line, whatever the file says
        raise type(error)(f"{options.config}: {error}") from None


def _coerce(name: str, value: Any, kind: Any) -> Any:
    if kind is float:
        # YAML reads 1e-4 as a string.
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise TypeError(f"{name} must be a number, got {value!r:.200}") from None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r:.200}")
        return float(value)
    if kind is int:
        return checks.integer(name, value)
    if kind in (bool, str):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be {'true or false' if kind is bool else 'a string'}, got {value!r:.200}")
        return value
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list, got {value!r:.200}")
    return [_coerce(name, v, kind.__args__[0]) for v in value]
