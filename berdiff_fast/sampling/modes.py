# SPDX-License-Identifier: Apache-2.0
"""Size classes in sampling: which class each mask is of (``docs/draw.md``, section 11), and masks of that class.

With a mode prior (``network/prior.py``) a mask is drawn in two parts: its class c from p(c | x), then the mask from
p(y | x, c) by a denoiser that is told c. Masks of class 0 are empty and need no denoiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from berdiff_fast import checks, rng
from berdiff_fast.network.prior import ModePrior, class_bounds, class_logits, class_weights, size_class
from berdiff_fast.sampling import arguments
from berdiff_fast.sampling.denoisers import CapturedDenoiser
from berdiff_fast.sampling.loop import Trajectory

# ---------------------------------------------------------------------- which class


def allowed_classes(modes: Any, classes: int) -> tuple[int, ...]:
    """The classes that ``modes`` of ``sample`` names, ascending.

    Args:
        modes: a class, several of them, "empty", "non-empty", or None for all.
        classes: how many there are.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    words = {"empty": (0,), "non-empty": tuple(range(1, classes))}
    if modes is None:
        return tuple(range(classes))
    if isinstance(modes, str):
        if modes not in words:
            raise ValueError(f"modes must be classes, 'empty' or 'non-empty', got {modes!r}")
        return words[modes]
    if not isinstance(modes, (list, tuple, set, frozenset, range)):
        modes = [modes]
    found = tuple(sorted({checks.integer("modes", mode) for mode in modes}))
    if not found or found[0] < 0 or found[-1] >= classes:
        raise ValueError(f"modes must be one or more classes from 0 to {classes - 1}, got {list(modes)}")
    return found


def bit_reversed(k: torch.Tensor) -> torch.Tensor:
    """The 32 bits of each k in the opposite order: 2^32 times van der Corput's sequence in base 2. int64 in and out."""
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        k = ((k >> shift) & mask) | ((k & mask) << shift)
    return k


def draw_classes(
    weights: torch.Tensor, seeds: torch.Tensor, n: int, *, first_sample: int = 0, stratify: bool = True
) -> torch.Tensor:
    """The classes of masks ``first_sample`` to ``first_sample + n - 1`` of each image.

    Args:
        weights: int64 (B, classes), see ``network.prior.class_weights``.
        seeds: int64 (B,).
        n: masks per image.
        first_sample: index of the first one.
        stratify: spread the masks of an image evenly over p; else each is drawn by itself.

    Returns:
        int64 (B, n).
    """
    images, classes = weights.shape
    k = torch.arange(first_sample, first_sample + n, device=weights.device)
    if stratify:
        offset = rng.words(seeds, 1, stream=rng.STREAM_MODES)
        v = (offset + bit_reversed(k)) & 0xFFFFFFFF
    else:
        of_row = seeds.repeat_interleave(n)
        v = rng.words(of_row, 1, sample=k.repeat(images), tag=1, stream=rng.STREAM_MODES).view(images, n)
    # The class at which the cumulated share passes v / 2^32, without a division.
    up_to = [weights[:, 0]]
    for c in range(1, classes):
        up_to.append(up_to[-1] + weights[:, c])
    passed = v * up_to[-1][:, None]
    return torch.stack([(end << 32)[:, None] <= passed for end in up_to[:-1]]).sum(0)


