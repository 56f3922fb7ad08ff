# SPDX-License-Identifier: Apache-2.0
"""Names of an image's channels, as files are named after them."""

from __future__ import annotations

from collections.abc import Sequence

#: MRI sequences of BraTS, by their names of 2018 to 2021; and what else files call them, those of 2023 first.
ALIASES = {
    "flair": ("t2f", "t2flair", "t2_flair", "t2-flair", "fla"),
    "t1": ("t1n", "t1w"),
    "t1ce": ("t1c", "t1gd", "t1post"),
    "t2": ("t2w",),
}

BRATS = ("flair", "t1", "t1ce", "t2")

#: The channels of a colour picture.
COLOUR = ("R", "G", "B")

#: Endings of volumes, and of pictures where cases are pictures.
ENDINGS = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".npy")


def in_colour(channels: Sequence[str] | None, count: int) -> bool:
    """Whether images of so many channels, by these names if they have any, may be colour pictures."""
    return count == len(COLOUR) and (channels is None or tuple(channels) == COLOUR)


def neighbours(index: int, count: int, context_slices: int) -> list[int]:
    """The slices that are shown as channels of slice ``index`` of ``count``: so many on either side, and itself
    between them. At an end of the volume its last slice is repeated."""
    return [min(max(index + off, 0), count - 1) for off in range(-context_slices, context_slices + 1)]


def in_context(names: Sequence[str], context_slices: int) -> tuple[str, ...]:
    """Names of these channels: ``ct[-1]``, ``ct[0]``, ``ct[+1]`` of ``ct``, one scan after the other."""
    if not context_slices:
        return tuple(names)
    offsets = range(-context_slices, context_slices + 1)
    return tuple(f"{name}[{off:+d}]" if off else f"{name}[0]" for name in names for off in offsets)


def of_scans(names: Sequence[str], context_slices: int) -> tuple[str, ...]:
    """The inverse of ``in_context``."""
    every = names[:: 2 * context_slices + 1]
    return tuple(name.rpartition("[")[0] for name in every) if context_slices else tuple(every)


def stem_of(name: str) -> str:
    """A file's name without its ending, of which it may have two."""
    return next((name[: -len(end)] for end in (*ENDINGS, *PICTURES) if name.lower().endswith(end)), name)


def names_of(channel: str) -> tuple[str, ...]:
    """What files call a channel, in lower case: its own name first."""
    return (channel.lower(), *ALIASES.get(channel.lower(), ()))


def channel_of(name: str, channels: Sequence[str]) -> str | None:
    """The channel that a file's name ends in, behind "_", "-" or "."; the longest name, if several fit."""
    stem = stem_of(name).lower()
    fits = [
        (len(one), channel)
        for channel in channels
        for one in names_of(channel)
        if stem == one or (stem.endswith(one) and stem[-len(one) - 1] in "_-.")
    ]
    return max(fits)[1] if fits else None
