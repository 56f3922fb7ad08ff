# SPDX-License-Identifier: Apache-2.0
"""One HTML file to look at: a slice viewer with every sample, maps, volumes, raters and provenance.

The file holds all that it shows: it loads nothing, and a content security policy forbids it to. What has numbers
(tables, histogram, summary) is written here and can be read without scripts; ``report.js`` draws slices and masks.
Images travel as 8-bit PNG, or as intensities where there are several windows to see them in; the masks of a slice as
runs of zeros and ones.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from markupsafe import Markup

from berdiff_fast import checks
from berdiff_fast.files import write_text
from berdiff_fast.imaging import encoding, tables, windows
from berdiff_fast.imaging import report_arguments as given
from berdiff_fast.imaging.summary import existence_in_words
from berdiff_fast.io.stack import SliceStack

#: Volumes of more slices than this are shown from the first to the last marked one, and this many beyond.
_ALL_SLICES, _MARGIN = 40, 3


def write_report(
    path: str | os.PathLike[str],
    image: torch.Tensor | np.ndarray,
    masks: torch.Tensor | np.ndarray,
    *,
    title: str = "",
    spacing: Sequence[float] | None = None,
    unit: str = "px",
    raters: torch.Tensor | np.ndarray | None = None,
    window: tuple[float, float] | None = None,
    windows: Mapping[str, tuple[float, float]] | None = None,
    intensity: str = "",
    provenance: Mapping[str, Any] | None = None,
    max_bytes: int = 50_000_000,
    existence: float | None = None,
    stack: SliceStack | None = None,
    coverage: str = "",
    notes: Sequence[str] = (),
    channels: Sequence[str] = (),
    pages: Mapping[str, str] | None = None,
) -> None:
    """Write one self-contained HTML file that shows n masks of an image, or of the slices of a volume.

    ``sample`` returns (B, n, 1, H, W); the masks of B slices are ``masks[:, :, 0].transpose(0, 1)`` here.

    Of more than 40 slices, those before the first and after the last that any mask marks are left out, but for 3 on
    either side, and the page says so. Numbers are of the whole volume: generalised energy distance and HM-IoU
    (docs/metrics.md) take each volume, flattened, as one mask. Slices, rows, columns and masks are counted from 0, as
    in arrays and file names. The same arguments give the same file.

    Args:
        path: the file; its folder must exist. It is written beside its place and renamed.
        image: (S, H, W) or (H, W) real numbers, finite.
        masks: (n, S, H, W), or (n, H, W) for one slice: bool or 0 and 1, n at least 1.
        title: the heading.
        spacing: millimetres from pixel to pixel, (slice, row, column) or (row, column); by default that of ``stack``.
            With three, volumes are in mm3 or mL; with two, areas (summed over the slices) in mm2. Pixels are shown in
            their proportions.
        unit: what a pixel is called in counts, where there is no spacing.
        raters: (R, S, H, W), or (R, H, W) for one slice: masks like ``masks``.
        window: (low, high) intensities shown as black and white; by default the 0.5th and 99.5th percentile.
        windows: several of them by name, to choose from, the one to begin with first (``imaging.windows.of`` has those
            of a scan). With more than one the page also takes a level and a width of the reader's own; the file then
            holds the intensities, as ``imaging.encoding.levels`` rounds them. If it would exceed ``max_bytes`` with
            them, it has the first window only, and says so.
        intensity: the unit of intensities, such as "HU".
        provenance: values that JSON can hold, by name, shown as a table: seed, model, versions.
        max_bytes: refuse to write a larger file.
        existence: the probability that a reader marks something, ``1 - model.prior(img)[:, 0]`` of a model with a mode
            prior; by default the share of masks in which anything is marked.
        stack: which slices of which volume ``image`` is (``SliceStack.of(volume, axis, first, end)``): their numbers
            and places, and how they lie in the patient. With it slices are turned as radiologists have them, with
            letters at the edges. Without it they are shown as stored and counted from 0.
        coverage: what sizes are of, after "Volume of ...": by default what ``stack`` says.
        notes: sentences shown beside the sizes.
        channels: names of the image's channels, to choose from. ``image`` is then (C, S, H, W), or (C, H, W) for one
            slice, and each channel has the window of its percentiles.
        pages: what other pages in the same folder show, and their file names, to go to; this one among them.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        TypeError, ValueError: naming the argument, before anything is written; the file would exceed ``max_bytes``.
    """
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"path must lie in an existing folder, got {path}")
    for name, value in (("title", title), ("unit", unit), ("intensity", intensity), ("coverage", coverage)):
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a str, got {type(value).__name__}")
    if isinstance(notes, str) or not all(isinstance(note, str) for note in notes):
        raise TypeError(f"notes must be a sequence of str, got {notes!r}")
    checks.integer("max_bytes", max_bytes, 1)
    several = given.image_of(image, channels)
    slices = several[0]
    drawn = given.masks_of("masks", masks, slices)
    rated = None if raters is None else given.masks_of("raters", raters, slices)
    if stack is not None and stack.count != len(slices):
        raise ValueError(f"stack must be of the {len(slices)} slices of image, got {stack.count}")
    if spacing is None and stack is not None:
        spacing = stack.spacing
    pitch = None if spacing is None else given.spacing_of(spacing)
    if len(several) > 1 and (window is not None or windows is not None):
        raise ValueError("window and windows are for an image of one channel; of several, each has its own")
    shown = given.windows_of(slices, window, windows)
    origin, beside = given.provenance_of(provenance), given.pages_of(pages)
    if existence is None:
        existence = float(drawn.any((1, 2, 3)).mean())
    elif isinstance(existence, bool) or not 0 <= existence <= 1:
        raise ValueError(f"existence must be a probability in [0, 1], got {existence!r}")
    if stack is None:
        stack = SliceStack(0, len(slices), len(slices))
    elif not coverage:
        coverage = "the whole scan" if stack.is_whole else f"{tables.count(stack.count, 'slice')} of {stack.total}"

    page = _Page(
        several,
        drawn,
        rated,
        stack,
        pitch,
        unit,
        shown,
        intensity,
        title,
        coverage,
        [*notes],
        origin,
        float(existence),
        [*channels],
        beside,
        path.name,
    )
    text = page.text()
    if len(text.encode()) > max_bytes and len(shown) > 1:
        first = next(iter(shown.items()))
        note = (
            f"Of {len(shown)} windows this file holds one: with the others it would take {_megabytes(text)}, more than "
            f"the {max_bytes / 1e6:.3g} MB that it may."
        )
        text = replace(page, windows=dict([first]), window_note=note).text()
    size = len(text.encode())
    if size > max_bytes:
        raise ValueError(
            f"max_bytes is {max_bytes}, and the report of {len(drawn)} masks of {slices.shape} pixels would take "
            f"{size}: give fewer slices or masks, or crop them, or raise max_bytes"
        )
    write_text(path, text)


def _megabytes(text: str) -> str:
    return f"{len(text.encode()) / 1e6:.3g} MB"


# ---------------------------------------------------------------------- the page


@dataclass(frozen=True)
class _Page:
    channels: np.ndarray  # (C, S, H, W) float32, as stored
    masks: np.ndarray  # (n, S, H, W) bool
    raters: np.ndarray | None
    stack: SliceStack
    spacing: tuple[float, ...] | None
    unit: str
    windows: dict[str, tuple[float, float]]
    intensity: str
    title: str
    coverage: str
    notes: list[str]
    provenance: dict[str, str]
    existence: float
    names: list[str]  # of the channels
    pages: dict[str, str]
    page: str  # this one's file name
    window_note: str = ""

    def text(self) -> str:
        view, stack = self.stack.view, self.stack
        masks, raters, stored = self.masks, self.raters, self.channels[0]
        everyone = masks if raters is None else np.concatenate([masks, raters])
        pixels = everyone.sum((1, 2, 3))
        measure = tables.Measure.of(pixels, len(stored), self.spacing, self.unit)
        sizes = pixels * measure.per_pixel
        own, theirs = sizes[: len(masks)], sizes[len(masks) :]
        kept = _kept(everyone)
        start = max(kept, key=lambda s: int(masks[:, s].sum()))
        histogram, axis = tables.histogram(own, theirs, measure)
        colors = [encoding.color(k) for k in range(len(masks))]
        image, masks, everyone = view.turn(stored), view.turn(masks), view.turn(everyone)
        height, width = image.shape[1:]
        row, column = view.turn_spacing(*self.spacing[-2:]) if self.spacing else (1.0, 1.0)
        aspect = width * column / (height * row)
        low, high = next(iter(self.windows.values()))
        first = encoding.grey(image[start], low, high)
        data = {
            "width": width,
            "height": height,
            "aspect": aspect,
            "spacing": [row, column] if self.spacing else None,
            "unit": self.unit,
            "total": stack.total,
            "slices": [stack.first + s for s in kept],
            "places": [stack.place(s) for s in kept],
            "turned": [view.transpose, view.flip_rows, view.flip_columns],
            "start": kept.index(start),
            "count": len(masks),
            "raterCount": len(theirs),
            "colors": colors,
            "raterColor": encoding.RATER,
            "ramps": encoding.RAMPS,
            "box": encoding.box(everyone),
            "sizes": own.tolist(),
            "axis": axis,
            "intensity": self.intensity,
            "channels": self.names,
            "windows": [{"name": name, "low": low, "high": high} for name, (low, high) in self.windows.items()],
            "masks": [encoding.runs(masks[:, s]) for s in kept],
            "raters": [] if raters is None else [encoding.runs(view.turn(raters)[:, s]) for s in kept],
        }
        if len(self.windows) > 1:
            levels, lowest, step = encoding.levels(image[kept])
            data |= {"images": [], "values": [*map(encoding.packed, levels)], "lowest": lowest, "step": step}
        else:
            data |= {"images": [*self._pictures(kept)], "values": []}
        here = Path(__file__).parent
        script = (here / "report.js").read_text("utf-8")
        parts = {
            "title": self.title or "Plausible masks",
            "policy": f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'",
            "style": Markup((here / "report.css").read_text("utf-8")),
            "facts": f"{tables.facts(stored.shape, len(masks), len(theirs), self.spacing)} · "
            f"{existence_in_words(self.existence)}",
            "which": _which(stack),
            "view": str(view),
            "edges": [*zip(("left", "top", "right", "bottom"), view.edges or (), strict=False)],
            "left_out": None if len(kept) == stack.count else (stack.first + kept[0], stack.first + kept[-1]),
            "stack": stack,
            "window": f"{_window_in_words(self.windows, self.intensity, len(self.names))} {self.window_note}",
            "windows": [*self.windows],
            "intensity": self.intensity,
            "channels": self.names,
            "pages": self.pages,
            "page": self.page,
            "mean_ramp": ", ".join(encoding.RAMPS["mean"]),
            "disagreement_ramp": ", ".join(encoding.RAMPS["disagreement"]),
            "last_slice": len(kept) - 1,
            "start": kept.index(start),
            "last_sample": len(masks) - 1,
            "aspect": f"{aspect:.6g}",
            "stills": [*zip(_captions(stack.first + start), encoding.stills(first, masks[:, start]), strict=True)],
            "measure": measure,
            "coverage": self.coverage,
            "summary": tables.summary(own, theirs, measure),
            "histogram": histogram,
            "raters": len(theirs),
            "agreement": None if raters is None else tables.agreement(raters, self.masks),
            "slices": len(stored),
            "rows": tables.rows(own, theirs, everyone.any((2, 3)).sum(1), colors),
            "rater_color": encoding.RATER,
            "notes": self.notes,
            "provenance": self.provenance,
            # Nothing in it ends the element that it stands in.
            "data": Markup(
                re.sub(r"[<>&\u2028\u2029]", lambda c: f"\\u{ord(c[0]):04x}", json.dumps(data, ensure_ascii=False))
            ),
            "script": Markup(script),
        }
        return templates().get_template("report.html").render(parts)

    def _pictures(self, kept: Sequence[int]) -> Iterator[str]:
        """The slices as pictures, channel after channel."""
        for k, channel in enumerate(self.channels):
            low, high = windows.percentile(channel) if k else next(iter(self.windows.values()))
            for s in kept:
                yield encoding.png(encoding.grey(self.stack.view.turn(channel[s]), low, high))


@functools.cache
def templates() -> jinja2.Environment:
    """Templates in which whatever is not ``Markup`` is escaped, and a name that is missing is an error."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["number"] = tables.number
    return templates


