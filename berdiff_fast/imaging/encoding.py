# SPDX-License-Identifier: Apache-2.0
"""How a report holds slices, masks and colours: what ``report.js`` decodes again."""

from __future__ import annotations

import base64
import io
import zlib

import numpy as np

from berdiff_fast.imaging.summary import disagreement

# After Okabe and Ito, without the yellow, which is the raters', and with blue and green lightened for a dark slice.
_SAMPLES = ("#E69F00", "#56B4E9", "#1FBF92", "#E8703A", "#D98CB8", "#7C9BFF")
RATER = "#F0E442"
# Evenly spaced stops whose lightness rises; dark ones still differ from a grey slice by their hue.
RAMPS = {
    "mean": ("#31378f", "#2a6fc4", "#1fa7b5", "#7fcf72", "#fbe94b"),
    "disagreement": ("#56217a", "#a32a80", "#e2526a", "#f9a05c", "#fdf3bd"),
}


def grey(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Intensities as uint8: black at ``low``, white at ``high``, and the same grey everywhere if these are equal."""
    if low == high:
        return np.full(image.shape, 128, np.uint8)
    shown = (np.clip(image, low, high).astype(np.float64) - low) * (255 / (high - low))
    return np.rint(shown).astype(np.uint8)


def box(masks: np.ndarray) -> list[int] | None:
    """[left, top, right, bottom] of all that is marked in (n, S, H, W), the latter two exclusive."""
    marked = np.asarray(masks.any((0, 1)))
    if not marked.any():
        return None
    rows, columns = np.flatnonzero(marked.any(1)), np.flatnonzero(marked.any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def runs(masks: np.ndarray) -> str:
    """Base64 of the lengths of runs of 0, 1, 0, ... over all masks, row by row; 7 bits a byte, the lowest first."""
    bits = masks.ravel()
    bounds = np.concatenate([[0], np.flatnonzero(bits[1:] != bits[:-1]) + 1, [bits.size]])
    lengths = np.diff(bounds, prepend=0)[0 if bits[0] else 1 :]  # the first is of zeros, if it be none
    groups = lengths[:, None] >> (7 * np.arange(6))
    used = groups > 0
    used[:, 0] = True
    coded = (groups & 127) | (groups > 127) * 128
    return base64.b64encode(coded[used].astype(np.uint8).tobytes()).decode()


def levels(image: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Intensities as uint16 levels, their lowest value, and the step from level to level.

    Whole numbers stay what they are. Others are rounded to whole numbers where they span 1024 or more, which is below
    what a screen shows, else to a 4095th of their span.
    """
    low, high = float(image.min()), float(image.max())
    span, step = high - low, 1.0
    if span > 65534:
        step = span / 65534
    elif span < 1024 and not (image == np.rint(image)).all():
        step = span / 4095
    elif not (image == np.rint(image)).all():
        low = float(np.floor(low))
    return np.rint((image.astype(np.float64) - low) / step).astype(np.uint16), low, step


def packed(slice_: np.ndarray) -> str:
    """Base64 of the levels (H, W) of a slice, exactly.

    Of each row the first level, then the difference to the pixel before, modulo 2^16. Small differences of either sign
    become small numbers (0, -1, 1, -2, ... are 0, 1, 2, 3, ...). Of all numbers first the low, then the high bytes;
    compressed by zlib.
    """
    difference = np.diff(slice_, axis=1, prepend=np.uint16(0)).view(np.int16).astype(np.int32)
    numbers = ((difference << 1) ^ (difference >> 31)).astype(np.uint16)
    bytes_ = np.stack([numbers & 255, numbers >> 8]).astype(np.uint8)
    return base64.b64encode(zlib.compress(bytes_.tobytes(), 9)).decode()


def png(pixels: np.ndarray) -> str:
    """A data URI of (H, W) or (H, W, 3) uint8."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def color(sample: int) -> str:
    """Six hues, then the same ones lighter, then darker, then again."""
    turn, hue = divmod(sample, len(_SAMPLES))
    to, part = ((0, 0.0), (255, 0.5), (0, 0.3))[turn % 3]
    return "#" + "".join(f"{round(v + (to - v) * part):02x}" for v in _rgb(_SAMPLES[hue]))


def _rgb(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color[1:]))


def stills(image: np.ndarray, masks: np.ndarray) -> list[str]:
    """Data URIs of a slice (H, W) uint8, and of it under mean and disagreement of its masks (n, H, W)."""
    mean = masks.mean(0)
    return [
        png(image),
        png(_blend(image, mean, "mean")),
        png(_blend(image, disagreement(mean).numpy(), "disagreement")),
    ]


def _blend(image: np.ndarray, values: np.ndarray, ramp: str) -> np.ndarray:
    """(H, W, 3) uint8: the colours of a map, 70 % opaque, where it is not 0."""
    stops = np.array([_rgb(color) for color in RAMPS[ramp]])
    at = np.linspace(0, 1, len(stops))
    colors = np.stack([np.interp(values, at, stops[:, c]) for c in range(3)], axis=-1)
    alpha = 0.7 * (values > 0)[..., None]
    return np.rint(image[..., None] * (1 - alpha) + colors * alpha).astype(np.uint8)
