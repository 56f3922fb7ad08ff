# SPDX-License-Identifier: Apache-2.0
"""Trees of files that people keep slices and raters' masks in: told apart, and listed slice by slice.

Only names are read here; no picture is opened. All paths are relative to the tree's root, with '/'.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

SPLITS = ("train", "val", "test")

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".npy")

#: The patient of a file name, in trees that have no folder for it. LIDC-IDRI-0023_slice-8 is a slice of
#: LIDC-IDRI-0023. Too coarse is safe where too fine is not: slices of one patient would land in two splits.
PATIENT_PATTERN = r"(?P<patient>[^_]+)"

_LARGEST = 2**31 - 1  # numbers are stored as int32
_MOST_RATERS = 100  # beyond, the number in a name is a date or an id
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
        folders, files = self._list(where)
        self.ignored += [_join(where, name) for name in files]
        return [match for name in folders if (match := self._match(pattern, where, name))]

    def pictures(self, where: str, pattern: str = ".*") -> dict[re.Match[str], str]:
        """The pictures in ``where`` whose stem matches, and their paths; all else there is ignored.

        Two of one stem are a problem.
        """
        folders, files = self._list(where)
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

    def _list(self, where: str) -> tuple[list[str], list[str]]:
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


def detect(root: Path) -> tuple[str, str]:
    """The name of the one layout that ``root`` has, and what shows it.

    Raises:
        OSError: the folder cannot be listed.
        ValueError: no layout fits, or several do.
    """
    names = sorted(os.listdir(root), key=natural)
    fits = {name: why for name, layout in LAYOUTS.items() if (why := layout.evidence(root))}
    if len(fits) == 1:
        return next(iter(fits.items()))
    if fits:
        seen = "; ".join(f"{name!r} ({why})" for name, why in fits.items())
        raise ValueError(f"layout: {root} looks like several: {seen}. Name one")
    wanted = "; ".join(f"{name!r}: {layout.shape}" for name, layout in LAYOUTS.items())
    there = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"
    raise ValueError(f"layout: {root} has none that is known. Looked for {wanted}. Found {there}")


def natural(name: str) -> tuple[list[str | int], str]:
    """Sort key by which 10 comes after 9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name


def numbers(names: list[str]) -> tuple[dict[str, int], bool]:
    """A number for each name: the one at its end if all have their own, else its place; and if it is the first."""
    at_end = {name: n for name in names if (n := number(name)) is not None}
    if len(set(at_end.values())) == len(names):
        return at_end, True
    return {name: place for place, name in enumerate(sorted(names, key=natural))}, False


def number(name: str) -> int | None:
    """The number at the end of a name; None if there is none that an int32 holds."""
    match = re.search(r"\d+$", name)
    return int(match[0]) if match and int(match[0]) <= _LARGEST else None


# ---------------------------------------------------------------------- patient/nodule/{images,mask-0..}/slice-N.png


def _slices(tree: Tree, _: str) -> Iterator[Slice]:
    for patient in tree.folders(""):
        nodules = tree.folders(patient[0])
        if not nodules:
            tree.problems.add(patient[0], "no nodule's folder in it")
        for nodule in nodules:
            where = f"{patient[0]}/{nodule[0]}"
            inside = {match[0]: match for match in tree.folders(where, r"images|mask-(\d+)")}
            if inside.pop("images", None) is None:
                tree.problems.add(where, "no folder images in it")
                continue
            images = tree.stems(f"{where}/images")
            masks = {int(match[1]): tree.stems(f"{where}/{name}") for name, match in inside.items()}
            for stem, path in images.items():
                n = number(stem)
                if n is None:
                    tree.problems.add(path, "no slice number at the end of its name")
                else:
                    yield Slice(patient[0], nodule[0], n, path, _pop(masks, stem))
            _orphans(tree, masks, images)


