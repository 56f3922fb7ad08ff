# SPDX-License-Identifier: Apache-2.0
"""What all commands share: how words become a command, and types that several have among their options."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, ClassVar

import tyro
from tyro.conf import FlagCreatePairsOff, arg

from berdiff_fast.words import shown

#: A flag that has no opposite.
Flag = FlagCreatePairsOff[bool]
#: Paths, any number of them.
Files = Annotated[tuple[str, ...], arg(metavar="FILE [FILE ...]", help_behavior_hint="")]
Words = Annotated[tuple[str, ...], arg(metavar="WORD [WORD ...]", help_behavior_hint="")]
Packages = Annotated[tuple[str, ...], arg(metavar="PACKAGE [PACKAGE ...]", help_behavior_hint="")]
#: How many masks.
Masks = Annotated[int, arg(aliases=("-n",))]


class Command:
    """Base of the commands: dataclasses with a method ``run``, which returns the exit status."""

    #: Options by the names they had, which are still taken, with a note.
    FORMER: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def parse(cls, prog: str, arguments: list[str]) -> Command:
        """The command that words ask for.

        Raises:
            SystemExit: help was asked for (status 0), or the usage is wrong (status 2).
        """
        modern = []
        for word in arguments:
            option, equals, value = word.partition("=")
            if option in cls.FORMER:
                print(shown(f"{prog}: {option} is called {cls.FORMER[option]} now"), file=sys.stderr)
                word = cls.FORMER[option] + equals + value
            modern.append(word)
        return tyro.cli(cls, prog=prog, args=modern, config=(tyro.conf.DisallowNone,))

    def run(self) -> int:
        """Do the work; returns the exit status."""
        raise NotImplementedError
