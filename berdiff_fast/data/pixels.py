# SPDX-License-Identifier: Apache-2.0
"""Pictures in files, PNG, JPEG, TIFF or NPY, to images and 0/1 masks of one size.

Every function raises a ValueError that says what is wrong with the picture; the caller knows its path.
"""

from __future__ import annotations

import numpy as np

from berdiff_fast.io import colours, padding
from berdiff_fast.io.pictures import read as read

# The values that mean "inside" in a mask of 0 and one other value.
_ONES = (1, 255, 65535)


def to_image(x: np.ndarray, window: tuple[float, float] | None) -> np.ndarray:
    """uint8 of the same shape, (H, W) or with channels. What is uint8 already stays as it is; all else is scaled and
    rounded, all channels alike.

    With a ``window`` (low, high), low becomes 0, high 255, and values beyond are clipped; without, the picture's own
    minimum becomes 0 and its maximum 255; values that mean "outside the scan" (``io.padding``) count for neither, and
    become 0. A picture of one value becomes 0.
    """
    if x.dtype == np.uint8:
        return x
    outside = padding.guess(x)
    x = x.astype(np.float64)
    low, high = window or (float((x if outside is None else x[x > outside[1]]).min()), float(x.max()))
    if not np.isfinite(high - low):
        raise ValueError(f"has values from {low} to {high}, too far apart to be scaled")
    unit = np.clip((x - low) / (high - low), 0, 1) if high > low else np.zeros_like(x)
    return np.rint(255 * unit).astype(np.uint8)


def to_mask(x: np.ndarray, lossy: bool, threshold: float | None) -> np.ndarray:
    """(H, W) uint8 of 0 and 1.

    A picture of 0 and one of 1, 255 and 65535 is a mask as it is. Any other is one only if it was compressed with
    loss or a ``threshold`` is given: values above that share of its range (1 for floats, 255 for uint8, 65535 for
    uint16; half of it by default) are 1.
    """
    if not lossy:
        top = x.max()
        if top in (0, *_ONES) and ((x == 0) | (x == top)).all():
            return (x != 0).astype(np.uint8)
        if threshold is None:
            values = np.unique(x)
            shown = ", ".join(f"{v:g}" for v in values[:4].tolist()) + (", ..." if len(values) > 4 else "")
            raise ValueError(f"is not a binary mask: expected 0 and 1 or 0 and 255, got {shown} (give a threshold?)")
    ranges: dict[str, float] = {"uint8": 255, "uint16": 65535, "float16": 1, "float32": 1, "float64": 1}
    if x.dtype.name not in ranges:
        raise ValueError(f"is not a binary mask, and a threshold has no meaning for {x.dtype}")
    return (x > (0.5 if threshold is None else threshold) * ranges[x.dtype.name]).astype(np.uint8)


def crop(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle of (H, W) or (H, W, C); where that is half a pixel off, the upper or left one."""
    if x.shape[0] < size[0] or x.shape[1] < size[1]:
        raise ValueError(f"is {by(x.shape[:2])}, too small to be cropped to {by(size)}")
    top, left = (x.shape[0] - size[0]) // 2, (x.shape[1] - size[1]) // 2
    return x[top : top + size[0], left : left + size[1]]


def resize(x: np.ndarray, size: tuple[int, int], *, nearest: bool = False) -> np.ndarray:
    """(H, W) or (H, W, C), bilinear and antialiased where it shrinks, or by the nearest neighbour; uint8 or bool stay
    so, all else is float64."""
    from PIL import Image

    method = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
    if x.shape[:2] == size:
        return x
    if x.ndim == 3:
        return np.stack([resize(channel, size, nearest=nearest) for channel in np.moveaxis(x, -1, 0)], axis=-1)
    if x.dtype == np.uint8:
        return np.asarray(Image.fromarray(np.ascontiguousarray(x)).resize(size[::-1], method))
    # Pillow resizes float32, which holds small differences only if they are not on top of a large number.
    x = x.astype(np.float64)
    low = x.min()
    return np.asarray(Image.fromarray((x - low).astype(np.float32)).resize(size[::-1], method)).astype(np.float64) + low


def without_padding(x: np.ndarray) -> np.ndarray:
    """The picture, with the lowest of its other values where it has one that means "outside the scan" (``io.padding``).

    So does ``sample_volume``: what is outside plays no part in a minimum.
    """
    found = padding.guess(x)
    if found is None:
        return x
    outside = x <= found[1]
    return np.where(outside, padding.lowest_tissue(x, outside), x).astype(x.dtype)


def to_preview(image: np.ndarray) -> np.ndarray:
    """(H, W) uint8 of an image of a file, (H, W) or the colours (3, H, W), to look at."""
    return to_image(image if image.ndim == 2 else colours.luminance(image), None)


def by(shape: tuple[int, ...]) -> str:
    """A size for people, height first."""
    return " x ".join(map(str, shape))


def contours(image: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """The slice beside itself with its raters' outlines, (H', 2 W', 3) uint8, of some 128 to 256 pixels a side.

    Args:
        image: (H, W) uint8.
        masks: (R, H, W) uint8 of 0 and 1.
    """
    every = -(-max(image.shape) // 256)
    image, masks = image[::every, ::every], masks[:, ::every, ::every]
    scale = -(-128 // max(image.shape))
    plain = np.repeat(image.repeat(scale, 0).repeat(scale, 1)[..., None], 3, axis=2)
    drawn = plain.copy()
    for rater, mask in enumerate(masks.repeat(scale, 1).repeat(scale, 2)):
        padded = np.pad(mask, 1)
        inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        drawn[(mask == 1) & (inner == 0)] = _COLOURS[rater % len(_COLOURS)]
    return np.concatenate([plain, drawn], axis=1)


# Okabe and Ito's orange, sky blue, green, yellow, vermilion, purple: told apart with every common deficiency.
_COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167))
