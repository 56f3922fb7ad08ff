# SPDX-License-Identifier: Apache-2.0
"""Size classes in sampling: which class each mask is of (``docs/draw.md``, section 11), and masks of that class.

With a mode prior a mask is drawn in two parts: its class c from p(c | x), then the mask from p(y | x, c) by a denoiser
that is told c. Masks of class 0 are empty and need no denoiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from berdiff_fast import checks, rng
from berdiff_fast.backends.reference import exp_negative
from berdiff_fast.network.prior import ModePrior, class_bounds, size_class

#: A class that is as likely as the likeliest one has this weight.
ONE = 2**24

# ---------------------------------------------------------------------- p(c | x)


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


def logits(prior: ModePrior, img: torch.Tensor) -> torch.Tensor:
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


def weights(logits: torch.Tensor, allowed: Sequence[int] | None = None) -> torch.Tensor:
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
    of_class = [(exp_negative(most - columns[c]) * ONE).long() if c in columns else none for c in range(z.shape[1])]
    return torch.stack(of_class, dim=1)


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    """p(c | x) as classes are drawn from it: float32 (B, classes)."""
    found = weights(logits).double()
    return (found / found.sum(1, keepdim=True)).float()


# ---------------------------------------------------------------------- which class


def bit_reversed(k: torch.Tensor) -> torch.Tensor:
    """The 32 bits of each k in the opposite order: 2^32 times van der Corput's sequence in base 2. int64 in and out."""
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        k = ((k >> shift) & mask) | ((k & mask) << shift)
    return k


def draw(
    weights: torch.Tensor, seeds: torch.Tensor, n: int, *, first_sample: int = 0, stratify: bool = True
) -> torch.Tensor:
    """The classes of masks ``first_sample`` to ``first_sample + n - 1`` of each image.

    Args:
        weights: int64 (B, classes), see ``weights``.
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


# ---------------------------------------------------------------------- masks of that class


class Told:
    """A denoiser that is told each mask's class. On a CPU it is asked about those only that are not empty.

    Args:
        network: of the sampler: called as ``network(y, step, images, modes)``, after ``network.images(img)``.
        modes: (rows,) int64, the class of each mask.
        of_row: (rows,) int64, which of the images it is of.
        edges: of the classes.
    """

    def __init__(self, network: Any, modes: torch.Tensor, of_row: torch.Tensor, edges: Sequence[int]) -> None:
        self.network, self.modes, self.of_row, self.edges = network, modes, of_row, edges
        #: The rows that the network is asked about, those of a class together; None: all of them, as they are. A GPU's
        #: host does not know which are empty.
        self.rows: torch.Tensor | None = None
        if modes.is_cpu:
            self.rows = modes.argsort(stable=True)[int((modes == 0).sum()) :]

    def images(self, img: torch.Tensor) -> torch.Tensor:
        """What ``__call__`` wants of images (b, C, *spatial)."""
        if self.rows is None:
            return self.network.images(img)[self.of_row]
        return self.network.images(img)[self.of_row[self.rows]] if len(self.rows) else img[:0]

    def __call__(self, y: torch.Tensor, step: int | slice, images: torch.Tensor) -> torch.Tensor:
        """Logits of all rows, at a step or at each of several in turn; of those that are not asked about, 0."""
        if self.rows is None:
            return self.network(y, step, images, self.modes)
        if not len(self.rows):
            return torch.zeros_like(y)
        rows, each = self.rows, len(self.modes)
        if isinstance(step, slice):
            rows = torch.cat([rows + i * each for i in range(step.stop - step.start)])
        asked = y[rows]
        found = self.network(asked, step, images, self.modes[self.rows])
        if not isinstance(found, torch.Tensor) or found.shape != asked.shape:
            return found  # for the sampler to refuse
        return found.new_zeros(y.shape).index_copy_(0, rows, found)

    def fit(self, masks: torch.Tensor, y: torch.Tensor, logits: torch.Tensor, prediction: str) -> torch.Tensor:
        """The last step's masks, those outside their class replaced by the likeliest mask of it.

        Args:
            masks: bool (rows, K, *spatial), as the last step left them.
            y: of the same shape, which entered that step, with its ``logits``.
            prediction: what the logits are of.
        """
        dims, edges = masks.ndim - 2, self.edges
        shape = (-1, *[1] * (masks.ndim - 1))
        masks = masks & (self.modes > 0).view(shape)
        wrong = (size_class(masks, edges, dims) != self.modes) & (self.modes > 0)
        if self.rows is None:  # and which masks those are
            mended = _likeliest(masks, y, logits, self.modes, edges, prediction)
            return torch.where(wrong.view(shape), mended, masks)
        if bool(wrong.any()):
            masks[wrong] = _likeliest(masks[wrong], y[wrong], logits[wrong], self.modes[wrong], edges, prediction)
        return masks


def _likeliest(
    masks: torch.Tensor,
    y: torch.Tensor,
    logits: torch.Tensor,
    modes: torch.Tensor,
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
        area = torch.where(modes == c, area.clamp(least, most), area)
    best = torch.zeros_like(marked).scatter_(1, z.argmax(1, keepdim=True), True)
    chosen = torch.where(marked.any(1, keepdim=True), marked, best)
    return (chosen & (rank < area[:, None])[:, None]).view(masks.shape)
