# SPDX-License-Identifier: Apache-2.0
"""One HTML file to look at: a slice viewer with every sample, maps, volumes, raters and provenance.

The file holds all that it shows: it loads nothing, and a content security policy forbids it to. What has numbers
(tables, histogram, summary) is written here and can be read without scripts; ``report.js`` draws slices and masks.
Images travel as 8-bit PNG, the masks of a slice as runs of zeros and ones.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch

from berdiff_fast import checks
from berdiff_fast.files import write_text
from berdiff_fast.imaging import tables
from berdiff_fast.imaging.summary import disagreement, existence_in_words

#: Volumes of more slices than this are shown from the first to the last marked one, and this many beyond.
_ALL_SLICES, _MARGIN = 40, 3

# After Okabe and Ito, without the yellow, which is the raters', and with blue and green lightened for a dark slice.
_SAMPLES = ("#E69F00", "#56B4E9", "#1FBF92", "#E8703A", "#D98CB8", "#7C9BFF")
_RATER = "#F0E442"
# Evenly spaced stops whose lightness rises; dark ones still differ from a grey slice by their hue.
_RAMPS = {
    "mean": ("#31378f", "#2a6fc4", "#1fa7b5", "#7fcf72", "#fbe94b"),
    "disagreement": ("#56217a", "#a32a80", "#e2526a", "#f9a05c", "#fdf3bd"),
}


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
    provenance: Mapping[str, Any] | None = None,
    max_bytes: int = 50_000_000,
    existence: float | None = None,
) -> None:
    """Write one self-contained HTML file that shows n masks of an image, or of the slices of a volume.

    ``sample`` returns (B, n, 1, H, W); the masks of B slices are ``masks[:, :, 0].transpose(0, 1)`` here.

    Of more than 40 slices, those before the first and after the last that any mask marks are left out, but for 3 on
    either side, and the page says so. Numbers are of the whole volume: generalised energy distance and HM-IoU
    (docs/metrics.md) take each volume, flattened, as one mask. The same arguments give the same file.

    Args:
        path: the file; its folder must exist. It is written beside its place and renamed.
        image: (S, H, W) or (H, W) real numbers, finite.
        masks: (n, S, H, W), or (n, H, W) for one slice: bool or 0 and 1, n at least 1.
        title: the heading.
        spacing: millimetres from pixel to pixel, (slice, row, column) or (row, column). With three, volumes are in mm3
            or mL; with two, areas (summed over the slices) in mm2. Pixels are shown in their proportions.
        unit: what a pixel is called in counts, where there is no spacing.
        raters: (R, S, H, W), or (R, H, W) for one slice: masks like ``masks``.
        window: (low, high) intensities shown as black and white; by default the 0.5th and 99.5th percentile.
        provenance: values that JSON can hold, by name, shown as a table: seed, model, versions.
        max_bytes: refuse to write a larger file.
        existence: the probability that a reader marks something, ``1 - model.prior(img)[:, 0]`` of a model with a mode
            prior; by default the share of masks in which anything is marked.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        TypeError, ValueError: naming the argument, before anything is written; the file would exceed ``max_bytes``.
    """
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"path must lie in an existing folder, got {path}")
    for name, value in (("title", title), ("unit", unit)):
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a str, got {type(value).__name__}")
    checks.integer("max_bytes", max_bytes, 1)
    slices = _image(image)
    drawn = _masks("masks", masks, slices)
    rated = None if raters is None else _masks("raters", raters, slices)
    pitch = None if spacing is None else _spacing(spacing)
    shown = _window(slices, window)
    origin = _provenance(provenance)
    if existence is None:
        existence = float(drawn.any((1, 2, 3)).mean())
    elif isinstance(existence, bool) or not 0 <= existence <= 1:
        raise ValueError(f"existence must be a probability in [0, 1], got {existence!r}")

    text = _page(shown, drawn, rated, title, pitch, unit, origin, float(existence))
    size = len(text.encode())
    if size > max_bytes:
        raise ValueError(
            f"max_bytes is {max_bytes}, and the report of {len(drawn)} masks of {slices.shape} pixels would take "
            f"{size}: give fewer slices or masks, or crop them, or raise max_bytes"
        )
    write_text(path, text)


# ---------------------------------------------------------------------- arguments


def _image(value: Any) -> np.ndarray:
    """(S, H, W) float32."""
    image = checks.tensor("image", value).detach().cpu()
    if image.is_complex():
        raise TypeError(f"image must hold real numbers, got {image.dtype}")
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise ValueError(f"image must be (S, H, W) or (H, W) and not empty, got shape {tuple(image.shape)}")
    image = image.float()
    if not bool(image.isfinite().all()):
        raise ValueError("image must be finite, got NaN or infinite values")
    return image.reshape(-1, *image.shape[-2:]).numpy()


def _masks(name: str, value: Any, image: np.ndarray) -> np.ndarray:
    """(n, S, H, W) bool."""
    masks = checks.tensor(name, value).detach().cpu()
    given = tuple(masks.shape)
    if masks.ndim == 3 and len(image) == 1:
        masks = masks[:, None]
    if masks.ndim != 4 or masks.shape[0] < 1 or masks.shape[1:] != image.shape:
        wanted = ", ".join(map(str, image.shape))
        raise ValueError(f"{name} must be (1 or more, {wanted}) to fit image, got shape {given}")
    if masks.dtype != torch.bool and not bool(((masks == 0) | (masks == 1)).all()):
        raise ValueError(f"{name} must be masks, bool or 0 and 1, got other values")
    return masks.bool().numpy()


def _spacing(value: Any) -> tuple[float, ...]:
    try:
        pitch = tuple(float(x) for x in value)
        good = len(pitch) in (2, 3) and all(0 < x < math.inf for x in pitch)
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(
            f"spacing must be (slice, row, column) or (row, column) in mm, finite and above 0, got {value!r}"
        )
    return pitch


def _window(image: np.ndarray, window: tuple[float, float] | None) -> np.ndarray:
    """(S, H, W) uint8."""
    if window is None:
        low, high = (float(x) for x in np.percentile(image, (0.5, 99.5)))
        if low == high:  # a bright spot on nothing, or nothing
            low, high = float(image.min()), float(image.max())
    else:
        low, high = checks.increasing_pair("window", window)
    if low == high:
        return np.full(image.shape, 128, np.uint8)
    shown = (np.clip(image, low, high).astype(np.float64) - low) * (255 / (high - low))
    return np.rint(shown).astype(np.uint8)


def _provenance(value: Mapping[str, Any] | None) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"provenance must be a dict with names as keys, got {value!r}")
    try:
        return {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in value.items()}
    except (TypeError, ValueError) as error:
        raise TypeError(f"provenance must hold values that JSON can, got {value!r}: {error}") from None


# ---------------------------------------------------------------------- the page


def _page(
    image: np.ndarray,
    masks: np.ndarray,
    raters: np.ndarray | None,
    title: str,
    spacing: tuple[float, ...] | None,
    unit: str,
    provenance: dict[str, str],
    existence: float,
) -> str:
    everyone = masks if raters is None else np.concatenate([masks, raters])
    pixels = everyone.sum((1, 2, 3))
    measure = tables.Measure.of(pixels, len(image), spacing, unit)
    sizes = pixels * measure.per_pixel
    own, theirs = sizes[: len(masks)], sizes[len(masks) :]
    kept = _kept(everyone)
    start = max(kept, key=lambda s: int(masks[:, s].sum()))
    histogram, axis = tables.histogram(own, theirs, measure)
    colors = [_color(k) for k in range(len(masks))]
    height, width = image.shape[1:]
    row, column = spacing[-2:] if spacing else (1.0, 1.0)
    aspect = width * column / (height * row)
    data = {
        "width": width,
        "height": height,
        "aspect": aspect,
        "spacing": [row, column] if spacing else None,
        "unit": unit,
        "total": len(image),
        "slices": [s + 1 for s in kept],
        "start": kept.index(start),
        "count": len(masks),
        "raterCount": len(theirs),
        "colors": colors,
        "raterColor": _RATER,
        "ramps": _RAMPS,
        "box": _box(everyone),
        "sizes": own.tolist(),
        "axis": axis,
        "images": [_png(image[s]) for s in kept],
        "masks": [_runs(masks[:, s]) for s in kept],
        "raters": [] if raters is None else [_runs(raters[:, s]) for s in kept],
    }
    here = Path(__file__).parent
    script = (here / "report.js").read_text("utf-8")
    parts = {
        "title": escape(title) or "Plausible masks",
        "policy": f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'",
        "style": (here / "report.css").read_text("utf-8"),
        "facts": f"{tables.facts(image.shape, len(masks), len(theirs), spacing)} · {existence_in_words(existence)}",
        "left_out": _left_out(kept, len(image)),
        "mean_ramp": ", ".join(_RAMPS["mean"]),
        "disagreement_ramp": ", ".join(_RAMPS["disagreement"]),
        "last_slice": str(len(kept) - 1),
        "start": str(kept.index(start)),
        "last_sample": str(len(masks) - 1),
        "raters_hidden": "hidden" if raters is None else "",
        "slices_hidden": "hidden" if len(kept) == 1 else "",
        "aspect": f"{aspect:.6g}",
        "stills": _stills(image[start], masks[:, start], start + 1, aspect),
        "measure": measure.name,
        "summary": tables.summary(own, theirs, measure),
        "histogram": histogram,
        "agreement": "" if raters is None else tables.agreement(raters, masks),
        "sizes": tables.sizes(own, theirs, everyone.any((2, 3)).sum(1), colors, _RATER, measure, len(image)),
        "provenance": tables.provenance(provenance),
        "data": re.sub(r"[<>&\u2028\u2029]", lambda c: f"\\u{ord(c[0]):04x}", json.dumps(data, ensure_ascii=False)),
        "script": script,
    }
    # In one pass: a title that looks like a placeholder stays what it is.
    return re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], (here / "report.html").read_text("utf-8"))


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


def _left_out(kept: list[int], total: int) -> str:
    if len(kept) == total:
        return ""
    return (
        f'<p class="note">Slices {kept[0] + 1} to {kept[-1] + 1} of {total} are in this file. In the others nobody '
        "marks anything.</p>"
    )


def _box(masks: np.ndarray) -> list[int] | None:
    """[left, top, right, bottom] of all that is marked, the latter two exclusive."""
    marked = np.asarray(masks.any((0, 1)))
    if not marked.any():
        return None
    rows, columns = np.flatnonzero(marked.any(1)), np.flatnonzero(marked.any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def _runs(masks: np.ndarray) -> str:
    """Base64 of the lengths of runs of 0, 1, 0, ... over all masks, row by row; 7 bits a byte, the lowest first."""
    bits = masks.ravel()
    bounds = np.concatenate([[0], np.flatnonzero(bits[1:] != bits[:-1]) + 1, [bits.size]])
    lengths = np.diff(bounds, prepend=0)[0 if bits[0] else 1 :]  # the first is of zeros, if it be none
    groups = lengths[:, None] >> (7 * np.arange(6))
    used = groups > 0
    used[:, 0] = True
    coded = (groups & 127) | (groups > 127) * 128
    return base64.b64encode(coded[used].astype(np.uint8).tobytes()).decode()


def _png(pixels: np.ndarray) -> str:
    """A data URI of (H, W) or (H, W, 3) uint8."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _color(sample: int) -> str:
    """Six hues, then the same ones lighter, then darker, then again."""
    turn, hue = divmod(sample, len(_SAMPLES))
    to, part = ((0, 0.0), (255, 0.5), (0, 0.3))[turn % 3]
    return "#" + "".join(f"{round(v + (to - v) * part):02x}" for v in _rgb(_SAMPLES[hue]))


