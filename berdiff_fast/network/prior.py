# SPDX-License-Identifier: Apache-2.0
"""The mode prior: is there anything, and how large is it? Classes of size, and a network that predicts them.

The size class c of a mask is a function of the mask, so p(y | x) = sum over c of p(c | x) p(y | x, c) loses nothing
(``docs/math.md``). ``ModePrior`` is p(c | x): a small convolutional network that sees the image alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from berdiff_fast import checks
from berdiff_fast.backends.reference import exp_negative
from berdiff_fast.network.blocks import Float32GroupNorm
from berdiff_fast.network.window import center_distance, middle, surroundings

#: Areas, in pixels, at which a class of size ends and the next begins. Class 0 is the empty mask.
EDGES = (16, 32, 64, 128, 256)

#: The most classes that the draw's integers are wide enough for (``docs/draw.md``, section 11).
MOST_CLASSES = 64

#: A class that is as likely as the likeliest one has this weight.
LIKELIEST = 2**24


def check_edges(name: str, edges: Any) -> tuple[int, ...]:
    """``edges`` as a tuple of ascending areas.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if isinstance(edges, (str, bytes)) or not isinstance(edges, Sequence):
        raise TypeError(f"{name} must be a list of areas in pixels, got {edges!r}")
    found = tuple(checks.integer(name, edge, 2) for edge in edges)
    if any(a >= b for a, b in pairwise(found)):
        raise ValueError(f"{name} must be ascending areas in pixels, got {list(edges)}")
    if len(found) + 2 > MOST_CLASSES:
        raise ValueError(f"{name} must be at most {MOST_CLASSES - 2} areas, got {len(found)}")
    return found


def size_class(masks: torch.Tensor, edges: Sequence[int], dims: int = 2) -> torch.Tensor:
    """The class of each mask: 0 if nothing is marked, else 1 + the number of ``edges`` that its area reaches.

    The area is the number of pixels that any of the K channels marks.

    Args:
        masks: (..., K, *spatial) of 0 and 1, of any dtype.
        edges: ascending areas in pixels: with 16 and 32, class 1 is 1 to 15 pixels, class 2 is 16 to 31, class 3 more.
        dims: how many spatial dimensions.

    Returns:
        int64 (...).
    """
    area = (masks != 0).any(dim=-dims - 1).flatten(-dims).sum(-1)
    # Comparisons rather than a table: no copy from the host, which a GPU would wait for.
    found = (area > 0).long()
    for edge in edges:
        found += area >= edge
    return found


def class_bounds(edges: Sequence[int]) -> list[tuple[int, int]]:
    """Least and largest area of each class; the last one has no largest and says 2^62."""
    starts = [1, *edges]
    return [(0, 0), *((a, b - 1) for a, b in zip(starts, [*starts[1:], 2**62 + 1], strict=True))]


