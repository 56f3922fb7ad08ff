# SPDX-License-Identifier: Apache-2.0
"""``{train,val,test}/{images/P/z-105.0_c0.png,gt/P/z-105.0_c0_l0.png}``: the tree that the published code reads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from berdiff_fast.data.importers.trees import SPLITS, Layout, Slice, Tree, natural, orphans, pop


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
            yield float(name["z"]), name["nodule"], split, path, pop(masks, stem)
        else:
            tree.problems.add(path, "its name is not z<position>_c<nodule>, as in z-105.0_c0")
    orphans(tree, masks, images)


def _berdiff_evidence(root: Path) -> str | None:
    for split in SPLITS:
        if (root / split / "images").is_dir() and (root / split / "gt").is_dir():
            return f"{split} holds images and gt"
    return None


LAYOUT = Layout(
    "{train,val,test}/{images/PATIENT/z-105.0_c0.png,gt/PATIENT/z-105.0_c0_l0.png,...}", _berdiff_evidence, _berdiff
)
