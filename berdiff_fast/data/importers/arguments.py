# SPDX-License-Identifier: Apache-2.0
"""Arguments of an import, judged before any work."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from berdiff_fast import checks
from berdiff_fast.data.importers.trees import SPLITS

#: What an import writes.
_FILES = {*(f"{name}.h5" for name in SPLITS), "splits.json", "import.json", "preview.png"}


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")


def check_size(size: Sequence[int]) -> tuple[int, int]:
    try:
        height, width = (checks.integer("size", side, 1) for side in size)
    except (TypeError, ValueError):
        raise ValueError(f"size must be (height, width), two ints of at least 1, got {size!r}") from None
    return height, width


def check_volume_size(size: Sequence[int]) -> tuple[int, int, int]:
    try:
        depth, height, width = (checks.integer("size", side, 1) for side in size)
    except (TypeError, ValueError):
        raise ValueError(
            f"size must be (depth, height, width) of whole volumes, three ints of at least 1, got {size!r}"
        ) from None
    return depth, height, width


def check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"patient_pattern must be a regular expression, got {pattern!r}: {error}") from error


def check_source(root: Path) -> None:
    if not root.exists():
        raise FileNotFoundError(f"source: there is no folder {root}")
    if not root.is_dir():
        raise NotADirectoryError(f"source must be a folder, got the file {root}")
    try:
        os.listdir(root)
    except OSError as error:
        raise type(error)(f"source: {root} cannot be listed: {error.strerror}") from error


def check_output(root: Path, output: Path, overwrite: bool) -> None:
    place = output.resolve()
    if place == root.resolve() or root.resolve() in place.parents:
        raise ValueError(f"output must lie outside source, got {output}")
    if not place.exists():
        return
    if not place.is_dir():
        raise NotADirectoryError(f"output must be a folder, got the file {output}")
    if os.path.ismount(place):
        raise ValueError(f"output: {output} is a mount point, which cannot be written whole; name a folder in it")
    names = set(os.listdir(place))
    if names and not overwrite:
        raise FileExistsError(
            f"output: {output} exists and is not empty; pass overwrite=True (--overwrite) to replace it"
        )
    foreign = sorted(names - _FILES)
    if foreign:
        raise FileExistsError(f"output: {output} holds {foreign[0]!r}, which no import wrote, and is not overwritten")
