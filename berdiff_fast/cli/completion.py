# SPDX-License-Identifier: Apache-2.0
"""``berdiff-fast completion``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from berdiff_fast.cli.base import Command


@dataclass(frozen=True)
class Completion(Command):
    """Print what makes a shell complete this command.

    example: eval "$(berdiff-fast completion bash)"

    Args:
        shell: the shell
    """

    shell: Positional[Literal["bash", "zsh", "tcsh", "fish"]]

    def run(self) -> int:
        from berdiff_fast import cli

        try:
            return cli.overview(["--tyro-print-completion", self.shell])
        except SystemExit as done:
            return int(done.code or 0)
