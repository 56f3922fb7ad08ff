# SPDX-License-Identifier: Apache-2.0
"""How many pixels masks share: exact integers on every backend."""

from __future__ import annotations

import torch

from berdiff_fast.backends import select
from berdiff_fast.ops._checks import check_devices, check_mask, check_memory
from berdiff_fast.ops._registry import entry, register


def overlap(a: torch.Tensor, b: torch.Tensor | None = None, *, backend: str = "auto") -> torch.Tensor:
    """How many pixels any two masks of an image share: all that GED, HM-IoU and their like need to know of the masks.

    The masks of an image are those of ``a`` and after them those of ``b``, each read once. Row and column R + j of the
    result belong to mask j of ``b``; the diagonal has the areas. Exact integers; not differentiable.

    Args:
        a: (N, R, *shape) masks of N images.
        b: (N, n, *shape) masks of the same images, perhaps of another dtype; none by default.
        backend: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        (N, R + n, R + n) int64, symmetric.

    Raises:
        ValueError, TypeError, BackendUnavailableError: naming the argument.
    """
    if b is None:
        return entry("overlap", ("a",), a)(a, None, backend)
    return entry("overlap", ("a", "b"), a, b)(a, b, backend)


def _overlap_output(a: torch.Tensor, b: torch.Tensor | None, backend: str) -> torch.Tensor:
    check_mask("a", a)
    images, masks, *shape = a.shape if a.ndim > 2 else (0, 0)
    if not shape:
        raise ValueError(f"a must be (N, R, *shape), got shape {tuple(a.shape)}")
    if b is not None:
        check_mask("b", b)
        images_of_b, masks_of_b, *shape_of_b = b.shape if b.ndim > 2 else (0, 0)
        if images_of_b != images or shape_of_b != shape:
            raise ValueError(f"b must be (N, n, *shape) with N and shape of a, {tuple(a.shape)}, got {tuple(b.shape)}")
        if not (a.is_cpu and b.is_cpu):
            check_devices(a, b=b)
        masks += masks_of_b
    # Zero, because kernels add what they find in their part of the pixels.
    return torch.zeros((images, masks, masks), dtype=torch.int64, device=a.device)


def _overlap(*arguments):
    out = _overlap_output(*arguments)
    a, b, backend = arguments
    check_memory("a", a)
    check_memory("b", b)
    kernels = select.get(backend, "cpu" if a.is_cpu else a.device.type)
    if out.numel():
        kernels.overlap(out, a.contiguous(), a[:, :0] if b is None else b.contiguous())
    return out


register("overlap(Tensor a, Tensor? b, str backend) -> Tensor", _overlap, _overlap_output)
