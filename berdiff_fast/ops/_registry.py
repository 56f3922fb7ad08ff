# SPDX-License-Identifier: Apache-2.0
"""How an op is registered with torch, and how its public function calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

KERNELS: dict[str, Callable[..., Any]] = {}
library = torch.library.Library("berdiff_fast", "DEF")
_DEVICES = ("CPU", "CUDA")


def register(schema: str, kernel, fake) -> None:
    name = schema.split("(")[0]
    KERNELS[name] = kernel
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in _DEVICES:
        library.impl(name, kernel, device)
    torch.library.register_fake(f"berdiff_fast::{name}", fake, lib=library)


def entry(name: str, first: torch.Tensor, **tensors: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The registered op, or the function behind it where nobody would see the difference.

    The dispatcher costs several times what a small kernel does. It is needed by compilers, tracers, transforms,
    subclasses, views with a pending negation and the profiler; an eager call on plain tensors goes without it.
    """
    if torch.compiler.is_compiling():
        return getattr(torch.ops.berdiff_fast, name)
    plain = not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd._profiler_enabled()
        or getattr(first, "is_meta", False)
    )
    for argument, tensor in tensors.items():
        if type(tensor) is not torch.Tensor:
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{argument} must be a torch.Tensor, got {type(tensor).__name__}")
            plain = False
        elif tensor.is_neg():
            plain = False
    return KERNELS[name] if plain else getattr(torch.ops.berdiff_fast, name)