@dataclass(frozen=True)
class ClassDraw:
    """Of a model with a mode prior: which size classes are drawn, and how."""

    prior: ModePrior
    allowed: tuple[int, ...]
    stratify: bool

    @classmethod
    def of(cls, model: Any, wanted: Any, stratify: Any) -> ClassDraw | None:
        """From ``modes`` and ``stratify`` of ``sample``; None for a model without a mode prior."""
        if not isinstance(stratify, bool):
            raise TypeError(f"stratify must be True or False, got {stratify!r}")
        prior = arguments.carried(model, "mode_prior")
        if prior is not None:
            return cls(prior, allowed_classes(wanted, prior.classes), stratify)
        if wanted is not None:
            raise ValueError(f"modes needs a model with a mode prior, got modes={wanted!r}")
        return None

    def draw(
        self, img: torch.Tensor, seeds: torch.Tensor, n: int, first_sample: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The class of each mask, (B, n), and whether the prior's logits are finite, one bool on the device."""
        logits = class_logits(self.prior, img)
        finite = torch.isfinite(logits).all()
        if not finite.is_cuda and not bool(finite):
            raise FloatingPointError("the mode prior returned NaN or infinite logits")
        weights = class_weights(logits, self.allowed)
        return draw_classes(weights, seeds, n, first_sample=first_sample, stratify=self.stratify), finite


# ---------------------------------------------------------------------- masks of that class


class ClassDenoiser:
    """Asks a denoiser for masks of given classes. On a CPU it asks about those only that are not empty.

    Args:
        denoiser: one that is told classes.
        classes: (rows,) int64, of each mask.
        image_of_row: (rows,) int64, which of the images it is of.
        edges: areas at which size classes begin.
    """

    def __init__(
        self, denoiser: CapturedDenoiser, classes: torch.Tensor, image_of_row: torch.Tensor, edges: Sequence[int]
    ) -> None:
        self.denoiser, self.classes, self.edges = denoiser, classes, edges
        self.image_of_row = image_of_row
        #: The rows that the denoiser is asked about, those of a class together; None: all of them, as they are. A
        #: GPU's host does not know which are empty.
        self.rows: torch.Tensor | None = None
        if classes.is_cpu:
            self.rows = classes.argsort(stable=True)[int((classes == 0).sum()) :]

    def condition(self, img: torch.Tensor, rows: int | torch.Tensor | None = None) -> torch.Tensor:
        """As of ``Denoiser``, for the masks that it is asked about; their images are known already."""
        if self.rows is None:
            return self.denoiser.condition(img, self.image_of_row)
        return self.denoiser.condition(img, self.image_of_row[self.rows]) if len(self.rows) else img[:0]

    def __call__(self, y: torch.Tensor, step: int | slice, condition: torch.Tensor) -> torch.Tensor:
        """Logits of all rows, at a step or at each of several in turn; 0 for those that are not asked about."""
        if self.rows is None:
            return self.denoiser(y, step, condition, self.classes)
        if not len(self.rows):
            return torch.zeros_like(y)
        rows, each = self.rows, len(self.classes)
        if isinstance(step, slice):
            rows = torch.cat([rows + i * each for i in range(step.stop - step.start)])
        asked = y[rows]
        found = self.denoiser(asked, step, condition, self.classes[self.rows])
        if not isinstance(found, torch.Tensor) or found.shape != asked.shape:
            return found  # for the loop to refuse
        return found.new_zeros(y.shape).index_copy_(0, rows, found)

    def fit(self, end: Trajectory) -> Trajectory:
        """Its masks, those outside their class replaced by the likeliest of it. Empty ones have a probability of 0."""
        masks, classes = end.masks, self.classes
        shape = (-1, *[1] * (masks.ndim - 1))
        something = (classes > 0).view(shape)
        masks = masks & something
        wrong = (size_class(masks, self.edges, masks.ndim - 2) != classes) & (classes > 0)
        if self.rows is None:  # and which masks those are
            mended = _likeliest(masks, end.state, end.logits, classes, self.edges, end.prediction)
            masks = torch.where(wrong.view(shape), mended, masks)
        elif bool(wrong.any()):
            masks[wrong] = _likeliest(
                masks[wrong], end.state[wrong], end.logits[wrong], classes[wrong], self.edges, end.prediction
            )
        probability = end.probability
        if probability is not None:
            probability = torch.where(something, probability, 0.0)
        return replace(end, masks=masks, probability=probability)


def _likeliest(
    masks: torch.Tensor,
    y: torch.Tensor,
    logits: torch.Tensor,
    classes: torch.Tensor,
    edges: Sequence[int],
    prediction: str,
) -> torch.Tensor:
    """The likeliest masks whose areas are as near to those of ``masks`` as their class allows.

    The bits of the last step are independent given its logits. Among masks of a given area the likeliest one takes the
    pixels that gain most by being marked: by z, the logit of P(y_0 = 1), for one channel.
    """
    z = logits.float()
    if prediction == "epsilon":
        z = torch.where(y != 0, -z, z)
    z = z.flatten(2)
    marked = z > 0
    # For several channels: of those that a pixel would be marked in, or of the one that it would be, if in any.
    gain = torch.where(marked.any(1), z.clamp(min=0).sum(1), z.amax(1))
    order = gain.sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=z.device).expand_as(order))
    area = masks.flatten(2).any(1).sum(1)
    for c, (least, most) in enumerate(class_bounds(edges)):
        area = torch.where(classes == c, area.clamp(least, most), area)
    best = torch.zeros_like(marked).scatter_(1, z.argmax(1, keepdim=True), True)
    chosen = torch.where(marked.any(1, keepdim=True), marked, best)
    return (chosen & (rank < area[:, None])[:, None]).view(masks.shape)
