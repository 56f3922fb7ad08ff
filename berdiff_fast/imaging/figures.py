# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a model drew: the slice, the raters, the samples, and where they disagree."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from berdiff_fast.imaging.canvas import INK as _INK
from berdiff_fast.imaging.canvas import RATER as _RATER
from berdiff_fast.imaging.canvas import SAMPLE as _SAMPLE
from berdiff_fast.imaging.canvas import done as _done
from berdiff_fast.imaging.canvas import figure as _figure
from berdiff_fast.imaging.canvas import quiet as _quiet
from berdiff_fast.imaging.canvas import require_matplotlib
from berdiff_fast.imaging.canvas import target as _target
from berdiff_fast.imaging.canvas import write as _write
from berdiff_fast.imaging.reliability import existence_diagram, reliability_diagram
from berdiff_fast.imaging.summary import disagreement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

__all__ = [
    "StepRecorder",
    "contact_sheet",
    "denoising_strip",
    "existence_diagram",
    "overlay",
    "reliability_diagram",
    "require_matplotlib",
]

# Inches.
_COLUMNS = 8
_SMALL, _GAP, _MARGIN, _CAPTION = 1.25, 0.08, 0.15, 0.24
_WIDTH = _COLUMNS * _SMALL + (_COLUMNS - 1) * _GAP
_BAR = 0.55  # a colour bar with its ticks
_LARGE = (_WIDTH - 2 * _BAR - 2 * _GAP) / 3


