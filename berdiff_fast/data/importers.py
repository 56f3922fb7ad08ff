# SPDX-License-Identifier: Apache-2.0
"""From trees of PNG, JPEG, TIFF or NPY files to HDF5 files for training, validation and test, split by patient.

A slice is read, checked and written before the next one, so memory does not grow with the pictures. Everything is
written into a folder beside the output that takes the output's name at the very end: whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import berdiff_fast
from berdiff_fast import checks
from berdiff_fast.data import layouts, pixels
from berdiff_fast.data.layouts import LAYOUTS, PATIENT_PATTERN, SPLITS, Problem, Slice
from berdiff_fast.data.writing import SplitReport, Writer, whole
from berdiff_fast.words import shown

__all__ = ["FORMAT", "Problem", "Report", "SplitReport", "import_tree", "split_of"]

#: Version of the HDF5 layout and of splits.json.
FORMAT = 1

DEFAULT_SPLIT = (70, 10, 20)

FITS = ("exact", "resize", "crop")

_SHOWN = 8  # slices in the preview

_FILES = {*(f"{name}.h5" for name in SPLITS), "splits.json", "import.json", "preview.png"}


@dataclass(frozen=True)
class Report:
    """What an import found and wrote; ``import.json`` holds the same.

    Attributes:
        source, output: the tree and the folder written.
        layout, evidence: the layout taken, and why.
        size: (H, W) in pixels.
        raters: R.
        splits: "train", "val", "test" to what is in it; one without slices has no file.
        problems: everything that was left out, and why; empty if ``on_error`` is "stop".
        ignored: files and folders that the layout has no use for.
        notes: what a user should know about this import.
        parameters: of the call.
        berdiff_fast, format: versions of the package and of the HDF5 layout.
    """

    source: str
    output: str
    layout: str
    evidence: str
    size: tuple[int, int]
    raters: int
    splits: dict[str, SplitReport]
    problems: tuple[Problem, ...]
    ignored: tuple[str, ...]
    notes: tuple[str, ...]
    parameters: dict[str, Any]
    berdiff_fast: str
    format: int = FORMAT

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def to_text(self) -> str:
        """The report in a few lines; of many problems only the first."""
        lines = [
            f"layout    {self.layout}: {self.evidence}",
            f"slices    {pixels.by(self.size)}, {self.raters} raters",
        ]
        for name, split in self.splits.items():
            empty = f"; empty masks by rater: {', '.join(map(str, split.empty_masks))}" if split.slices else ""
            lines.append(f"{name:9s} {split.slices} slices of {split.patients} patients{empty}")
        lines += [f"note      {note}" for note in self.notes]
        if self.ignored:
            lines.append(f"ignored   {len(self.ignored)} files or folders, such as {shown(self.ignored[0])}")
        if self.problems:
            lines.append(f"problems  {len(self.problems)}, all of them in {Path(self.output) / 'import.json'}")
            lines += [f"  {shown(one.path)}: {shown(one.reason)}" for one in self.problems[:5]]
        return "\n".join([*lines, f"written   {self.output}"])


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
    overwrite: bool = False,
    preview: bool = True,
    progress: bool = False,
) -> Report:
    """Turn a tree of files into train.h5, val.h5, test.h5, splits.json, import.json and preview.png.

    Each HDF5 file holds image (N, H, W) uint8, mask (N, R, H, W) uint8 of 0 and 1, patient_id, nodule and slice (N,)
    int32, and the strings patient and path (N,); see docs/data.md.

    Args:
        source: the tree's root.
        output: the folder to write; made, with its parents, if it is not there.
        layout: "slices", "cimd", "berdiff", "plain", or "auto" to tell by the names of files and folders.
        split: train, val and test in per cent of the patients, such as (70, 10, 20) or "70/10/20". By default the
            tree's own splits if it has any, else 70/10/20.
        seed: of the split, at least 0; see ``split_of``.
        split_file: a splits.json to use instead: lists of patients under "train", "val" and "test".
        size: (H, W) in pixels that every slice has to have; by default that of the first.
        fit: what becomes of slices of another size: "exact" makes them errors, "resize" resizes them (images bilinear
            and antialiased, masks nearest neighbour), "crop" takes the middle. The latter two need ``size``.
        raters: R; by default one more than the largest number of a rater in the tree.
        missing_mask: "error", or "empty": a rater without a file marked nothing.
        on_error: "stop" at the first bad file, or "skip" its slice and list it in ``Report.problems``.
        threshold: share of its range, in (0, 1), above which a pixel is inside. By default only JPEG masks are
            thresholded, at 0.5, and other masks of more than two values are errors.
        window: (low, high) in the image's own units that becomes 0 and 255; by default each slice's minimum and
            maximum do. Images of 8 bits are taken as they are.
        patient_pattern: for "plain", a regular expression at the start of a file's name; its group "patient", else
            its first group, else all of it is the patient. Groups "nodule" and "slice" are used where present.
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
    _choice("layout", layout, ("auto", *LAYOUTS))
    _choice("fit", fit, FITS)
    _choice("missing_mask", missing_mask, ("error", "empty"))
    _choice("on_error", on_error, ("stop", "skip"))
    shares = None if split is None else _shares(split)
    checks.integer("seed", seed, 0)
    if shares is not None and split_file is not None:
        raise ValueError("split and split_file cannot both be given")
    exact_size = None if size is None else _size(size)
    if fit != "exact" and exact_size is None:
        raise ValueError(f"size must be given with fit={fit!r}")
    if raters is not None:
        checks.integer("raters", raters, 1)
    if threshold is not None and not (isinstance(threshold, float) and 0 < threshold < 1):
        raise ValueError(f"threshold must be a share of the range, in (0, 1), got {threshold!r}")
    limits = None if window is None else checks.increasing_pair("window", window)
    _pattern(patient_pattern)
    lists = None if split_file is None else _read_splits(Path(split_file))
    _check_source(root)
    _check_output(root, target, overwrite)

    problems = layouts.Problems(stop=on_error == "stop")
    kind, evidence = layouts.detect(root) if layout == "auto" else (layout, "it was asked for")
    tree = layouts.Tree(root, problems)
    keep = shares is None and lists is None  # the tree's own splits, if it has any
    slices = _unique(LAYOUTS[kind].slices(tree, patient_pattern), keep, problems)
    if not slices:
        first = problems.found[0] if problems.found else None
        why = f"; the first problem: {first.path}: {first.reason}" if first else f", which is {LAYOUTS[kind].shape}"
        raise ValueError(f"source: no slice of layout {kind!r} in {root}{why}")
    found = layouts.found_raters(slices)
    if raters is not None and raters < found:
        path = next(one.masks[found - 1] for one in slices if found - 1 in one.masks)
        raise ValueError(f"raters must be at least {found}, since there is {path}, got {raters}")

    notes = [LAYOUTS[kind].note] if LAYOUTS[kind].note else []
    if kind == "plain" and len(slices) > 1 and len({one.patient for one in slices}) == 1:
        raise ValueError(
            f"patient_pattern {patient_pattern!r} finds one patient, {slices[0].patient!r}, in all {len(slices)} "
            "names; give one that tells patients apart"
        )
    patients_of, rule = _assign(slices, keep, shares, lists, seed)
    place = {patient: name for name, patients in patients_of.items() for patient in patients}
    placed = []
    for one in slices:
        if one.patient in place:
            placed.append((place[one.patient], one))
        else:
            problems.add(
                one.image, f"its patient {one.patient!r} is not in the split file {Path(str(split_file)).name}"
            )

    if rule is _OWN:
        notes.append("the splits are the source's own: seed plays no part without split")
    hashed = rule is _RULE
    shares = (shares or DEFAULT_SPLIT) if hashed else None
    parameters = {
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
    reader = _Reader(root, raters or found, exact_size, fit, missing_mask == "empty", threshold, limits, problems)
    ids, numbered = layouts.numbers(list({one.patient for one in slices}))
    if not numbered:
        notes.append("patient_id is a patient's place in sorted order: not all names end in a number of their own")
    with whole(target, overwrite) as folder:
        counts, shown = _write_files(folder, placed, ids, reader, parameters, progress)
        if not any(one.slices for one in counts.values()):
            first = problems.found[0]
            raise ValueError(f"source: every slice has a problem; the first: {first.path}: {first.reason}")
        notes += [f"{name} has no slices, and no file" for name in SPLITS if not counts[name].slices]
        if reader.windowless:
            notes.append(f"window: {reader.windowless} images of 8 bits were taken as they are")
        assert reader.size is not None
        splits = {
            "format": FORMAT,
            "rule": rule,
            "shares": list(shares) if shares else None,
            "seed": seed if hashed else None,
            "counts": {name: {"patients": c.patients, "slices": c.slices} for name, c in counts.items()},
            **{name: sorted(patients_of[name], key=layouts.natural) for name in SPLITS},
        }
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
            berdiff_fast=berdiff_fast.__version__,
        )
        _write_text(folder / "splits.json", json.dumps(splits, indent=2) + "\n")
        _write_text(folder / "import.json", report.to_json())
        if preview:
            _preview(folder / "preview.png", shown)
    return report


