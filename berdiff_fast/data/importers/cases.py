# SPDX-License-Identifier: Apache-2.0
"""Trees of volumes: cases with their channels and label maps, found by names alone.

A layout is a pair of templates, such as ``{case}/{case}_{channel}{ext}`` for images and ``{case}/{case}_seg{ext}`` for
label maps. All paths are relative to the tree's root, with '/'.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from berdiff_fast.channels import BRATS, ENDINGS, PICTURES, channel_of, names_of
from berdiff_fast.data.importers.trees import Problems, natural
from berdiff_fast.regions import Regions


@dataclass(frozen=True)
class Case:
    """A scan and its readings, by name.

    Attributes:
        name: of the case.
        patient: whose it is; all cases of a patient go into one split.
        images: a path for each channel, in their order.
        masks: rater to the path of the label map.
    """

    name: str
    patient: str
    images: tuple[str, ...]
    masks: Mapping[int, str]


@dataclass(frozen=True)
class VolumeLayout:
    """A kind of tree of volumes.

    Attributes:
        shape: how it looks, for people.
        images, masks: templates with {case}, {channel}, {rater} and {ext}; several, the first that fits a file counts.
        channels: names of the channels; empty: as many as are found.
        regions: by default.
        patient: a regular expression; its first group, of a case's name, is the patient.
        foreground: cut slices around what is not 0.
    """

    shape: str
    images: tuple[str, ...]
    masks: tuple[str, ...]
    channels: tuple[str, ...] = ()
    regions: str = ""
    patient: str = r"(.+)"
    foreground: bool = False


VOLUME_LAYOUTS = {
    "brats": VolumeLayout(
        "CASE/{CASE_flair.nii.gz,CASE_t1.nii.gz,CASE_t1ce.nii.gz,CASE_t2.nii.gz,CASE_seg.nii.gz}, or CASE-t2f.nii.gz",
        # In a folder of its own, or beside others; a case's folder may also be named as the tree.
        (
            "{case}/{case}_{channel}{ext}",
            "{case}/{case}-{channel}{ext}",
            "{case}_{channel}{ext}",
            "{case}-{channel}{ext}",
        ),
        (
            *("{case}/{case}_seg{ext}", "{case}/{case}-seg{ext}", "{case}/{case}_seg_{rater}{ext}"),
            *("{case}_seg{ext}", "{case}-seg{ext}", "{case}_seg_{rater}{ext}"),
        ),
        channels=BRATS,
        # Cases of BraTS 2023 end in the number of a visit.
        patient=r"(BraTS-[A-Za-z]+-\d+)-\d{3}$|(.+)",
        foreground=True,
    ),
    "nnunet": VolumeLayout(
        "{imagesTr/CASE_0000.nii.gz,labelsTr/CASE.nii.gz,dataset.json}",
        ("imagesTr/{case}_{channel}{ext}",),
        ("labelsTr/{case}{ext}",),
    ),
    "qubiq": VolumeLayout(
        "CASE/{image.nii.gz,task01_seg01.nii.gz,task01_seg02.nii.gz,...}",
        ("{case}/image{ext}",),
        ("{case}/task01_seg{rater}{ext}", "{case}/seg{rater}{ext}"),
    ),
}

#: Layouts that pictures come in, too.
_OF_PICTURES = ("nnunet", "qubiq")

#: Whole tumour, as in the paper, by the labels of either year.
WHOLE_TUMOUR = {"_": "WT=1,2,4", "-": "WT=1,2,3"}


def compiled(template: str, channels: Sequence[str] = (), endings: Sequence[str] = ENDINGS) -> re.Pattern[str]:
    """A template as a regular expression of whole paths, whose {ext} is one of ``endings``.

    Raises:
        ValueError: it has no {case}, or a name that there is not.
    """
    named = "|".join(re.escape(c) for c in sorted(channels, key=len, reverse=True)) or r"[A-Za-z0-9]+"
    parts = {
        "case": r"(?P<case>[^/]+?)",
        "channel": rf"(?P<channel>{named})",
        "rater": r"(?P<rater>\d{1,4})",
        "ext": "(?:" + "|".join(re.escape(end) for end in endings) + ")",
    }
    found, seen = [], set()
    for text in re.split(r"(\{[^{}]*\})", template):
        name = text[1:-1] if text.startswith("{") and text.endswith("}") else None
        if name is None:
            found.append(re.escape(text))
        elif name not in parts:
            raise ValueError(f"{template!r} has {text}; known are {{case}}, {{channel}}, {{rater}} and {{ext}}")
        else:
            found.append(f"(?P={name})" if name in seen and name != "ext" else parts[name])
            seen.add(name)
    if "case" not in seen:
        raise ValueError(f"{template!r} must have {{case}}, which tells cases apart")
    return re.compile("".join(found), re.IGNORECASE | re.DOTALL)


def detect_volumes(root: Path) -> dict[str, str]:
    """Layouts that the tree looks like, and what shows it."""
    paths = list(paths_in(root, depth=2, at_most=2000))
    return _detected(paths, VOLUME_LAYOUTS, ENDINGS) or _detected(paths, _OF_PICTURES, PICTURES)


def _detected(paths: Sequence[str], names: Iterable[str], endings: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in names:
        layout = VOLUME_LAYOUTS[name]
        patterns = [compiled(t, _spelled(layout.channels), endings) for t in layout.images]
        image = next((path for path in paths if any(p.fullmatch(path) for p in patterns)), None)
        if image:
            found[name] = f"there is {image}"
    return found


def _spelled(channels: Sequence[str]) -> tuple[str, ...]:
    return tuple(one for channel in channels for one in names_of(channel))


def list_cases(
    root: Path,
    layout: VolumeLayout,
    channels: Sequence[str],
    problems: Problems,
    ignored: list[str],
    pictures: bool = False,
) -> tuple[list[Case], tuple[str, ...]]:
    """The cases of a tree, and the names of their channels. If it has no volumes, its cases are pictures.

    Args:
        root: of the tree.
        layout: templates.
        channels: the wanted names; the layout's, or all that are found, by default.
        problems: gets what is wrong: a channel that is missing, or there twice; a case without a label map.
        ignored: gets files that no template fits.
        pictures: look for pictures alone.
    """
    wanted = tuple(channels) or layout.channels
    spelled = _spelled(wanted)
    paths = list(paths_in(root, depth=4))
    volumes = [compiled(t, spelled) for t in layout.images]
    pictures = pictures or not any(pattern.fullmatch(path) for path in paths for pattern in volumes)
    endings = PICTURES if pictures else ENDINGS
    of_images = [compiled(t, spelled, endings) for t in layout.images]
    of_masks = [compiled(t, endings=endings) for t in layout.masks]
    images: dict[str, dict[str, str]] = {}
    masks: dict[str, dict[int, str]] = {}
    for path in paths:
        case_of_mask = next((m for p in of_masks if (m := p.fullmatch(path))), None)
        case_of_image = next((m for p in of_images if (m := p.fullmatch(path))), None)
        if case_of_mask and not (case_of_image and wanted):
            number = case_of_mask.groupdict().get("rater")
            _once(masks.setdefault(case_of_mask["case"], {}), 0 if number is None else int(number), path, problems)
        elif case_of_image:
            raw = case_of_image.groupdict().get("channel", "image") or "image"
            channel = (channel_of(raw, wanted) or raw) if wanted else raw
            _once(images.setdefault(case_of_image["case"], {}), channel, path, problems)
        else:
            ignored.append(path)
    names = wanted or tuple(sorted({c for found in images.values() for c in found}, key=natural))
    cases = []
    for name in sorted({*images, *masks}, key=natural):
        there = images.get(name, {})
        lacking = [channel for channel in names if channel not in there]
        first = next(iter((there or masks[name]).values()))
        if lacking:
            problems.add(first, f"case {name} lacks its channel {', '.join(lacking)}")
        elif not masks.get(name):
            problems.add(first, f"case {name} has no label map")
        else:
            found = re.match(layout.patient, name)
            patient = next((g for g in found.groups() if g), name) if found else name
            # Raters are numbered from 0, whatever the first number is.
            numbers = {number: k for k, number in enumerate(sorted(masks[name]))}
            raters = {numbers[number]: path for number, path in masks[name].items()}
            cases.append(Case(name, patient, tuple(there[c] for c in names), raters))
    return cases, names


def _once(found: dict[Any, str], key: Any, path: str, problems: Problems) -> None:
    if found.setdefault(key, path) != path:
        problems.add(path, f"duplicate: {found[key]} is the same of the same case")


def paths_in(root: Path, depth: int, at_most: int = 2**62) -> Iterator[str]:
    """Files of a tree, in natural order, without hidden ones."""
    count = 0
    for where, folders, files in os.walk(root):
        inside = Path(where).relative_to(root)
        folders[:] = sorted((f for f in folders if not f.startswith(".")), key=natural)
        if len(inside.parts) >= depth:
            folders.clear()
        for name in sorted(files, key=natural):
            if not name.startswith("."):
                count += 1
                yield (inside / name).as_posix()
        if count >= at_most:
            return


def nnunet_names(root: Path) -> tuple[dict[str, str], str]:
    """Of a ``dataset.json``: number of a channel ("0000") to its name, and regions in words; empty where it has none.

    Raises:
        ValueError: it cannot be read, or does not say what it should.
    """
    path = root / "dataset.json"
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"dataset.json: cannot be read as JSON: {error}") from error
    channels = content.get("channel_names", content.get("modality", {})) if isinstance(content, dict) else None
    labels = content.get("labels", {}) if isinstance(content, dict) else None
    if not isinstance(channels, dict) or not isinstance(labels, dict):
        raise ValueError("dataset.json: must have channel_names and labels, objects both")
    named = {}
    for number, name in channels.items():
        if not str(number).isdecimal() or not isinstance(name, str):
            raise ValueError(
                f"dataset.json: channel_names must be numbers with names, got {number!r:.40}: {name!r:.40}"
            )
        named[f"{int(number):04d}"] = re.sub(r"[^A-Za-z0-9_+-]+", "_", name).strip("_") or f"channel{number}"
    rows = []
    for key, value in labels.items():  # nnU-Net v2 has names first, version 1 and MSD numbers
        name, numbers = (value, key) if isinstance(value, str) else (key, value)
        numbers = numbers if isinstance(numbers, list) else [numbers]
        try:
            numbers = [int(n) for n in numbers]
        except (TypeError, ValueError):
            raise ValueError(f"dataset.json: labels must be numbers, got {value!r:.40} for {key!r:.40}") from None
        if numbers != [0] and str(name).lower() not in ("background", "ignore"):
            rows.append((re.sub(r"[^A-Za-z0-9_+-]+", "_", str(name)).strip("_"), tuple(numbers)))
    return named, str(Regions(tuple(rows))) if rows else ""