def _rgb(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color[1:]))


def _stills(image: np.ndarray, masks: np.ndarray, number: int, aspect: float) -> str:
    """Pictures of one slice, for browsers without scripts."""
    mean = masks.mean(0)
    pictures = [
        ("Slice " + str(number), image),
        ("Mean of the samples, blue 0 to yellow 1", _blend(image, mean, "mean")),
        ("Disagreement, purple 0 to cream 1 bit", _blend(image, disagreement(mean).numpy(), "disagreement")),
    ]
    return "".join(
        f'<figure><img src="{_png(pixels)}" alt="{caption}" style="aspect-ratio: {aspect:.6g}">'
        f"<figcaption>{caption}</figcaption></figure>"
        for caption, pixels in pictures
    )


def _blend(image: np.ndarray, values: np.ndarray, ramp: str) -> np.ndarray:
    """(H, W, 3) uint8: the colours of a map, 70 % opaque, where it is not 0."""
    stops = np.array([_rgb(color) for color in _RAMPS[ramp]])
    at = np.linspace(0, 1, len(stops))
    colors = np.stack([np.interp(values, at, stops[:, c]) for c in range(3)], axis=-1)
    alpha = 0.7 * (values > 0)[..., None]
    return np.rint(image[..., None] * (1 - alpha) + colors * alpha).astype(np.uint8)