# ---------------------------------------------------------------------- splits

_OWN = "the source's own"
_RULE = (
    "place = int(sha256(patient), 16) mod 100, where a seed other than 0 is appended to the patient as '#seed'; "
    "below shares[0]: train, below shares[0] + shares[1]: val, else test"
)


def split_of(patient: str, split: Sequence[int] = DEFAULT_SPLIT, seed: int = 0) -> str:
    """Return a patient's split, which follows from the name, the shares and the seed alone.

    So no patient ever moves because others were added. A patient's place is the SHA-256 of the name modulo 100, or of
    "name#seed" for a seed other than 0.

    Args:
        patient: the name, such as "LIDC-IDRI-0001".
        split: train, val and test in per cent.
        seed: at least 0.

    Returns:
        "train", "val" or "test".

    Raises:
        ValueError: the shares are not three that add up to 100, or the seed is negative.
    """
    train, val, _ = _shares(split)
    text = f"{patient}#{seed}" if checks.integer("seed", seed, 0) else patient
    place = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100
    return "train" if place < train else "val" if place < train + val else "test"


def _shares(split: Sequence[int] | str) -> tuple[int, int, int]:
    try:
        shares = [int(part) for part in split.split("/")] if isinstance(split, str) else list(split)
        train, val, test = (checks.integer("split", share, 0) for share in shares)
        good = train + val + test == 100
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(f"split must be train/val/test in per cent that add up to 100, as 70/10/20, got {split!r}")
    return train, val, test