class _Block(nn.Module):
    """A residual block."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Float32GroupNorm(channels, 8),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            Float32GroupNorm(channels, 8),
            nn.SiLU(),
            nn.Dropout2d(dropout),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


class _Member(nn.Module):
    """One network: views in, logits out."""

    def __init__(self, inputs: int, classes: int, channels: Sequence[int], views: int, dropout: float) -> None:
        super().__init__()
        self.trunks = nn.ModuleList()
        for _ in range(views):
            layers: list[nn.Module] = [nn.Conv2d(4 * inputs, channels[0], 3, padding=1), _Block(channels[0], dropout)]
            for before, width in pairwise(channels):
                layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), _Block(width, dropout)]
            self.trunks.append(nn.Sequential(*layers))
        self.head = nn.Sequential(
            nn.Dropout(2 * dropout),
            nn.Linear(3 * channels[-1] * views, 128),
            nn.SiLU(),
            nn.Dropout(2 * dropout),
            nn.Linear(128, classes),
        )
        nn.init.zeros_(self.head[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.head[-1].bias)  # type: ignore[arg-type]

    def forward(self, views: Sequence[torch.Tensor]) -> torch.Tensor:
        found = []
        for trunk, view in zip(self.trunks, views, strict=True):
            z = trunk(F.pixel_unshuffle(view, 2)).float()
            height, width = z.shape[-2:]
            y, x = max(height // 2 - 1, 0), max(width // 2 - 1, 0)
            # What is everywhere, what is in the middle, and what is anywhere.
            found += [z.mean((2, 3)), z[:, :, y : y + 2, x : x + 2].mean((2, 3)), z.amax((2, 3))]
        weight: torch.Tensor = self.head[1].weight  # type: ignore[assignment]
        return self.head(torch.cat(found, dim=1).to(weight.dtype))


class ModePrior(nn.Module):
    """p(c | x): the probability that a mask of an image is empty, or of one of a few sizes.

    Trained by cross-entropy on the classes of *all* raters of an image. There are few images to learn this from, and
    confident errors are dear; so it is small, drops out, sees each image moved and with other intensities at every
    step, and may average several networks and the images' symmetries.

    Args:
        img_channels: C.
        edges: areas in pixels between the classes; see ``size_class``.
        channels: widths of the levels, multiples of 8; each level halves the resolution, and so does the way in.
        crop: side of the middle square that is seen at full resolution; 0: all of the image.
        context: beside it, the surroundings at half the resolution (a square of 2 ``crop``).
        dropout: of the levels; twice as much before and in the head.
        members: how many networks are trained side by side and averaged.
        symmetries: what is averaged over in eval mode: 1, 4 (mirror images) or 8 (quarter turns as well, where height
            is width).
        shift: in training, the middle is up to so many pixels off.
        jitter: in training, intensities are multiplied by 1 + u and moved by u', u and u' up to this.

    Attributes:
        config: these arguments; JSON-able.
        classes: how many, the empty one included: edges + 2.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self,
        img_channels: int = 1,
        edges: Sequence[int] = EDGES,
        *,
        channels: Sequence[int] = (32, 64, 96, 128),
        crop: int = 0,
        context: bool = False,
        dropout: float = 0.1,
        members: int = 1,
        symmetries: int = 8,
        shift: int = 0,
        jitter: float = 0.1,
    ) -> None:
        super().__init__()
        self.edges = check_edges("edges", edges)
        self.classes = len(self.edges) + 2
        self.img_channels = checks.integer("img_channels", img_channels, 1)
        widths = [checks.integer("channels", width, 8) for width in channels]
        if not widths or any(width % 8 for width in widths):
            raise ValueError(f"channels must be multiples of 8, at least one, got {list(channels)}")
        self.crop, self.shift = checks.integer("crop", crop, 0), checks.integer("shift", shift, 0)
        if self.crop % 2:
            raise ValueError(f"crop must be even, got {crop}")
        if not isinstance(context, bool):
            raise TypeError(f"context must be True or False, got {context!r}")
        if context and not crop:
            raise ValueError("context needs a crop: with crop=0 all of the image is seen anyway")
        if not 0 <= dropout < 0.5:
            raise ValueError(f"dropout must be in [0, 0.5), got {dropout}")
        if symmetries not in (1, 4, 8):
            raise ValueError(f"symmetries must be 1, 4 or 8, got {symmetries!r}")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter must be in [0, 1), got {jitter}")
        self.context, self.symmetries, self.jitter = context, symmetries, float(jitter)
        count = checks.integer("members", members, 1)
        self.config: dict[str, Any] = dict(
            img_channels=self.img_channels,
            edges=list(self.edges),
            channels=widths,
            crop=self.crop,
            context=context,
            dropout=float(dropout),
            members=count,
            symmetries=symmetries,
            shift=self.shift,
            jitter=self.jitter,
        )
        views = 2 if context else 1
        self.members = nn.ModuleList(
            _Member(self.img_channels + 1, self.classes, widths, views, dropout) for _ in range(count)
        )

    def forward(self, img: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of the classes, or with a target how far they are from it.

        Args:
            img: (N, C, H, W), scaled as the denoiser's images are.
            target: (N, classes), the share of the raters' masks in each class.

        Returns:
            (N, classes) float32: log p(c | x), up to a constant. With a target (N,): the cross-entropy in nats, the
            members' mean.

        Raises:
            ValueError: a shape that does not fit.
        """
        if img.ndim != 4 or img.shape[1] != self.img_channels:
            raise ValueError(f"img must have shape (N, {self.img_channels}, H, W), got {tuple(img.shape)}")
        if min(img.shape[2:]) < max(self.crop, 2):
            raise ValueError(f"img must be at least {max(self.crop, 2)} pixels high and wide, got {tuple(img.shape)}")
        if target is not None:
            return torch.stack([-(target * self._log_p(m, img)).sum(1) for m in self.members]).mean(0)
        if self.training:
            return torch.stack([self._log_p(m, img) for m in self.members]).mean(0)
        # All of them as one batch, which costs fewer launches and no more work.
        several = _symmetric(img, self.symmetries)
        views = self._views(torch.cat(several))
        each = [F.log_softmax(member(views).float(), dim=1).unflatten(0, (len(several), -1)) for member in self.members]
        log_p = torch.cat(each)
        return torch.logsumexp(log_p, dim=0) - math.log(len(log_p))

    def _log_p(self, member: nn.Module, img: torch.Tensor) -> torch.Tensor:
        """Of one member; in training of an image that is moved and has other intensities."""
        if not self.training:
            return F.log_softmax(member(self._views(img)).float(), dim=1)
        off = (0, 0)
        if self.shift:
            # The host's generator: nothing waits for the device.
            y, x = torch.randint(-self.shift, self.shift + 1, (2,), device="cpu").tolist()
            off = (y, x)
        if self.jitter:
            u = torch.rand(2, len(img), 1, 1, 1, device=img.device, dtype=torch.float32) * 2 - 1
            img = img * (1 + self.jitter * u[0]).to(img.dtype) + (self.jitter * u[1]).to(img.dtype)
        return F.log_softmax(member(self._views(img, off)).float(), dim=1)

    def _views(self, img: torch.Tensor, off: tuple[int, int] = (0, 0)) -> list[torch.Tensor]:
        if self.crop:
            views = [middle(img, self.crop, off)]
        else:
            height, width = (size - size % 2 for size in img.shape[-2:])
            views = [img.roll(off, (-2, -1))[..., :height, :width]]
        if self.context:
            views.append(surroundings(img, self.crop, off))
        return [torch.cat([v, center_distance(v).expand(len(v), 1, *v.shape[2:])], dim=1) for v in views]


def _symmetric(img: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The image, mirrored along both axes, and with 8 turned by 90 degrees too."""
    found = [img]
    if count > 1:
        found += [img.flip(-1), img.flip(-2), img.flip((-2, -1))]
    if count == 8 and img.shape[-1] == img.shape[-2]:
        found += [x.transpose(-2, -1) for x in found]
    return found


# ---------------------------------------------------------------------- p(c | x), in whole numbers


def class_logits(prior: ModePrior, img: torch.Tensor) -> torch.Tensor:
    """What the prior says of images (B, C, H, W): float32 (B, classes).

    On a CPU it sees one image at a time, so that no image's classes depend on the others.
    """
    training = [module for module in prior.modules() if module.training]
    dtype = next(prior.parameters()).dtype
    for module in training:
        module.training = False
    try:
        with torch.no_grad(), torch.autocast(img.device.type, enabled=False):
            x = img.to(dtype)
            return prior(x) if x.is_cuda else torch.cat([prior(x[i : i + 1]) for i in range(len(x))])
    finally:
        for module in training:
            module.training = True


def class_weights(logits: torch.Tensor, allowed: Sequence[int] | None = None) -> torch.Tensor:
    """Whole numbers in proportion to the probabilities of the classes; those not ``allowed`` have none.

    W_c = floor(2^24 E(max z - z_c)), with E(z) = exp(-z) of the draw contract: equal logits give equal weights on every
    device.

    Args:
        logits: (B, classes) float32.

    Returns:
        int64 (B, classes).
    """
    z = logits.float()
    chosen = range(z.shape[1]) if allowed is None else allowed
    columns = {c: z[:, c] for c in chosen}
    most = torch.stack(list(columns.values())).amax(0)
    none = torch.zeros_like(most, dtype=torch.int64)
    of_class = [
        (exp_negative(most - columns[c]) * LIKELIEST).long() if c in columns else none for c in range(z.shape[1])
    ]
    return torch.stack(of_class, dim=1)


def class_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """p(c | x) as classes are drawn from it: float32 (B, classes)."""
    found = class_weights(logits).double()
    return (found / found.sum(1, keepdim=True)).float()
