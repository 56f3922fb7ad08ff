# SPDX-License-Identifier: Apache-2.0
"""What a config asks for is made here: models, schedules, the accelerator; and it is checked against the data."""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration

from berdiff_fast import rng
from berdiff_fast.channels import COLOUR
from berdiff_fast.data import examples
from berdiff_fast.data.examples import TrainingExamples
from berdiff_fast.data.hdf5 import RaterDataset, check_disjoint
from berdiff_fast.loading import load
from berdiff_fast.model import BerDiff
from berdiff_fast.network.prior import ModePrior
from berdiff_fast.network.unet import UNet
from berdiff_fast.network.window import Window
from berdiff_fast.preprocessing import Preprocessing, warn_of_ranges
from berdiff_fast.regions import Regions
from berdiff_fast.schedule import NoiseSchedule
from berdiff_fast.training import on_cpu, own_network
from berdiff_fast.training.config import TrainConfig

logger = logging.getLogger("berdiff_fast")


def build_schedule(config: TrainConfig) -> NoiseSchedule:
    """The noise schedule of a run."""
    diffusion = config.diffusion
    return NoiseSchedule(
        diffusion.schedule,
        diffusion.timesteps,
        input_scale=diffusion.input_scale,
        as_released=diffusion.as_released,
    )


def build_model(
    config: TrainConfig,
    mask_channels: int,
    img_channels: int,
    size: tuple[int, ...] | None = None,
    *,
    spatial_dims: int = 2,
    preprocessing: Preprocessing | None = None,
    channels: tuple[str, ...] | None = None,
    regions: Regions | None = None,
    meta: bool = False,
) -> BerDiff:
    """The untrained model of a run.

    Args:
        config: the run.
        mask_channels, img_channels: K and C of its data.
        size: height and width of its images, which preprocessing then asks for.
        spatial_dims: 2, or 3 for volumes.
        preprocessing: of its images; by default what the config says of any.
        channels, regions: what its channels are called, and what those of its masks stand for.
        meta: make no memory for its weights.

    Raises:
        ValueError: what the network, the prior, the schedule or the preprocessing refuses.
    """
    c = config.network
    view = Window(c.output_crop, c.context, c.distance)
    own: dict[str, Any] = {}
    if c.class_path:
        own = dict(network_arguments=own_network.arguments(c), mask_channels=mask_channels, img_channels=img_channels)
    # A class of one's own may need numbers to be made.
    with torch.device("meta" if meta and not own else "cpu"):
        network = (
            own_network.build(c)
            if own
            else _build_unet(config, mask_channels, view.channels(img_channels), spatial_dims)
        )
        prior = _build_prior(config, img_channels) if config.prior.enabled else None
    return BerDiff(
        network,
        build_schedule(config),
        config.diffusion.prediction,
        preprocessing=preprocessing or preprocessing_of(config, img_channels, size=size),
        spacing=config.diffusion.spacing,
        output_crop=c.output_crop,
        context=c.context,
        distance=c.distance,
        mode_prior=prior,
        channels=channels,
        regions=regions,
        **own,
    )


def _build_unet(config: TrainConfig, mask_channels: int, img_channels: int, dims: int) -> UNet:
    c = config.network
    return UNet(
        in_channels=mask_channels,
        img_channels=img_channels,
        model_channels=c.model_channels,
        channel_mult=list(c.channel_mult),
        num_res_blocks=c.num_res_blocks,
        attention_resolutions=list(c.attention_resolutions),
        num_heads=c.num_heads,
        dropout=c.dropout,
        use_scale_shift_norm=c.use_scale_shift_norm,
        norm_groups=c.norm_groups,
        patch_size=c.patch_size,
        dims=dims,
        num_classes=len(config.prior.edges) + 2 if config.prior.enabled else 0,
    )


def preprocessing_of(
    config: TrainConfig,
    img_channels: int,
    *,
    has_statistics: bool = False,
    size: tuple[int, ...] | None = None,
    pixel_spacing: tuple[float, ...] | None = None,
    foreground: bool = False,
    context_slices: int = 0,
    channels: tuple[str, ...] | None = None,
) -> Preprocessing:
    """How images are scaled, by the config and by what their file tells.

    Args:
        config: the run.
        img_channels: C.
        channels: their names. The colours of a picture are scaled together unless told otherwise: they would change.
        has_statistics: whether the file tells those of the slices' volumes.
        size, pixel_spacing, foreground, context_slices: of its slices, see ``Preprocessing``.

    Raises:
        ValueError: windows that are not one, or one for each channel.
    """
    data = config.data
    mode = data.scaling
    if mode == "auto":
        mode = "window" if data.window else "z-score" if has_statistics else "min-max"
    windows: Any = tuple(zip(data.window[::2], data.window[1::2], strict=True))
    together = 2 * context_slices + 1  # neighbours of a slice have its scan's window
    if len(windows) > 1 and len(windows) * together != img_channels:
        scans = img_channels // together
        raise ValueError(f"data.window must be one window, or one for each of {scans} channels, got {windows}")
    windows = tuple(window for window in windows for _ in range(together if len(windows) > 1 else 1))
    return Preprocessing(
        mode,
        (windows if len(windows) > 1 else windows[0]) if windows else None,
        size=size,
        pixel_spacing=pixel_spacing,
        per_channel=img_channels > 1 and channels != COLOUR
        if data.per_channel == "auto"
        else data.per_channel == "true",
        by_volume=has_statistics and mode != "window",
        foreground=foreground,
        context_slices=context_slices,
    )