def contact_sheet(
    path: str | os.PathLike[str],
    image: Tensor | ArrayLike,
    samples: Tensor | ArrayLike,
    *,
    raters: Tensor | ArrayLike | None = None,
    title: str | None = None,
    labels: Sequence[str] | None = None,
    max_samples: int = 16,
) -> None:
    """Write one PNG that shows each slice, its probability and disagreement maps, raters and samples.

    Masks are drawn as a contour with a light fill over the slice, raters orange, samples blue. The
    probability map is the mean of all n samples, its white line where the probability is 1/2. The
    file is written beside ``path`` and moved there when it is complete.

    Args:
        path: the PNG; its folder must exist.
        image: (H, W) or (B, H, W) real numbers, shown from each slice's minimum (black) to its maximum.
        samples: (n, H, W) or (B, n, H, W) masks, bool or 0 and 1.
        raters: (R, H, W) or (B, R, H, W) masks, bool or 0 and 1, or None.
        title: the heading of the sheet.
        labels: one for each of the B slices; by default their numbers, if there are several.
        max_samples: the most samples, and the most raters, drawn one by one for each slice.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        ImportError: matplotlib is not installed.
        TypeError: ``max_samples`` is not an int.
        ValueError: shapes do not fit, the image is not finite, or a mask is not binary.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must lie in an existing folder, got {path}")
    if isinstance(max_samples, bool) or not isinstance(max_samples, int):
        raise TypeError(f"max_samples must be an int, got {type(max_samples).__name__}")
    if max_samples < 1:
        raise ValueError(f"max_samples must be at least 1, got {max_samples}")
    images = _images(image)
    single = images.shape[0] == 1 and torch.as_tensor(image).ndim == 2
    drawn = _masks("samples", samples, images, single)
    rated = None if raters is None else _masks("raters", raters, images, single)
    cases = images.shape[0]
    if labels is None:
        labels = [f"Slice {b + 1}" for b in range(cases)] if cases > 1 else [""]
    elif isinstance(labels, str) or len(labels) != cases:
        raise ValueError(f"labels must be a sequence of {cases} strings, one for each slice, got {labels!r}")

    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = min(max_samples, drawn.shape[1])
    rated_shown = 0 if rated is None else min(max_samples, rated.shape[1])
    rows = -(-shown // _COLUMNS) + -(-rated_shown // _COLUMNS)
    aspect = images.shape[1] / images.shape[2]
    large, small = _CAPTION + _LARGE * aspect + _GAP, _CAPTION + _SMALL * aspect + _GAP
    heading = 0.4 if title else 0.0
    block = large + rows * small + 0.2
    width, height = _WIDTH + 2 * _MARGIN, heading + cases * block + _MARGIN

    # Laid out by hand, in inches from the top left corner: automatic layouts are slow with so many panels.
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)

    def panel(x: float, y: float, side: float, caption: str) -> Axes:
        bottom = height - y - _CAPTION - side * aspect
        axes = figure.add_axes(((x + _MARGIN) / width, bottom / height, side / width, side * aspect / height))
        axes.set_axis_off()
        axes.set_title(caption, fontsize=8, color=_INK, pad=3, loc="left")
        return axes

    def grid(top: float, picture: Tensor, masks: Tensor, name: str, color: str) -> float:
        for k, mask in enumerate(masks):
            row, column = divmod(k, _COLUMNS)
            axes = panel(column * (_SMALL + _GAP), top + row * small, _SMALL, f"{name} {k + 1}")
            _slice(axes, picture)
            _outline(axes, mask, color)
        return top + -(-len(masks) // _COLUMNS) * small

    if title:
        at = (_MARGIN / width, 1 - 0.27 / height)
        figure.text(*at, title, fontsize=13, color=_INK, weight="bold", va="center")
    for b in range(cases):
        y = heading + b * block
        _slice(panel(0, y, _LARGE, labels[b] or "Slice"), images[b])
        mean = drawn[b].float().mean(0)
        n = drawn.shape[1]
        maps = (
            (mean, f"Probability: mean of {n} sample{'s' * (n > 1)}", "cividis"),
            (disagreement(mean), "Disagreement: entropy in bits", "inferno"),
        )
        for k, (values, caption, colors) in enumerate(maps):
            x = (k + 1) * (_LARGE + _GAP) + k * _BAR
            axes = panel(x, y, _LARGE, caption)
            shades = axes.imshow(values.numpy(), cmap=colors, vmin=0, vmax=1, interpolation="nearest")
            if k == 0:
                _contour(axes, mean, "white", 0.9)
            beside = axes.inset_axes((1.02, 0, 0.04, 1))
            bar = figure.colorbar(shades, cax=beside, ticks=(0, 0.25, 0.5, 0.75, 1))
            bar.ax.tick_params(labelsize=7, length=2, colors=_INK)
            bar.outline.set_visible(False)
        y += large
        if rated is not None:
            y = grid(y, images[b], rated[b, :rated_shown], "Rater", _RATER)
        grid(y, images[b], drawn[b, :shown], "Sample", _SAMPLE)

    _write(figure, path, "png")


def overlay(
    image: Tensor | ArrayLike,
    masks: Tensor | ArrayLike,
    *,
    raters: Tensor | ArrayLike | None = None,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw one slice under the mean of its masks, their contours, and the raters'.

    The mean is a colour where it is not 0. Contours of the samples are thin, that of their majority is white and bold,
    those of the raters are dashed.

    Args:
        image: (H, W) real numbers, shown from minimum (black) to maximum.
        masks: (n, H, W), bool or 0 and 1.
        raters: (R, H, W) masks, or None.
        title: the heading.
        path: write it there too, as PNG, PDF, SVG, ...: whatever its suffix says to matplotlib.

    Returns:
        The figure, which belongs to no window: ``savefig`` writes it, too.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        ImportError: matplotlib is not installed.
        ValueError: shapes do not fit, the image is not finite, or a mask is not binary.
    """
    images = _images(image)
    if torch.as_tensor(image).ndim != 2:
        raise ValueError(f"image must be (H, W), got {tuple(torch.as_tensor(image).shape)}")
    drawn = _masks("masks", masks, images, single=True)[0]
    rated = None if raters is None else _masks("raters", raters, images, single=True)[0]
    target = _target(path)
    height, width = images.shape[1:]
    figure = _figure(5.6, 5.0 * height / width + _CAPTION * bool(title))
    axes = figure.add_subplot()
    axes.set_axis_off()
    if title:
        axes.set_title(title, fontsize=11, color=_INK, loc="left")
    _slice(axes, images[0])
    mean = drawn.float().mean(0)
    shades = axes.imshow(
        mean.numpy(), cmap="viridis", vmin=0, vmax=1, alpha=0.6 * (mean > 0).float().numpy(), interpolation="nearest"
    )
    for mask in drawn:
        _contour(axes, mask.float(), _SAMPLE, 0.5)
    _contour(axes, mean, "white", 1.8)
    for mask in () if rated is None else rated:
        _contour(axes, mask.float(), _RATER, 1.2, "dashed")
    bar = figure.colorbar(shades, ax=axes, fraction=0.045 * height / width, pad=0.02, ticks=(0, 0.25, 0.5, 0.75, 1))
    bar.set_label(f"Mean of {len(drawn)} sample{'s' * (len(drawn) > 1)}", fontsize=8, color=_INK)
    _quiet(bar.ax)
    bar.outline.set_visible(False)
    return _done(figure, target)


class StepRecorder(nn.Module):
    """A model that remembers what it was asked to denoise; ``sample`` takes it in the model's place.

    >>> recorder = StepRecorder(model)
    >>> mask = bf.sample(recorder, img, n=1, seed=7)[0, 0, 0]
    >>> labels = [f"t = {t}" for t in recorder.timesteps]
    >>> denoising_strip([*(y[0, 0] for y in recorder.states), mask], labels=[*labels, "mask"])

    Args:
        model: a ``BerDiff``, or any callable ``model(y_t, t, img) -> logits``. It is run as it is, not prepared.

    Attributes:
        timesteps: the timestep of each call, in order, as ints.
        states: y_t of each call, (N, K, H, W) of 0 and 1 on the CPU. With more masks than fit into one call of the
            network, there are several calls for a timestep.
    """

    def __init__(self, model: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        if not callable(model):
            raise TypeError(f"model must be callable as model(y_t, t, img), got {type(model).__name__}")
        self.model = model
        self.timesteps: list[int] = []
        self.states: list[Tensor] = []
        # What ``sample`` would ask the model.
        for name in ("schedule", "prediction", "spacing", "mask_channels", "img_channels", "spatial_dims"):
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))

    def forward(self, y: Tensor, t: Tensor, img: Tensor) -> Tensor:
        self.timesteps.append(int(t[0]))
        self.states.append(y.detach().to("cpu", torch.float32, copy=True))
        return self.model(y, t, img)


