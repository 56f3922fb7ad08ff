# SPDX-License-Identifier: Apache-2.0
"""``import_tcia``: LIDC-IDRI as The Cancer Imaging Archive gives it, DICOM series and XML, to cuts around nodules."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from berdiff_fast import checks
from berdiff_fast._optional import require
from berdiff_fast._version import __version__
from berdiff_fast.data.importers.arguments import check_choice, check_output, check_size, check_source
from berdiff_fast.data.importers.cases import paths_in
from berdiff_fast.data.importers.files import write_reports
from berdiff_fast.data.importers.lidc_nodules import OVERLAP
from berdiff_fast.data.importers.report import FORMAT, Report
from berdiff_fast.data.importers.splits import DEFAULT_SPLIT, RULE, assign, read_splits, shares_of
from berdiff_fast.data.importers.tcia_tree import Found, Scan, find, judge
from berdiff_fast.data.importers.tcia_writing import Nodules, write_scans
from berdiff_fast.data.importers.trees import SPLITS, Problems, Slice, Tree, numbers
from berdiff_fast.data.importers.writing import whole

SIZE = (128, 128)

#: Pixel spacings that can be meant, in mm.
_FINEST, _COARSEST = 0.05, 20.0


def detect_tcia(root: Path) -> bool:
    """Whether a tree looks like DICOM series, by names alone."""
    return any(path.lower().endswith(".dcm") for path in paths_in(root, depth=5, at_most=2000))


def check_spacing(spacing: Any) -> tuple[float, float]:
    pair = spacing if isinstance(spacing, Sequence) and not isinstance(spacing, str) else (spacing,)
    try:
        row, column = (float(x) for x in (pair if len(pair) == 2 else [*pair] * 2))
        good = not any(isinstance(x, bool) for x in pair) and all(_FINEST <= x <= _COARSEST for x in (row, column))
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(
            f"pixel_spacing must be one or two numbers of mm, {_FINEST} to {_COARSEST:g}, got {spacing!r:.80}"
        )
    return row, column


def import_tcia(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    split: Sequence[int] | str | None = None,
    seed: int = 0,
    *,
    split_file: str | os.PathLike[str] | None = None,
    size: Sequence[int] = SIZE,
    pixel_spacing: float | Sequence[float] | None = None,
    on_error: str = "stop",
    overwrite: bool = False,
    preview: bool = True,
    progress: bool = False,
) -> Report:
    """Turn LIDC-IDRI as downloaded into train.h5, val.h5, test.h5, splits.json, import.json and preview.png.

    A file holds image (N, H, W) int16 in Hounsfield units, mask (N, R, H, W), a reader in each session's place,
    rater_valid (N, R), and where each slice comes from: a slice for each nodule of 3 mm or more and each axial slice
    in which any reader has it, cut around the middle of what all readers marked; see docs/data.md.

    Args:
        source, output, split, seed, split_file, overwrite, preview, progress: as in ``import_tree``.
        size: (H, W) of a cut, in pixels.
        pixel_spacing: in mm, one number or (row, column), what slices are resampled to; by default the scan's own.
        on_error: "stop" at the first bad file, or "skip" the scan that it is of and list it in ``Report.problems``.

    Returns:
        What was found and written; ``Report.readings`` counts readings, of each scan and altogether.

    Raises:
        FileExistsError, FileNotFoundError, NotADirectoryError, ValueError, TypeError: as in ``import_tree``.
        ImportError: pydicom is not installed.
    """
    root, target = Path(source), Path(output)
    check_choice("on_error", on_error, ("stop", "skip"))
    shares = None if split is None else shares_of(split)
    checks.integer("seed", seed, 0)
    if shares is not None and split_file is not None:
        raise ValueError("split and split_file cannot both be given")
    exact = check_size(size)
    wanted = None if pixel_spacing is None else check_spacing(pixel_spacing)
    lists = None if split_file is None else read_splits(Path(split_file))
    check_source(root)
    check_output(root, target, overwrite)
    require("pydicom")

    problems = Problems(stop=on_error == "stop")
    tree = Tree(root, problems)
    found = find(tree, progress)
    scans = _judged(tree, found, problems, wanted, progress)
    if not scans:
        first = problems.found[0] if problems.found else None
        why = f"; the first problem: {first.path}: {first.reason}" if first else ""
        raise ValueError(f"source: no CT scan with a reading of LIDC-IDRI in {root}{why}")
    if not any(scan.outlines for scan in scans):
        raise ValueError(f"source: no reader outlined a nodule of 3 mm or more in the {len(scans)} scans of {root}")
    raters = max(len(scan.sessions) for scan in scans if scan.outlines)
    one_each = [Slice(scan.series.patient, "0", 0, scan.xml, {}) for scan in scans]
    patients_of, rule = assign(one_each, False, shares, lists, seed)
    place = {patient: name for name, patients in patients_of.items() for patient in patients}
    ids, from_names = numbers(list({scan.series.patient for scan in scans}))
    parameters: dict[str, Any] = {
        "layout": "tcia",
        "split": list(shares or DEFAULT_SPLIT) if rule is RULE else rule,
        "seed": seed,
        "size": list(exact),
        "pixel_spacing": None if wanted is None else list(wanted),
        "overlap": OVERLAP,
        "on_error": on_error,
        "scaling": "none: Hounsfield units, rounded to whole ones",
    }
    with whole(target, overwrite) as folder:
        attributes = {
            "format": FORMAT,
            "berdiff_fast": __version__,
            "source": "tcia",
            "parameters": json.dumps(parameters),
        }
        written = write_scans(folder, tree, scans, place, ids, raters, exact, wanted, attributes, progress)
        if not any(one.slices for one in written.splits.values()):
            first = problems.found[0] if problems.found else None
            raise ValueError(f"source: no slice in {root}" + (f"; {first.path}: {first.reason}" if first else ""))
        nodules = written.nodules
        readings = _readings(found, nodules)
        evidence = (
            f"{_some(len(nodules.scans), 'CT scan')} with readings; {_some(nodules.count, 'nodule')} of 3 mm or more "
            f"in {_some(readings['readings'], 'reading')}, {_some(readings['small_nodules'], 'mark')} of smaller ones, "
            f"{readings['non_nodules']} of non-nodules"
        )
        report = Report(
            source=str(source),
            output=str(output),
            layout="tcia",
            evidence=evidence,
            size=exact,
            raters=raters,
            splits=written.splits,
            problems=tuple(problems.found),
            ignored=tuple(tree.ignored),
            notes=tuple(_notes(readings, nodules, wanted is None, from_names, written.splits)),
            parameters=parameters,
            berdiff_fast=__version__,
            readings=readings,
        )
        write_reports(folder, report, patients_of, rule, shares, seed, written.shown if preview else [])
    return report


def _judged(
    tree: Tree, found: Found, problems: Problems, wanted: tuple[float, float] | None, progress: bool
) -> list[Scan]:
    """The scans that fit their readings."""
    from tqdm import tqdm

    scans = []
    for series, xml in tqdm(found.pairs, unit="scan", desc="headers", disable=None if progress else True):
        scan = judge(tree, series, xml, problems)
        if scan is not None and wanted is not None and scan.spacing is None:
            problems.add(series.name, "has no PixelSpacing, and is to be resampled (pixel_spacing)")
        elif scan is not None:
            scans.append(scan)
    return scans


def _readings(found: Found, nodules: Nodules) -> dict[str, Any]:
    """What ``import.json`` tells of readings."""
    of_scans = nodules.scans
    summed = ("readings", "small_nodules", "non_nodules", "outlines", "exclusions", "bridged", "single_pixels")
    return {
        "scans": len(of_scans),
        "other_series": dict(sorted(found.other.items())),
        "chest_xray_readings": found.chest_xrays,
        "sessions_per_scan": _table(one["sessions"] for one in of_scans),
        "sessions_of_another_scan": sum(one["sessions_of_another_scan"] for one in of_scans),
        "nodules": nodules.count,
        "readings_per_nodule": _table(nodules.sizes),
        "nodules_of_more_than_four_readings": sum(size > 4 for size in nodules.sizes),
        "nodules_with_two_outlines_of_a_reader": nodules.twice,
        "readings_without_a_pixel": nodules.hollow,
        "slices_that_show_another_nodule": nodules.crowded,
        **{name: sum(one[name] for one in of_scans) for name in summed},
        "of_scans": of_scans,
    }


def _table(values: Any) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


def _notes(
    readings: dict[str, Any], nodules: Nodules, own_spacing: bool, from_names: bool, splits: dict[str, Any]
) -> list[str]:
    """What a user should know, each only where there is something to say."""
    sessions = ", ".join(f"{count} of {many}" for many, count in readings["sessions_per_scan"].items())
    other = ", ".join(f"{count} {modality}" for modality, count in readings["other_series"].items())
    chest = _some(readings["chest_xray_readings"], "chest X-ray reading")
    foreign = readings["sessions_of_another_scan"]
    uneven = [one["series"] for one in readings["of_scans"] if one["unevenly_spaced"]]
    more, twice = readings["nodules_of_more_than_four_readings"], readings["nodules_with_two_outlines_of_a_reader"]
    bridged, hollow = readings["bridged"], readings["readings_without_a_pixel"]
    crowded, kinds = readings["slices_that_show_another_nodule"], len(nodules.spacings)
    told = [
        (True, f"scans by their reading sessions: {sessions}"),
        (more, f"{_some(more, 'nodule')} of more than four readings"),
        (twice, f"{_some(twice, 'nodule')} of which a reader outlined two parts that another saw as one"),
        (foreign, f"{_some(foreign, 'session')} of another scan (no slice of the series is named): no readers here"),
        (readings["chest_xray_readings"] or other, f"left aside: {chest}; series that are no CT: {other or 'none'}"),
        (
            uneven,
            f"{_some(len(uneven), 'series', 'series')} unevenly spaced, with slices missing or twice, such as "
            f"{next(iter(uneven), '')}: import.json has all; marked slices are there",
        ),
        (bridged, f"{_some(bridged, 'outline')} with gaps, which straight lines close"),
        (hollow, f"{_some(hollow, 'reading')} of a nodule whose outlines enclose no pixel"),
        (crowded, f"{_some(crowded, 'slice')} that show a part of another nodule, which the masks do not hold"),
        (
            own_spacing and kinds > 1,
            f"scans differ in pixel spacing ({kinds} kinds): the files tell none (--pixel-spacing makes them alike)",
        ),
        (not from_names, "patient_id is a patient's place in sorted order: not all names end in a number of their own"),
        *((not splits[name].slices, f"{name} has no slices, and no file") for name in SPLITS),
    ]
    return [words for there, words in told if there]


def _some(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
