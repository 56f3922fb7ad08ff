# SPDX-License-Identifier: Apache-2.0
"""``berdiff-fast info``."""

from __future__ import annotations

from dataclasses import dataclass

from berdiff_fast.cli.base import Command, Flag


@dataclass(frozen=True)
class Info(Command):
    """Print versions and backends, and why each missing one is missing.

    Args:
        json: print one JSON object
    """

    json: Flag = False

    def run(self) -> int:
        from berdiff_fast import info

        return info.main(["--json"] if self.json else [])
