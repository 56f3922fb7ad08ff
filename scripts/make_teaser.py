#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make docs/teaser.png, the first picture of the README: three CT slices with their readers and sampled masks.

python scripts/make_teaser.py [PNG]
"""

import sys
from pathlib import Path

import torch
from matplotlib import patheffects
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import berdiff_fast as bf
from berdiff_fast.imaging.canvas import INK, RATER, SAMPLE

ROWS, SHOWN = 3, 6
MIDDLE = slice(32, 96)  # of the 128 x 128 pixels

target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "teaser.png"
cases, model = bf.data.lidc.load(), bf.load("lidc")
masks = bf.sample(model, model.preprocess(cases.images[:ROWS]), n=16, steps=10, seed=7)
assert isinstance(masks, torch.Tensor)
disagreement = bf.figures.disagreement(masks[:, :, 0].float().mean(1))

columns = 1 + 4 + SHOWN + 1
figure = Figure(figsize=(columns * 1.06, ROWS * 1.06 + 0.3), dpi=150, facecolor="white")
FigureCanvasAgg(figure)
grid = figure.subplots(ROWS, columns, squeeze=False)
figure.subplots_adjust(
    left=0.004, right=0.996, top=1 - 0.3 / (ROWS * 1.06 + 0.3), bottom=0.008, wspace=0.04, hspace=0.04
)
for i in range(ROWS):
    ct = cases.images[i, 0, MIDDLE, MIDDLE]
    outlines = [(None, INK)]
    outlines += [(mask[0, MIDDLE, MIDDLE], RATER) for mask in cases.raters[i]]
    outlines += [(mask[0, MIDDLE, MIDDLE], SAMPLE) for mask in masks[i, :SHOWN]]
    for axes, (mask, colour) in zip(grid[i], outlines, strict=False):
        axes.imshow(ct, cmap="gray", interpolation="lanczos")
        if mask is not None and mask.any():
            axes.contourf(mask.float(), levels=[0.5, 2], colors=[colour], alpha=0.25)
            axes.contour(mask.float(), levels=[0.5], colors=[colour], linewidths=1.4)
        elif mask is not None:
            label = axes.text(0.5, 0.06, "nothing", transform=axes.transAxes, ha="center", color=colour, fontsize=8)
            label.set_path_effects([patheffects.withStroke(linewidth=2, foreground="black")])
    grid[i, -1].imshow(ct, cmap="gray", interpolation="lanczos")
    shown = disagreement[i, MIDDLE, MIDDLE]
    grid[i, -1].imshow(shown, cmap="inferno", vmin=0, vmax=1, alpha=(shown > 0).float().numpy() * 0.85)
for axes in grid.flat:
    axes.set_axis_off()
for column, words in ((0, "CT"), (2.5, "four radiologists"), (7.5, "six of sixteen masks drawn"), (11, "disagreement")):
    figure.text((column + 0.5) / columns, 0.93, words, ha="center", va="center", fontsize=9, color=INK)
figure.savefig(target)
print(target)
