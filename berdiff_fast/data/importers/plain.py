# SPDX-License-Identifier: Apache-2.0
"""``{images,masks_0,masks_1,...}/NAME.png``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from berdiff_fast.data.importers.trees import Layout, Slice, Tree, number, orphans, pop, subfolders


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
        yield Slice(patient, nodule, n, path, pop(masks, stem))
    orphans(tree, masks, images)


def _plain_evidence(root: Path) -> str | None:
    mask = next((folder.name for folder in subfolders(root) if re.fullmatch(r"masks_\d+", folder.name)), None)
    return f"images beside {mask}" if mask and (root / "images").is_dir() else None


LAYOUT = Layout("{images,masks_0,masks_1,...}/NAME.png", _plain_evidence, _plain)
