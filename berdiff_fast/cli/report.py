# SPDX-License-Identifier: Apache-2.0
"""``berdiff-fast report``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from berdiff_fast.cli.base import Command, Files, Flag
from berdiff_fast.words import shown


@dataclass(frozen=True)
class Report(Command):
    """Write report.html, to look at, for results of sample.

    example: berdiff-fast report masks/ --raters reader1.nii.gz reader2.nii.gz

    Args:
        folder: what `sample` wrote
        input: the scan, if it is no longer where it was
        raters: masks to compare with (see sample)
        anonymize: name no file, in a report to be passed on
    """

    folder: Annotated[Positional[str], arg(metavar="FOLDER")]
    input: Annotated[str | None, arg(metavar="FILE")] = None
    raters: Files = ()
    anonymize: Flag = False

    def run(self) -> int:
        from berdiff_fast.scans import results

        written = results.report_again(self.folder, self.input, self.raters, anonymize=self.anonymize)
        print(shown(str(written)))
        return 0
