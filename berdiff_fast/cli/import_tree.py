# SPDX-License-Identifier: Apache-2.0
"""``berdiff-fast import``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from tyro.conf import Positional, arg, create_mutex_group

from berdiff_fast.cli.base import Command, Flag
from berdiff_fast.words import shown

_FIT = create_mutex_group(required=False, title="slices of another size")


@dataclass(frozen=True)
class Import(Command):
    """Turn a tree of PNG, JPEG, TIFF or NPY files into HDF5 files for training, split by patient.

    layouts (--layout auto tells them apart):
      slices   PATIENT/NODULE/{images,mask-0,mask-1,...}/slice-N.png
      cimd     CASE/{image_N.jpg,label0_.jpg,label1_.jpg,...}
      berdiff  {train,val,test}/{images/PATIENT/z-105.0_c0.png,gt/PATIENT/z-105.0_c0_l0.png,...}
      plain    {images,masks_0,masks_1,...}/NAME.png

    examples:
      berdiff-fast import LIDC-slices data/lidc
      berdiff-fast import tree data/mine --split 80/10/10 --seed 3 --on-error skip
      berdiff-fast import tree data/mine --split-file data/lidc/splits.json
      berdiff-fast import tree data/mine --size 128 128 --crop
      berdiff-fast import ct data/ct --layout plain --window -1000 400 --patient-pattern '(?P<patient>[^-]+)-'

    Nothing is written unless everything is. Hounsfield units are lost: images become 8 bits. More: docs/data.md

    Args:
        source: the tree's root
        output: the folder to write
        layout: auto, slices, cimd, berdiff or plain
        split: train/val/test in per cent; none: the tree's own splits, else 70/10/20
        seed: fixes the split
        split_file: the splits.json of another import, instead
        size: in pixels; none: that of the first slice
        resize: resize slices to --size
        crop: cut --size out of their middle
        rater_count: masks per slice; none: as many as are found
        missing_mask: error; empty: the rater marked nothing; absent: the rater did not read the slice
        on_error: stop, or skip slices with a bad file
        threshold: share of a mask's range above which a pixel is inside; none: 0.5 for JPEG, else no threshold
        window: what becomes 0 and 255; none: each slice's range
        patient_pattern: finds the patient in a plain tree's names; none: up to a '_'
        overwrite: replace an earlier import
        preview: write preview.png, or not
        quiet: no progress bar, no words but errors
        json: print the report as JSON
    """

    FORMER: ClassVar = {"--raters": "--rater-count"}

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    output: Annotated[Positional[str], arg(metavar="OUTPUT")]
    layout: str = "auto"
    split: str | None = None
    seed: int = 0
    split_file: Annotated[str | None, arg(metavar="JSON")] = None
    size: Annotated[tuple[int, int] | None, arg(metavar="H W")] = None
    resize: Annotated[Flag, _FIT] = False
    crop: Annotated[Flag, _FIT] = False
    rater_count: int | None = None
    missing_mask: str = "error"
    on_error: str = "stop"
    threshold: Annotated[float | None, arg(metavar="SHARE")] = None
    window: Annotated[tuple[float, float] | None, arg(metavar="LOW HIGH")] = None
    patient_pattern: Annotated[str | None, arg(metavar="REGEX")] = None
    overwrite: Flag = False
    preview: Flag = True
    quiet: Flag = False
    json: Flag = False

    def run(self) -> int:
        from berdiff_fast.data import importers

        options: dict[str, Any] = {} if self.patient_pattern is None else {"patient_pattern": self.patient_pattern}
        report = importers.import_tree(
            self.source,
            self.output,
            self.layout,
            self.split,
            self.seed,
            split_file=self.split_file,
            size=self.size,
            fit="resize" if self.resize else "crop" if self.crop else "exact",
            raters=self.rater_count,
            missing_mask=self.missing_mask,
            on_error=self.on_error,
            threshold=self.threshold,
            window=self.window,
            overwrite=self.overwrite,
            preview=self.preview,
            progress=not self.quiet,
            **options,
        )
        if self.json:
            print(report.to_json(), end="")
        elif not self.quiet:
            print(shown(report.to_text(), lines=True))
        return 0
