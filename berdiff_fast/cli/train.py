# SPDX-License-Identifier: Apache-2.0
"""``berdiff-fast train``."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

from berdiff_fast.cli.base import Command
from berdiff_fast.training.fields import arrange
from berdiff_fast.training.sections import FLAT, Settings
from berdiff_fast.words import shown

if TYPE_CHECKING:
    from berdiff_fast.training.config import TrainConfig

#: Options that are in no section.
_PLAIN = ("help", "config", "output", "seed", "device", "quiet", "no-quiet")


@dataclass(frozen=True)
class Train(Settings, Command):
    """Train a model on an HDF5 file of slices with raters' masks; the same command again resumes.

    examples:
      berdiff-fast train --config lidc --train-data train.h5 --val-data val.h5 --output runs/lidc
      accelerate launch -m berdiff_fast.cli train ...      several GPUs
      berdiff-fast train --config lidc --help              with the file's values as defaults

    An option may leave its section out: --batch-size is --optimiser.batch-size, --prior-steps is --prior.steps, and
    --train-data and --val-data are --data.train and --data.validation. The command line wins over the file, and the
    file over the defaults. More: docs/training.md

    Args:
        config: YAML file of settings, or one that comes with the package: lidc, lidc_v1, lidc_whole
    """

    config: str = ""

    @classmethod
    def parse(cls, prog: str, arguments: list[str]) -> Command:
        """The run that words ask for: defaults, then the YAML file, then the words.

        Raises:
            SystemExit: help was asked for (status 0), or the usage is wrong (status 2).
            FileNotFoundError, ValueError, TypeError: of the YAML file.
        """
        path = _value("--config", arguments)
        values = {}
        if path:
            from berdiff_fast.training.yaml_files import read_yaml

            try:
                values = arrange(Settings, FLAT, read_yaml(path))
            except (TypeError, ValueError) as error:
                raise type(error)(error if str(error).startswith(path) else f"{path}: {error}") from None
        return tyro.cli(
            cls,
            prog=prog,
            args=[_in_section(word, prog) for word in arguments],
            default=cls(config=path, **values),
            config=(tyro.conf.DisallowNone,),
        )

    def checked(self) -> TrainConfig:
        """The settings, whose values fit each other.

        Raises:
            ValueError, TypeError: they do not; the message names the YAML file too, if there is one.
        """
        from berdiff_fast.training.config import TrainConfig

        try:
            return TrainConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Settings)})
        except (TypeError, ValueError) as error:
            where = f"{self.config}, with the command line: " if self.config else ""
            raise type(error)(f"{where}{error}") from None

    def run(self) -> int:
        from berdiff_fast import training

        training.require()
        from berdiff_fast.training import loop

        path = loop.train(self.checked())
        if not self.quiet:
            print(shown(str(path)))
        training.leave()
        return 0


def _value(option: str, arguments: list[str]) -> str:
    """The last value of an option, which is needed before the others can be read."""
    value = ""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if word == option:
            value = following
        elif word.startswith(f"{option}="):
            value = word.partition("=")[2]
    return value


def _in_section(word: str, prog: str) -> str:
    """An option without its section, as the command line has it: ``--no-flip`` is ``--augmentation.no-flip``."""
    option, equals, value = word.removeprefix("--").partition("=")
    if not word.startswith("--") or not option or "." in option or option in _PLAIN:
        return word
    name = option.replace("-", "_")
    negative = name not in FLAT and name.startswith("no_")
    name = name.removeprefix("no_") if negative else name
    if name not in FLAT:
        near = difflib.get_close_matches(name, FLAT, n=1)
        hint = f"did you mean --{near[0].replace('_', '-')}?" if near else f"{prog} --help lists them all"
        print(shown(f"{prog}: there is no option {word.partition('=')[0]}; {hint}"), file=sys.stderr)
        raise SystemExit(2)
    section, _, setting = FLAT[name].partition(".")
    return f"--{section}.{'no-' if negative else ''}{setting.replace('_', '-')}{equals}{value}"
