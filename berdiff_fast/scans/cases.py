# SPDX-License-Identifier: Apache-2.0
"""Which scans a cohort has: those of a folder, of a list (CSV), or as they are named one by one."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from berdiff_fast import limits
from berdiff_fast.channels import ENDINGS, in_colour, stem_of
from berdiff_fast.imaging.volumes import FORMATS
from berdiff_fast.io import dicom
from berdiff_fast.scans.inputs import case_files
from berdiff_fast.scans.result_files import SUMMARY

#: Endings of what is a scan by itself: volumes, pictures, arrays.
_SCANS = tuple(end for ends in FORMATS.values() for end in ends)

#: Files of a cohort's folder that no case may be called.
TABLE, PAGE = "cohort.csv", "index.html"

#: What a case is called, which is a folder of results.
_NAME = re.compile(r"[^\x00-\x1f\x7f/\\:*?\"<>|]{1,120}")


@dataclass(frozen=True)
class Case:
    """A scan of a cohort.

    Attributes:
        name: its folder of results.
        inputs: its files, or its folder.
        where: slices, center, center_mm or roi of its own, as ``sample_volume`` has them.
        raters: masks to compare with.
        series: of a DICOM folder.
    """

    name: str
    inputs: tuple[str, ...]
    where: dict[str, Any] = field(default_factory=dict)
    raters: tuple[str, ...] = ()
    series: str | None = None


def cases_of(inputs: Sequence[str], channels: int, names: Sequence[str] | None) -> list[Case] | None:
    """The cases of a cohort; None where the inputs are one scan.

    A list (``.csv``) is a cohort, and so is a folder that is no scan itself: each volume or picture in it is a case,
    and each folder. Several inputs are several cases, but for files of a model of several channels, which are one.

    Args:
        inputs: what the user named.
        channels: how many the model has, and
        names: what they are called, if it knows.

    Raises:
        ValueError, FileNotFoundError: naming ``input``, and the line of a list.
    """
    paths = [Path(one) for one in inputs]
    if len(paths) == 1:
        path = paths[0]
        if path.suffix.lower() == ".csv":
            return read_list(path)
        return _in_folder(path, channels, names) if path.is_dir() else None
    pictures = in_colour(names, channels) and all(_is_picture(path) for path in paths)
    if channels > 1 and not pictures and not any(path.is_dir() for path in paths):
        return None
    if lists := [path for path in paths if path.suffix.lower() == ".csv"]:
        raise ValueError(f"input: the list {lists[0]} must be the only input, got {len(paths)}")
    return _different([_case(path, channels) for path in paths], "input")


def _in_folder(folder: Path, channels: int, names: Sequence[str] | None) -> list[Case] | None:
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in entries if path.is_file()]
    folders = [path for path in entries if path.is_dir() and any(path.iterdir()) and not _is_of_results(path)]
    if channels > 1:
        if names is not None and case_files(folder, names):
            return None  # the folder of one scan
        scans = [path for path in files if in_colour(names, channels) and _is_picture(path)]
    else:
        if any(_is_dicom(path) for path in files):
            return None
        scans = [path for path in files if path.name.lower().endswith(_SCANS)]
    if not scans and not folders:
        return None  # nothing: reading it says so
    return _different([_case(path, channels) for path in (*scans, *folders)], f"input: {folder}")


def _is_of_results(folder: Path) -> bool:
    """What an earlier run left among the scans is no scan."""
    return any((folder / name).is_file() for name in (TABLE, SUMMARY))


def _is_picture(path: Path) -> bool:
    return path.name.lower().endswith(FORMATS["picture"])


def _is_dicom(path: Path) -> bool:
    return path.name.lower().endswith(FORMATS["dicom"]) or dicom.is_dicom(path)


def _case(path: Path, channels: int) -> Case:
    """A case by its file or folder. A folder that holds nothing but another, or one scan, stands for that."""
    name = path.name or path.absolute().name
    found = path
    while found.is_dir() and channels == 1:
        inside = [one for one in found.iterdir() if not one.name.startswith(".")]
        scans = [one for one in inside if one.is_file() and one.name.lower().endswith(ENDINGS)]
        if len(inside) == 1 and inside[0].is_dir():
            found = inside[0]
        elif len(scans) == 1 and not any(one.is_file() and _is_dicom(one) for one in inside):
            found = scans[0]
        else:
            break
    if not path.is_dir():
        ending = next((end for end in (*ENDINGS, *_SCANS) if name.lower().endswith(end)), "")
        name = stem_of(name) if ending in ENDINGS else name[: len(name) - len(ending)]
    return Case(name or "scan", (str(found),))


def _different(cases: list[Case], what: str) -> list[Case]:
    """The cases, once each has a name of its own that a folder can have."""
    found: dict[str, Case] = {}
    for case in cases:
        problem = "may not begin with a point" if case.name.startswith(".") else "is no name that a folder can have"
        if not _NAME.fullmatch(case.name) or case.name != case.name.strip() or case.name.startswith("."):
            raise ValueError(f"{what}: the case {case.name!r:.80} {problem}")
        if case.name.lower() in (TABLE, PAGE):
            raise ValueError(f"{what}: a case may not be called {case.name}, as a file of the results is")
        other = found.setdefault(case.name.lower(), case)
        if other is not case:
            raise ValueError(
                f"{what}: there is the case {case.name} twice, of {', '.join(other.inputs)} and of "
                f"{', '.join(case.inputs)}; give them names of their own in a list (CSV)"
            )
    return [*found.values()]


# ---------------------------------------------------------------------- lists


def _numbers(kind: type, count: int) -> Callable[[str], tuple[Any, ...]]:
    def read(text: str) -> tuple[Any, ...]:
        words = text.replace(",", " ").split()
        try:
            found = tuple(kind(word) for word in words)
        except ValueError:
            found = ()
        if len(found) != count or len(words) != count:
            what = "whole numbers" if kind is int else "numbers"
            raise ValueError(f"must be {count} {what} with spaces between, got {text!r:.80}")
        return found

    return read


#: Columns that say where in a scan.
_WHERE = {
    "slices": _numbers(int, 2),
    "center": _numbers(float, 2),
    "center_mm": _numbers(float, 3),
    "roi": _numbers(int, 4),
}
#: Those of them that exclude each other.
IN_SLICE = frozenset({"center", "center_mm", "roi"})
_COLUMNS = ("case", "files", *_WHERE, "raters", "series")


def read_list(path: Path) -> list[Case]:
    """The cases of a CSV file with a header: ``case`` and ``files``, and if wanted ``slices``, ``center``,
    ``center_mm``, ``roi``, ``raters``, ``series``.

    Several files are separated by ``;``, numbers by spaces. Files are meant from the list's folder.

    Raises:
        ValueError, FileNotFoundError: with the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"input: there is no file {path}")
    if path.stat().st_size > limits.HARMLESS:
        raise ValueError(f"input: {path} has {limits.size(path.stat().st_size)}, which is no list")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"input: {path} must be a text file in UTF-8: {error}") from None
    try:
        rows = [*csv.reader(text.splitlines(), strict=True)]
    except csv.Error as error:
        raise ValueError(f"input: {path} must be CSV: {error}") from None
    header = [name.strip() for name in rows[0]] if rows else []
    missing = [name for name in ("case", "files") if name not in header]
    unknown = [name for name in header if name not in _COLUMNS]
    if missing or unknown or len(set(header)) < len(header):
        wrong = f"lacks {', '.join(missing)}" if missing else f"has {unknown[0]!r:.40}" if unknown else "repeats a name"
        raise ValueError(f"input: the first line of {path} must name columns of {', '.join(_COLUMNS)}; it {wrong}")
    cases = []
    for number, row in enumerate(rows[1:], start=2):
        if not any(word.strip() for word in row):
            continue
        if len(row) != len(header):
            raise ValueError(f"input: {path}, line {number}: must have {len(header)} columns, got {len(row)}")
        cases.append(_listed(path, number, {name: word.strip() for name, word in zip(header, row, strict=True)}))
    if not cases:
        raise ValueError(f"input: {path} lists no case")
    return _different(cases, f"input: {path}")


def _listed(path: Path, number: int, row: Mapping[str, str]) -> Case:
    where = {}
    for name, read in _WHERE.items():
        if text := row.get(name, ""):
            try:
                where[name] = read(text)
            except ValueError as error:
                raise ValueError(f"input: {path}, line {number}: {name} {error}") from None
    if len(IN_SLICE & where.keys()) > 1:
        raise ValueError(f"input: {path}, line {number}: center, center_mm and roi exclude each other")
    files = _files(path, row["files"])
    if not row["case"] or not files:
        empty = "files" if row["case"] else "case"
        raise ValueError(f"input: {path}, line {number}: {empty} must not be empty")
    return Case(row["case"], files, where, _files(path, row.get("raters", "")), row.get("series") or None)


def _files(path: Path, text: str) -> tuple[str, ...]:
    """Files, some of them as CHANNEL=FILE, from the folder of the list."""
    found = []
    for word in filter(None, (word.strip() for word in text.split(";"))):
        name, equals, rest = word.partition("=")
        named = equals and not (path.parent / word).exists()
        found.append(f"{name}={path.parent / rest}" if named else str(path.parent / word))
    return tuple(found)