def _read_splits(path: Path) -> dict[str, list[str]]:
    """Split to patients, no patient twice."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"split_file: there is no file {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"split_file: {path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not any(name in content for name in SPLITS):
        raise ValueError(f'split_file: {path} must hold lists of patients under "train", "val" and "test"')
    lists = {name: content.get(name, []) for name in SPLITS}
    for name, patients in lists.items():
        if not isinstance(patients, list) or not all(isinstance(patient, str) for patient in patients):
            raise ValueError(f"split_file: {name!r} in {path} must be a list of patients' names, got {patients!r:.60}")
    _check_disjoint(f"split_file: {path}", [(name, patient) for name in SPLITS for patient in lists[name]])
    return lists


def _assign(
    slices: list[Slice], keep: bool, shares: tuple[int, int, int] | None, lists: dict[str, list[str]] | None, seed: int
) -> tuple[dict[str, list[str]], str]:
    """Split to patients, and by which rule: the tree's own splits, lists that were given, or shares and a seed."""
    if keep and any(one.split for one in slices):
        return _own_splits(slices), _OWN
    if lists is not None:
        return lists, "a split file"
    drawn: dict[str, list[str]] = {name: [] for name in SPLITS}
    for patient in {one.patient: None for one in slices}:
        drawn[split_of(patient, shares or DEFAULT_SPLIT, seed)].append(patient)
    return drawn, _RULE


