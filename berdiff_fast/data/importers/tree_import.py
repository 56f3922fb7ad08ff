# SPDX-License-Identifier: Apache-2.0
"""``import_tree``: from a tree of pictures to files for training, validation and test."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from berdiff_fast import checks
from berdiff_fast._version import __version__
from berdiff_fast.data.importers.arguments import check_choice, check_output, check_pattern, check_size, check_source
from berdiff_fast.data.importers.depth import DEPTHS, Depth
from berdiff_fast.data.importers.files import write_files, write_reports
from berdiff_fast.data.importers.layouts import LAYOUTS, detect, found_raters
from berdiff_fast.data.importers.reading import Reader
from berdiff_fast.data.importers.report import Report
from berdiff_fast.data.importers.splits import DEFAULT_SPLIT, OWN, RULE, assign, read_splits, shares_of
from berdiff_fast.data.importers.trees import PATIENT_PATTERN, SPLITS, Problems, Slice, Tree, numbers
from berdiff_fast.data.importers.writing import whole

FITS = ("exact", "resize", "crop")


def _unique(found: Iterator[Slice], keep_splits: bool, problems: Problems) -> list[Slice]:
    """The slices, each once. A patient in two splits that are kept passes here, and ``assign`` raises."""
    seen: dict[tuple[str, str, int, str | None], str] = {}
    slices = []
    for one in found:
        path = seen.setdefault((one.patient, one.nodule, one.number, one.split if keep_splits else None), one.image)
        if path is one.image:
            slices.append(one)
        else:
            where = f"slice {one.number} of nodule {one.nodule} of patient {one.patient}"
            problems.add(one.image, f"duplicate: {where} is also {path}")
    return slices


def import_tree(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    layout: str = "auto",
    split: Sequence[int] | str | None = None,
    seed: int = 0,
    *,
    split_file: str | os.PathLike[str] | None = None,
    size: Sequence[int] | None = None,
    fit: str = "exact",
    raters: int | None = None,
    missing_mask: str = "error",
    on_error: str = "stop",
    threshold: float | None = None,
    window: Sequence[float] | None = None,
    patient_pattern: str = PATIENT_PATTERN,
    colour: bool = False,
    depth: str | int = 8,
    overwrite: bool = False,
    preview: bool = True,
    progress: bool = False,
) -> Report:
    """Turn a tree of files into train.h5, val.h5, test.h5, splits.json, import.json and preview.png.

    Each HDF5 file holds image (N, H, W) uint8, or of another ``depth``, or (N, 3, H, W) with ``colour``; mask (N, R, H,
    W) uint8 of 0 and 1, rater_valid (N, R) uint8, patient_id, nodule and slice (N,) int32, and the strings patient and
    path (N,); see docs/data.md.

    Args:
        source: the tree's root.
        output: the folder to write; made, with its parents, if it is not there.
        layout: "slices", "cimd", "berdiff", "plain", or "auto" to tell by the names of files and folders.
        split: train, val and test in per cent of the patients, such as (70, 10, 20) or "70/10/20". By default the
            tree's own splits if it has any, else 70/10/20.
        seed: fixes the split, at least 0; see ``split_of``.
        split_file: a splits.json to use instead: lists of patients under "train", "val" and "test".
        size: (H, W) in pixels that every slice has to have; by default that of the first.
        fit: what becomes of slices of another size: "exact" makes them errors, "resize" resizes them (images bilinear
            and antialiased, masks nearest neighbour), "crop" takes the middle. The latter two need ``size``.
        raters: R; by default one more than the largest number of a rater in the tree.
        missing_mask: "error"; "empty": a rater without a file marked nothing; or "absent": the rater did not read the
            slice, which counts neither in training nor in any metric.
        on_error: "stop" at the first bad file, or "skip" its slice and list it in ``Report.problems``.
        threshold: share of its range, in (0, 1), above which a pixel is inside. By default only JPEG masks are
            thresholded, at 0.5, and other masks of more than two values are errors.
        window: (low, high) in the image's own units that becomes 0 and 255; by default each slice's minimum and
            maximum do. Images of 8 bits are taken as they are.
        patient_pattern: for "plain", a regular expression at the start of a file's name; its group "patient", else
            its first group, else all of it is the patient. Groups "nodule" and "slice" are used where present.
        colour: images are colour pictures, and become three channels, R, G and B; a grey one is an error. Masks are
            grey in any case.
        depth: 8: images become 8 bits, those that have more are scaled. 16, "float16" and "float32" keep their values,
            as uint16 or int16 by the first image, or as floating point; an image with values beyond is an error.
        overwrite: replace ``output``, if it holds nothing but an earlier import.
        preview: draw some slices and their raters' outlines.
        progress: show a progress bar where stderr is a terminal.

    Returns:
        What was found and written.

    Raises:
        FileExistsError: ``output`` exists and is not empty.
        FileNotFoundError: ``source`` or ``split_file`` does not exist.
        NotADirectoryError: ``source`` or ``output`` is a file.
        ValueError, TypeError: a bad argument, an unknown layout, a patient in two splits, or a bad file (its path
            comes first). Nothing has been written then.
    """
    root, target = Path(source), Path(output)
    check_choice("layout", layout, ("auto", *LAYOUTS))
    check_choice("fit", fit, FITS)
    check_choice("missing_mask", missing_mask, ("error", "empty", "absent"))
    check_choice("on_error", on_error, ("stop", "skip"))
    shares = None if split is None else shares_of(split)
    checks.integer("seed", seed, 0)
    if shares is not None and split_file is not None:
        raise ValueError("split and split_file cannot both be given")
    exact_size = None if size is None else check_size(size)
    if fit != "exact" and exact_size is None:
        raise ValueError(f"size must be given with fit={fit!r}")
    if raters is not None:
        checks.integer("raters", raters, 1)
    if threshold is not None and not (isinstance(threshold, float) and 0 < threshold < 1):
        raise ValueError(f"threshold must be a share of the range, in (0, 1), got {threshold!r}")
    limits = None if window is None else checks.increasing_pair("window", window)
    depth = str(depth)
    check_choice("depth", depth, DEPTHS)
    if limits is not None and depth != "8":
        raise ValueError(f"window is what becomes 0 and 255 of 8 bits, and depth {depth!r} keeps the values")
    check_pattern(patient_pattern)
    lists = None if split_file is None else read_splits(Path(split_file))
    check_source(root)
    check_output(root, target, overwrite)

    problems = Problems(stop=on_error == "stop")
    kind, evidence = detect(root) if layout == "auto" else (layout, "it was asked for")
    tree = Tree(root, problems)
    keep = shares is None and lists is None  # the tree's own splits, if it has any
    slices = _unique(LAYOUTS[kind].slices(tree, patient_pattern), keep, problems)
    if not slices:
        first = problems.found[0] if problems.found else None
        why = f"; the first problem: {first.path}: {first.reason}" if first else f", which is {LAYOUTS[kind].shape}"
        raise ValueError(f"source: no slice of layout {kind!r} in {root}{why}")
    found = found_raters(slices)
    if raters is not None and raters < found:
        path = next(one.masks[found - 1] for one in slices if found - 1 in one.masks)
        raise ValueError(f"raters must be at least {found}, since there is {path}, got {raters}")

    notes = [LAYOUTS[kind].note] if LAYOUTS[kind].note else []
    if kind == "plain" and len(slices) > 1 and len({one.patient for one in slices}) == 1:
        raise ValueError(
            f"patient_pattern {patient_pattern!r} finds one patient, {slices[0].patient!r}, in all {len(slices)} "
            "names; give one that tells patients apart"
        )
    patients_of, rule = assign(slices, keep, shares, lists, seed)
    place = {patient: name for name, patients in patients_of.items() for patient in patients}
    placed = []
    for one in slices:
        if one.patient in place:
            placed.append((place[one.patient], one))
        else:
            problems.add(
                one.image, f"its patient {one.patient!r} is not in the split file {Path(str(split_file)).name}"
            )

    if rule is OWN:
        notes.append("the splits are the source's own: seed plays no part without split")
    hashed = rule is RULE
    shares = (shares or DEFAULT_SPLIT) if hashed else None
    parameters: dict[str, Any] = {
        "layout": kind,
        "split": list(shares) if shares else rule,
        "seed": seed if hashed else None,
        "size": None if exact_size is None else list(exact_size),
        "fit": fit,
        "raters": raters,
        "missing_mask": missing_mask,
        "on_error": on_error,
        "threshold": threshold,
        "window": None if limits is None else list(limits),
        "patient_pattern": patient_pattern if kind == "plain" else None,
    }
    # Only what is used is named: files of other imports are what they were.
    if colour:
        parameters["colour"] = True
    if depth != "8":
        parameters["depth"] = depth
    kept = None if depth == "8" else Depth(depth)
    reader = Reader(root, raters or found, exact_size, fit, missing_mask, threshold, limits, problems, colour, kept)
    ids, numbered = numbers(list({one.patient for one in slices}))
    if not numbered:
        notes.append("patient_id is a patient's place in sorted order: not all names end in a number of their own")
    with whole(target, overwrite) as folder:
        counts, shown = write_files(folder, placed, ids, reader, parameters, progress)
        if not any(one.slices for one in counts.values()):
            first = problems.found[0]
            raise ValueError(f"source: every slice has a problem; the first: {first.path}: {first.reason}")
        notes += [f"{name} has no slices, and no file" for name in SPLITS if not counts[name].slices]
        if reader.windowless:
            notes.append(f"window: {reader.windowless} images of 8 bits were taken as they are")
        assert reader.size is not None
        report = Report(
            source=str(source),
            output=str(output),
            layout=kind,
            evidence=evidence,
            size=reader.size,
            raters=reader.raters,
            splits=counts,
            problems=tuple(problems.found),
            ignored=tuple(tree.ignored),
            notes=tuple(notes),
            parameters=parameters,
            berdiff_fast=__version__,
        )
        write_reports(folder, report, patients_of, rule, shares, seed, shown if preview else [])
    return report
