# SPDX-License-Identifier: Apache-2.0
"""What of a report can be read without scripts: sizes of masks, in words, as a histogram and by mask."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from berdiff_fast import metrics


@dataclass(frozen=True)
class Measure:
    """What the sizes of masks are called and measured in."""

    name: str
    unit: str
    per_pixel: float

    @staticmethod
    def of(pixels: np.ndarray, slices: int, spacing: tuple[float, ...] | None, unit: str) -> Measure:
        if spacing is None:
            return Measure("Volume" if slices > 1 else "Area", unit, 1.0)
        each = math.prod(spacing)
        if len(spacing) == 2:
            return Measure("Area" if slices == 1 else "Area, all slices", "mm²", each)
        return Measure("Volume", "mL", each / 1000) if pixels.max() * each >= 1000 else Measure("Volume", "mm³", each)

    def text(self, value: float) -> str:
        return f"{number(value)} {self.unit}"


def number(value: float) -> str:
    """Whole, or with four significant digits."""
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def count(many: int, what: str) -> str:
    """So many of them, in the singular or the plural."""
    return f"{many} {what}{'s' * (many != 1)}"


def facts(shape: tuple[int, ...], samples: int, raters: int, spacing: tuple[float, ...] | None) -> str:
    found = [count(samples, "sample"), *([count(raters, "rater")] if raters else [])]
    found.append(f"{count(shape[0], 'slice')} of {shape[1]} × {shape[2]}")
    if spacing:
        found.append(" × ".join(f"{x:g}" for x in spacing) + " mm")
    return " · ".join(found)


def summary(own: np.ndarray, theirs: np.ndarray, measure: Measure) -> dict[str, str]:
    """The median of the sizes of samples in words, and what there is to say beside it."""
    low, median, high = np.percentile(own, (5, 50, 95))
    rest = f"; 5 to 95 % of samples: {number(low)} to {measure.text(high)}." if len(own) > 1 else "."
    if empty := int((own == 0).sum()):
        rest += f" {empty} of {len(own)} mark nothing."
    if len(theirs):
        rest += f" Raters: {', '.join(map(number, theirs))} {measure.unit}."
    return {"median": measure.text(median), "rest": rest}


def histogram(own: np.ndarray, theirs: np.ndarray, measure: Measure) -> tuple[Markup, list[float]]:
    """An SVG, and [value, x, value, x] of two points of its axis."""
    width, height, left, base, top = 420, 190, 14, 140, 14
    everyone = np.concatenate([own, theirs])
    low, high = float(everyone.min()), float(everyone.max())
    room = 0.05 * (high - low) or 0.1 * high or 1.0
    low, high = low - room, high + room

    def x(value: float) -> float:
        return round(left + (value - low) / (high - low) * (width - 2 * left), 2)

    # The rule of Rice; a single value gets one narrow bar.
    bins = math.ceil(2 * len(own) ** (1 / 3)) if np.ptp(own) > 0 else 1
    around = (own.min(), own.max()) if np.ptp(own) > 0 else (own[0] - room / 4, own[0] + room / 4)
    counts, edges = np.histogram(own, bins, around)
    p5, median, p95 = np.percentile(own, (5, 50, 95))
    tall, labels = base - top, []
    parts = [f'<rect class="band" x="{x(p5)}" y="{top}" width="{round(x(p95) - x(p5), 2)}" height="{tall}"/>']
    for count, a, b in zip(counts.tolist(), edges, edges[1:], strict=False):
        h = round(count / counts.max() * (tall - 14), 2)
        w = max(1.0, round(x(b) - x(a) - 1.5, 2))
        parts.append(f'<rect class="bar" data-count="{count}" x="{x(a)}" y="{base - h}" width="{w}" height="{h}"/>')
        if count:
            middle = round(x(a) + w / 2, 2)
            labels.append(f'<text class="count" x="{middle}" y="{base - h - 4}" text-anchor="middle">{count}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{width - left}" y1="{base}" y2="{base}"/>')
    parts.append(f'<line class="median" x1="{x(median)}" x2="{x(median)}" y1="{top}" y2="{base}"/>')
    for value in _ticks(low, high):
        parts.append(f'<line class="axis" x1="{x(value)}" x2="{x(value)}" y1="{base}" y2="{base + 5}"/>')
        label = f"{value:,.6g}" if abs(value) < 1e6 else f"{value:.3g}"
        parts.append(f'<text x="{x(value)}" y="{base + 30}" text-anchor="middle">{label}</text>')
    for value in theirs.tolist():
        at = x(value)
        parts.append(f'<path class="rater" d="M{at} {base + 2}l5 10h-10z"/>')
    parts.append(f'<path id="marker" d="M0 {base}v-{tall}" visibility="hidden"/>')
    parts.append(f'<text x="{width - left}" y="{height - 3}" text-anchor="end">{escape(measure.unit)}</text>')
    svg = f'<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="summary">{"".join(parts + labels)}</svg>'
    return Markup(svg), [low, x(low), high, x(high)]


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers in [low, high]."""
    power = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = max(power * m for m in (1, 2, 5) if power * m <= (high - low) / 3)
    return [k * step for k in range(max(0, math.ceil(low / step)), math.floor(high / step) + 1)]


def agreement(raters: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """GED and HM-IoU of samples and raters, each volume one mask."""
    found = metrics.evaluate(raters[None], masks[None], ("ged", "hm_iou"))
    return {name: float(value) for name, value in found.items()}


def rows(own: np.ndarray, theirs: np.ndarray, marked: np.ndarray, colors: list[str]) -> list[dict[str, Any]]:
    """A row for each mask, samples first: its name, size, how many slices it marks, and a sample's colour."""
    found: list[dict[str, Any]] = [
        {"name": f"Sample {k}", "sample": k, "color": colors[k], "size": value} for k, value in enumerate(own.tolist())
    ]
    found += [{"name": f"Rater {r + 1}", "sample": None, "size": value} for r, value in enumerate(theirs.tolist())]
    return [{**row, "slices": int(many)} for row, many in zip(found, marked, strict=True)]
