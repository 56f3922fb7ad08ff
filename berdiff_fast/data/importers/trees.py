# SPDX-License-Identifier: Apache-2.0
"""Trees of files that people keep slices and raters' masks in: told apart, and listed slice by slice.

Only names are read here; no picture is opened. All paths are relative to the tree's root, with '/'.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

SPLITS = ("train", "val", "test")

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".npy")

#: The patient of a file name, in trees that have no folder for it. LIDC-IDRI-0023_slice-8 is a slice of
#: LIDC-IDRI-0023. Too coarse is safe where too fine is not: slices of one patient would land in two splits.
PATIENT_PATTERN = r"(?P<patient>[^_]+)"

LARGEST = 2**31 - 1  # numbers are stored as int32
_CLUTTER = ("Thumbs.db", "desktop.ini", "__MACOSX")


@dataclass(frozen=True)
class Slice:
    """An image and its raters' masks, by name.

    Attributes:
        patient, nodule: their names; a layout without nodules has nodule "0".
        number: which slice of the nodule.
        image: the path of the image.
        masks: rater to the path of its mask; raters without a file are absent.
        split: the tree's own, if it has splits.
    """

    patient: str
    nodule: str
    number: int
    image: str
    masks: Mapping[int, str]
    split: str | None = None


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file or folder of the tree."""

    path: str
    reason: str


@dataclass
class Problems:
    """All that was found wrong so far; if ``stop``, the first one is an error."""

    stop: bool
    found: list[Problem] = field(default_factory=list)

    def add(self, path: str, reason: str) -> None:
        self.found.append(Problem(path, reason))
        if self.stop:
            raise ValueError(f"{path}: {reason}")


class Tree:
    """Folders under ``root``, in natural order (slice-10 after slice-9), without hidden files.

    What a layout has no use for is in ``ignored``, what is wrong in ``problems``.
    """

    def __init__(self, root: Path, problems: Problems) -> None:
        self.root = root
        self.problems = problems
        self.ignored: list[str] = []

    def folders(self, where: str, pattern: str = ".*") -> list[re.Match[str]]:
        """The folders in ``where`` whose whole name matches; all else there is ignored."""
        folders, files = self.entries(where)
        self.ignored += [_join(where, name) for name in files]
        return [match for name in folders if (match := self._match(pattern, where, name))]

    def pictures(self, where: str, pattern: str = ".*") -> dict[re.Match[str], str]:
        """The pictures in ``where`` whose stem matches, and their paths; all else there is ignored.

        Two of one stem are a problem.
        """
        folders, files = self.entries(where)
        self.ignored += [_join(where, name) for name in folders]
        found: dict[str, str] = {}
        for name in files:
            stem, suffix = os.path.splitext(name)
            path = _join(where, name)
            if suffix.lower() not in PICTURES:
                self.ignored.append(path)
            elif stem in found:
                self.problems.add(path, f"duplicate: {found[stem]} has the same name")
            else:
                found[stem] = path
        return {match: path for stem, path in found.items() if (match := self._match(pattern, where, stem))}

    def stems(self, where: str) -> dict[str, str]:
        """The pictures in ``where`` by their stem."""
        return {match.string: path for match, path in self.pictures(where).items()}

    def _match(self, pattern: str, where: str, name: str) -> re.Match[str] | None:
        match = re.fullmatch(pattern, name, flags=re.DOTALL)
        if not match:
            self.ignored.append(_join(where, name))
        return match

    def entries(self, where: str) -> tuple[list[str], list[str]]:
        """Names of the folders and of the files in ``where``."""
        folders: list[str] = []
        files: list[str] = []
        try:
            with os.scandir(self.root / where) as entries:
                for entry in entries:
                    if not _is_text(entry.name):  # neither HDF5 nor a terminal takes it
                        self.problems.add(_join(where, ascii(entry.name)), "a name that is not UTF-8")
                    elif not entry.name.startswith(".") and entry.name not in _CLUTTER:
                        (folders if entry.is_dir() else files).append(entry.name)
        except OSError as error:
            self.problems.add(where or ".", f"cannot be listed: {error.strerror or error}")
        return sorted(folders, key=natural), sorted(files, key=natural)


@dataclass(frozen=True)
class Layout:
    """A kind of tree.

    Attributes:
        shape: how it looks, for people.
        evidence: what of a tree looks so, or None.
        slices: its slices, patient by patient.
        note: what its users should know.
    """

    shape: str
    evidence: Callable[[Path], str | None]
    slices: Callable[[Tree, str], Iterator[Slice]]
    note: str = ""


def natural(name: str) -> tuple[list[str | int], str]:
    """Sort key by which 10 comes after 9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name


def numbers(names: list[str]) -> tuple[dict[str, int], bool]:
    """(ids, from_names): the numbers at the ends of names if each has its own, else the names' ranks."""
    at_end = {name: n for name in names if (n := number(name)) is not None}
    if len(set(at_end.values())) == len(names):
        return at_end, True
    return {name: place for place, name in enumerate(sorted(names, key=natural))}, False


def number(name: str) -> int | None:
    """The number at the end of a name; None if there is none that an int32 holds."""
    match = re.search(r"\d+$", name)
    return int(match[0]) if match and int(match[0]) <= LARGEST else None


def pop(masks: dict[int, dict[str, str]], stem: str) -> dict[int, str]:
    """The masks of one slice, taken away: what is left in the end has no image."""
    return {rater: files.pop(stem) for rater, files in sorted(masks.items()) if stem in files}


def orphans(tree: Tree, masks: dict[int, dict[str, str]], images: Mapping[str, str]) -> None:
    for files in masks.values():
        for stem, path in files.items():
            if stem not in images:
                tree.problems.add(path, "a mask whose image is missing")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # the importer itself says so
        return []


def subfolders(folder: Path) -> Iterator[Path]:
    return (folder / name for name in sorted(names_in(folder), key=natural) if (folder / name).is_dir())


def _join(where: str, name: str) -> str:
    return f"{where}/{name}" if where else name
