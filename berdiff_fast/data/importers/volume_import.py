# SPDX-License-Identifier: Apache-2.0
"""``import_volumes``: from a tree of volumes, with channels and label maps, to slices or volumes for training."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from berdiff_fast import checks
from berdiff_fast._version import __version__
from berdiff_fast.channels import COLOUR, in_context
from berdiff_fast.data.importers.arguments import (
    check_choice,
    check_output,
    check_size,
    check_source,
    check_volume_size,
)
from berdiff_fast.data.importers.case_reading import CaseReader
from berdiff_fast.data.importers.cases import (
    VOLUME_LAYOUTS,
    WHOLE_TUMOUR,
    Case,
    VolumeLayout,
    list_cases,
    nnunet_names,
)
from berdiff_fast.data.importers.depth import DEPTHS, Depth
from berdiff_fast.data.importers.files import write_reports
from berdiff_fast.data.importers.report import FORMAT, Report
from berdiff_fast.data.importers.splits import DEFAULT_SPLIT, RULE, assign, read_splits, shares_of
from berdiff_fast.data.importers.trees import SPLITS, Problems, Slice, numbers
from berdiff_fast.data.importers.volume_writing import Cutting, measured, write_cases
from berdiff_fast.data.importers.writing import whole
from berdiff_fast.imaging import volumes
from berdiff_fast.regions import Regions, check_names


def import_volumes(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    layout: str | VolumeLayout,
    split: Sequence[int] | str | None = None,
    seed: int = 0,
    *,
    split_file: str | os.PathLike[str] | None = None,
    channels: Sequence[str] = (),
    regions: Regions | str | None = None,
    other_labels: str = "error",
    size: Sequence[int] | None = None,
    foreground: bool | None = None,
    empty_share: float = 0.1,
    plane: str = "axial",
    missing_mask: str = "error",
    on_error: str = "stop",
    colour: bool = False,
    depth: str | int = "float32",
    context_slices: int = 0,
    whole_volumes: bool = False,
    overwrite: bool = False,
    preview: bool = True,
    progress: bool = False,
) -> Report:
    """Turn a tree of volumes into train.h5, val.h5, test.h5, splits.json, import.json and preview.png.

    A file holds image (N, C, H, W) in the volumes' own units, mask (N, R, K, H, W), rater_valid (N, R), and statistics
    (N, C, 4) of each slice's volume; with ``whole_volumes`` (N, C, D, H, W) and (N, R, K, D, H, W); see docs/data.md.
    Memory is bounded by one case.

    Args:
        source, output, split, seed, split_file, on_error, overwrite, preview, progress: as in ``import_tree``.
        layout: "brats", "nnunet", "qubiq", or templates of one's own.
        channels: which, in this order; the layout's by default, or all that are found.
        regions: the mask's channels; by default those of dataset.json, the whole tumour for "brats", else every label
            there is as one region.
        other_labels: what a label that no region names is: "error" or "background".
        size: (H, W) of slices, or (D, H, W) of whole volumes; by default the smallest multiples of 16 (D: the smallest
            number) that hold every case, for which each case is read once more.
        foreground: cut slices around the middle of what is not 0; by default for "brats".
        empty_share: of slices in which nobody marked anything so many are taken, chosen by the seed.
        plane: "axial", "coronal" or "sagittal".
        missing_mask: what a rater without a label map of a case is: "error", "empty" or "absent".
        colour: a case is one colour picture, and becomes three channels, R, G and B.
        depth: the type of images in the file: "float32", "float16", 16 (int16 or uint16 by the first image) or 8
            (uint8). Values stay what they are; a volume with others is an error.
        context_slices: so many neighbours of a slice, above and below, are channels of their own: ct[-1], ct[0] and
            ct[+1] of ct with 1. At an end of a volume the last slice is repeated.
        whole_volumes: examples are volumes, for a network of three dimensions, and not slices.

    Returns:
        What was found and written.

    Raises:
        FileExistsError, FileNotFoundError, NotADirectoryError, ValueError, TypeError: as in ``import_tree``.
    """
    root, target = Path(source), Path(output)
    kind = layout if isinstance(layout, str) else "pattern"
    if isinstance(layout, str):
        check_choice("layout", layout, tuple(VOLUME_LAYOUTS))
        layout = VOLUME_LAYOUTS[layout]
    check_choice("missing_mask", missing_mask, ("error", "empty", "absent"))
    check_choice("on_error", on_error, ("stop", "skip"))
    check_choice("other_labels", other_labels, ("error", "background"))
    check_choice("plane", plane, ("axial", "coronal", "sagittal"))
    check_choice("depth", str(depth), DEPTHS)
    checks.integer("context_slices", context_slices, 0)
    if context_slices and (whole_volumes or colour):
        what = "whole_volumes" if whole_volumes else "colour"
        raise ValueError(f"context_slices is for slices of volumes, got {context_slices} with {what}")
    if whole_volumes and colour:
        raise ValueError("whole_volumes is for volumes, and colour for pictures")
    if colour and channels:
        raise ValueError(f"channels must not be given with colour, whose channels are R, G and B, got {list(channels)}")
    if channels:
        channels = check_names("channels", list(channels))
    shares = None if split is None else shares_of(split)
    checks.integer("seed", seed, 0)
    if shares is not None and split_file is not None:
        raise ValueError("split and split_file cannot both be given")
    exact: tuple[int, ...] | None = None
    if size is not None:
        exact = check_volume_size(size) if whole_volumes else check_size(size)
    if isinstance(empty_share, bool) or not 0 <= float(empty_share) <= 1:
        raise ValueError(f"empty_share must be in [0, 1], got {empty_share!r}")
    lists = None if split_file is None else read_splits(Path(split_file))
    check_source(root)
    check_output(root, target, overwrite)
    foreground = layout.foreground if foreground is None else foreground

    problems = Problems(stop=on_error == "stop")
    ignored: list[str] = []
    cases, names = list_cases(root, layout, channels, problems, ignored, colour)
    told = ""
    if kind == "nnunet":
        named, told = nnunet_names(root)
        if named and set(named) != set(names) and not channels and not colour:
            raise ValueError(f"dataset.json: names channels {sorted(named)}, and the files have {list(names)}")
        names = tuple(named.get(name, name) for name in names)
    if not cases:
        first = problems.found[0] if problems.found else None
        why = f"; the first problem: {first.path}: {first.reason}" if first else f", which is {layout.shape}"
        among = " among its pictures" if colour else ""
        raise ValueError(f"source: no case of layout {kind!r} in {root}{among}{why}")
    if colour:
        if len(names) > 1:
            raise ValueError(f"colour: a case must have one colour picture, and the files are {', '.join(names)}")
        names = COLOUR
    raters = max(len(case.masks) for case in cases)
    if missing_mask == "error":
        for case in cases:
            if len(case.masks) < raters:
                lacking = f"has {len(case.masks)} label maps, others have {raters} (missing_mask 'absent' takes that)"
                problems.add(case.images[0], f"case {case.name} {lacking}")
        cases = [case for case in cases if len(case.masks) == raters]
    found = _regions(regions, told or layout.regions, kind, root, cases)

    reader = CaseReader(root, found, raters, plane, other_labels, Depth(str(depth)), problems, colour=colour)
    slices = [Slice(case.patient, case.name, 0, case.images[0], case.masks) for case in cases]
    patients_of, rule = assign(slices, False, shares, lists, seed)
    place = {patient: name for name, patients in patients_of.items() for patient in patients}
    ids, from_names = numbers(list({case.patient for case in cases}))
    notes = [] if from_names else ["patient_id is a patient's place in sorted order: not all names end in a number"]
    if exact is None:
        exact, cases = measured(cases, reader, foreground, whole_volumes, progress)
    cutting = Cutting(exact, foreground, context_slices, float(empty_share), seed)
    names = in_context(names, context_slices)
    parameters: dict[str, Any] = {
        "layout": kind,
        "split": list(shares or DEFAULT_SPLIT) if rule is RULE else rule,
        "seed": seed,
        "channels": list(names),
        "regions": str(found),
        "other_labels": other_labels,
        "size": list(exact),
        "foreground": foreground,
        "empty_share": float(empty_share),
        "plane": plane,
        "missing_mask": missing_mask,
        "on_error": on_error,
        "scaling": "none: intensities are the volumes' own",
    }
    # Only what is used is named: files of other imports are what they were.
    used = {"colour": colour, "context_slices": context_slices, "whole_volumes": whole_volumes}
    parameters |= {name: value for name, value in used.items() if value}
    if str(depth) != "float32":
        parameters["depth"] = str(depth)
    with whole(target, overwrite) as folder:
        attributes = {
            "format": FORMAT,
            "berdiff_fast": __version__,
            "source": kind,
            "parameters": json.dumps(parameters),
            "channels": json.dumps(list(names)),
            "regions": json.dumps([[name, list(labels)] for name, labels in found.table]),
            "foreground": foreground,
        }
        if context_slices:
            attributes["context_slices"] = context_slices
        if whole_volumes:
            attributes["spatial_dims"] = 3
        counts, shown, spacings = write_cases(
            folder, cases, place, ids, reader, cutting, missing_mask, attributes, progress
        )
        if not any(one.slices for one in counts.values()):
            first = problems.found[0] if problems.found else None
            raise ValueError(f"source: no slice in {root}" + (f"; {first.path}: {first.reason}" if first else ""))
        notes += [f"{name} has no slices, and no file" for name in SPLITS if not counts[name].slices]
        if spacings > 1:
            notes.append(f"cases differ in pixel spacing ({spacings} kinds): the files tell none")
        report = Report(
            source=str(source),
            output=str(output),
            layout=kind,
            evidence=f"{len(cases)} cases of {', '.join(names)}; masks of {found}",
            size=exact,
            raters=raters,
            splits=counts,
            problems=tuple(problems.found),
            ignored=tuple(ignored),
            notes=tuple(notes),
            parameters=parameters,
            berdiff_fast=__version__,
        )
        write_reports(folder, report, patients_of, rule, shares, seed, shown if preview else [])
    return report


def _regions(given: Regions | str | None, told: str, kind: str, root: Path, cases: list[Case]) -> Regions:
    if isinstance(given, Regions):
        return given
    if given or told:
        return Regions.parse(given or told)
    if kind == "brats":
        name = Path(cases[0].images[0]).name.removeprefix(cases[0].name)
        return Regions.parse(WHOLE_TUMOUR.get(name[:1], WHOLE_TUMOUR["_"]))
    labels = np.unique(volumes.read(root / next(iter(cases[0].masks.values()))).array)
    values = tuple(int(v) for v in labels if v > 0 and v == int(v))
    return Regions((("region", values or (1,)),))
