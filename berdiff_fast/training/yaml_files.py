# SPDX-License-Identifier: Apache-2.0
"""YAML files of settings, and those that come with the package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from berdiff_fast import limits, words

_BUNDLED = Path(__file__).parent / "configs"

#: Of a YAML file, and of what it says once each alias is written out: far more than a config has.
_MOST_BYTES, _MOST_VALUES = 2**20, 10_000


#: Configs that were called something else before.
_FORMER = {"lidc2": "lidc"}


def bundled_configs() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(p.stem for p in _BUNDLED.glob("*.yaml"))


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a YAML file, or in a config that comes with the package (``bundled_configs()``).

    Raises:
        FileNotFoundError: neither a file nor a bundled name.
        ValueError: not a YAML mapping, or one that says more than a config can.
    """
    import yaml

    file = Path(path)
    if not file.is_file():
        path = _FORMER.get(str(path), path)
        if str(path) not in bundled_configs():
            raise FileNotFoundError(
                f"config: no file {str(path)!r}, and no bundled config of that name (there are {bundled_configs()})"
            )
        file = _BUNDLED / f"{path}.yaml"
    if file.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{file} must have at most {_MOST_BYTES} bytes, got {file.stat().st_size}")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        said = limits.count(values, {})
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{file} is not YAML: {words.line(error)}") from error
    if said > _MOST_VALUES:
        raise ValueError(f"{file} must say at most {_MOST_VALUES} values, got {said:.3g} (aliases of aliases?)")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold keys and values, got a {type(values).__name__}")
    return values


def dump(values: dict[str, Any]) -> str:
    """The text of a YAML file: a line for each setting, under its section."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Lists stay on their line."""

    def line(dumper: Any, value: tuple[Any, ...]) -> Any:
        return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)

    Dumper.add_representer(tuple, line)
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, default_flow_style=False)
