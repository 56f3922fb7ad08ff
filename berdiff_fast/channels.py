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

#: Endings of volumes.
ENDINGS = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")


def in_colour(channels: Sequence[str] | None, count: int) -> bool:
    """Whether images of so many channels, by these names if they have any, may be colour pictures."""
    return count == len(COLOUR) and (channels is None or tuple(channels) == COLOUR)


def stem_of(name: str) -> str:
    """A file's name without its ending, of which it may have two."""
    return next((name[: -len(end)] for end in ENDINGS if name.lower().endswith(end)), name)


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
