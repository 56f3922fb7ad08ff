# SPDX-License-Identifier: Apache-2.0
"""How an op is registered with torch, and how its public function calls it.

The dispatcher costs several times what a small kernel does. Where nobody would see the difference, an eager call on
plain tensors therefore goes straight to the function that is registered; all others go by way of ``torch.ops``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.compiler import is_compiling
from torch.jit import is_tracing

try:
    # All that is used of torch's private names; tests/test_torch_citizens.py tries them.
    from torch._C import _len_torch_dispatch_stack as dispatch_modes
    from torch._C._functorch import peek_interpreter_stack as innermost_transform
    from torch.autograd import _profiler_enabled as is_profiled
except ImportError:  # a torch that has other names: every call goes to the dispatcher

    def is_watched() -> bool:
        return True

else:

    def is_watched() -> bool:
        """Whether a dispatch mode, a transform (vmap, grad), the profiler or a tracer is to see what ops run."""
        return bool(dispatch_modes()) or innermost_transform() is not None or is_profiled() or is_tracing()


KERNELS: dict[str, Callable[..., Any]] = {}
library = torch.library.Library("berdiff_fast", "DEF")


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an op.

    Args:
        schema: as torch writes them; what is written into is marked, ``Tensor(a!)``.
        kernel: takes the schema's arguments in their order, on the CPU and on a GPU.
        fake: takes the same, checks them and makes the output that the kernel fills. This is all that FakeTensor, meta
            tensors and ``torch.compile`` need to know.
    """
    name = schema.split("(")[0]
    KERNELS[name] = kernel
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        library.impl(name, kernel, device)
    torch.library.register_fake(f"berdiff_fast::{name}", fake, lib=library)


def entry(name: str, names: Sequence[str], *tensors: torch.Tensor) -> Callable[..., torch.Tensor]:
    """What to call for an op: the registered function or, where somebody has to see it, the op of ``torch.ops``.

    The latter serves compilers, whoever watches, subclasses, meta tensors and views with a pending negation.

    Args:
        name: the op's.
        names: of the tensors that it is called with.
        tensors: in the same order.

    Raises:
        TypeError: one of them is no tensor.
    """
    if is_compiling():
        return getattr(torch.ops.berdiff_fast, name)
    plain = not is_watched()
    for tensor in tensors:
        if type(tensor) is not torch.Tensor:
            if not isinstance(tensor, torch.Tensor):
                argument = next(n for n, t in zip(names, tensors, strict=False) if not isinstance(t, torch.Tensor))
                raise TypeError(f"{argument} must be a torch.Tensor, got {type(tensor).__name__}")
            plain = False
        elif tensor.is_neg():
            plain = False
    return KERNELS[name] if plain and not tensors[0].is_meta else getattr(torch.ops.berdiff_fast, name)
