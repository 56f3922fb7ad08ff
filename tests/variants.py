# SPDX-License-Identifier: Apache-2.0
"""Every way in which a kernel can run on this machine, to be compared with the reference on the CPU."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from berdiff_fast.backends import select


@dataclass(frozen=True)
class Variant:
    name: str
    backend: str
    device: str = "cpu"
    isa: str | None = None
    way: str | None = None  # to run a grid of CUDA on the CPU

    def use(self) -> AbstractContextManager[None]:
        if self.way is not None:
            import emulated_cuda

            return emulated_cuda.run_grids(self.way)
        if self.isa is None:
            return nullcontext()
        from berdiff_fast.backends import cpp

        return cpp.use_isa(self.isa)

    @property
    def is_interpreted(self) -> bool:
        return self.backend == "triton" and self.device == "cpu"

    @property
    def is_emulated(self) -> bool:
        return self.way is not None or (self.isa == "avx512" and "BERDIFF_FAST_TEST_CPU_MODULE" in os.environ)


def _find() -> list[Variant]:
    found = []
    if select.can_run("cpp", "cpu"):
        from berdiff_fast.backends import cpp

        found += [Variant(isa, "cpp", isa=isa) for isa in cpp.available_isas()]
    if torch.cuda.is_available():
        found += [Variant(b, b, "cuda") for b in ("cuda", "triton") if select.can_run(b, "cuda")]
        found.append(Variant("reference on the GPU", "reference", "cuda"))
    elif select.can_run("triton", "cpu"):
        found.append(Variant("triton interpreter", "triton"))
    if "BERDIFF_FAST_TEST_CUDA_MODULE" in os.environ:
        from emulated_cuda import WAYS

        found += [Variant(f"cuda {way}", "cuda", way=way) for way in WAYS]
    only = os.environ.get("BERDIFF_FAST_TEST_VARIANTS")
    return [v for v in found if only is None or v.name in only.split(",")]


VARIANTS = _find()
COMPILED = [v for v in VARIANTS if not v.is_interpreted]
