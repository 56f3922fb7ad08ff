# SPDX-License-Identifier: Apache-2.0
"""``import_volumes``: from a tree of volumes, several channels and label maps a case, to slices for training."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from berdiff_fast import checks
from berdiff_fast._version import __version__
from berdiff_fast.data import pixels
from berdiff_fast.data.importers.arguments import check_choice, check_output, check_size, check_source
from berdiff_fast.data.importers.case_reading import CaseReader, cut_around
from berdiff_fast.data.importers.cases import (
    VOLUME_LAYOUTS,
    WHOLE_TUMOUR,
    Case,
    VolumeLayout,
    list_cases,
    nnunet_names,
)
from berdiff_fast.data.importers.files import write_reports
from berdiff_fast.data.importers.report import FORMAT, Report
from berdiff_fast.data.importers.splits import DEFAULT_SPLIT, RULE, assign, read_splits, shares_of
from berdiff_fast.data.importers.trees import SPLITS, Problems, Slice, numbers
from berdiff_fast.data.importers.writing import SplitReport, Writer, whole
from berdiff_fast.imaging import volumes
from berdiff_fast.regions import Regions, check_names

#: Sides of slices are multiples of this, which networks halve.
_MULTIPLE = 16


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
    overwrite: bool = False,
    preview: bool = True,
    progress: bool = False,
) -> Report:
    """Turn a tree of volumes into train.h5, val.h5, test.h5, splits.json, import.json and preview.png.

    A file holds image (N, C, H, W) in the volumes' own units, mask (N, R, K, H, W), rater_valid (N, R), and statistics
    (N, C, 4) of each slice's volume; see docs/data.md. Memory is bounded by one case.

    Args:
        source, output, split, seed, split_file, on_error, overwrite, preview, progress: as in ``import_tree``.
        layout: "brats", "nnunet", "qubiq", or templates of one's own.
        channels: which, in this order; the layout's by default, or all that are found.
        regions: the mask's channels; by default those of dataset.json, the whole tumour for "brats", else every label
            there is as one region.
        other_labels: what a label that no region names is: "error" or "background".
        size: (H, W) of slices; by default the smallest multiples of 16 that hold every case, for which each case is
            read once more.
        foreground: cut slices around the middle of what is not 0; by default for "brats".
        empty_share: of slices in which nobody marked anything so many are taken, chosen by the seed.
        plane: "axial", "coronal" or "sagittal".
        missing_mask: what a rater without a label map of a case is: "error", "empty" or "absent".

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
    if channels:
        channels = check_names("channels", list(channels))
    shares = None if split is None else shares_of(split)
    checks.integer("seed", seed, 0)
    if shares is not None and split_file is not None:
        raise ValueError("split and split_file cannot both be given")
    exact = None if size is None else check_size(size)
    if isinstance(empty_share, bool) or not 0 <= float(empty_share) <= 1:
        raise ValueError(f"empty_share must be in [0, 1], got {empty_share!r}")
    lists = None if split_file is None else read_splits(Path(split_file))
    check_source(root)
    check_output(root, target, overwrite)
    foreground = layout.foreground if foreground is None else foreground

    problems = Problems(stop=on_error == "stop")
    ignored: list[str] = []
    cases, names = list_cases(root, layout, channels, problems, ignored)
    told = ""
    if kind == "nnunet":
        named, told = nnunet_names(root)
        if named and set(named) != set(names) and not channels:
            raise ValueError(f"dataset.json: names channels {sorted(named)}, and the files have {list(names)}")
        names = tuple(named.get(name, name) for name in names)
    if not cases:
        first = problems.found[0] if problems.found else None
        why = f"; the first problem: {first.path}: {first.reason}" if first else f", which is {layout.shape}"
        raise ValueError(f"source: no case of layout {kind!r} in {root}{why}")
    raters = max(len(case.masks) for case in cases)
    if missing_mask == "error":
        for case in cases:
            if len(case.masks) < raters:
                lacking = f"has {len(case.masks)} label maps, others have {raters} (missing_mask 'absent' takes that)"
                problems.add(case.images[0], f"case {case.name} {lacking}")
        cases = [case for case in cases if len(case.masks) == raters]
    found = _regions(regions, told or layout.regions, kind, root, cases)

    reader = CaseReader(root, found, raters, plane, other_labels, problems)
    slices = [Slice(case.patient, case.name, 0, case.images[0], case.masks) for case in cases]
    patients_of, rule = assign(slices, False, shares, lists, seed)
    place = {patient: name for name, patients in patients_of.items() for patient in patients}
    ids, from_names = numbers(list({case.patient for case in cases}))
    notes = [] if from_names else ["patient_id is a patient's place in sorted order: not all names end in a number"]
    if exact is None:
        exact, cases = _size(cases, reader, foreground, progress)
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
        counts, shown, spacings = _write(
            folder,
            cases,
            place,
            ids,
            reader,
            exact,
            foreground,
            float(empty_share),
            seed,
            missing_mask,
            attributes,
            progress,
        )
        if not any(one.slices for one in counts.values()):
            first = problems.found[0] if problems.found else None
            raise ValueError(f"source: no slice in {root}" + (f"; {first.path}: {first.reason}" if first else ""))
        notes += [f"{name} has no slices, and no file" for name in SPLITS if not counts[name].slices]
        if len(spacings) > 1:
            notes.append(f"cases differ in pixel spacing ({len(spacings)} kinds): the files tell none")
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