def _build_prior(config: TrainConfig, img_channels: int) -> ModePrior:
    c = config.prior
    # What the images are mirrored and turned by in training is what may be averaged over.
    symmetries = (8 if config.augmentation.rotate90 else 4) if config.augmentation.flip else 1
    return ModePrior(
        img_channels,
        list(c.edges),
        channels=list(c.channels),
        crop=c.crop,
        context=c.context,
        dropout=c.dropout,
        members=c.members,
        symmetries=symmetries,
        shift=c.shift,
        jitter=c.jitter,
    )


def check(config: TrainConfig) -> None:
    """Raise what schedule, network and prior say of their settings, without memory for weights.

    Raises:
        ValueError, TypeError: naming the argument of ``NoiseSchedule``, ``UNet``, ``Window`` or ``ModePrior``.
    """
    build_schedule(config).subsequence(config.validation.steps, config.diffusion.spacing)
    dims = config.network.spatial_dims or 2
    build_model(
        config, mask_channels=1, img_channels=max(len(config.data.window) // 2, 1), spatial_dims=dims, meta=True
    )


def read_data(config: TrainConfig) -> tuple[RaterDataset, RaterDataset | None]:
    """The slices to train on, and those to validate on, if there are any.

    Raises:
        FileNotFoundError, ValueError: files that are not there, or that this run cannot be trained or validated on.
    """
    data = config.data
    slices = RaterDataset(data.train, in_memory=data.in_memory, spatial_dims=config.network.spatial_dims)
    # In memory too: what is spread over a compressed file takes seconds to read, at every validation.
    held_out = None
    if data.validation:
        held_out = RaterDataset(data.validation, in_memory=data.in_memory, spatial_dims=slices.spatial_dims)
    _check_data(config, slices, held_out)
    return slices, held_out


def check_network(config: TrainConfig, slices: RaterDataset) -> None:
    """Try a network of the user's own, if there is one, on what the run will show it.

    Raises:
        ValueError: see ``own_network.check``.
    """
    if config.network.class_path:
        model = build_model(config, slices.mask_channels, slices.img_channels)
        own_network.check(model, config.network.class_path, slices, config.augmentation.crop)


def _check_data(config: TrainConfig, slices: RaterDataset, held_out: RaterDataset | None) -> None:
    factor = 1 if config.network.output_crop else config.network.halvings
    crop = config.augmentation.crop
    _check_dims(config, slices)
    for data in filter(None, (slices, held_out)):
        sides = data.image_size[-2:]  # a network keeps the depth of volumes as it is
        for name, side in (("network.output_crop", config.network.output_crop), ("prior.crop", config.prior.crop)):
            if side > min(sides):
                raise ValueError(f"{name} must be at most the images of {data.path}, {data.image_size}, got {side}")
        if any(size % factor for size in sides):
            what = "images must have sides" if data.spatial_dims == 2 else "volumes must have a height and width"
            raise ValueError(f"{data.path}: {what} divisible by {factor}, got {data.image_size}")
        if crop > min(sides):
            raise ValueError(
                f"augmentation.crop must be at most the images of {data.path}, {data.image_size}, got {crop} (--crop 0 "
                "or crop: 0 in the config trains on whole slices)"
            )
        if sides[0] != sides[1] and config.augmentation.rotate90 and data is slices:
            raise ValueError(f"augmentation.rotate90 needs square images, and {data.path} has {data.image_size}")
    if slices.img_channels > 1 and config.data.per_channel == "false" and slices.statistics is None:
        few = slices.whole()[0] if slices.in_memory else slices.batch([0, len(slices) // 2])[0].numpy()
        axes = (0, *range(2, few.ndim))
        warn_of_ranges(few.min(axes).tolist(), few.max(axes).tolist(), str(slices.path))
    if held_out is not None:
        check_disjoint(slices, held_out)
        for name in ("img_channels", "mask_channels", "channels", "regions", "pixel_spacing", "context_slices"):
            if getattr(slices, name) != getattr(held_out, name):
                raise ValueError(
                    f"data.validation must have the {name} of data.train, {getattr(slices, name)}, got "
                    f"{getattr(held_out, name)}"
                )


def _check_dims(config: TrainConfig, slices: RaterDataset) -> None:
    """Raise a ValueError where a setting is for slices, and the data are volumes."""
    network = config.network
    if slices.spatial_dims == 3:
        for name, value, plain in (
            ("network.patch_size", network.patch_size, 1),
            ("network.output_crop", network.output_crop, 0),
            ("network.distance", network.distance, False),
            ("prior.enabled", config.prior.enabled, False),
        ):
            if value != plain:
                raise ValueError(f"{name} must be {plain} for volumes, which {slices.path} holds; got {value}")
    elif slices.img_channels == slices.mask_channels > 1 and not slices.channels and not slices.regions:
        logger.warning(
            "%s: read as slices of %d channels and as many regions; if these are volumes of as many slices, "
            "network.dims: 3 (--network.dims 3) says so",
            slices.path,
            slices.img_channels,
        )


def initial_model(config: TrainConfig, slices: RaterDataset, device: torch.device) -> BerDiff:
    """The model as a run starts with it: random weights by the seed, or those of ``network.initial_weights``."""
    torch.manual_seed(rng.signed64(rng.splitmix64(config.seed, 0)))
    model = build_model(
        config,
        slices.mask_channels,
        slices.img_channels,
        preprocessing=preprocessing_of(
            config,
            slices.img_channels,
            has_statistics=slices.statistics is not None,
            size=slices.image_size,
            pixel_spacing=slices.pixel_spacing,
            foreground=slices.foreground,
            context_slices=slices.context_slices,
            channels=slices.channels,
        ),
        spatial_dims=slices.spatial_dims,
        channels=slices.channels,
        regions=slices.regions,
    )
    if config.network.initial_weights:
        _start_from(config, model)
    model.to(device)
    if config.optimiser.channels_last:
        last = torch.channels_last if model.spatial_dims == 2 else torch.channels_last_3d
        model.to(memory_format=last)  # type: ignore[call-overload]
    return model


def _start_from(config: TrainConfig, model: BerDiff) -> None:
    name_or_path, allowed = config.network.initial_weights, config.network.allow_imports
    if model.own_network is not None:  # which has been imported by now
        allowed = (*allowed, model.own_network["type"])
    former = load(name_or_path, allow_imports=allowed)
    if former.prediction != model.prediction:
        raise ValueError(
            f"network.initial_weights: {name_or_path} predicts {former.prediction}, the config {model.prediction}"
        )
    try:
        model.network.load_state_dict(former.network.state_dict())
        if model.mode_prior is not None and former.mode_prior is not None:
            model.mode_prior.load_state_dict(former.mode_prior.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"network.initial_weights: {name_or_path} is of another architecture: {' '.join(str(error).split())}"
        ) from None


def accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate's part of a run: devices, processes, mixed precision, accumulation.

    Raises:
        ValueError: the batch cannot be shared out evenly.
    """
    AcceleratorState._reset_state()  # a process may train again, in another precision
    optimiser = config.optimiser
    made = Accelerator(
        mixed_precision=optimiser.precision if optimiser.precision in ("bf16", "fp16") else "no",
        gradient_accumulation_steps=optimiser.accumulation,
        cpu=on_cpu(config.device),
        # Each batch of the loader is one of all processes together; every process takes its slice of it.
        dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
    )
    if optimiser.batch_size % (optimiser.accumulation * made.num_processes):
        raise ValueError(
            f"optimiser.batch_size must be a multiple of accumulation x processes, {optimiser.accumulation} x "
            f"{made.num_processes}, got {optimiser.batch_size}"
        )
    return made


def augmentation(config: TrainConfig) -> examples.Augmentation:
    """The random changes of training images."""
    c = config.augmentation
    return examples.Augmentation(c.flip, c.rotate90, c.rotate, c.scale)


def training_examples(config: TrainConfig, slices: RaterDataset, model: BerDiff) -> TrainingExamples:
    """The endless sequence of examples that ``model`` is trained on."""
    assert model.preprocessing is not None
    return TrainingExamples(
        slices,
        model.preprocessing,
        config.diffusion.timesteps,
        config.seed,
        augmentation(config),
        crop=config.augmentation.crop,
        crop_before=config.augmentation.crop_steps * config.optimiser.batch_size or None,
        mode_edges=None if model.mode_prior is None else model.mode_prior.edges,
        mode_window=model.output_window.size,
    )
