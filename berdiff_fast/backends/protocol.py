# SPDX-License-Identifier: Apache-2.0
"""What a backend is: one function per op, of the op's name, that fills tensors which ``berdiff_fast.ops`` has made.

Tensors are contiguous, on one device, and of types and shapes that the op has checked. No output is empty. Masks are
(N, K, *spatial). Outputs come first; a backend writes into them, and into ``nan_flag``, and into nothing else.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch


class Rows(NamedTuple):
    """Which masks the rows of a call are, as ``Rows`` in csrc/include/berdiff/arguments.h; see ``berdiff_fast.ops``."""

    seeds: torch.Tensor  # (B,) int64, or (B, 2): the seed and the first sample of each image
    samples_per_image: int
    first_row: int
    first_sample: int


class Backend(Protocol):
    """The ops that every backend has."""

    def initial_noise(self, out: torch.Tensor, rows: Rows, /) -> None:
        """Fill ``out``, masks of any type, with fair coin tosses."""

    def q_sample(
        self, out: torch.Tensor, y_0: torch.Tensor, t: torch.Tensor, flip: torch.Tensor, rows: Rows, /
    ) -> None:
        """Flip bits of ``y_0``: in mask i, at timestep t[i], a 0 with probability flip[i, 0] and a 1 with flip[i, 1].

        ``t`` is (N,) int64, ``flip`` (N, 2) float32.
        """

    def sample_step(
        self,
        out: torch.Tensor,
        y_t: torch.Tensor,
        logits: torch.Tensor,
        coefficients: torch.Tensor,
        nan_flag: torch.Tensor,
        timestep: int,
        predicts_y0: bool,
        threshold: bool,
        rows: Rows,
        /,
    ) -> None:
        """Flip bits of ``y_t`` by the rule of ``coefficients`` or, with ``threshold``, where epsilon's logit is > 0.

        ``coefficients`` are P, Q, R, S in float32; ``nan_flag``, (1,) int32, is set to 1 where a logit is NaN.
        """

    def posterior(
        self,
        out: torch.Tensor,
        y_t: torch.Tensor,
        logits: torch.Tensor,
        coefficients: torch.Tensor,
        predicts_y0: bool,
        /,
    ) -> None:
        """Fill ``out``, float32, with the probability that ``sample_step`` draws a one."""

    def diffusion_loss(
        self,
        value: torch.Tensor,
        gradient: torch.Tensor,
        logits: torch.Tensor,
        y_t: torch.Tensor,
        y_0: torch.Tensor,
        columns: torch.Tensor,
        ignore: torch.Tensor | None,
        kept: torch.Tensor | None,
        predicts_y0: bool,
        /,
    ) -> None:
        """Fill ``value`` (N,) and ``gradient``, of the shape of ``logits``.

        ``columns`` (N, len(LOSS_COLUMNS)) float64 has a row of the loss table for each mask, ``kept`` (N,) int64 the
        pixels that ``ignore`` leaves; both of these are None, or neither is.
        """

    def overlap(self, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, /) -> None:
        """Add to ``out``, (N, R + n, R + n) int64 zeros, what masks a (N, R, *shape) and b (N, n, *shape) share.

        R or n may be 0.
        """


class HasGroupNorm(Protocol):
    """A backend that has the op ``group_norm_silu``; ``select.LACKING`` names those that have not."""

    def group_norm_silu(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        other: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor,
        groups: int,
        eps: float,
        silu: bool,
        /,
    ) -> None:
        """Fill ``out`` (N, C + C', *spatial) from ``x`` (N, C, *spatial) and ``other`` (N, C', *spatial).

        In memory the channels of all three are last, and nothing lies between pixels.
        """


class HasWinograd(Protocol):
    """A backend that has the op ``winograd``; ``select.LACKING`` names those that have not."""

    def winograd(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        residual: torch.Tensor | None,
        upsample: bool,
        /,
    ) -> None:
        """Fill ``out`` (N, O, H', W') from ``x`` (N, C, H, W) and ``weight`` (36, panels, C, 64); add ``residual``.

        In memory the channels of images are last, and nothing lies between pixels.
        """
