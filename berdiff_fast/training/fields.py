# SPDX-License-Identifier: Apache-2.0
"""Sections of settings: typed, frozen, and found by their flat names too."""

from __future__ import annotations

import dataclasses
import difflib
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints


class Section:
    """A part of a config: a frozen dataclass whose values are of the types it declares.

    Attributes:
        ALSO: other names of settings, in files and in Python's mappings; "" is the section itself, given as a word.

    Raises:
        TypeError: a value of another type; the message names it as ``section.setting``.
        ValueError: a value that is none of the choices.
    """

    ALSO: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        section = type(self).__name__.lower()
        for name, kind in types(self.__class__).items():
            object.__setattr__(self, name, coerce(f"{section}.{name}", getattr(self, name), kind))


def types(owner: Any) -> dict[str, Any]:
    """The settings of a dataclass and their types."""
    kinds = get_type_hints(owner)
    return {f.name: kinds[f.name] for f in dataclasses.fields(owner)}


def is_section(kind: Any) -> bool:
    """Whether a type is a section."""
    return isinstance(kind, type) and issubclass(kind, Section)


def flat_names(owner: Any, *, prefixed: Sequence[str], renamed: Mapping[str, str]) -> dict[str, str]:
    """The place of every setting that is in a section, by its flat name.

    Args:
        owner: the dataclass of sections.
        prefixed: sections whose settings bear the section's name: ``prior_crop`` is ``prior.crop``.
        renamed: those that are called otherwise.
    """
    others = {place: flat for flat, place in renamed.items()}
    names: dict[str, str] = {}
    for section, kind in types(owner).items():
        for setting in types(kind) if is_section(kind) else ():
            place = f"{section}.{setting}"
            flat = others.get(place, f"{section}_{setting}" if section in prefixed else setting)
            assert flat not in names, f"{flat} is {names[flat]} and {place}"
            names[flat] = place
    return names


def flatten(settings: Any, flat: Mapping[str, str]) -> dict[str, Any]:
    """All settings by their flat names, tuples as lists, as JSON has them."""
    values = {name: getattr(settings, name) for name, kind in types(settings.__class__).items() if not is_section(kind)}
    for name, place in flat.items():
        section, _, setting = place.partition(".")
        values[name] = getattr(getattr(settings, section), setting)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def arrange(owner: Any, flat: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``owner`` from values by section, by place (``network.dropout``) and by flat name.

    Of a setting that is given twice the later one counts, so that ``{**former, "steps": 100}`` changes one.

    Raises:
        ValueError: an unknown name, for which the nearest is suggested.
        TypeError: a value of another type.
    """
    kinds = types(owner)
    arranged: dict[str, Any] = {}
    given: dict[str, dict[str, Any]] = {}

    def put(place: str, value: Any) -> None:
        section, _, setting = place.partition(".")
        known, setting = types(kinds[section]), kinds[section].ALSO.get(setting, setting)
        if setting not in known:
            raise _unknown(f"{section}.{setting}", [f"{section}.{name}" for name in known])
        given.setdefault(section, {})[setting] = value

    for key, value in values.items():
        section, _, setting = str(key).partition(".")
        if setting and is_section(kinds.get(section)):
            put(str(key), value)
        elif key in flat:
            put(flat[key], value)
        elif key not in kinds:
            raise _unknown(str(key), [*kinds, *flat])
        elif not is_section(kinds[key]):
            arranged[key] = coerce(key, value, kinds[key])
        elif isinstance(value, kinds[key]):
            arranged[key] = value
        elif isinstance(value, Mapping):
            for name, inner in value.items():
                put(f"{key}.{name}", inner)
        elif isinstance(value, str) and "" in kinds[key].ALSO:
            put(f"{key}.", value)
        elif value is not None:  # a heading of a YAML file with nothing under it
            raise TypeError(f"{key} must be a section of settings, got {value!r:.200}")
    for name, kind in kinds.items():
        if is_section(kind):
            base = arranged.get(name, kind())
            arranged[name] = dataclasses.replace(base, **given[name]) if name in given else base
    defaults = {f.name: f.default for f in dataclasses.fields(owner)}
    return defaults | arranged


def _unknown(key: str, known: Sequence[str]) -> ValueError:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
    return ValueError(f"unknown key {key!r} in the training config{hint}")


def coerce(name: str, value: Any, kind: Any) -> Any:
    """A value as one of ``kind``: bool, int, float, str, a choice (``Literal``) or a tuple of one of these. One word is
    a tuple of words, too.

    Raises:
        TypeError: a value of another type.
        ValueError: a value that is none of the choices.
    """
    if kind is float:
        # YAML reads 1e-4 as a string.
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise TypeError(f"{name} must be a number, got {value!r:.200}") from None
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {value!r:.200}")
        return float(value)
    if kind is int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        return int(value)
    if kind is bool:
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be true or false, got {value!r:.200}")
        return value
    if get_origin(kind) is Literal:
        if isinstance(value, bool):  # as YAML reads true and false
            value = str(value).lower()
        elif isinstance(value, int) and str(value) in get_args(kind):  # as YAML reads 3
            value = str(value)
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a string, got {value!r:.200}")
        if value not in get_args(kind):
            raise ValueError(f"{name} must be one of {list(get_args(kind))}, got {value!r:.200}")
        return value
    if kind is str:
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a string, got {value!r:.200}")
        return value
    inner = get_args(kind)[0]
    if isinstance(value, str) and (inner is str or get_origin(inner) is Literal):
        value = (value,)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list, got {value!r:.200}")
    return tuple(coerce(name, part, inner) for part in value)
