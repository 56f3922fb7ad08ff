# SPDX-License-Identifier: Apache-2.0
"""Calls into a compiled module: tensors become pointers, sizes and type numbers (csrc/bindings/ops.h)."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import torch

from berdiff_fast.backends.protocol import Rows

#: Numbered as ``berdiff::Type`` in csrc/include/berdiff/arguments.h.
TYPES = {torch.bool: 0, torch.uint8: 0, torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}

#: No system gives out addresses below: what is there is a place in a storage that has been freed.
NOWHERE = 2**16 - 1


def address(name: str, tensor: torch.Tensor) -> int:
    """Of a tensor's first element.

    Raises:
        ValueError: it has no memory.
    """
    return p if (p := tensor.data_ptr()) > NOWHERE else no_memory(name)


def no_memory(name: str, tensor: torch.Tensor | None = None) -> int:
    """Raise where a kernel would get an address that is none; an empty ``tensor`` may have such.

    Raises:
        ValueError: naming the argument: zeros that are nowhere, a functional tensor, a storage that was freed.
    """
    if tensor is not None and not tensor.numel():
        return 0
    raise ValueError(
        f"{name} has no memory (a zero tensor, a functional one, or a storage that was freed); clone it first"
    )


class NativeBackend:
    """The ops of one compiled module.

    Args:
        module: ``berdiff_fast._cpu`` or ``berdiff_fast._cuda``.
        context: called with an op's output, returns what the module wants last: a number of threads or a stream.
    """

    def __init__(self, module: ModuleType, context: Callable[[torch.Tensor], int]) -> None:
        self.module = module
        self._context = context

    def initial_noise(self, out: torch.Tensor, rows: Rows) -> None:
        seeds, samples_per_image, first_row, first_sample = rows
        count = out.shape[0]
        self.module.initial_noise(
            out.data_ptr(),
            TYPES[out.dtype],
            p if (p := seeds.data_ptr()) > NOWHERE else no_memory("seeds"),
            seeds.ndim,  # columns: a seed, or a seed and a first sample
            count,
            out.numel() // count,
            samples_per_image,
            first_row,
            first_sample,
            self._context(out),
        )

    def q_sample(
        self,
        out: torch.Tensor,
        y_0: torch.Tensor,
        t: torch.Tensor,
        flip: torch.Tensor,
        rows: Rows,
    ) -> None:
        seeds, samples_per_image, first_row, first_sample = rows
        count = out.shape[0]
        self.module.q_sample(
            out.data_ptr(),
            TYPES[out.dtype],
            p if (p := y_0.data_ptr()) > NOWHERE else no_memory("y_0"),
            TYPES[y_0.dtype],
            p if (p := t.data_ptr()) > NOWHERE else no_memory("t"),
            p if (p := flip.data_ptr()) > NOWHERE else no_memory("flip"),
            p if (p := seeds.data_ptr()) > NOWHERE else no_memory("seeds"),
            seeds.ndim,  # columns: a seed, or a seed and a first sample
            count,
            out.numel() // count,
            samples_per_image,
            first_row,
            first_sample,
            self._context(out),
        )

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
    ) -> None:
        seeds, samples_per_image, first_row, first_sample = rows
        count = out.shape[0]
        self.module.sample_step(
            out.data_ptr(),
            TYPES[out.dtype],
            p if (p := y_t.data_ptr()) > NOWHERE else no_memory("y_t"),
            TYPES[y_t.dtype],
            p if (p := logits.data_ptr()) > NOWHERE else no_memory("logits"),
            TYPES[logits.dtype],
            p if (p := coefficients.data_ptr()) > NOWHERE else no_memory("coefficients"),
            p if (p := nan_flag.data_ptr()) > NOWHERE else no_memory("nan_flag"),
            timestep,
            predicts_y0,
            threshold,
            p if (p := seeds.data_ptr()) > NOWHERE else no_memory("seeds"),
            seeds.ndim,  # columns: a seed, or a seed and a first sample
            count,
            out.numel() // count,
            samples_per_image,
            first_row,
            first_sample,
            self._context(out),
        )

    def posterior(
        self,
        out: torch.Tensor,
        y_t: torch.Tensor,
        logits: torch.Tensor,
        coefficients: torch.Tensor,
        predicts_y0: bool,
    ) -> None:
        self.module.posterior(
            out.data_ptr(),
            p if (p := y_t.data_ptr()) > NOWHERE else no_memory("y_t"),
            TYPES[y_t.dtype],
            p if (p := logits.data_ptr()) > NOWHERE else no_memory("logits"),
            TYPES[logits.dtype],
            p if (p := coefficients.data_ptr()) > NOWHERE else no_memory("coefficients"),
            predicts_y0,
            out.numel(),
            self._context(out),
        )

    def overlap(self, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        images, masks = a.shape[:2]
        self.module.overlap(
            out.data_ptr(),
            p if (p := a.data_ptr()) > NOWHERE else no_memory("a", a),
            TYPES[a.dtype],
            masks,
            p if (p := b.data_ptr()) > NOWHERE else no_memory("b", b),
            TYPES[b.dtype],
            b.shape[1],
            images,
            math.prod(a.shape[2:]),
            self._context(out),
        )

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
    ) -> None:
        count = value.shape[0]
        pixels = gradient.numel() // count
        partial = columns.new_empty(count * -(-pixels // self.module.loss_tile))
        self.module.diffusion_loss(
            value.data_ptr(),
            gradient.data_ptr(),
            TYPES[gradient.dtype],
            partial.data_ptr(),
            p if (p := logits.data_ptr()) > NOWHERE else no_memory("logits"),
            TYPES[logits.dtype],
            p if (p := y_t.data_ptr()) > NOWHERE else no_memory("y_t"),
            TYPES[y_t.dtype],
            p if (p := y_0.data_ptr()) > NOWHERE else no_memory("y_0"),
            TYPES[y_0.dtype],
            0 if ignore is None else address("ignore", ignore),
            0 if ignore is None else TYPES[ignore.dtype],
            p if (p := columns.data_ptr()) > NOWHERE else no_memory("t"),
            0 if kept is None else kept.data_ptr(),
            predicts_y0,
            count,
            pixels,
            self._context(value),
        )