def _slices_evidence(root: Path) -> str | None:
    for patient in _subfolders(root):
        for nodule in _subfolders(patient):
            inside = [folder.name for folder in _subfolders(nodule)]
            mask = next((name for name in inside if re.fullmatch(r"mask-\d+", name)), None)
            if mask and "images" in inside:
                return f"{patient.name}/{nodule.name} holds images and {mask}"
    return None


# ---------------------------------------------------------------------- case/{image_N.jpg,label0_.jpg..}


def _cimd(tree: Tree, _: str) -> Iterator[Slice]:
    for case in tree.folders(""):
        found = tree.pictures(case[0], r"image_?(?P<slice>\d+)|label(?P<rater>\d+)_?")
        images = [(int(match["slice"]), path) for match, path in found.items() if match["slice"]]
        if len(images) != 1:
            tree.problems.add(case[0], f"one image_N expected in it, found {len(images)}")
            continue
        ((n, image),) = images
        masks: dict[int, str] = {}
        for match, path in found.items():
            if match["rater"] and masks.setdefault(int(match["rater"]), path) != path:
                tree.problems.add(path, f"duplicate: rater {match['rater']} also has {masks[int(match['rater'])]}")
        if n > _LARGEST:
            tree.problems.add(image, "its number is beyond 2^31")
        else:
            yield Slice(case[0], "0", n, image, masks)


def _cimd_evidence(root: Path) -> str | None:
    for case in _subfolders(root):
        names = sorted(_names(case), key=natural)
        image = next((name for name in names if re.match(r"image_?\d+\.", name)), None)
        label = next((name for name in names if re.match(r"label\d+_?\.", name)), None)
        if image and label:
            return f"{case.name} holds {image} and {label}"
    return None


# ------------------------------------------------- {train,val,test}/{images/P/z-105.0_c0.png,gt/P/z-105.0_c0_l0.png}


def _berdiff(tree: Tree, _: str) -> Iterator[Slice]:
    kinds = {split[0]: {kind[0] for kind in tree.folders(split[0])} for split in tree.folders("", "|".join(SPLITS))}
    for split in sorted(kinds):
        for kind in ("images", "gt"):
            if kind not in kinds[split]:
                tree.problems.add(split, f"no folder {kind} in it")
    patients = {
        (split, kind): {match[0] for match in tree.folders(f"{split}/{kind}")}
        for split in kinds
        for kind in ("images", "gt")
        if kind in kinds[split]
    }
    # A patient's slices are numbered by their position, whichever splits they are in.
    for patient in sorted(set().union(*patients.values()), key=natural):
        found: list[tuple[float, str, str, str, dict[int, str]]] = []
        for split in SPLITS:
            if patient in patients.get((split, "images"), ()):
                graded = patient in patients.get((split, "gt"), ())
                found += _berdiff_patient(tree, split, patient, graded)
            elif patient in patients.get((split, "gt"), ()):
                tree.problems.add(f"{split}/gt/{patient}", f"no folder {split}/images/{patient} for it")
        places = {z: place for place, z in enumerate(sorted({z for z, *_ in found}))}
        for z, nodule, split, path, masks in sorted(found, key=lambda one: (natural(one[1]), one[0])):
            yield Slice(patient, nodule, places[z], path, masks, split)


def _berdiff_patient(
    tree: Tree, split: str, patient: str, graded: bool
) -> Iterator[tuple[float, str, str, str, dict[int, str]]]:
    """(z, nodule, split, image, masks) of each slice."""
    images = tree.stems(f"{split}/images/{patient}")
    masks: dict[int, dict[str, str]] = {}
    if graded:
        for match, path in tree.pictures(f"{split}/gt/{patient}", r"(?P<stem>.+)_l(?P<rater>\d+)").items():
            masks.setdefault(int(match["rater"]), {})[match["stem"]] = path
    for stem, path in images.items():
        name = re.fullmatch(r"z(?P<z>[-+]?\d+(\.\d+)?)_c(?P<nodule>\d+)", stem)
        if name:
            yield float(name["z"]), name["nodule"], split, path, _pop(masks, stem)
        else:
            tree.problems.add(path, "its name is not z<position>_c<nodule>, as in z-105.0_c0")
    _orphans(tree, masks, images)


