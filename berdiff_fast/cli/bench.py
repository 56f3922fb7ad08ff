# SPDX-License-Identifier: Apache-2.0
"""``berdiff-fast bench``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from berdiff_fast.cli.base import Command, Files, Flag, Words
from berdiff_fast.files import write_text
from berdiff_fast.words import shown


@dataclass(frozen=True)
class Bench(Command):
    """Time kernels and whole calls against plain PyTorch on this machine.

    Every contender's result is checked before it is timed, and they are timed in turns.

    examples:
      berdiff-fast bench --quick                       under five minutes on a laptop
      berdiff-fast bench --output bench/               everything; writes bench.json, bench.md and bench.png
      berdiff-fast bench --only call                   cases whose name or group contains a word
      berdiff-fast bench --from bench/bench.json --update README.md

    Args:
        output: folder for JSON, table and picture
        append: keep the other cases of an earlier run of this day
        quick: leave out what takes minutes on a laptop
        compile: time torch.compile, or leave it out
        only: cases with one of these words
        contenders: these, and what they are compared with
        device: auto, cpu or cuda
        published: a checkout of the published code, which is run and timed too
        source: measure nothing, take what was measured before
        update: Markdown files with places for tables to fill
    """

    output: str = "bench"
    append: Flag = False
    quick: Flag = False
    compile: Flag = True
    only: Words = ()
    contenders: Words = ()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    published: Annotated[str | None, arg(metavar="CHECKOUT")] = None
    source: Annotated[str | None, arg(name="from", metavar="JSON")] = None
    update: Files = ()

    def run(self) -> int:
        from berdiff_fast.bench import report

        measured = report.read(self.source) if self.source else self._measure()
        for path in self.update:
            if not report.update(path, measured):
                raise ValueError(
                    f"update: {path} has no place for a table, such as <!-- bench: call --> <!-- /bench -->"
                )
        return 0

    def _measure(self) -> dict[str, Any]:
        import torch

        from berdiff_fast.bench import cases, report
        from berdiff_fast.bench.runner import Settings

        device: str = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        registry = cases.registry(
            device, quick=self.quick, compile=self.compile and not self.quick, published=self.published
        )
        chosen = [
            case for case in registry if not self.only or any(w in f"{case.group} {case.name}" for w in self.only)
        ]
        if not chosen:
            raise ValueError(f"only: no case has one of {list(self.only)} in its name or group")
        folder = Path(self.output)
        folder.mkdir(parents=True, exist_ok=True)
        settings = Settings(device, seconds=10.0 if self.quick else 60.0, contenders=list(self.contenders))
        file = folder / "bench.json"
        former = report.read(file) if self.append and file.is_file() else None
        measured = report.measure(chosen, settings, file, former=former)
        write_text(folder / "bench.md", report.tables(measured))
        try:
            report.plot(measured, folder / "bench.png")
        except ImportError as error:
            print(f"no picture: {error}", file=sys.stderr)
        print(f"written: {shown(str(folder))}")
        return measured
