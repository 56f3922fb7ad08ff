# SPDX-License-Identifier: Apache-2.0
"""The sections of a training run's settings. Their types and docstrings are the command line's options and help."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from berdiff_fast.choices import Method, Prediction, Schedule, Spacing, Tracker
from berdiff_fast.training.fields import Section, flat_names


@dataclass(frozen=True)
class Data(Section):
    """Files, and how they are read.

    Args:
        train: HDF5 file to train on
        validation: HDF5 file to validate on; none: no validation
        window: LOW HIGH: clip intensities to this window; or LOW HIGH of each channel in turn; none: do not clip
        scaling: of intensities: min-max, window, z-score, or auto: by the window if there is one, by the z-score of the
            volume where the file tells its statistics, else min-max
        per_channel: scale each channel by itself: auto (if there are several, but for red, green and blue), true or
            false
        in_memory: read the data files at once
        on_device: keep the slices where the model trains: auto (if they fit), true or false
        workers: processes that prepare batches of other slices; 0: the training process itself
    """

    train: str = ""
    validation: str = ""
    window: tuple[float, ...] = ()
    scaling: Literal["auto", "min-max", "window", "z-score"] = "auto"
    per_channel: Literal["auto", "true", "false"] = "auto"
    in_memory: bool = True
    on_device: Literal["auto", "true", "false"] = "auto"
    workers: int = 0


@dataclass(frozen=True)
class Network(Section):
    """The denoiser: the published U-Net or a class of your own, and where in the image it looks.

    Args:
        model_channels: width of the first level, a multiple of norm_groups
        channel_mult: width of each level in units of model_channels
        num_res_blocks: residual blocks per level
        attention_resolutions: downsampling factors at which there is attention
        num_heads: attention heads
        dropout: dropout probability
        use_scale_shift_norm: the timestep scales and shifts instead of being added
        norm_groups: groups of GroupNorm; fewer in a narrow network
        patch_size: p x p pixels become channels on the way in: p^2 times cheaper
        dims: 2 for slices, 3 for volumes, auto: what the data file holds
        output_crop: masks are denoised in the middle square of this many pixels; 0: everywhere
        context: with output_crop: show the surroundings too, at half the resolution
        distance: show each pixel's distance from the middle
        initial_weights: model to start from, of the same architecture: a file, directory or bundled name
        class_path: package.Class of a network of your own, called as network(y_t, t, img), instead of the U-Net, whose
            settings then count for nothing (docs/own_network.md); none: the U-Net
        arguments: that class's keyword arguments, as JSON: {"width": 32}
        allow_imports: packages that initial_weights may import its network from, beside that of class_path
    """

    ALSO: ClassVar = {"": "class_path", "class": "class_path"}

    model_channels: int = 32
    channel_mult: tuple[int, ...] = (1, 1, 2, 3)
    num_res_blocks: int = 1
    attention_resolutions: tuple[int, ...] = (8,)
    num_heads: int = 2
    dropout: float = 0.0
    use_scale_shift_norm: bool = False
    norm_groups: int = 32
    patch_size: int = 1
    dims: Literal["auto", "2", "3"] = "auto"
    output_crop: int = 0
    context: bool = False
    distance: bool = False
    initial_weights: str = ""
    class_path: str = ""
    arguments: str = ""
    allow_imports: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.arguments, Mapping):  # as YAML and Python have them
            object.__setattr__(self, "arguments", _json(dict(self.arguments)))
        super().__post_init__()
        if self.arguments:
            try:
                given = json.loads(self.arguments)
            except ValueError as error:
                raise ValueError(f"network.arguments must be JSON, got {self.arguments!r:.200} ({error})") from None
            if not isinstance(given, dict):
                raise TypeError(f"network.arguments must be a JSON object, got {self.arguments!r:.200}")
            # Equal arguments are one text.
            object.__setattr__(self, "arguments", _json(given))
            if not self.class_path:
                raise ValueError(f"network.arguments needs a class_path, which is empty; got {self.arguments:.200}")

    @property
    def spatial_dims(self) -> int | None:
        """2 or 3; None: as the data say."""
        return None if self.dims == "auto" else int(self.dims)

    @property
    def halvings(self) -> int:
        """What the sides of its input must be multiples of, as far as the config tells."""
        if self.class_path:
            return 1
        return self.patch_size * 2 ** (len(self.channel_mult) - 1)


def _json(values: dict[str, Any]) -> str:
    try:
        return json.dumps(values, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise TypeError(f"network.arguments must be what JSON can hold, got {values!r:.200} ({error})") from None


@dataclass(frozen=True)
class Prior(Section):
    """The mode prior, which says whether there is anything, and how large (docs/math.md).

    Args:
        enabled: predict the size class of the masks, and tell the network the class
        edges: areas in pixels between the classes; class 0 is the empty mask
        channels: widths of the prior's levels, multiples of 8
        crop: side of the middle square that the prior sees in full; 0: all of the image
        context: with crop: it sees the surroundings too, at half the resolution
        members: networks that are trained side by side and averaged
        dropout: dropout probability of the prior
        shift: in training, its middle square is up to so many pixels off
        jitter: in training, it sees intensities scaled and moved by up to this fraction
        weight: weight of its cross-entropy (nats) beside the denoiser's loss (bits per pixel)
        learning_rate: its peak rate of AdamW
        weight_decay: its weight decay
        ema_decay: of its averaged weights
        keep_best: the saved prior is that of the validation with the least cross-entropy; else the last one
        steps: steps after which it is left as it is, since it overfits sooner; 0: all steps
    """

    enabled: bool = False
    edges: tuple[int, ...] = (16, 32, 64, 128, 256)
    channels: tuple[int, ...] = (32, 64, 96, 128)
    crop: int = 0
    context: bool = False
    members: int = 1
    dropout: float = 0.1
    shift: int = 0
    jitter: float = 0.1
    weight: float = 0.01
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    ema_decay: float = 0.998
    keep_best: bool = True
    steps: int = 0


@dataclass(frozen=True)
class Diffusion(Section):
    """The noise and what is predicted of it.

    Args:
        schedule: noise schedule
        timesteps: T
        input_scale: b < 1: more noise at every timestep; see NoiseSchedule
        as_released: the published code's noise, which leaves background clean (comparisons)
        prediction: what the network predicts
        spacing: of the timesteps that validations and the saved model sample at
    """

    schedule: Schedule = "cosine2"
    timesteps: int = 1000
    input_scale: float = 1.0
    as_released: bool = False
    prediction: Prediction = "epsilon"
    spacing: Spacing = "trailing-quadratic"


@dataclass(frozen=True)
class Loss(Section):
    """The loss (BerDiff, eq. 8).

    Args:
        kl_weight: weight of the KL term
        bce_weight: lambda, weight of the BCE term
        leave_one_out: the leave-one-out shift in the KL term; see docs/math.md
    """

    kl_weight: float = 1.0
    bce_weight: float = 1.0
    leave_one_out: bool = False


@dataclass(frozen=True)
class Augmentation(Section):
    """Random changes of the training images.

    Args:
        flip: random mirror images
        rotate90: random multiples of 90 degrees
        rotate: random rotation by up to this many degrees; of volumes, in the plane of their slices
        scale: random zoom by up to this fraction
        crop: train on the middle square of this many pixels; 0: whole slices
        crop_steps: so many steps at first, then on whole slices; 0: all steps
    """

    flip: bool = True
    rotate90: bool = True
    rotate: float = 0.0
    scale: float = 0.0
    crop: int = 0
    crop_steps: int = 0


@dataclass(frozen=True)
class Optimiser(Section):
    """AdamW, its learning rate, the average of the weights, and how numbers are kept.

    Args:
        steps: optimiser steps
        batch_size: images per optimiser step, over all processes and accumulations
        accumulation: forward passes per optimiser step
        learning_rate: peak rate of AdamW
        beta2: of AdamW; with 0.999 a sudden gradient can throw a small network far off
        weight_decay: of AdamW
        warmup: steps in which the rate rises linearly
        decay: the rate after warm-up: along half a cosine to 0, or constant
        clip: largest norm of the gradient; 0: no clipping
        ema_decay: of the averaged weights, which are the ones that are saved
        precision: fp32, tf32, or bf16 or fp16 (automatic mixed precision)
        channels_last: channels last in memory
        compile: torch.compile the network
    """

    steps: int = 4000
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 1e-3
    beta2: float = 0.99
    weight_decay: float = 1e-4
    warmup: int = 200
    decay: Literal["cosine", "constant"] = "cosine"
    clip: float = 1.0
    ema_decay: float = 0.999
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    compile: bool = False


@dataclass(frozen=True)
class Validation(Section):
    """Validations, with the averaged weights.

    Args:
        every: steps between validations
        slices: slices of a validation, evenly spread over the file
        samples: masks per slice
        steps: sampling steps
        method: sampler
    """

    every: int = 1000
    slices: int = 64
    samples: int = 16
    steps: int = 10
    method: Method = "ddim"


@dataclass(frozen=True)
class Records(Section):
    """What a run writes down.

    Args:
        log_every: steps between lines of log.jsonl
        checkpoint_every: steps between checkpoints
        keep: checkpoints to keep, the newest ones
        tensorboard: write TensorBoard files, where it is installed
        log_with: trackers of Accelerate that follow the run, one or several
        project: the project or experiment that trackers list the run under
    """

    log_every: int = 50
    checkpoint_every: int = 500
    keep: int = 2
    tensorboard: bool = True
    log_with: tuple[Tracker, ...] = ()
    project: str = "berdiff_fast"


@dataclass(frozen=True)
class Settings:
    """The settings of a run, each of its right type; ``TrainConfig`` also checks that they make sense.

    Args:
        output: folder of the run; running again with the same one resumes
        seed: of weights, order, raters, augmentation, noise and validation samples
        device: auto (a GPU if there is one) or cpu
        quiet: no progress bar, no words but errors and warnings
        data: files, and how they are read
        network: the denoiser
        prior: the mode prior
        diffusion: the noise and what is predicted of it
        loss: the loss
        augmentation: random changes of the training images
        optimiser: AdamW, its learning rate, the average of the weights
        validation: validations
        records: what a run writes down
    """

    output: str = ""
    seed: int = 0
    device: Literal["auto", "cpu"] = "auto"
    quiet: bool = False
    data: Data = Data()
    network: Network = Network()
    prior: Prior = Prior()
    diffusion: Diffusion = Diffusion()
    loss: Loss = Loss()
    augmentation: Augmentation = Augmentation()
    optimiser: Optimiser = Optimiser()
    validation: Validation = Validation()
    records: Records = Records()


#: The names that settings had before there were sections, and their places now: ``{"channel_mult":
#: "network.channel_mult", ...}``. Old YAML files, checkpoints, scripts and options use them.
FLAT = flat_names(
    Settings,
    prefixed=("prior", "validation"),
    renamed={
        "train_data": "data.train",
        "val_data": "data.validation",
        "data_on_device": "data.on_device",
        "mode_prior": "prior.enabled",
        "mode_edges": "prior.edges",
        "validate_every": "validation.every",
        "network_class": "network.class_path",
        "network_arguments": "network.arguments",
    },
)