def _kept(masks: np.ndarray) -> list[int]:
    """Indices of the slices that are shown."""
    slices = masks.shape[1]
    marked = np.flatnonzero(masks.any((0, 2, 3)))
    first, last = 0, slices - 1
    if slices > _ALL_SLICES:
        middle = (slices - _ALL_SLICES) // 2
        first, last = (marked[0], marked[-1]) if marked.size else (middle, middle + _ALL_SLICES - 1)
        first, last = max(0, int(first) - _MARGIN), min(slices - 1, int(last) + _MARGIN)
    return list(range(first, last + 1))


def _which(stack: SliceStack) -> str:
    which = str(stack)
    return f"{which[0].upper()}{which[1:]}; slices, rows, columns and samples are counted from 0."


def _window_in_words(windows: Mapping[str, tuple[float, float]], unit: str, channels: int) -> str:
    if channels > 1:
        return "Window: the 0.5 to 99.5 percentile of each channel."
    name, (low, high) = next(iter(windows.items()))
    ends = f"{low:.4g} to {high:.4g} {unit}".strip()
    return f"Window: {name} ({ends})."


def _captions(number: int) -> tuple[str, str, str]:
    """Of pictures of one slice, for browsers without scripts."""
    return (
        f"Slice {number}",
        "Mean of the samples, blue 0 to yellow 1",
        "Disagreement, purple 0 to cream 1 bit",
    )
