# SPDX-License-Identifier: Apache-2.0
"""Procedural CT-like slices of a nodule with an ambiguous border, whose raters are known exactly.

A slice shows a bright core, a ground-glass rim around it and a lobe attached to it. A rater makes two
independent decisions: to include the rim (probability a) and to include the lobe (probability b). So every
rater draws one of M = 4 masks, and the distribution over them is known, not estimated. The brighter the rim
is in the slice, the larger a; the brighter the lobe, the larger b: a network can learn both from the image,
and what it learnt can be held against the truth.

Image i of a seed depends on the seed and on i alone. Everything but the rater counts is float32 addition,
multiplication, division and square root, one element at a time, all of them correctly rounded; no library
sine, exponential or matrix product takes part, so neither the batch nor the machine changes a bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from berdiff_fast import checks, metrics, rng

#: Lengths below are in units of which a slice shows this many from side to side, unless another ``field`` is asked for.
_TEMPLATE = 64
_SMALLEST = 32
_LOWEST, _HIGHEST = 0.1, 0.9  # the range of a and b
_VESSELS = 9

# Intensities, on the scale [-1, 1] of a lung window.
_LUNG, _CORE, _WALL = -0.66, 0.52, 0.7
_FAINT, _DENSE = -0.42, 0.18  # of a rim or lobe that is drawn with probability _LOWEST, _HIGHEST

# One tag for each purpose keeps the random numbers apart.
_TAG_GEOMETRY, _TAG_VESSELS, _TAG_COARSE, _TAG_FINE, _TAG_GRAIN, _TAG_RATERS = range(6)

# SplitMix64 adds this to its state for each output, so a sequence can be entered at any place.
_SPLITMIX64_STEP = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Phantom:
    """A batch of N slices, the M masks a rater may draw, and R raters who did.

    Attributes:
        images: (N, 1, H, W) float32 in [-1, 1].
        modes: (N, M, 1, H, W) bool: core, core + rim, core + lobe, core + rim + lobe.
        probabilities: (N, M) float64, each row sums to exactly 1: how often a rater draws each mode.
        raters: (N, R, 1, H, W) bool: independent draws from the modes.
        rater_modes: (N, R) int64: the index of the mode that each rater drew.
    """

    images: Tensor
    modes: Tensor
    probabilities: Tensor
    raters: Tensor
    rater_modes: Tensor


def generate(
    count: int, size: int = 64, *, raters: int = 4, seed: int = 0, first: int = 0, field: int = _TEMPLATE
) -> Phantom:
    """Make images ``first`` ... ``first + count - 1`` of the endless sequence that belongs to ``seed``.

    Image i is the same whatever ``count`` and ``first`` it is asked for with, and its rater r is the same
    however many raters there are. All sizes show the same anatomy, at their own resolution and with their
    own grain.

    Args:
        count: number of images, at least 1.
        size: height and width in pixels, at least 32.
        raters: draws for each image, at least 1.
        seed: any int; it is taken modulo 2^64.
        first: index of the first image, at least 0.
        field: how much a slice shows, at least 64: with 128, a nodule takes half as many pixels of the same size. What
            lies beyond 64 is lung and chest wall.

    Returns:
        A batch on the CPU.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument is too small.
    """
    checks.integer("count", count, 1)
    checks.integer("size", size, _SMALLEST)
    checks.integer("raters", raters, 1)
    checks.integer("seed", seed)
    checks.integer("first", first, 0)
    checks.integer("field", field, _TEMPLATE)

    seeds = rng.image_seeds(seed + first * _SPLITMIX64_STEP, count)
    draw = _drawer(seeds, _TAG_GEOMETRY, 32)

    # (N, 1, 1) each. Multiples of 2^-24, as the raters' uniforms are: P(uniform < a) is a, without an error
    # term, and so are 1 - a, the products below and their sum.
    a = _round24(draw(_LOWEST, _HIGHEST))
    b = _round24(draw(_LOWEST, _HIGHEST))

    axis = (torch.arange(size, dtype=torch.float32) + 0.5) * (field / size) - field / 2
    slice_x, slice_y = axis.view(1, 1, -1), axis.view(1, -1, 1)
    # The nodule reaches less than 23 from its centre, and half the slice is 32 or more.
    centre_x, centre_y = draw(-8.0, 8.0), draw(-8.0, 8.0)
    x, y = slice_x - centre_x, slice_y - centre_y

    # Signed distances along the ray from the centre: not positive inside.
    radius = draw(6.0, 9.0)
    bumps = [(draw(-limit, limit), draw(-limit, limit)) for limit in (0.09, 0.06, 0.04, 0.03)]
    core = _distance(x, y, radius, bumps)
    width, uneven = draw(3.0, 5.0), [(draw(-0.08, 0.08), draw(-0.08, 0.08))]
    rim = core - width * (1 + _harmonics(x, y, uneven))

    # The lobe sits across the rim: its radius of 3.9 or more exceeds both 0.7 and 0.3 of the rim's width of
    # less than 5.6, so it touches the core and reaches beyond the rim, and no two modes are equal.
    to_x, to_y = _direction(draw)
    reach = radius * (1 + _harmonics(to_x, to_y, bumps)) + 0.7 * width * (1 + _harmonics(to_x, to_y, uneven))
    lobe_bumps = [(draw(-limit, limit), draw(-limit, limit)) for limit in (0.06, 0.03)]
    lobe = _distance(x - to_x * reach, y - to_y * reach, draw(4.5, 6.0), lobe_bumps)

    image = _lung(seeds, slice_x, slice_y, field)
    image = _blend(image, _wall(x, y, draw), _WALL, 3.0)
    # The denser of rim and lobe wins where they meet, so neither hides the other; and vessels stay visible
    # through both, which is what makes an opacity a ground-glass one.
    for part, probability in ((rim, a), (lobe, b)):
        image = torch.maximum(image, _blend(image, part, _level(probability), 2.5))
    image = _blend(image, core, _CORE + draw(-0.06, 0.06), 3.5)
    image = image + 0.16 * _smooth_noise(seeds, size, field, 4, _TAG_FINE) + 0.05 * _grain(seeds, size)

    in_core, in_rim, in_lobe = core <= 0, rim <= 0, lobe <= 0
    modes = torch.stack([in_core, in_rim, in_core | in_lobe, in_rim | in_lobe], dim=1).unsqueeze(2)
    a, b = a.double().view(-1), b.double().view(-1)
    probabilities = torch.stack([(1 - a) * (1 - b), a * (1 - b), (1 - a) * b, a * b], dim=1)

    uniforms = rng.uniform(rng.words(seeds, 2 * raters, tag=_TAG_RATERS, stream=rng.STREAM_PHANTOM))
    includes = uniforms.view(count, raters, 2) < torch.stack([a, b], dim=1).unsqueeze(1)
    rater_modes = includes[..., 0].long() + 2 * includes[..., 1].long()
    drawn = modes[torch.arange(count).unsqueeze(1), rater_modes]
    return Phantom(image.clamp(-1, 1).unsqueeze(1), modes, probabilities, drawn, rater_modes)


def expected_ged(phantom: Phantom, n: int, *, raters: int | None = None) -> Tensor:
    """Return the generalized energy distance that n perfect samples have on average, exactly.

    With d = 1 - IoU (two empty masks have d = 0) and all ordered pairs, i = j included,

        GED = 2 E d(Y, S) - E d(Y, Y') - E d(S, S').

    Let the R raters Y and the n samples S all be independent draws of mode i with probability p_i, and
    D = sum_ij p_i p_j d_ij. Each pair (Y, S) has mean D. Of the R^2 pairs (Y, Y') the R with i = j have
    d = 0 and the rest have mean D: together (1 - 1/R) D. In the same way (S, S') gives (1 - 1/n) D. Hence

        E GED = 2 D - (1 - 1/R) D - (1 - 1/n) D = D (1/R + 1/n).

    Even a perfect model does not come down to zero: hold a measured GED, averaged over many slices,
    against this value.

    Args:
        phantom: a batch of N slices.
        n: samples for each slice, at least 1.
        raters: raters for each slice, at least 1; by default as many as the batch has.

    Returns:
        (N,) float64 in [0, 2): the mean over draws of the raters as well as of the samples.

    Raises:
        TypeError: ``n`` or ``raters`` is not an int.
        ValueError: ``n`` or ``raters`` is below 1.
    """
    raters = phantom.raters.shape[1] if raters is None else raters
    checks.integer("n", n, 1)
    checks.integer("raters", raters, 1)
    distance = metrics.iou_distance(phantom.modes, phantom.modes)
    p = phantom.probabilities
    return (p.unsqueeze(2) * p.unsqueeze(1) * distance).sum((1, 2)) * (1 / raters + 1 / n)


def _drawer(seeds: Tensor, tag: int, count: int) -> Callable[[float, float], Tensor]:
    """A function that gives the next of ``count`` uniform numbers in [low, high), (N, 1, 1) float32."""
    words = rng.words(seeds, count, tag=tag, stream=rng.STREAM_PHANTOM)
    columns = iter(rng.uniform(words).view(-1, count, 1, 1).unbind(1))
    return lambda low, high: low + (high - low) * next(columns)


def _round24(probability: Tensor) -> Tensor:
    return (probability * 2.0**24).round() * 2.0**-24


def _level(probability: Tensor) -> Tensor:
    """The intensity that shows how likely a rater is to include a part."""
    return _FAINT + (_DENSE - _FAINT) * ((probability - _LOWEST) / (_HIGHEST - _LOWEST))


def _root(x: Tensor) -> Tensor:
    """The square root, correctly rounded: by NumPy, since torch's may be MKL's, which is not on every processor."""
    return torch.from_numpy(np.sqrt(x.numpy()))


def _direction(draw: Callable[[float, float], Tensor]) -> tuple[Tensor, Tensor]:
    """A unit vector. Not quite uniform in angle, which is the price for doing without a sine."""
    x, y = draw(-1.0, 1.0) + 1e-6, draw(-1.0, 1.0)
    length = _root(x * x + y * y)
    return x / length, y / length


def _harmonics(x: Tensor, y: Tensor, coefficients: list[tuple[Tensor, Tensor]]) -> Tensor:
    """sum_k c_k cos(k angle) + s_k sin(k angle) for k = 2, 3, ...; k = 2 makes an ellipse of a circle."""
    length = _root(x * x + y * y) + 1e-6
    cos_1, sin_1 = x / length, y / length
    cos_k, sin_k = cos_1, sin_1
    total = torch.zeros(())
    for c, s in coefficients:
        cos_k, sin_k = cos_k * cos_1 - sin_k * sin_1, sin_k * cos_1 + cos_k * sin_1
        total = total + (c * cos_k + s * sin_k)
    return total


def _distance(x: Tensor, y: Tensor, radius: Tensor, coefficients: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Distance along the ray to a wobbling circle around (0, 0); not positive inside."""
    return _root(x * x + y * y) - radius * (1 + _harmonics(x, y, coefficients))


def _blend(image: Tensor, distance: Tensor, level: Tensor | float, softness: float) -> Tensor:
    """Lay tissue of one intensity over the image; its border is a smooth step ``softness`` pixels wide."""
    t = (0.5 - distance / softness).clamp(0, 1)
    return image + (t * t * (3 - 2 * t)) * (level - image)


def _wall(x: Tensor, y: Tensor, draw: Callable[[float, float], Tensor]) -> Tensor:
    """Distance to the chest wall, a large circle around lung and nodule that often lies outside the slice."""
    to_x, to_y = _direction(draw)
    radius = draw(50.0, 90.0)
    beyond = radius - draw(25.0, 45.0)  # further than the nodule reaches
    along_x, along_y = x + to_x * beyond, y + to_y * beyond
    return radius - _root(along_x * along_x + along_y * along_y)


def _lung(seeds: Tensor, x: Tensor, y: Tensor, field: int) -> Tensor:
    """Parenchyma of slowly varying density, crossed by vessels: (N, H, W)."""
    image = _LUNG + 0.14 * _smooth_noise(seeds, x.shape[-1], field, 16, _TAG_COARSE)
    draw = _drawer(seeds, _TAG_VESSELS, 8 * _VESSELS)
    vessels = torch.zeros_like(image)
    for index in range(_VESSELS):
        along_x, along_y = _direction(draw)
        dx, dy = x - draw(-30.0, 30.0), y - draw(-30.0, 30.0)
        s, t = dx * along_x + dy * along_y, dy * along_x - dx * along_y
        # The first ones run through the slice in a bow and get thinner, the others are cut across.
        cut = index >= _VESSELS // 2
        length, width = (draw(1.4, 2.2), draw(1.2, 1.8)) if cut else (draw(14.0, 28.0), draw(0.9, 2.0))
        along = s / length
        taper = 1.0 if cut else (1 - 0.5 * along).clamp(0.5, 1.5)
        across = (t - draw(-0.015, 0.015) * s * s) / (width * taper)
        ridge = 1 + across * across + along * along * along * along
        vessels = torch.maximum(vessels, draw(0.5, 0.95) / (ridge * ridge))
    return image + vessels


def _smooth_noise(seeds: Tensor, size: int, field: int, pitch: int, tag: int) -> Tensor:
    """Random values in [-1, 1) on a lattice of ``pitch`` units, joined by cubic B-splines: (N, H, W)."""
    nodes = -(-field // pitch) + 3
    words = rng.words(seeds, nodes * nodes, tag=tag, stream=rng.STREAM_PHANTOM)
    lattice = rng.uniform(words).view(-1, nodes, nodes) * 2 - 1
    place = (torch.arange(size, dtype=torch.float32) + 0.5) * (field / (size * pitch))
    offset = (place.unsqueeze(1) - (torch.arange(nodes) - 1)).abs()
    inner, outer = (1 - offset).clamp_min(0), (2 - offset).clamp_min(0)
    weights = (outer * outer * outer - 4 * (inner * inner * inner)) / 6  # (size, nodes)
    # A sum written out: the order of additions in a matrix product may depend on the batch.
    zero = torch.zeros(())
    rows = sum((weights[:, k].view(-1, 1) * lattice[:, k].unsqueeze(1) for k in range(nodes)), zero)
    return sum((weights[:, k] * rows[:, :, k].unsqueeze(2) for k in range(nodes)), zero)


def _grain(seeds: Tensor, size: int) -> Tensor:
    """Noise of mean 0 and deviation 1, nearly normal, with the short range of reconstructed CT: (N, H, W)."""
    side = size + 1
    words = rng.words(seeds, side * side, tag=_TAG_GRAIN, stream=rng.STREAM_PHANTOM)
    # The sum of the four bytes of a word is nearly normal, with variance 4 (256^2 - 1) / 12.
    total = (words & 255) + ((words >> 8) & 255) + ((words >> 16) & 255) + (words >> 24)
    grain = ((total - 510).float() * (1 / 147.8)).view(-1, side, side)
    # The mean of four neighbours has half the deviation of one.
    rows = grain[:, 1:] + grain[:, :-1]
    return (rows[:, :, 1:] + rows[:, :, :-1]) * 0.5