def _own_splits(slices: list[Slice]) -> dict[str, list[str]]:
    pairs = {(one.split or "", one.patient): None for one in slices}
    _check_disjoint("source", list(pairs), "; split anew with split=70/10/20 or a split_file")
    return {name: [patient for split, patient in pairs if split == name] for name in SPLITS}


def _check_disjoint(what: str, pairs: list[tuple[str, str]], advice: str = "") -> None:
    """A patient in two splits makes a test set worthless, so it is never just skipped."""
    counts = Counter(patient for _, patient in pairs)
    twice = [patient for patient, count in counts.items() if count > 1]
    if twice:
        where = " and ".join(name for name, patient in pairs if patient == twice[0])
        more = f", and {len(twice) - 1} more" if len(twice) > 1 else ""
        raise ValueError(f"{what}: patient {twice[0]!r} is in {where}{more}{advice}")


def _unique(found: Iterator[Slice], keep_splits: bool, problems: layouts.Problems) -> list[Slice]:
    """The slices, without those that are there twice; in two splits that are kept is worse, and for later."""
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


# ---------------------------------------------------------------------- reading


class _Reader:
    """Reads slices, all of one size; None for one with a problem."""

    def __init__(
        self,
        root: Path,
        raters: int,
        size: tuple[int, int] | None,
        fit: str,
        missing_is_empty: bool,
        threshold: float | None,
        window: tuple[float, float] | None,
        problems: layouts.Problems,
    ) -> None:
        self.root = root
        self.raters = raters
        self.size = size
        self.fit = fit
        self.missing_is_empty = missing_is_empty
        self.threshold = threshold
        self.window = window
        self.problems = problems
        self.windowless = 0
        self._sized_by = "size"  # who decided

    def __call__(self, one: Slice) -> tuple[np.ndarray, np.ndarray] | None:
        """image (H, W) uint8, masks (R, H, W) uint8 of 0 and 1."""
        before = len(self.problems.found)
        raw = self._try(one.image, lambda: pixels.read(self.root / one.image)[0])
        masks = [self._mask(one, rater, raw) for rater in range(self.raters)]
        if len(self.problems.found) > before or raw is None:
            return None
        if self.size is None:
            self.size, self._sized_by = (raw.shape[0], raw.shape[1]), one.image
        size = self.size
        if raw.shape != size and self.fit == "exact":
            self.problems.add(one.image, f"is {pixels.by(raw.shape)}, expected {pixels.by(size)} as {self._sized_by}")
            return None
        image = self._try(one.image, lambda: pixels.to_image(self._fitted(raw, size), self.window))
        if image is None:
            return None
        self.windowless += self.window is not None and raw.dtype == np.uint8
        empty = np.zeros(raw.shape, np.uint8)
        fitted = [self._fitted(empty if mask is None else mask, size, nearest=True) for mask in masks]
        return image, np.stack(fitted)

    def _mask(self, one: Slice, rater: int, image: np.ndarray | None) -> np.ndarray | None:
        if rater not in one.masks:
            if not self.missing_is_empty:
                self.problems.add(one.image, f"the mask of rater {rater} is missing")
            return None

        def load() -> np.ndarray:
            x, lossy = pixels.read(self.root / one.masks[rater])
            if image is not None and x.shape != image.shape:
                raise ValueError(f"is {pixels.by(x.shape)}, its image {pixels.by(image.shape)}")
            return pixels.to_mask(x, lossy, self.threshold)

        return self._try(one.masks[rater], load)

    def _try(self, path: str, load: Callable[[], np.ndarray]) -> np.ndarray | None:
        try:
            return load()
        except ValueError as error:
            reason = str(error)
        self.problems.add(path, reason)
        return None

    def _fitted(self, x: np.ndarray, size: tuple[int, int], *, nearest: bool = False) -> np.ndarray:
        return pixels.crop(x, size) if self.fit == "crop" else pixels.resize(x, size, nearest=nearest)


