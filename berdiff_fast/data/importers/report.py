# SPDX-License-Identifier: Apache-2.0
"""What an import found and wrote."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from berdiff_fast.data import pixels
from berdiff_fast.data.importers.trees import Problem
from berdiff_fast.data.importers.writing import SplitReport
from berdiff_fast.words import shown

#: Version of the HDF5 layout and of splits.json: 1 had no ``rater_valid``, and is read as it was.
FORMAT = 2


@dataclass(frozen=True)
class Report:
    """What an import found and wrote; ``import.json`` holds the same.

    Attributes:
        source, output: the tree and the folder written.
        layout, evidence: the layout taken, and why.
        size: (H, W) in pixels, or (D, H, W) of whole volumes.
        raters: R.
        splits: "train", "val", "test" to what is in it; one without slices has no file.
        problems: everything that was left out, and why; empty if ``on_error`` is "stop".
        ignored: files and folders that the layout has no use for.
        notes: what a user should know about this import.
        parameters: the arguments of the call.
        berdiff_fast, format: versions of the package and of the HDF5 layout.
        readings: of the layout "tcia": how many nodules, readings and other marks there are, in each scan and
            altogether; not told of other layouts.
    """

    source: str
    output: str
    layout: str
    evidence: str
    size: tuple[int, ...]
    raters: int
    splits: dict[str, SplitReport]
    problems: tuple[Problem, ...]
    ignored: tuple[str, ...]
    notes: tuple[str, ...]
    parameters: dict[str, Any]
    berdiff_fast: str
    format: int = FORMAT
    readings: dict[str, Any] | None = None

    def to_json(self) -> str:
        """The report as JSON text."""
        told = {name: value for name, value in asdict(self).items() if name != "readings" or value is not None}
        return json.dumps(told, indent=2) + "\n"

    def to_text(self) -> str:
        """The report in a few lines; of many problems only the first."""
        what = "volumes" if len(self.size) == 3 else "slices"
        lines = [
            f"layout    {self.layout}: {self.evidence}",
            f"{what:9s} {pixels.by(self.size)}, {self.raters} raters",
        ]
        for name, split in self.splits.items():
            empty = f"; empty masks by rater: {', '.join(map(str, split.empty_masks))}" if split.slices else ""
            lines.append(f"{name:9s} {split.slices} {what} of {split.patients} patients{empty}")
        lines += [f"note      {note}" for note in self.notes]
        if self.ignored:
            lines.append(f"ignored   {len(self.ignored)} files or folders, such as {shown(self.ignored[0])}")
        if self.problems:
            lines.append(f"problems  {len(self.problems)}, all of them in {Path(self.output) / 'import.json'}")
            lines += [f"  {shown(one.path)}: {shown(one.reason)}" for one in self.problems[:5]]
        return "\n".join([*lines, f"written   {self.output}"])
