# SPDX-License-Identifier: Apache-2.0
"""Sharing the masks of a call out over calls of the network.

The draws of a mask depend on its own number alone, so masks may be parted anywhere: only memory and speed ask for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from berdiff_fast.network import graph

logger = logging.getLogger("berdiff_fast")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Chunk:
    """Masks that go through the network together.

    Row r is mask ``first_sample + (first_row + r) % n`` of image ``(first_row + r) // n``.
    """

    img: torch.Tensor  # (b, C, *spatial)
    seeds: torch.Tensor  # (b,) int64; or (b, 2) with the first sample of each
    rows: int
    n: int  # masks per image
    mask_channels: int  # K
    first_sample: int = 0
    first_row: int = 0
    whole: bool = True  # rows are n masks of each image in turn, from the first one on
    classes: torch.Tensor | None = None  # (rows,) int64, the size class of each mask, for a model with a mode prior

    @property
    def mask_shape(self) -> tuple[int, ...]:
        return (self.mask_channels, *self.img.shape[2:])

    @property
    def numbering(self) -> dict[str, Any]:
        """Which mask a row is, as ops are told it."""
        return dict(samples_per_image=self.n, first_row=self.first_row, first_sample=self.first_sample)

    @property
    def images_of_rows(self) -> int | torch.Tensor:
        """How many rows each image has, or the image of each row."""
        return self.n if self.whole else self.image_of_row()

    def image_of_row(self) -> torch.Tensor:
        """int64 (rows,)."""
        return torch.arange(self.first_row, self.first_row + self.rows, device=self.img.device) // self.n

    @property
    def key(self) -> tuple[Any, ...]:
        """Chunks of images of one shape with the same key are the same work, on other samples."""
        return self.rows, self.n


@dataclass(frozen=True)
class Masks:
    """All masks of a call, B x n of them, image by image."""

    img: torch.Tensor  # (B, C, *spatial) in the dtype computed in, on the device
    seeds: torch.Tensor  # (B,) int64 on the device
    n: int  # masks per image
    mask_channels: int  # K
    first_sample: int = 0
    classes: torch.Tensor | None = None  # (B, n) int64, for a model with a mode prior

    @property
    def rows(self) -> int:
        return len(self.img) * self.n

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.img), self.n, self.mask_channels, *self.img.shape[2:])

    def chunk(self, first: int, last: int) -> Chunk:
        """Those from ``first`` to ``last`` - 1."""
        n = self.n
        low, high = first // n, (last - 1) // n + 1
        found = Chunk(
            self.img[low:high],
            self.seeds[low:high],
            last - first,
            n,
            self.mask_channels,
            self.first_sample,
            classes=None if self.classes is None else self.classes.flatten()[first:last],
        )
        if high - low == 1:  # told as all masks of a batch of its own: equal work has equal names
            return replace(found, n=last - first, first_sample=self.first_sample + first % n)
        if first % n == 0 and last % n == 0:
            return found
        return replace(found, first_row=first % n, whole=False)


def max_batch(img: torch.Tensor) -> int:
    """Masks per call of the network unless told: on a CPU 2^18 pixels; see docs/performance.md."""
    return 2**62 if img.is_cuda else max(1, 2**18 // img[0, 0].numel())


def in_chunks(
    masks: Masks,
    work: Callable[[Chunk, int, Callable[[int], object]], Result],
    *,
    size: int,
    window: int,
    advance: Callable[[int], object],
    free_memory: Callable[[], None],
) -> list[Result]:
    """The results of ``work`` on all masks, in order. Where a GPU's memory does not suffice, chunks are halved.

    Args:
        masks: all of a call.
        work: ``work(chunk, window, advance)``.
        size: masks per call of the network; each may be there at several steps.
        window: how many steps of a mask go through the network together.
        advance: is told how many steps of masks were done; less than 0 for those that have to be done again.
        free_memory: gives back what is kept for later calls.
    """
    results: list[Result] = []
    first, size = 0, min(size, masks.rows * window)
    while first < masks.rows:
        last = min(first + max(1, size // window), masks.rows)
        called = min(size, (last - first) * window)
        done = 0

        def count(mask_steps: int) -> None:
            nonlocal done
            done += mask_steps
            advance(mask_steps)

        try:
            results.append(work(masks.chunk(first, last), min(window, size), count))
        except RuntimeError as error:  # torch.OutOfMemoryError is one, and so are the libraries' own
            if called == 1 or not graph.is_out_of_memory(error):
                raise
            size = (called + 1) // 2
        else:
            first = last
            continue
        # Out of the handler, so that nothing of the failed attempt is kept alive. What it drew is drawn again.
        logger.warning("out of memory with %d masks a call; going on with %d", called, size)
        advance(-done)
        free_memory()
    return results
