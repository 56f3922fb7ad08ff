# SPDX-License-Identifier: Apache-2.0
"""``CASE/{image_N.jpg,label0_.jpg,label1_.jpg,...}``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from berdiff_fast.data.importers.trees import LARGEST, Layout, Slice, Tree, names_in, natural, subfolders


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
        if n > LARGEST:
            tree.problems.add(image, "its number is beyond 2^31")
        else:
            yield Slice(case[0], "0", n, image, masks)


def _cimd_evidence(root: Path) -> str | None:
    for case in subfolders(root):
        names = sorted(names_in(case), key=natural)
        image = next((name for name in names if re.match(r"image_?\d+\.", name)), None)
        label = next((name for name in names if re.match(r"label\d+_?\.", name)), None)
        if image and label:
            return f"{case.name} holds {image} and {label}"
    return None


LAYOUT = Layout(
    "CASE/{image_N.jpg,label0_.jpg,label1_.jpg,...}",
    _cimd_evidence,
    _cimd,
    "this layout names no patients: each case counts as one, and two cases of a patient may be in two splits",
)
