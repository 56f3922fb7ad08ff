#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures for docs/model_card.md, from a bundled model's training.json and an evaluation of it.

python scripts/model_card.py --evaluation results --data val.h5
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

#: Mean area of the raters' masks that mark something, in pixels.
SIZES = ((0, 32), (32, 64), (64, 128), (128, 256), (256, 10**9))


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables and pictures for the model card.")
    parser.add_argument("--evaluation", type=Path, required=True, help="what berdiff-fast evaluate wrote")
    parser.add_argument("--data", type=Path, required=True, help="the slices that it was of")
    parser.add_argument("--model", default="lidc")
    options = parser.parse_args()
    with (options.evaluation / "slices.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    areas = _areas(options.data, [int(row["index"]) for row in rows])

    print("| raters who mark nothing | slices | GED | floor | HM-IoU |\n|---|---|---|---|---|")
    for empty in range(5):
        _line(f"{empty} of 4", rows, [round(4 * row["empty_raters"]) == empty for row in rows])
    print("\n| mean area of the others, pixels | slices | GED | floor | HM-IoU |\n|---|---|---|---|---|")
    for low, high in SIZES:
        name = f"{low} to {high - 1}" if high < 10**9 else f"{low} and more"
        _line(name, rows, [low <= area < high for area in areas])
    for name in ("cases", "existence"):
        shutil.copyfile(options.evaluation / f"{name}.png", DOCS / f"lidc_{name}.png")
    training = json.loads((ROOT / "berdiff_fast" / "weights" / options.model / "training.json").read_text())
    _curves(training, DOCS / "lidc_curves.png")


def _areas(path: Path, indices: list[int]) -> list[float]:
    """The mean area of the masks of each slice that are not empty."""
    with h5py.File(path) as file:
        found = []
        for index in indices:
            sizes = file["mask"][index].sum((-2, -1))
            found.append(float(sizes[sizes > 0].mean()) if sizes.any() else 0.0)
    return found


def _line(name: str, rows: list[dict[str, float]], chosen: list[bool]) -> None:
    some = [row for row, kept in zip(rows, chosen, strict=True) if kept]
    if some:
        means = " | ".join(f"{np.mean([row[key] for row in some]):.3f}" for key in ("ged", "ged_floor", "hm_iou"))
        print(f"| {name} | {len(some)} | {means} |")


def _curves(training: dict, path: Path) -> None:
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for axis, name, title in (
        (left, "loss_bits_per_pixel", "denoiser: loss, bits a pixel"),
        (middle, "prior_loss_nats", "prior: cross-entropy, nats"),
    ):
        values = training[name]
        axis.plot([int(step) for step in values], [*values.values()], label="training")
        axis.set_title(title, fontsize=9)
    left.set_yscale("log")
    steps = [row["step"] for row in training["validation"]]
    middle.plot(steps, [row["prior_cross_entropy"] for row in training["validation"]], "o-", label="validation")
    middle.legend(fontsize=8)
    for name in ("ged", "hm_iou"):
        right.plot(steps, [row[name] for row in training["validation"]], "o-", label=name)
    right.set_title("validation, 32 slices", fontsize=9)
    right.legend(fontsize=8)
    for axis in (left, middle, right):
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
