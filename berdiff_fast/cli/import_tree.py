# SPDX-License-Identifier: Apache-2.0
"""``berdiff-fast import``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import Positional, arg, create_mutex_group

from berdiff_fast.cli.base import Command, Flag
from berdiff_fast.words import shown

_FIT = create_mutex_group(required=False, title="slices of another size")

#: Options that are for pictures alone, and for volumes alone.
_PICTURES = ("resize", "crop", "rater_count", "threshold", "window", "patient_pattern")
_VOLUMES = ("channels", "regions", "context", "volumes", "image_pattern", "mask_pattern")
#: Which slices of volumes are taken, and how.
_SLICES = ("other_labels", "empty_share", "plane", "foreground")


@dataclass(frozen=True)
class Import(Command):
    """Turn a tree of pictures or volumes into HDF5 files for training, split by patient.

    layouts (--layout auto tells them apart):
      slices   PATIENT/NODULE/{images,mask-0,mask-1,...}/slice-N.png
      cimd     CASE/{image_N.jpg,label0_.jpg,label1_.jpg,...}
      berdiff  {train,val,test}/{images/PATIENT/z-105.0_c0.png,gt/PATIENT/z-105.0_c0_l0.png,...}
      plain    {images,masks_0,masks_1,...}/NAME.png
    of volumes (NIfTI, MetaImage, NRRD), with several channels and raters:
      brats    CASE/CASE_{flair,t1,t1ce,t2,seg}.nii.gz, or CASE-{t2f,t1n,t1c,t2w,seg}.nii.gz; CASE_seg_0.nii.gz, ...
      nnunet   {imagesTr/CASE_0000.nii.gz,labelsTr/CASE.nii.gz,dataset.json}
      qubiq    CASE/{image.nii.gz,task01_seg01.nii.gz,task01_seg02.nii.gz,...}
      pattern  as --image-pattern '{case}/{channel}{ext}' --mask-pattern '{case}/reader{rater}{ext}' say
    of CT scans with LIDC's readings, as The Cancer Imaging Archive gives them:
      tcia     LIDC-IDRI-0001/STUDY/SERIES/{1-001.dcm,...,069.xml}

    examples:
      berdiff-fast import LIDC-slices data/lidc
      berdiff-fast import tree data/mine --split 80/10/10 --seed 3 --on-error skip
      berdiff-fast import tree data/mine --split-file data/lidc/splits.json
      berdiff-fast import tree data/mine --size 128 128 --crop
      berdiff-fast import ct data/ct --layout plain --window -1000 400 --patient-pattern '(?P<patient>[^-]+)-'
      berdiff-fast import skin data/skin --colour --size 256 256 --resize
      berdiff-fast import BraTS2021 data/brats --regions WT=1,2,4 TC=1,4 ET=4
      berdiff-fast import LIDC-IDRI data/lidc --layout tcia --pixel-spacing 0.7
      berdiff-fast import BraTS2021 data/brats25 --context 1
      berdiff-fast import BraTS2021 data/brats3d --volumes --size 64 128 128

    Nothing is written unless everything is. Pictures become 8 bits, and Hounsfield units are lost, unless a --depth
    keeps them. Volumes and tcia keep their units. More: docs/data.md

    Args:
        source: the tree's root
        output: the folder to write
        layout: auto, slices, cimd, berdiff, plain, brats, nnunet, qubiq, pattern or tcia
        split: train/val/test in per cent; none: the tree's own splits, else 70/10/20
        seed: fixes the split
        split_file: the splits.json of another import, instead
        size: in pixels; none: that of the first slice, or what holds every volume (tcia: 128 128); D H W with --volumes
        pixel_spacing: of tcia: in mm, what slices are resampled to; none: the scan's own
        resize: resize slices to --size
        crop: cut --size out of their middle
        rater_count: masks per slice; none: as many as are found
        missing_mask: error; empty: the rater marked nothing; absent: the rater did not read the slice
        on_error: stop, or skip slices with a bad file
        threshold: share of a mask's range above which a pixel is inside; none: 0.5 for JPEG, else no threshold
        window: what becomes 0 and 255; none: each slice's range
        patient_pattern: finds the patient in a plain tree's names; none: up to a '_'
        channels: of volumes: which, in this order; none: the layout's
        regions: of volumes: NAME=LABEL,LABEL,... of each channel of the masks; none: dataset.json's, whole tumour
        other_labels: of volumes: what a label is that no region names: error or background
        empty_share: of volumes: share of the slices without a mark that is taken
        plane: of volumes: axial, coronal or sagittal slices
        foreground: of volumes: cut around what is not 0: auto (brats), true or false
        context: of volumes: so many neighbours above and below a slice are channels beside it
        volumes: of volumes: write whole volumes, for a network of three dimensions, not slices
        colour: pictures are in colour: three channels R, G and B
        depth: of the images in the file: 8, 16, float16 or float32; none: 8, and float32 of volumes
        image_pattern: of the layout pattern: a path with {case}, {channel} and {ext}
        mask_pattern: of the layout pattern: a path with {case}, {rater} and {ext}
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
    size: Annotated[tuple[int, ...] | None, arg(metavar="[D] H W")] = None
    pixel_spacing: Annotated[tuple[float, ...], arg(metavar="ROW [COLUMN]")] = ()
    resize: Annotated[Flag, _FIT] = False
    crop: Annotated[Flag, _FIT] = False
    rater_count: int | None = None
    missing_mask: str = "error"
    on_error: str = "stop"
    threshold: Annotated[float | None, arg(metavar="SHARE")] = None
    window: Annotated[tuple[float, float] | None, arg(metavar="LOW HIGH")] = None
    patient_pattern: Annotated[str | None, arg(metavar="REGEX")] = None
    channels: tuple[str, ...] = ()
    regions: Annotated[tuple[str, ...], arg(metavar="NAME=LABELS")] = ()
    other_labels: str = "error"
    empty_share: float = 0.1
    plane: Literal["axial", "coronal", "sagittal"] = "axial"
    foreground: Literal["auto", "true", "false"] = "auto"
    context: Annotated[int, arg(metavar="SLICES")] = 0
    volumes: Flag = False
    colour: Flag = False
    depth: str | None = None
    image_pattern: str | None = None
    mask_pattern: str | None = None
    overwrite: Flag = False
    preview: Flag = True
    quiet: Flag = False
    json: Flag = False

    def run(self) -> int:
        layout = self._volumes()
        if layout == "tcia":
            report = self._import_tcia()
        else:
            report = self._import_tree() if layout is None else self._import_volumes(layout)
        if self.json:
            print(report.to_json(), end="")
        elif not self.quiet:
            print(shown(report.to_text(), lines=True))
        return 0

    def _volumes(self) -> Any:
        """The layout of volumes that is asked for, or that the tree has, or "tcia"; None for pictures."""
        from pathlib import Path

        from berdiff_fast.data.importers.arguments import check_source
        from berdiff_fast.data.importers.cases import VOLUME_LAYOUTS, VolumeLayout, compiled, detect_volumes
        from berdiff_fast.data.importers.layouts import LAYOUTS
        from berdiff_fast.data.importers.tcia_import import detect_tcia

        if (self.layout == "pattern") != bool(self.image_pattern and self.mask_pattern):
            raise ValueError("image_pattern and mask_pattern must be given exactly with --layout pattern")
        if self.layout == "pattern":
            images, masks = str(self.image_pattern), str(self.mask_pattern)
            for name, template in (("image_pattern", images), ("mask_pattern", masks)):
                try:
                    compiled(template)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
            return VolumeLayout(f"{images} with {masks}", (images,), (masks,))
        if self.layout in (*VOLUME_LAYOUTS, "tcia"):
            return self.layout
        if self.layout != "auto":
            return None
        check_source(Path(self.source))
        found = detect_volumes(Path(self.source))
        if not found and not any(one.evidence(Path(self.source)) for one in LAYOUTS.values()):
            # Stray DICOM files do not make a tree of pictures one of series.
            return "tcia" if detect_tcia(Path(self.source)) else None
        if len(found) > 1:
            seen = "; ".join(f"{name!r} ({why})" for name, why in found.items())
            raise ValueError(f"layout: {self.source} looks like several: {seen}. Name one")
        return next(iter(found), None)

    def _import_volumes(self, layout: Any) -> Any:
        from berdiff_fast.data import importers

        self._refuse(_PICTURES, "pictures", "volumes")
        self._refuse(("pixel_spacing",), "CT scans (tcia)", "volumes")
        return importers.import_volumes(
            self.source,
            self.output,
            layout,
            self.split,
            self.seed,
            split_file=self.split_file,
            channels=self.channels,
            regions=" ".join(self.regions) or None,
            other_labels=self.other_labels,
            size=self.size,
            foreground=None if self.foreground == "auto" else self.foreground == "true",
            empty_share=self.empty_share,
            plane=self.plane,
            missing_mask=self.missing_mask,
            on_error=self.on_error,
            colour=self.colour,
            depth=self.depth or "float32",
            context_slices=self.context,
            whole_volumes=self.volumes,
            overwrite=self.overwrite,
            preview=self.preview,
            progress=not self.quiet,
        )

    def _import_tcia(self) -> Any:
        from berdiff_fast.data import importers

        self._refuse(_PICTURES, "pictures", "CT scans (tcia)")
        self._refuse((*_VOLUMES, *_SLICES, "missing_mask", "depth"), "volumes", "CT scans (tcia)")
        self._refuse(("colour",), "pictures", "CT scans (tcia)")
        options: dict[str, Any] = {} if self.size is None else {"size": self.size}
        return importers.import_tcia(
            self.source,
            self.output,
            self.split,
            self.seed,
            split_file=self.split_file,
            pixel_spacing=self.pixel_spacing or None,
            on_error=self.on_error,
            overwrite=self.overwrite,
            preview=self.preview,
            progress=not self.quiet,
            **options,
        )

    def _refuse(self, names: tuple[str, ...], theirs: str, ours: str) -> None:
        for name in names:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name} is for trees of {theirs}, and this is one of {ours}")

    def _import_tree(self) -> Any:
        from berdiff_fast.data import importers

        self._refuse((*_VOLUMES, *_SLICES), "volumes", "pictures")
        self._refuse(("pixel_spacing",), "CT scans (tcia)", "pictures")
        options: dict[str, Any] = {} if self.patient_pattern is None else {"patient_pattern": self.patient_pattern}
        return importers.import_tree(
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
            colour=self.colour,
            depth=self.depth or "8",
            overwrite=self.overwrite,
            preview=self.preview,
            progress=not self.quiet,
            **options,
        )