def denoising_strip(
    steps: Sequence[Tensor | ArrayLike],
    *,
    image: Tensor | ArrayLike | None = None,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw how one mask comes out of noise: a picture per step, eight in a row (``StepRecorder`` records them).

    Args:
        steps: (H, W) arrays in the order of sampling, of 0 and 1, or of probabilities.
        image: the slice, (H, W), drawn before them.
        labels: one for each step; by default their numbers.
        title, path: as in ``overlay``.

    Returns:
        The figure.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        ImportError: matplotlib is not installed.
        ValueError: no steps, shapes that differ, values outside [0, 1], or labels that do not fit.
    """
    pictures = [torch.as_tensor(step).detach().cpu().float() for step in steps]
    if not pictures or any(p.ndim != 2 or p.shape != pictures[0].shape or 0 in p.shape for p in pictures):
        raise ValueError(f"steps must be one or more (H, W) of one size, got {[tuple(p.shape) for p in pictures]}")
    if not all(bool(((p >= 0) & (p <= 1)).all()) for p in pictures):
        raise ValueError("steps must hold values in [0, 1], got NaN or values outside")
    if labels is None:
        labels = [f"Step {k + 1}" for k in range(len(pictures))]
    elif isinstance(labels, str) or len(labels) != len(pictures):
        raise ValueError(f"labels must be a sequence of {len(pictures)} strings, one for each step, got {labels!r}")
    captions = list(labels)
    if image is not None:
        slices = _images(image)
        if slices.shape != (1, *pictures[0].shape):
            raise ValueError(f"image must be {tuple(pictures[0].shape)} like steps, got {tuple(slices.shape[1:])}")
        pictures.insert(0, slices[0])
        captions.insert(0, "Slice")
    target = _target(path)
    rows, columns = -(-len(pictures) // _COLUMNS), min(len(pictures), _COLUMNS)
    height, width = pictures[0].shape
    side = _SMALL + _GAP
    figure = _figure(columns * side, rows * (_SMALL * height / width + _CAPTION) + 0.3 * bool(title))
    if title:
        figure.suptitle(title, fontsize=11, color=_INK, x=0.01, ha="left")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for k, (axes, picture, caption) in enumerate(zip(grid, pictures, captions, strict=False)):
        axes.set_title(caption, fontsize=8, color=_INK, pad=3, loc="left")
        limits: dict[str, Any] = {} if image is not None and k == 0 else {"vmin": 0, "vmax": 1}
        axes.imshow(picture.numpy(), cmap="gray", interpolation="nearest", **limits)
    return _done(figure, target)


def _images(image: Tensor | ArrayLike) -> Tensor:
    """(B, H, W) float32, checked."""
    images = torch.as_tensor(image).detach().cpu()
    if images.ndim not in (2, 3) or 0 in images.shape:
        raise ValueError(f"image must be (H, W) or (B, H, W) and not empty, got {tuple(images.shape)}")
    if images.is_complex():
        raise ValueError(f"image must hold real numbers, got {images.dtype}")
    images = images.float()
    if not bool(images.isfinite().all()):
        raise ValueError("image must be finite, got NaN or infinite values")
    return images if images.ndim == 3 else images.unsqueeze(0)


def _masks(name: str, value: Tensor | ArrayLike, images: Tensor, single: bool) -> Tensor:
    """(B, n, H, W) bool, checked against the (B, H, W) images."""
    masks = torch.as_tensor(value).detach().cpu()
    given = tuple(masks.shape)
    masks = masks.unsqueeze(0) if single else masks
    cases, height, width = images.shape
    if masks.ndim != 4 or masks.shape[1] < 1 or masks.shape[:1] + masks.shape[2:] != images.shape:
        lead = "" if single else f"{cases}, "
        raise ValueError(f"{name} must be ({lead}1 or more, {height}, {width}) to fit image, got {given}")
    if not bool(((masks == 0) | (masks == 1)).all()):
        raise ValueError(f"{name} must be masks, bool or 0 and 1, got other values")
    return masks.bool()


def _slice(axes: Axes, picture: Tensor) -> None:
    axes.imshow(picture.numpy(), cmap="gray", interpolation="nearest")


def _outline(axes: Axes, mask: Tensor, color: str) -> None:
    from matplotlib.colors import to_rgb

    rgb = torch.tensor(to_rgb(color)).expand(*mask.shape, 3)
    fill = torch.cat([rgb, 0.22 * mask.unsqueeze(-1)], dim=-1)
    axes.imshow(fill.numpy(), interpolation="nearest")
    _contour(axes, mask.float(), color, 1.3)


def _contour(axes: Axes, values: Tensor, color: str, width: float, style: str = "solid") -> None:
    # A map that never crosses 1/2 has no contour, and one of a single row or column cannot have any.
    if min(values.shape) > 1 and bool((values > 0.5).any()) and bool((values <= 0.5).any()):
        axes.contour(values.numpy(), levels=[0.5], colors=color, linewidths=width, linestyles=style)
