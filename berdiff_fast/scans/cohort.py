# SPDX-License-Identifier: Apache-2.0
"""Many scans with one model: each goes on where it stopped, a bad one is a line in a table, processes share them.

A case is done when its folder has its summary; nothing else says so. Who works on one holds a lock on its folder, which
the system takes back when a process dies. So any number of processes may be started on one folder, together or one
after another, and what they leave depends on the cases alone.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import functools
import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from berdiff_fast import locks
from berdiff_fast.files import append_text, own_folder, refuse_link, write_text
from berdiff_fast.model import fingerprint
from berdiff_fast.scans.case import Request, sample_case
from berdiff_fast.scans.cases import IN_SLICE, PAGE, TABLE, Case
from berdiff_fast.scans.result_files import SUMMARY, clear_up, read_summary, remove
from berdiff_fast.scans.share import Share
from berdiff_fast.words import line

logger = logging.getLogger("berdiff_fast")

#: Where it is kept why cases failed, a file each.
_FAILED = ".failed"

DONE, FAILED, UNFINISHED = "done", "failed", "unfinished"


@dataclass(frozen=True)
class Cohort:
    """Cases, how masks are drawn of them, and the folder of their results.

    Attributes:
        request: how; the same for all.
        cases: which.
        output: the folder; each case has one in it, by its name.
        where: slices, center, center_mm or roi of cases that have none of their own.
    """

    request: Request
    cases: Sequence[Case]
    output: Path
    where: Mapping[str, Any]

    def sample(self, share: Share, progress: bool = False) -> list[dict[str, Any]]:
        """Draw masks of all cases that nobody has drawn or is drawing, this process's own ones first.

        Returns:
            The rows of ``cohort.csv``, which is written again, as is ``index.html``.

        Raises:
            FileExistsError: results are there that were drawn otherwise, and ``overwrite`` is False.
            OSError: the disk is full, or the folder cannot be written to.
        """
        self.request.check()
        self._check()
        own_folder(self.output)
        failed = own_folder(self.output / _FAILED)
        own = share.own(self.cases)
        for case in own:
            self._failure(case).unlink(missing_ok=True)  # the files may have been mended since
        with _bar(progress, len(self.cases), sum(self.is_done(case) for case in self.cases)) as tell:
            for case in (*own, *share.others(self.cases)):
                if self.is_done(case):
                    clear_up(self.output / case.name)
                elif not self._reason(case):
                    tell(case.name, self._sample_one(case))
        with contextlib.suppress(OSError):
            failed.rmdir()  # if nothing failed
        return self._tell()

    def _tell(self) -> list[dict[str, Any]]:
        """Write the table, one process after the other: the last one's is of all."""
        for _ in range(600):
            try:
                with locks.exclusive(self.output):
                    return self.write_table()
            except locks.BusyError:
                time.sleep(0.1)
        with locks.exclusive(self.output):
            return self.write_table()

    def _sample_one(self, case: Case) -> str:
        """Draw masks of one case; what became of it."""
        try:
            sample_case(
                self.request,
                case.inputs,
                self.output / case.name,
                series=case.series,
                raters=case.raters,
                note={"request_sha256": self.identity(case)},
                **self._place(case),
            )
        except locks.BusyError:
            return UNFINISHED
        except Exception as error:  # whatever is wrong with one scan is no reason to leave the others
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            if self.is_done(case):  # by another process, just now
                return DONE
            own_folder(self.output / _FAILED)
            # By one call, and not by way of a file beside it, which would stay if the process were killed.
            self._failure(case).unlink(missing_ok=True)
            append_text(self._failure(case), line(error) + "\n")
            logger.warning("%s: %s", case.name, line(error))
            return FAILED
        return DONE

    def _place(self, case: Case) -> dict[str, Any]:
        """Where in its scan: what it says itself, and what is said for all. Of center, center_mm and roi only one."""
        told = IN_SLICE & case.where.keys()
        return {**{name: value for name, value in self.where.items() if not (told and name in IN_SLICE)}, **case.where}

    @functools.cached_property
    def _model(self) -> str:
        return fingerprint(self.request.model)

    def identity(self, case: Case) -> str:
        """SHA-256 of all that the masks of a case depend on, but for what is in its files."""
        request = self.request
        parts = {
            "model": self._model,
            "n": request.n,
            "steps": request.steps,
            "options": {k: str(v) for k, v in request.options.items() if k != "max_batch"},
            "where": self._place(case),
            "files": [Path(name).name for name in case.inputs],
            "raters": [Path(name).name for name in case.raters],
            "series": case.series,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def is_done(self, case: Case) -> bool:
        """Whether its results are there, drawn as they are wanted now."""
        summary = self._summary(case)
        return summary is not None and summary.get("request_sha256") == self.identity(case)

    def _summary(self, case: Case) -> dict[str, Any] | None:
        folder = self.output / case.name
        return read_summary(folder) if os.path.lexists(folder / SUMMARY) else None

    def _failure(self, case: Case) -> Path:
        return self.output / _FAILED / f"{case.name}.txt"

    def _reason(self, case: Case) -> str:
        """Why a case failed; empty where it did not, or where who was to write it was killed."""
        with contextlib.suppress(FileNotFoundError):
            return self._failure(case).read_text(encoding="utf-8").strip()
        return ""

    def _check(self) -> None:
        """Raise FileExistsError for what stands where results are to be."""
        if self.output.exists() and not self.output.is_dir():
            raise FileExistsError(f"output must be a folder, and {self.output} is a file")
        refuse_link(self.output / _FAILED)
        for name in (TABLE, PAGE):
            if (self.output / name).is_dir():
                raise FileExistsError(f"output: {self.output / name} is a folder, and a file is to have its name")
        if os.path.lexists(self.output / SUMMARY):
            raise FileExistsError(f"output: {self.output} holds the results of one scan; choose another folder")
        if self.request.overwrite:
            return
        for case in self.cases:
            if self._summary(case) is not None and not self.is_done(case):
                raise FileExistsError(
                    f"output: {self.output / case.name} holds results that were drawn otherwise (another model, seed, "
                    "number of masks, place or file); choose another folder, or overwrite them"
                )

    # ------------------------------------------------------------------ the table

    def rows(self) -> list[dict[str, Any]]:
        """A row for each case, in the order of the cases."""
        return [self._row(case) for case in self.cases]

    def _row(self, case: Case) -> dict[str, Any]:
        if self.is_done(case):
            summary = self._summary(case)
            assert summary is not None
            return {"case": case.name, "status": DONE, **_figures(summary, case.name)}
        if reason := self._reason(case):
            return {"case": case.name, "status": FAILED, "error": reason}
        return {"case": case.name, "status": UNFINISHED}

    def write_table(self) -> list[dict[str, Any]]:
        """Write ``cohort.csv`` and ``index.html`` of what is there now; the rows."""
        from berdiff_fast.imaging.index import write_index

        for name in (TABLE, PAGE):  # of a process that was killed while it wrote; nobody writes now but us
            for path in self.output.glob(f".{name}.*"):
                remove(path)
        rows = self.rows()
        last = ("report", "error")
        names = dict.fromkeys(("case", "status", *(key for row in rows for key in row if key not in last), *last))
        text = io.StringIO()
        table = csv.DictWriter(text, [*names], restval="", lineterminator="\n")
        table.writeheader()
        table.writerows({key: _plain(value) for key, value in row.items()} for row in rows)
        write_text(self.output / TABLE, text.getvalue(), follow=False)
        write_index(self.output / PAGE, rows, title="Cohort", model=Path(self.request.model_name).name)
        return rows


def _figures(summary: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What the table says of a case: volumes and their spread, of each region too, and how it compares with raters."""
    sizes = summary["sizes"]
    unit = "mL" if "mL" in sizes else "voxels"
    found: dict[str, Any] = {
        "masks": summary["n"],
        "empty": sum(voxels == 0 for voxels in sizes["voxels"]),
        **_spread("", sizes, unit),
    }
    for region, about in summary.get("regions", {}).items():
        found |= _spread(f"{region}_", about["sizes"], unit)
    if "raters" in summary:
        found |= {"ged": summary["raters"]["ged"], "hm_iou": summary["raters"]["hm_iou"]}
    if "report" in summary:
        found["report"] = f"{name}/{summary['report']}"
    return found


def _spread(prefix: str, sizes: Mapping[str, Any], unit: str) -> dict[str, float]:
    spread = sizes[f"spread_{unit}"]
    short = {"mean": "mean", "standard_deviation": "sd", "p05": "p05", "median": "median", "p95": "p95"}
    return {f"{prefix}{name}_{unit}": spread[key] for key, name in short.items()}


def _plain(value: Any) -> str:
    """A number with as many digits as tell it from others; text that no spreadsheet takes for a formula."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


@contextlib.contextmanager
def _bar(show: bool, total: int, done: int) -> Iterator[Callable[[str, str], None]]:
    """A bar over cases; it is told of each what became of it."""
    if not show:
        yield lambda name, status: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, initial=done, desc="cases", unit="case") as bar:

        def tell(name: str, status: str) -> None:
            bar.set_postfix_str(f"{name}: {status}", refresh=False)
            bar.update()

        yield tell
