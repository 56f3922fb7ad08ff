# SPDX-License-Identifier: Apache-2.0
"""The files of an import, but its reports: a slice is read, checked and written before the next one."""

from __future__ import annotations

import json
import math
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from berdiff_fast._version import __version__
from berdiff_fast.channels import COLOUR
from berdiff_fast.data import pixels
from berdiff_fast.data.importers.reading import Reader
from berdiff_fast.data.importers.report import FORMAT, Report
from berdiff_fast.data.importers.splits import DEFAULT_SPLIT, RULE
from berdiff_fast.data.importers.trees import SPLITS, Slice, natural, numbers
from berdiff_fast.data.importers.writing import SplitReport, Writer

_SHOWN = 8  # slices in the preview


def write_files(
    folder: Path,
    placed: list[tuple[str, Slice]],
    ids: dict[str, int],
    reader: Reader,
    parameters: dict[str, Any],
    progress: bool,
) -> tuple[dict[str, SplitReport], list[tuple[np.ndarray, np.ndarray]]]:
    """Write each split's file; what is in it, and a few slices (image, masks) to look at."""
    from tqdm import tqdm

    planned = Counter(name for name, _ in placed)
    names: dict[str, set[str]] = {}
    for _, one in placed:
        names.setdefault(one.patient, set()).add(one.nodule)
    nodules = {patient: numbers(sorted(found))[0] for patient, found in names.items()}
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
                attributes = {
                    "format": FORMAT,
                    "berdiff_fast": __version__,
                    "source": parameters["layout"],
                    "split": name,
                    "parameters": json.dumps(parameters),
                }
                if reader.colour:
                    attributes["channels"] = json.dumps(COLOUR)
                image, masks = pair
                writers[name] = Writer(
                    folder / f"{name}.h5", planned[name], image.shape, masks.shape, attributes, image.dtype
                )
                stack.callback(writers[name].close)
            number = nodules[one.patient][one.nodule]
            writers[name].append(*pair, ids[one.patient], number, one, reader.valid(one))
            if index // every >= len(shown):
                shown.append((pixels.to_preview(pair[0]), pair[1]))
        done = {name: writer.finish() for name, writer in writers.items()}
    none = (0,) * reader.raters
    return {name: done.get(name, SplitReport(0, 0, none, none)) for name in SPLITS}, shown


def write_reports(
    folder: Path,
    report: Report,
    patients_of: dict[str, list[str]],
    rule: str,
    shares: tuple[int, int, int] | None,
    seed: int,
    shown: list[tuple[np.ndarray, np.ndarray]],
) -> None:
    """Write what lies beside the HDF5 files of an import: splits.json, import.json, a preview of what is ``shown``."""
    drawn = rule is RULE
    splits = {
        "format": FORMAT,
        "rule": rule,
        "shares": list(shares or DEFAULT_SPLIT) if drawn else None,
        "seed": seed if drawn else None,
        "counts": {name: {"patients": c.patients, "slices": c.slices} for name, c in report.splits.items()},
        **{name: sorted(patients_of[name], key=natural) for name in SPLITS},
    }
    (folder / "splits.json").write_text(json.dumps(splits, indent=2) + "\n", encoding="utf-8")
    (folder / "import.json").write_text(report.to_json(), encoding="utf-8")
    if shown:
        _preview(folder / "preview.png", shown)


def _preview(path: Path, shown: list[tuple[np.ndarray, np.ndarray]]) -> None:
    from PIL import Image

    pairs = [pixels.contours(image, masks) for image, masks in shown]
    pairs += [np.zeros_like(pairs[0])] * (len(pairs) % 2)
    rows = [np.concatenate(pairs[k : k + 2], axis=1) for k in range(0, len(pairs), 2)]
    Image.fromarray(np.concatenate(rows)).save(path)
