# SPDX-License-Identifier: Apache-2.0
"""From what a user names to the volumes of a scan: one, or one for each channel that a model has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from berdiff_fast.channels import COLOUR, ENDINGS, channel_of, in_colour, of_scans
from berdiff_fast.imaging import volumes
from berdiff_fast.imaging.volumes import Volume
from berdiff_fast.io import raters as raters_io
from berdiff_fast.io.formats import FORMATS
from berdiff_fast.model import BerDiff
from berdiff_fast.scans.study import scans_of

#: Ends of names of what may be in colour.
_PICTURES = (*FORMATS["picture"], *FORMATS["numpy"])


def read_scan(paths: Sequence[str], model: BerDiff, series: str | None = None) -> tuple[Volume, ...]:
    """The volumes of a scan, in the order of the model's channels, on the grid of the first; one of a colour picture.

    Args:
        paths: a file or a DICOM folder; a colour picture for a model of red, green and blue. For another model of
            several channels a file of each, which tells its channel at the end of its name (``..._flair.nii.gz``, BraTS
            of 2018 as of 2023) or as ``CHANNEL=FILE``; or the folder that holds them.
        model: what they are for.
        series: the series to read, where a DICOM folder holds several.

    Raises:
        ValueError, FileNotFoundError: naming ``input``: a channel is missing, named twice, or lies on another grid; a
            file that cannot be read.
    """
    count, names = scans_of(model), scan_names(model)
    colour = is_picture(paths, model)
    if count == 1 or colour:
        if len(paths) != 1:
            raise ValueError(f"input must be one scan for this model, got {len(paths)}")
        volume = volumes.read(paths[0], series=series, colour=colour)
        if series is not None and volume.format != "dicom":
            raise ValueError(f"series: {paths[0]} is not a DICOM folder")
        return (volume,)
    if series is not None:
        raise ValueError(f"series is for a scan of one channel, and the model has {count}")
    if names == COLOUR:
        raise ValueError(f"{paths[0]}: is no picture, and the model is for colour pictures ({', '.join(COLOUR)})")
    files = _of_channels(paths, names, count)
    first = volumes.read(files[0])
    found = [first]
    for path in files[1:]:
        try:
            found.append(raters_io.onto(volumes.read(path), first))
        except ValueError as error:
            reason = str(error).removeprefix("raters: ")
            raise ValueError(f"input: channels must lie on one grid, that of {first.path}: {reason}") from None
    return tuple(found)


def is_picture(paths: Sequence[str | Path], model: BerDiff) -> bool:
    """Whether all of them are pictures or arrays, and the model is one of red, green and blue (or of three channels
    without names)."""
    pictures = all(str(path).lower().endswith(_PICTURES) for path in paths)
    return pictures and not model.context_slices and in_colour(model.channels, model.img_channels or 1)


def scan_names(model: BerDiff) -> tuple[str, ...] | None:
    """What the scans that a model wants are called: its channels, without neighbours of slices."""
    return None if model.channels is None else of_scans(model.channels, model.context_slices)


def _of_channels(paths: Sequence[str], names: tuple[str, ...] | None, count: int) -> list[Path]:
    """The file of each channel."""
    wanted = f"the model's {count} channels" + (f" ({', '.join(names)})" if names else "")
    if names is None:
        if len(paths) != count:
            raise ValueError(f"input must be a file of each of {wanted}, in their order, got {len(paths)}")
        return [Path(path) for path in paths]
    files = [Path(path) for path in paths]
    if len(files) == 1 and files[0].is_dir():
        files = case_files(files[0], names)
        if not files:
            raise ValueError(f"input: {paths[0]} holds no file that is named after one of {wanted}")
    found: dict[str, Path] = {}
    for file in files:
        name, equals, rest = str(file).partition("=")
        channel = name if equals and name in names else channel_of(file.name, names)
        if channel is None:
            raise ValueError(f"input: {file} is named after none of {wanted}; give it as CHANNEL=FILE")
        if channel in found:
            raise ValueError(f"input: {file} and {found[channel]} are both named after the channel {channel}")
        found[channel] = Path(rest) if equals and name in names else file
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"input must have {wanted}, and {', '.join(missing)} is missing")
    return [found[name] for name in names]


def case_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """Files of a folder that are named after channels, by name."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return [path for path in files if path.name.lower().endswith(ENDINGS) and channel_of(path.name, names)]