# ---------------------------------------------------------------------- writing


def _write_files(
    folder: Path,
    placed: list[tuple[str, Slice]],
    ids: dict[str, int],
    reader: _Reader,
    parameters: dict[str, Any],
    progress: bool,
) -> tuple[dict[str, SplitReport], list[tuple[np.ndarray, np.ndarray]]]:
    """Write each split's file; what is in it, and a few slices (image, masks) to look at."""
    from tqdm import tqdm

    planned = Counter(name for name, _ in placed)
    names: dict[str, set[str]] = {}
    for _, one in placed:
        names.setdefault(one.patient, set()).add(one.nodule)
    nodules = {patient: layouts.numbers(sorted(found))[0] for patient, found in names.items()}
    every = max(1, math.ceil(len(placed) / _SHOWN))
    shown: list[tuple[np.ndarray, np.ndarray]] = []
    writers: dict[str, Writer] = {}
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(placed, unit="slice", disable=None if progress else True))
        for index, (name, one) in enumerate(bar):
            pair = reader(one)
            if pair is None:
                continue
            if name not in writers:
                assert reader.size is not None
                attributes = {
                    "format": FORMAT,
                    "berdiff_fast": berdiff_fast.__version__,
                    "source": parameters["layout"],
                    "split": name,
                    "parameters": json.dumps(parameters),
                }
                path = folder / f"{name}.h5"
                writers[name] = Writer(path, planned[name], reader.size, reader.raters, attributes)
                stack.callback(writers[name].close)
            writers[name].append(*pair, ids[one.patient], nodules[one.patient][one.nodule], one)
            if index // every >= len(shown):
                shown.append(pair)
        done = {name: writer.finish() for name, writer in writers.items()}
    none = (0,) * reader.raters
    return {name: done.get(name, SplitReport(0, 0, none, none)) for name in SPLITS}, shown


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _preview(path: Path, shown: list[tuple[np.ndarray, np.ndarray]]) -> None:
    from PIL import Image

    pairs = [pixels.contours(image, masks) for image, masks in shown]
    pairs += [np.zeros_like(pairs[0])] * (len(pairs) % 2)
    rows = [np.concatenate(pairs[k : k + 2], axis=1) for k in range(0, len(pairs), 2)]
    Image.fromarray(np.concatenate(rows)).save(path)


# ---------------------------------------------------------------------- arguments


def _choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")


def _size(size: Sequence[int]) -> tuple[int, int]:
    try:
        height, width = (checks.integer("size", side, 1) for side in size)
    except (TypeError, ValueError):
        raise ValueError(f"size must be (height, width), two ints of at least 1, got {size!r}") from None
    return height, width


def _pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"patient_pattern must be a regular expression, got {pattern!r}: {error}") from error


def _check_source(root: Path) -> None:
    if not root.exists():
        raise FileNotFoundError(f"source: there is no folder {root}")
    if not root.is_dir():
        raise NotADirectoryError(f"source must be a folder, got the file {root}")
    try:
        os.listdir(root)
    except OSError as error:
        raise type(error)(f"source: {root} cannot be listed: {error.strerror}") from error


def _check_output(root: Path, output: Path, overwrite: bool) -> None:
    place = output.resolve()
    if place == root.resolve() or root.resolve() in place.parents:
        raise ValueError(f"output must lie outside source, got {output}")
    if not place.exists():
        return
    if not place.is_dir():
        raise NotADirectoryError(f"output must be a folder, got the file {output}")
    if os.path.ismount(place):
        raise ValueError(f"output: {output} is a mount point, which cannot be written whole; name a folder in it")
    names = set(os.listdir(place))
    if names and not overwrite:
        raise FileExistsError(f"output: {output} exists and is not empty; overwrite it?")
    foreign = sorted(names - _FILES)
    if foreign:
        raise FileExistsError(f"output: {output} holds {foreign[0]!r}, which no import wrote, and is not overwritten")