def _berdiff_evidence(root: Path) -> str | None:
    for split in SPLITS:
        if (root / split / "images").is_dir() and (root / split / "gt").is_dir():
            return f"{split} holds images and gt"
    return None


# ---------------------------------------------------------------------- images/NAME.png, masks_0/NAME.png ..


def _plain(tree: Tree, patient_pattern: str) -> Iterator[Slice]:
    inside = {match[0]: match for match in tree.folders("", r"images|masks_(\d+)")}
    if inside.pop("images", None) is None:
        tree.problems.add(".", "no folder images in it")
        return
    images = tree.stems("images")
    masks = {int(match[1]): tree.stems(name) for name, match in inside.items()}
    pattern = re.compile(patient_pattern)
    counts: Counter[tuple[str, str]] = Counter()
    for stem, path in images.items():
        match = pattern.match(stem)
        if not match:
            tree.problems.add(path, f"its name does not match the patient pattern {patient_pattern!r}")
            continue
        groups = match.groupdict()
        patient = groups["patient"] if "patient" in groups else match[1 if pattern.groups else 0]
        nodule = groups.get("nodule") or "0"
        place = counts[patient or "", nodule]
        counts[patient or "", nodule] += 1
        n = number(groups["slice"] or "") if "slice" in groups else place
        if not patient or n is None:
            lacking = "number of the slice" if patient else "patient"
            tree.problems.add(path, f"the patient pattern {patient_pattern!r} finds no {lacking} in its name")
            continue
        yield Slice(patient, nodule, n, path, _pop(masks, stem))
    _orphans(tree, masks, images)


def _plain_evidence(root: Path) -> str | None:
    mask = next((folder.name for folder in _subfolders(root) if re.fullmatch(r"masks_\d+", folder.name)), None)
    return f"images beside {mask}" if mask and (root / "images").is_dir() else None


# ---------------------------------------------------------------------- all of them

LAYOUTS = {
    "slices": Layout("PATIENT/NODULE/{images,mask-0,mask-1,...}/slice-N.png", _slices_evidence, _slices),
    "cimd": Layout(
        "CASE/{image_N.jpg,label0_.jpg,label1_.jpg,...}",
        _cimd_evidence,
        _cimd,
        "this layout names no patients: each case counts as one, and two cases of a patient may be in two splits",
    ),
    "berdiff": Layout(
        "{train,val,test}/{images/PATIENT/z-105.0_c0.png,gt/PATIENT/z-105.0_c0_l0.png,...}", _berdiff_evidence, _berdiff
    ),
    "plain": Layout("{images,masks_0,masks_1,...}/NAME.png", _plain_evidence, _plain),
}


def found_raters(slices: list[Slice]) -> int:
    """R, one more than the largest rater's number in the tree.

    Raises:
        ValueError: no masks at all, or a number too large to be a rater's.
    """
    last, path = max(((rater, path) for one in slices for rater, path in one.masks.items()), default=(-1, ""))
    if last < 0:
        raise ValueError("source has images and not one mask")
    if last >= _MOST_RATERS:
        raise ValueError(f"{path}: rater {last}, where at most {_MOST_RATERS} raters are expected")
    return last + 1


def _pop(masks: dict[int, dict[str, str]], stem: str) -> dict[int, str]:
    """The masks of one slice, taken away: what is left in the end has no image."""
    return {rater: files.pop(stem) for rater, files in sorted(masks.items()) if stem in files}


def _orphans(tree: Tree, masks: dict[int, dict[str, str]], images: Mapping[str, str]) -> None:
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


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # the importer itself says so
        return []


def _subfolders(folder: Path) -> Iterator[Path]:
    return (folder / name for name in sorted(_names(folder), key=natural) if (folder / name).is_dir())


def _join(where: str, name: str) -> str:
    return f"{where}/{name}" if where else name
