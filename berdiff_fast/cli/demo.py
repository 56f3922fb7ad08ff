# SPDX-License-Identifier: Apache-2.0
"""``berdiff-fast demo``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar, Literal

from berdiff_fast.choices import Backend
from berdiff_fast.cli.base import Command, Flag, Masks
from berdiff_fast.words import shown


@dataclass(frozen=True)
class Demo(Command):
    """Draw masks for a few CT slices with the bundled model and write one PNG.

    example: berdiff-fast demo --output demo.png --seed 7

    Args:
        output: the picture
        data: HDF5 file of slices with raters' masks; none: CT that comes along
        phantoms: procedural slices instead of CT
        slice_count: how many slices
        n: masks per slice
        steps: sampling steps
        seed: seed of the masks
        backend: kernels that draw the masks
        json: print one JSON object
    """

    FORMER: ClassVar = {"--slices": "--slice-count"}

    output: str = "demo.png"
    data: str | None = None
    phantoms: Flag = False
    slice_count: int = 3
    n: Masks = 16
    steps: int = 10
    seed: int = 7
    backend: Literal["auto"] | Backend = "auto"
    json: Flag = False

    def run(self) -> int:
        from berdiff_fast import demo

        result = demo.run(
            self.output,
            data=self.data,
            phantoms=self.phantoms,
            slices=self.slice_count,
            n=self.n,
            steps=self.steps,
            seed=self.seed,
            backend=self.backend,
        )
        if self.json:
            numbers = ("seconds", "network_seconds", "step_seconds", "backend", "ged", "majority_ged")
            print(json.dumps({**{name: getattr(result, name) for name in numbers}, "picture": str(result.picture)}))
            return 0
        drawn, size = self.slice_count * self.n, " x ".join(map(str, result.masks.shape[-2:]))
        print(f"{drawn} masks ({self.n} for each of {self.slice_count} slices of {size}) in {self.steps} steps")
        print(f"  whole call    {result.seconds:8.2f} s")
        print(f"  network       {result.network_seconds:8.2f} s  ({result.network_seconds / result.seconds:.1%})")
        print(f"  step kernel   {result.step_seconds:8.4f} s  ({result.step_seconds / result.seconds:.2%})")
        print(f"  backend       {result.backend}")
        print(f"  GED           {result.ged:8.3f}    (the raters' majority instead: {result.majority_ged:.3f})")
        print(f"picture: {shown(str(result.picture))}")
        return 0
