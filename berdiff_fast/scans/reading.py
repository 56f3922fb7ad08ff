# SPDX-License-Identifier: Apache-2.0
"""The scan that the command ``sample`` is given, read as its model wants it."""

from __future__ import annotations

import os
from pathlib import Path

from berdiff_fast.channels import COLOUR, in_colour
from berdiff_fast.imaging import volumes
from berdiff_fast.io.formats import FORMATS
from berdiff_fast.io.volume import Volume
from berdiff_fast.model import BerDiff
from berdiff_fast.scans.study import scans_of

#: Ends of names of what may be in colour.
_PICTURES = (*FORMATS["picture"], *FORMATS["numpy"])


def read_scan(path: str | os.PathLike[str], model: BerDiff, name: str, series: str | None = None) -> Volume:
    """A scan, or a colour picture for a model of red, green and blue (or of three channels without names).

    Args:
        path: a file, or a folder with a DICOM series.
        model: what masks are drawn by.
        name: what the user called the model.
        series: the DICOM series to read, where a folder holds several.

    Raises:
        FileNotFoundError, ValueError: the scan cannot be read, is grey where the model wants colours or the other way
            round, or the model wants more than one scan or has more than one region.
    """
    channels = scans_of(model)
    colour = not model.context_slices and in_colour(model.channels, channels) and str(path).lower().endswith(_PICTURES)
    volume = volumes.read(path, series=series, colour=colour)
    if series is not None and volume.format != "dicom":
        raise ValueError(f"series: {Path(path)} is not a DICOM folder")
    if tuple(model.channels or ()) == COLOUR and not colour:
        raise ValueError(f"{path}: is no picture, and the model {name} is for colour pictures ({', '.join(COLOUR)})")
    if (channels > 1 and not colour) or model.mask_channels > 1:
        raise ValueError(
            f"model: {name} has {channels} channels and {model.mask_channels} regions, and this command takes scans "
            "of one; sample_volume (in Python) takes a scan of each channel"
        )
    return volume
