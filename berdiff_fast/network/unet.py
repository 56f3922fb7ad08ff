# SPDX-License-Identifier: Apache-2.0
"""The U-Net of BerDiff: parameter names and shapes of the published model, logits instead of probabilities.

The architecture is that of improved DDPM (Nichol & Dhariwal, arXiv 2102.09672), with the image concatenated
to the noisy mask (BerDiff, arXiv 2304.04429). The module tree below *is* the checkpoint format, so attribute
names such as ``in_layers`` or ``op`` are fixed; everything else is free to change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from berdiff_fast.network.blocks import (
    AttentionBlock,
    Downsample,
    EmbeddingSequential,
    Float32GroupNorm,
    ResBlock,
    Upsample,
    conv,
    timestep_embedding,
    zeroed,
)


class UNet(nn.Module):
    """The published BerDiff U-Net; returns logits where the published one returns their sigmoid.

    State-dict names and shapes are those of the published ``SegmentationModel``, and so is the function of
    the weights. The number of heads does not show in any shape: a checkpoint loads, and computes something
    else, if ``num_heads`` is wrong.

    Args:
        in_channels: mask channels K.
        img_channels: image channels C.
        model_channels: width of the first level, a multiple of ``norm_groups``.
        out_channels: logit channels; ``None`` or K.
        num_res_blocks: residual blocks per level on the way down (one more on the way up).
        attention_resolutions: downsampling factors (1, 2, 4, ...) at which there is attention. The middle
            block always has it; factors the network does not reach are ignored.
        dropout: probability, in [0, 1].
        channel_mult: width of each level in units of ``model_channels``.
        conv_resample: change resolution by convolutions; else by averaging and repetition.
        dims: 2 for images, 3 for volumes (whose depth keeps its resolution).
        num_heads: attention heads.
        num_heads_upsample: heads on the way up; -1 means ``num_heads``.
        use_scale_shift_norm: the timestep scales and shifts instead of being added.
        norm_groups: groups of every GroupNorm; 32 in the published model. Where a group is one channel, normalising
            takes away what the timestep added to it: a narrow network wants fewer groups, or
            ``use_scale_shift_norm``.
        patch_size: p > 1 makes p x p pixels of every channel into p^2 channels on the way in and back on the way out
            (sub-pixel shuffle, arXiv 1609.05158; DiT's word for it), which costs p^2 times less. Not in the published
            model, where it is 1.
        num_classes: the network is also told a class from 0 to num_classes - 1, whose embedding is added to the
            timestep's; 0: it is told none, as the published model.

    Attributes:
        config: these arguments as a dict that survives JSON; ``UNet(**network.config)`` has the same shape.
        mask_channels: K.
        img_channels: C.
        spatial_dims: 2 or 3.
        downsampling: height and width of the input must be multiples of this.

    Raises:
        ValueError: naming the argument, what came and what was expected.
    """

    def __init__(
        self,
        in_channels: int = 1,
        img_channels: int = 1,
        model_channels: int = 128,
        out_channels: int | None = None,
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (8, 16),
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 1, 2, 3, 4),
        conv_resample: bool = True,
        dims: int = 2,
        num_heads: int = 1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        norm_groups: int = 32,
        patch_size: int = 1,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = dict(
            in_channels=in_channels,
            img_channels=img_channels,
            model_channels=model_channels,
            out_channels=in_channels if out_channels is None else out_channels,
            num_res_blocks=num_res_blocks,
            attention_resolutions=_as_list(attention_resolutions),
            dropout=dropout,
            channel_mult=_as_list(channel_mult),
            conv_resample=conv_resample,
            dims=dims,
            num_heads=num_heads,
            num_heads_upsample=num_heads_upsample,
            use_scale_shift_norm=use_scale_shift_norm,
            norm_groups=norm_groups,
            patch_size=patch_size,
        )
        if num_classes != 0:  # only where it is used: configs of other networks stay as they were
            self.config["num_classes"] = num_classes
        _check_config(self.config)
        self.num_classes = num_classes
        self.mask_channels = in_channels
        self.img_channels = img_channels
        self.model_channels = model_channels
        self.spatial_dims = dims
        self.downsampling = patch_size * 2 ** (len(channel_mult) - 1)
        self.patch_size = patch_size

        embedding = 4 * model_channels
        widths = [model_channels * multiplier for multiplier in channel_mult]
        heads_up = num_heads if num_heads_upsample == -1 else num_heads_upsample

        def residual(inputs: int, outputs: int) -> ResBlock:
            return ResBlock(inputs, outputs, embedding, dropout, dims, use_scale_shift_norm, norm_groups)

        def attention(level: int, heads: int) -> list[AttentionBlock]:
            return [AttentionBlock(widths[level], heads, norm_groups)] if 2**level in attention_resolutions else []

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )

        pixels = patch_size**2  # of a channel that become channels
        first = conv(dims, (in_channels + img_channels) * pixels, model_channels)
        self.input_blocks = nn.ModuleList([EmbeddingSequential(first)])
        channels = model_channels
        skips = [channels]  # widths of the outputs of input_blocks, which output_blocks take last one first
        for level, width in enumerate(widths):
            if level > 0:
                self.input_blocks.append(EmbeddingSequential(Downsample(channels, conv_resample, dims)))
                skips.append(channels)
            for _ in range(num_res_blocks):
                layers = [residual(channels, width), *attention(level, num_heads)]
                self.input_blocks.append(EmbeddingSequential(*layers))
                channels = width
                skips.append(channels)

        self.middle_block = EmbeddingSequential(
            residual(channels, channels), AttentionBlock(channels, num_heads, norm_groups), residual(channels, channels)
        )

        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for index in range(num_res_blocks + 1):
                layers = [residual(channels + skips.pop(), widths[level]), *attention(level, heads_up)]
                channels = widths[level]
                if level > 0 and index == num_res_blocks:
                    layers.append(Upsample(channels, conv_resample, dims))
                self.output_blocks.append(EmbeddingSequential(*layers))

        # The published code has model_channels here, and so requires channel_mult[0] = 1; this does not.
        last = conv(dims, channels, in_channels * pixels)
        self.out = nn.Sequential(Float32GroupNorm(channels, norm_groups), nn.SiLU(), zeroed(last))
        if num_classes:  # last, so that it changes no other layer's random start
            self.label_emb = nn.Embedding(num_classes, embedding)
            nn.init.normal_(self.label_emb.weight, std=0.02)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, to which inputs are cast."""
        return next(self.parameters()).dtype

    def forward(
        self, y_t: torch.Tensor, timesteps: torch.Tensor, img: torch.Tensor, classes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of what the network predicts about each pixel.

        Args:
            y_t: (N, K, *spatial) noisy masks, bool or 0/1 of any dtype.
            timesteps: (N,) int or float.
            img: (N, C, *spatial) images in a floating dtype, scaled as in training.
            classes: (N,) int64, of a network with ``num_classes``.

        Returns:
            (N, K, *spatial) logits in the network's dtype (under autocast, in autocast's).

        Raises:
            TypeError: if ``img`` is not floating point.
            ValueError: if a shape does not fit.
        """
        self._check_inputs(y_t, timesteps, img, classes)
        embedding = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(self.dtype))
        if classes is not None:
            embedding = embedding + self.label_emb(classes)
        h = torch.cat([y_t.to(self.dtype), img.to(self.dtype)], dim=1)
        if self.patch_size > 1:
            h = F.pixel_unshuffle(h, self.patch_size)
        skips = []
        for block in self.input_blocks:
            h = block(h, embedding)
            skips.append(h)
        h = self.middle_block(h, embedding)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), embedding)
        logits = self.out(h)
        return F.pixel_shuffle(logits, self.patch_size) if self.patch_size > 1 else logits

    def _check_inputs(
        self, y_t: torch.Tensor, timesteps: torch.Tensor, img: torch.Tensor, classes: torch.Tensor | None
    ) -> None:
        layout = "D, H, W" if self.spatial_dims == 3 else "H, W"
        for name, tensor, channels in (("y_t", y_t, self.mask_channels), ("img", img, self.img_channels)):
            if tensor.ndim != self.spatial_dims + 2 or tensor.shape[1] != channels:
                raise ValueError(f"{name} must have shape (N, {channels}, {layout}), got {tuple(tensor.shape)}")
        if not img.is_floating_point():
            raise TypeError(f"img must be floating point, scaled as in training, got {img.dtype}")
        if img.shape[0] != y_t.shape[0]:
            raise ValueError(f"img must have the batch size of y_t, {y_t.shape[0]}, got {img.shape[0]}")
        if img.shape[2:] != y_t.shape[2:]:
            raise ValueError(
                f"img must have the spatial size of y_t, {tuple(y_t.shape[2:])}, got {tuple(img.shape[2:])}"
            )
        if timesteps.shape != y_t.shape[:1]:
            raise ValueError(
                f"timesteps must have shape ({y_t.shape[0]},), one for each mask of y_t, got {tuple(timesteps.shape)}"
            )
        if (classes is None) == bool(self.num_classes):
            raise ValueError(
                f"classes must be given exactly to a network with num_classes, which is {self.num_classes}, got "
                f"{'none' if classes is None else tuple(classes.shape)}"
            )
        if classes is not None and classes.shape != y_t.shape[:1]:
            raise ValueError(
                f"classes must have shape ({y_t.shape[0]},), one for each mask of y_t, got {tuple(classes.shape)}"
            )
        check_size(y_t.shape[2:], self.downsampling)


def check_size(size: Sequence[int], downsampling: int, name: str = "y_t and img") -> None:
    """Raise ValueError for masks and images (..., H, W) that cannot be halved at every level."""
    height, width = size[-2:]
    if height % downsampling or width % downsampling:
        raise ValueError(f"{name} must have a height and width divisible by {downsampling}, got {height} x {width}")


def _as_list(values: Any) -> Any:
    # What is not a sequence is left as it is, for _check_config to name.
    return list(values) if isinstance(values, (list, tuple)) else values


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


#: Far beyond what is of use, and well below what takes minutes only to describe: a file may ask for anything.
_MOST_LEVELS = 16
_MOST = {
    "in_channels": 2**12,
    "img_channels": 2**12,
    "model_channels": 2**18,
    "num_res_blocks": 64,
    "patch_size": 2**8,
}


def _check_config(config: dict[str, Any]) -> None:
    for name in (
        "in_channels",
        "img_channels",
        "model_channels",
        "num_res_blocks",
        "num_heads",
        "norm_groups",
        "patch_size",
    ):
        if not _is_count(config[name]):
            raise ValueError(f"{name} must be a positive int, got {config[name]!r:.80}")
    if not _is_count(config.get("num_classes", 1)):
        raise ValueError(f"num_classes must be a positive int, or 0 for none, got {config['num_classes']!r:.80}")
    for name in ("channel_mult", "attention_resolutions"):
        values = config[name]
        if not isinstance(values, list) or not all(_is_count(value) for value in values):
            raise ValueError(f"{name} must be a list or tuple of positive ints, got {values!r:.200}")
        if len(values) > _MOST_LEVELS:
            raise ValueError(f"{name} must have at most {_MOST_LEVELS} entries, got {len(values)}")
    for name, most in _MOST.items():
        if config[name] > most:
            raise ValueError(f"{name} must be at most {most}, got {config[name]!r:.80}")
    if max(config["channel_mult"], default=1) * config["model_channels"] > _MOST["model_channels"]:
        widest = max(config["channel_mult"]) * config["model_channels"]
        raise ValueError(f"channel_mult must keep levels to {_MOST['model_channels']} channels, got {widest:.80g}")
    for name in ("conv_resample", "use_scale_shift_norm"):
        if not isinstance(config[name], bool):
            raise ValueError(f"{name} must be True or False, got {config[name]!r}")
    if not config["channel_mult"]:
        raise ValueError("channel_mult must name at least one level, got none")
    if config["out_channels"] != config["in_channels"]:
        raise ValueError(
            f"out_channels must equal in_channels = {config['in_channels']}: there is one logit for each bit "
            f"of the mask, got {config['out_channels']!r}"
        )
    if config["dims"] not in (2, 3):
        raise ValueError(f"dims must be 2 or 3, got {config['dims']!r}")
    if config["patch_size"] > 1 and config["dims"] != 2:
        raise ValueError(f"patch_size must be 1 for volumes, got {config['patch_size']}")
    if isinstance(config["dropout"], bool) or not isinstance(config["dropout"], (int, float)):
        raise ValueError(f"dropout must be a number in [0, 1], got {config['dropout']!r}")
    if not 0 <= config["dropout"] <= 1:
        raise ValueError(f"dropout must lie in [0, 1], got {config['dropout']!r}")
    # All other widths are sums of multiples of this one.
    if config["model_channels"] % config["norm_groups"]:
        raise ValueError(
            f"model_channels must be a multiple of {config['norm_groups']}, the groups of GroupNorm, "
            f"got {config['model_channels']}"
        )

    if config["num_heads_upsample"] != -1 and not _is_count(config["num_heads_upsample"]):
        raise ValueError(
            f"num_heads_upsample must be a positive int, or -1 for num_heads, got {config['num_heads_upsample']!r}"
        )

    widths = [config["model_channels"] * multiplier for multiplier in config["channel_mult"]]
    attended = [width for level, width in enumerate(widths) if 2**level in config["attention_resolutions"]]
    for name, places in (("num_heads", [*attended, widths[-1]]), ("num_heads_upsample", attended)):
        heads = config[name]
        for width in places:
            if heads != -1 and width % heads:
                raise ValueError(f"{name} must divide the {width} channels attention works on, got {heads}")
