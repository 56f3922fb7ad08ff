# SPDX-License-Identifier: Apache-2.0
"""``berdiff-fast sample``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg, create_mutex_group

from berdiff_fast import words
from berdiff_fast.choices import Method, Spacing
from berdiff_fast.cli.base import Command, Files, Flag, Masks, Packages

_WHERE = create_mutex_group(required=False, title="where in a slice")


@dataclass(frozen=True)
class Sample(Command):
    """Draw masks of a scan or a picture, on its own grid; the same command again goes on after an interruption.

    INPUT is a NIfTI (.nii, .nii.gz), NRRD, MetaImage (.mha) or DICOM file, a folder with a DICOM series, a picture
    (.png, .tif, .jpg), a NumPy (.npy) or an HDF5 file (dataset "image").

    examples:
      berdiff-fast sample ct.nii.gz --output masks --center 214 130 --slices 80 96 --seed 7 --report
      berdiff-fast sample dicom/ --output masks --roi 150 278 90 218
      berdiff-fast sample slice.png --model runs/lidc/model.safetensors --n 32 --output masks

    Written are n masks, their mean and their disagreement (entropy, in bits) on the grid of INPUT, as NIfTI for DICOM,
    with DICOM segmentations beside; summary.json has sizes and how it was done. The bundled model lidc was trained on
    128 x 128 cuts with a nodule in the middle: give it a --center or --center-mm. Slices, rows, columns and masks are
    counted from 0. Not a medical device. More: docs/scans.md

    Args:
        input: a file, or a folder with a DICOM series
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
        from berdiff_fast import scans
        from berdiff_fast.imaging import volumes
        from berdiff_fast.io import raters as raters_io
        from berdiff_fast.loading import load
        from berdiff_fast.model import fingerprint
        from berdiff_fast.scans import results

        device = _device(self.device)
        volume = volumes.read(self.input, series=self.series)
        if self.series is not None and volume.format != "dicom":
            raise ValueError(f"series: {self.input} is not a DICOM folder")
        files = raters_io.read(self.raters, volume)
        raters = results.check_raters(files, volume)
        model = load(self.model, allow_imports=self.allow_imports).to(device)
        if (model.img_channels or 1) > 1 or model.mask_channels > 1:
            raise ValueError(
                f"model: {self.model} has {model.img_channels} channels and {model.mask_channels} regions, and this "
                "command takes scans of one; sample_volume (in Python) takes a scan of each channel"
            )
        options: dict[str, Any] = dict(
            seed=self.seed,
            plane=self.plane,
            slices=self.slices,
            center=self.center,
            center_mm=self.center_mm,
            roi=self.roi,
            overlap=self.overlap,
            method=self.method,
            spacing=self.spacing,
            max_batch=self.max_batch,
            prepare="winograd" if self.winograd else True,
        )
        if self.modes:
            by_name = not self.modes[0].isdecimal()
            options["modes"] = self.modes[0] if by_name else [int(w) if w.isdecimal() else w for w in self.modes]
        with (
            words.muted("berdiff_fast.hints", self.quiet),
            results.folder(self.output, volume, self.n, raters=files, overwrite=self.overwrite) as work,
        ):
            sampled = scans.sample_volume(
                model, volume, self.n, self.steps, work=work, progress=not self.quiet, **options
            )
            assert isinstance(sampled, scans.SampledVolume)
            provenance = results.provenance(
                volume,
                sampled,
                self.model,
                fingerprint(model),
                device,
                self.series,
                files,
                anonymize=self.anonymize,
            )
            summary = results.write(
                sampled,
                self.output,
                work,
                provenance=provenance,
                raters=raters,
                report=self.report,
                anonymize=self.anonymize,
            )
        if self.json:
            print(json.dumps(summary))
        elif not self.quiet:
            print(words.shown(results.as_text(summary, self.output), lines=True))
        return 0


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be auto, or one that torch can use here, got {name!r} ({reason})") from None
    return name
