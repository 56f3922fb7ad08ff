# SPDX-License-Identifier: Apache-2.0
"""``PATIENT/NODULE/{images,mask-0,mask-1,...}/slice-N.png``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from berdiff_fast.data.importers.trees import Layout, Slice, Tree, number, orphans, pop, subfolders


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
                    yield Slice(patient[0], nodule[0], n, path, pop(masks, stem))
            orphans(tree, masks, images)


def _slices_evidence(root: Path) -> str | None:
    for patient in subfolders(root):
        for nodule in subfolders(patient):
            inside = [folder.name for folder in subfolders(nodule)]
            mask = next((name for name in inside if re.fullmatch(r"mask-\d+", name)), None)
            if mask and "images" in inside:
                return f"{patient.name}/{nodule.name} holds images and {mask}"
    return None


LAYOUT = Layout("PATIENT/NODULE/{images,mask-0,mask-1,...}/slice-N.png", _slices_evidence, _slices)
