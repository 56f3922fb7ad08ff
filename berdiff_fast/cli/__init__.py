# SPDX-License-Identifier: Apache-2.0
"""The command ``berdiff-fast``: a file per command, whose types and docstrings are its options and its help.

A command is a frozen dataclass with a method ``run``. Its module imports what only its work needs inside ``run``, so
that ``--version``, ``--help`` and completion come without torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from berdiff_fast import words

#: Commands in the order of ``--help``: name, module, class.
COMMANDS = {
    "demo": ("demo", "Demo"),
    "info": ("info", "Info"),
    "sample": ("sample", "Sample"),
    "report": ("report", "Report"),
    "import": ("import_tree", "Import"),
    "train": ("train", "Train"),
    "evaluate": ("evaluate", "Evaluate"),
    "bench": ("bench", "Bench"),
    "completion": ("completion", "Completion"),
}

DESCRIPTION = """\
Bernoulli diffusion for segmentation, fast.

examples:
  berdiff-fast demo
  berdiff-fast sample ct.nii.gz --center 214 130 --slices 80 96 --output masks
  berdiff-fast COMMAND --help                          more of each

before a COMMAND: --version; --debug shows a traceback on errors

exit status: 0 done; 1 an error, in one line on stderr; 2 wrong usage; 130 interrupted by Ctrl-C
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status.

    Args:
        arguments: the words after ``berdiff-fast``; by default those of the process.

    Raises:
        SystemExit: help was asked for (status 0), or the usage is wrong (status 2).
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    debug = given[:1] == ["--debug"]
    name, *rest = given[debug:] or ["--help"]
    if name == "--version":
        from berdiff_fast._version import __version__

        print(f"berdiff-fast {__version__}")
        return 0
    if name not in COMMANDS:
        return overview([name, *rest])
    try:
        return command(name).parse(f"berdiff-fast {name}", rest).run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        print(f"berdiff-fast {name}: {words.line(error)}", file=sys.stderr)
        return 1


def command(name: str) -> Any:
    """The class of a command."""
    module, owner = COMMANDS[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), owner)


def overview(arguments: list[str]) -> int:
    """Answer words that begin with no command: help, completion, wrong usage."""
    from typing import Annotated, Union

    import tyro

    choices = []
    for name in COMMANDS:
        owner = command(name)
        short = " ".join(owner.__doc__.split("\n\n")[0].split())
        choices.append(Annotated[owner, tyro.conf.subcommand(name, description=short)])
    either: Any = Union[tuple(choices)]  # noqa: UP007
    tyro.cli(
        either,
        prog="berdiff-fast",
        description=DESCRIPTION,
        args=arguments,
        config=(tyro.conf.DisallowNone,),
    )
    return 0
