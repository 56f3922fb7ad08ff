# SPDX-License-Identifier: Apache-2.0
"""``berdiff-fast sample``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg, create_mutex_group

from berdiff_fast import words
from berdiff_fast.choices import Method, Spacing
from berdiff_fast.cli.base import Command, Files, Flag, Masks, Packages

if TYPE_CHECKING:
    from berdiff_fast.scans.case import Request
    from berdiff_fast.scans.cases import Case

_WHERE = create_mutex_group(required=False, title="where in a slice")


@dataclass(frozen=True)
class Sample(Command):
    """Draw masks of a scan or a picture, on its own grid; the same command again goes on after an interruption.

    INPUT is a NIfTI (.nii, .nii.gz), NRRD, MetaImage (.mha) or DICOM file, a folder with a DICOM series, a picture
    (.png, .tif, .jpg; in colour for a model of red, green and blue), a NumPy (.npy) or an HDF5 file (dataset "image").
    For another model of several channels it is the folder of a case, or a file for each channel. A folder of scans, a
    list (.csv: case,files,center,...) or several inputs are a cohort: each case has its folder in OUTPUT, cohort.csv
    and index.html tell of all, and the same command goes on.

    examples:
      berdiff-fast sample ct.nii.gz --output masks --center 214 130 --slices 80 96 --seed 7 --report
      berdiff-fast sample dicom/ --output masks --roi 150 278 90 218
      berdiff-fast sample slice.png --model runs/lidc/model.safetensors --n 32 --output masks
      berdiff-fast sample BraTS-GLI-00001-000/ --model runs/brats/model.safetensors --output masks --report
      berdiff-fast sample scans/ --output masks

    Written are n masks, their mean and their disagreement (entropy, in bits) on the grid of INPUT, as NIfTI for DICOM,
    with DICOM segmentations beside; summary.json has sizes and how it was done. The bundled model lidc was trained on
    128 x 128 cuts with a nodule in the middle: give it a --center or --center-mm. Slices, rows, columns and masks are
    counted from 0. Not a medical device. More: docs/scans.md

    Args:
        input: a file, a folder, or a list of scans (.csv)
        more: the other channels of a scan, or more scans
        output: the folder of results
        model: a bundled model or a file
        n: masks
        steps: sampling steps
        seed: fixes the masks
        method: sampler
        spacing: which timesteps are visited; none: as the model says
        plane: the way the volume is cut into slices
        slices: only from FIRST to before END, counted from 0
        center: pixel in the middle of a cut
        center_mm: the same by its place in the patient, in mm to the left, back and head (LPS, as DICOM has it; of a
            point in RAS, as NIfTI has it, give -X -Y Z)
        roi: rows and columns to keep to
        overlap: how far tiles overlap, as a share of their size
        modes: draw masks of these size classes only, or: non-empty (a model with a mode prior)
        series: the series to read, where a DICOM folder holds several
        raters: masks to compare with, on the same grid, DICOM SEG or RTSTRUCT (FILE#NAME: one of several structures)
        report: also write report.html, to look at
        anonymize: name no file in report.html and summary.json
        winograd: multiply less, which is faster on a CPU and about one decimal digit less accurate
        max_batch: masks per call of the network
        allow_imports: packages whose code a model may run, if its network is a class of somebody's own
        device: auto, cpu, cuda, ...
        overwrite: replace earlier results
        quiet: no progress bar, no words but errors
        json: print the summary as JSON
    """

    input: Annotated[Positional[str], arg(metavar="INPUT")]
    output: str
    more: Annotated[Positional[tuple[str, ...]], arg(metavar="[INPUT ...]", help_behavior_hint="")] = ()
    model: str = "lidc"
    n: Masks = 16
    steps: int = 10
    seed: int = 0
    method: Method = "ddim"
    spacing: Spacing | None = None
    plane: Literal["axial", "coronal", "sagittal"] = "axial"
    slices: Annotated[tuple[int, int] | None, arg(metavar="FIRST END")] = None
    center: Annotated[tuple[float, float] | None, arg(metavar="ROW COLUMN"), _WHERE] = None
    center_mm: Annotated[tuple[float, float, float] | None, arg(metavar="X Y Z"), _WHERE] = None
    roi: Annotated[tuple[int, int, int, int] | None, arg(metavar="ROW END COLUMN END"), _WHERE] = None
    overlap: float = 0.25
    modes: Annotated[tuple[str, ...], arg(metavar="CLASS [CLASS ...]", help_behavior_hint="")] = ()
    series: Annotated[str | None, arg(metavar="UID")] = None
    raters: Files = ()
    report: Flag = False
    anonymize: Flag = False
    winograd: Flag = False
    max_batch: Annotated[int | None, arg(metavar="MASKS")] = None
    allow_imports: Packages = ()
    device: str = "auto"
    overwrite: Flag = False
    quiet: Flag = False
    json: Flag = False

    def run(self) -> int:
        from berdiff_fast.loading import load
        from berdiff_fast.scans import results
        from berdiff_fast.scans.case import Request, sample_case
        from berdiff_fast.scans.cases import cases_of
        from berdiff_fast.scans.inputs import scan_names
        from berdiff_fast.scans.study import scans_of

        device = _device(self.device)
        options: dict[str, Any] = dict(
            seed=self.seed,
            plane=self.plane,
            overlap=self.overlap,
            method=self.method,
            spacing=self.spacing,
            max_batch=self.max_batch,
            prepare="winograd" if self.winograd else True,
        )
        if self.modes:
            by_name = not self.modes[0].isdecimal()
            options["modes"] = self.modes[0] if by_name else [int(w) if w.isdecimal() else w for w in self.modes]
        request = Request(
            load(self.model, allow_imports=self.allow_imports).to(device),
            self.model,
            self.n,
            self.steps,
            options,
            self.report,
            self.anonymize,
            self.overwrite,
        )
        inputs = (self.input, *self.more)
        where: dict[str, Any] = dict(slices=self.slices, center=self.center, center_mm=self.center_mm, roi=self.roi)
        cases = cases_of(inputs, scans_of(request.model), scan_names(request.model))
        if cases is not None:
            return self._cohort(request, cases, where)
        with words.muted("berdiff_fast.hints", self.quiet):
            summary = sample_case(
                request,
                inputs,
                self.output,
                series=self.series,
                raters=self.raters,
                progress=not self.quiet,
                **where,
            )
        if self.json:
            print(json.dumps(summary))
        elif not self.quiet:
            print(words.shown(results.as_text(summary, self.output), lines=True))
        return 0

    def _cohort(self, request: Request, cases: Sequence[Case], where: Mapping[str, Any]) -> int:
        """Many scans; the exit status is 1 if one of them failed."""
        from berdiff_fast.scans.cohort import DONE, FAILED, Cohort
        from berdiff_fast.scans.share import Share

        for name in ("raters", "series"):
            if getattr(self, name):
                raise ValueError(f"{name} is for one scan; of several, a list (CSV) has a column {name}")
        listed = len(self.more) == 0 and self.input.lower().endswith(".csv")
        if self.anonymize and not listed:
            raise ValueError("anonymize: cases would be named after files; give a list (CSV) with names of its own")
        given = {name: value for name, value in where.items() if value is not None}
        with words.muted("berdiff_fast.hints"):
            rows = Cohort(request, cases, Path(self.output), given).sample(Share.of(os.environ), not self.quiet)
        count = {status: sum(row["status"] == status for row in rows) for status in (DONE, FAILED)}
        if self.json:
            print(json.dumps(rows))
        elif not self.quiet:
            rest = len(rows) - sum(count.values())
            said = [f"{count[DONE]} of {len(rows)} cases done"]
            said += [f"{count[FAILED]} failed"] if count[FAILED] else []
            said += [f"{rest} unfinished, with another process or left by one"] if rest else []
            print(", ".join(said))
            for row in rows:
                if row["status"] == FAILED:
                    print(words.shown(f"failed: {row['case']}: {row['error']}"))
            print(words.shown(f"written: {Path(self.output) / 'index.html'}"))
        return int(count[FAILED] > 0)


def _device(name: str) -> str:
    import torch

    from berdiff_fast.scans.share import Share

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.device_count() > 1:  # each process of a machine has one of its own
        return f"cuda:{Share.of(os.environ).local % torch.cuda.device_count()}"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be auto, or one that torch can use here, got {name!r} ({reason})") from None
    return name
