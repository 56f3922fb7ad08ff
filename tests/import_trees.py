# SPDX-License-Identifier: Apache-2.0
"""Small trees of pictures in every layout, for tests of importers; also the fixtures ``tree`` and ``out``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from berdiff_fast.data.importers import split_of, trees

H, W, R = 12, 10, 4
ALL_IN_TRAIN = {"split": (100, 0, 0)}
Pictures = dict[tuple[str, int, int], tuple[np.ndarray, np.ndarray]]


# ---------------------------------------------------------------------- small trees


def pictures(patients: int = 2, nodules: int = 2, slices: int = 1, seed: int = 0) -> Pictures:
    """(patient, nodule, slice) to an image (H, W) and masks (R, H, W) of 0 and 1; rater 3 is empty in slice 0."""
    rng = np.random.default_rng(seed)
    made: Pictures = {}
    for p in range(patients):
        for n in range(nodules):
            for s in range(slices):
                masks = np.zeros((R, H, W), np.uint8)
                for rater in range(R - (s == 0)):
                    y, x = rng.integers(0, 5, 2)
                    masks[rater, y : y + 5, x : x + 4] = 1
                made[f"P-{p + 1:02d}", n, s] = rng.integers(0, 256, (H, W), dtype=np.uint8), masks
    return made


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def slices_tree(root: Path, made: Pictures) -> Path:
    for (p, n, s), (image, masks) in made.items():
        save(root / p / f"nodule-{n}" / "images" / f"slice-{s}.png", image)
        for rater, mask in enumerate(masks):
            save(root / p / f"nodule-{n}" / f"mask-{rater}" / f"slice-{s}.png", mask * 255)
    return root


def cimd_tree(root: Path, made: Pictures) -> Path:
    for case, (image, masks) in enumerate(made.values()):
        save(root / str(case) / f"image_{case + 1}.jpg", image)
        for rater, mask in enumerate(masks):
            save(root / str(case) / f"label{rater}_.jpg", mask * 255)
    return root


def berdiff_tree(root: Path, made: Pictures, split: Callable[[str], str] = split_of) -> Path:
    for (p, n, s), (image, masks) in made.items():
        stem = f"{p}/z{-105.0 + 1.25 * s}_c{n}"
        save(root / split(p) / "images" / f"{stem}.png", image)
        for rater, mask in enumerate(masks):
            save(root / split(p) / "gt" / f"{stem}_l{rater}.png", mask * 255)
    return root


def plain_tree(root: Path, made: Pictures, suffix: str = ".png") -> Path:
    for (p, n, s), (image, masks) in made.items():
        save(root / "images" / f"{p}_n{n}_{s}{suffix}", image)
        for rater, mask in enumerate(masks):
            save(root / f"masks_{rater}" / f"{p}_n{n}_{s}{suffix}", mask)
    return root


TREES: dict[str, Callable[[Path, Pictures], Path]] = {
    "slices": slices_tree,
    "cimd": cimd_tree,
    "berdiff": berdiff_tree,
    "plain": plain_tree,
}


def contents(output: Path) -> dict[str, dict[str, np.ndarray]]:
    read = {}
    for name in trees.SPLITS:
        if (output / f"{name}.h5").exists():
            with h5py.File(output / f"{name}.h5") as file:
                read[name] = {key: d.asstr()[()] if d.dtype == object else d[()] for key, d in file.items()}
    return read


def by_path(output: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {
        path: (split["image"][k], split["mask"][k])
        for split in contents(output).values()
        for k, path in enumerate(split["path"])
    }


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return tmp_path / "tree"


def left(out: Path) -> list[str]:
    """What is beside the tree."""
    return sorted(name for name in os.listdir(out.parent) if name != "tree")


def first(tree: Path, what: str = "images", nodule: str = "P-01/nodule-0") -> Path:
    return tree / nodule / what / "slice-0.png"