def _size(
    cases: list[Case], reader: CaseReader, foreground: bool, progress: bool
) -> tuple[tuple[int, int], list[Case]]:
    """The smallest multiples of 16 that hold every case, and the cases that could be read."""
    from tqdm import tqdm

    sides, good = [(1, 1)], []
    for case in tqdm(cases, unit="case", desc="measuring", disable=None if progress else True):
        read = reader(case)
        if read is not None:
            top, bottom, left, right = read.box
            sides.append((bottom - top, right - left) if foreground else read.images.shape[-2:])
            good.append(case)
    height, width = (-(-max(side) // _MULTIPLE) * _MULTIPLE for side in zip(*sides, strict=True))
    return (height, width), good


def _write(
    folder: Path,
    cases: list[Case],
    place: dict[str, str],
    ids: dict[str, int],
    reader: CaseReader,
    size: tuple[int, int],
    foreground: bool,
    empty_share: float,
    seed: int,
    missing_mask: str,
    attributes: dict[str, Any],
    progress: bool,
) -> tuple[dict[str, SplitReport], list[tuple[np.ndarray, np.ndarray]], set[tuple[float, float] | None]]:
    """Write each split's file, case after case."""
    from tqdm import tqdm

    shown: list[tuple[np.ndarray, np.ndarray]] = []
    writers: dict[str, Writer] = {}
    visits: Counter[str] = Counter()
    spacings: set[tuple[float, float] | None] = set()
    every = max(1, len(cases) // 8)
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(cases, unit="case", disable=None if progress else True))
        for number, case in enumerate(bar):
            if case.patient not in place:
                reader.problems.add(case.images[0], f"its patient {case.patient!r} is not in the split file")
                continue
            read = reader(case)
            if read is None:
                continue
            top, bottom, left, right = read.box
            height, width = read.images.shape[-2:]
            middle = ((top + bottom) / 2, (left + right) / 2) if foreground else (height / 2, width / 2)
            images = cut_around(read.images, middle, size)
            masks = cut_around(read.masks, middle, size)
            if masks.sum() < read.masks.sum():
                reader.problems.add(
                    next(iter(case.masks.values())), f"marks more than the {pixels.by(size)} pixels that are cut out"
                )
                continue
            name, statistics = place[case.patient], read.statistics
            if name not in writers:
                room = sum(1 for c in cases if place.get(c.patient) == name) * 4096
                writers[name] = Writer(
                    folder / f"{name}.h5",
                    room,
                    images[:, 0].shape,
                    masks[:, :, 0].shape,
                    {**attributes, "split": name},
                    np.float32,
                    statistics=True,
                )
                stack.callback(writers[name].close)
            spacings.add(None if read.spacing is None else (round(read.spacing[0], 4), round(read.spacing[1], 4)))
            valid = read.valid if missing_mask == "absent" else None
            chosen = [
                s for s in range(images.shape[1]) if masks[:, :, s].any() or _is_drawn(case.name, s, empty_share, seed)
            ]
            for s in chosen:
                one = Slice(case.patient, case.name, s, case.images[0], case.masks)
                image = np.ascontiguousarray(images[:, s], np.float32)
                writers[name].append(
                    image,
                    masks[:, :, s].astype(np.uint8),
                    ids[case.patient],
                    visits[case.patient],
                    one,
                    valid,
                    statistics,
                )
            visits[case.patient] += 1
            if number // every >= len(shown) and chosen:
                s = max(chosen, key=lambda s: masks[:, :, s].sum())
                shown.append((pixels.to_image(images[0, s], None), masks[:, 0, s].astype(np.uint8)))
        if len(spacings) == 1 and None not in spacings:
            for writer in writers.values():
                writer.tell("pixel_spacing", np.array(next(iter(spacings)), np.float64))
        done = {name: writer.finish() for name, writer in writers.items() if writer.rows}
    none = (0,) * reader.raters
    return {name: done.get(name, SplitReport(0, 0, none, none)) for name in SPLITS}, shown, spacings


def _is_drawn(case: str, index: int, share: float, seed: int) -> bool:
    """A slice by itself, whatever others there are."""
    digest = hashlib.sha256(f"{case}#{index}#{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
