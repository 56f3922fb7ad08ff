# SPDX-License-Identifier: Apache-2.0
"""``berdiff-fast evaluate``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import arg

from berdiff_fast.choices import Method, Spacing
from berdiff_fast.cli.base import Command, Flag, Packages


@dataclass(frozen=True)
class Evaluate(Command):
    """Compare a model's masks with the raters' on an HDF5 file, beside simple yardsticks.

    examples:
      berdiff-fast evaluate --model lidc --data val.h5 --output results --slice-count 200
      accelerate launch -m berdiff_fast.cli evaluate ...   several GPUs

    Args:
        model: a bundled model, a directory or a .safetensors file
        data: HDF5 file of slices with raters' masks
        output: folder for the table, the summary and the picture
        slice_count: how many slices, drawn by the seed; none: all
        n: masks per slice
        steps: sampling steps
        method: sampler
        leave_one_out: the leave-one-out shift of the logits
        spacing: which timesteps are visited; none: as the model says
        seed: fixes the masks and the choice of slices
        batch: slices at a time
        table: format of the table
        save_masks: keep all masks in masks.h5
        allow_imports: packages whose code a model may run, if its network is a class of somebody's own
        device: auto (a GPU if there is one) or cpu
        json: print the summary as JSON
    """

    FORMER: ClassVar = {"--slices": "--slice-count"}

    model: str
    data: str
    output: str
    slice_count: int | None = None
    # Under torchrun --n is ambiguous: its own options are matched by their beginnings.
    n: Annotated[int, arg(aliases=("-n", "--samples"))] = 16
    steps: int = 10
    method: Method = "ddim"
    leave_one_out: Flag = False
    spacing: Spacing | None = None
    seed: int = 0
    batch: int = 8
    table: Literal["csv", "parquet"] = "csv"
    save_masks: Flag = False
    allow_imports: Packages = ()
    device: Literal["auto", "cpu"] = "auto"
    json: Flag = False

    def run(self) -> int:
        from berdiff_fast import training

        training.require()
        from accelerate import PartialState

        from berdiff_fast.data.hdf5 import RaterDataset
        from berdiff_fast.loading import load
        from berdiff_fast.training import evaluate

        state = PartialState(cpu=training.on_cpu(self.device))
        model = load(self.model, allow_imports=self.allow_imports).to(state.device)
        summary = evaluate.evaluate(
            model,
            RaterDataset(self.data, spatial_dims=model.spatial_dims),
            self.output,
            count=self.slice_count,
            n=self.n,
            steps=self.steps,
            method=self.method,
            leave_one_out=self.leave_one_out,
            spacing=self.spacing or model.spacing,
            seed=self.seed,
            batch=self.batch,
            table=self.table,
            save_masks=self.save_masks,
            name=Path(self.model).name,  # without folders
        )
        if state.is_main_process:
            print(json.dumps(summary) if self.json else evaluate.as_text(summary))
        training.leave()
        return 0
