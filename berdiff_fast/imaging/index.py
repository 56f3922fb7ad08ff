# SPDX-License-Identifier: Apache-2.0
"""The page of a cohort: a table of its cases, with volumes and their spread, and the way to their reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from berdiff_fast.files import write_text
from berdiff_fast.imaging import tables
from berdiff_fast.imaging.report import templates

#: Width of the bars, in pixels.
_WIDTH = 160


def write_index(path: Path, rows: Sequence[Mapping[str, Any]], *, title: str, model: str) -> None:
    """Write the page; it loads nothing but the reports that its links lead to.

    Args:
        path: the file.
        rows: of ``cohort.csv``: case, status, and of what is done masks, empty, volumes, report; of what failed error.
        title: the heading.
        model: what drew the masks.
    """
    unit = next((key.removeprefix("median_") for row in rows for key in row if key.startswith("median_")), "mL")
    regions = dict.fromkeys(
        key.removesuffix(f"_median_{unit}") for row in rows for key in row if key.endswith(f"_median_{unit}")
    )
    most = max((row[f"p95_{unit}"] for row in rows if f"p95_{unit}" in row), default=0) or 1
    shown = []
    for row in rows:
        found: dict[str, Any] = {**row, "link": quote(row["report"]) if "report" in row else ""}
        if f"median_{unit}" in row:
            low, middle, high = (row[f"{name}_{unit}"] for name in ("p05", "median", "p95"))
            found |= {
                "sizes": [(low, middle, high)]
                + [tuple(row[f"{region}_{name}_{unit}"] for name in ("p05", "median", "p95")) for region in regions],
                "bar": [round(_WIDTH * value / most, 1) for value in (low, middle, high)],
                "existence": 1 - row["empty"] / row["masks"],
            }
        shown.append(found)
    count = {status: sum(row["status"] == status for row in rows) for status in ("done", "failed", "unfinished")}
    parts = {
        "title": title,
        "model": model,
        "style": Markup((Path(__file__).parent / "report.css").read_text("utf-8")),
        "rows": shown,
        "unit": unit,
        "regions": [*regions],
        "width": _WIDTH,
        "raters": any("ged" in row for row in rows),
        "facts": ", ".join(f"{many} {status}" for status, many in count.items() if many),
        "cases": tables.count(len(rows), "case"),
    }
    write_text(path, templates().get_template("index.html").render(parts), follow=False)
