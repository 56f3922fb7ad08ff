# SPDX-License-Identifier: Apache-2.0
"""Regions of a label map: what the K channels of a mask stand for, and how they become labels again.

Glioma segmentations (BraTS) label tissue, 1 necrosis, 2 oedema, 4 enhancing tumour, and are judged by regions that
contain each other: whole tumour (1, 2, 4), tumour core (1, 4), enhancing tumour (4). nnU-Net trains on regions too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from berdiff_fast import checks

#: Names go into names of files.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]{0,31}")

#: Behind the name of a channel that is a neighbour of a slice, or the slice itself (``channels.in_context``).
_PLACE = re.compile(r"\[(0|[+-][1-9]\d{0,3})\]$")

#: The largest label, which fits two bytes.
LARGEST_LABEL = 2**16 - 1


def check_names(name: str, names: Any, *, placed: bool = False) -> tuple[str, ...]:
    """``names`` as a tuple of different names, each of letters, digits, "_", "+" and "-".

    Args:
        name: what the argument is called in errors.
        names: what came.
        placed: whether a name may end in the place of a slice among its neighbours, such as ``[-1]``.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"{name} must be a list of names, got {names!r:.80}")
    for one in names:
        if not isinstance(one, str) or not _NAME.fullmatch(_PLACE.sub("", one) if placed else one):
            raise ValueError(f"{name} must be names of letters, digits, '_', '+' and '-', got {one!r:.80}")
    if len({one.lower() for one in names}) < len(names) or not names:
        raise ValueError(f"{name} must be different names, one at least, got {list(names)!r:.200}")
    return tuple(names)


@dataclass(frozen=True)
class Regions:
    """Named sets of labels.

    Args:
        table: a region's name and its labels, in the order of the mask's channels.

    Attributes:
        names: (K,) of the regions.
        inside: pairs (k, j): region k is a part of region j, since its labels are some of j's.

    Raises:
        TypeError, ValueError: naming the argument ``regions``.
    """

    table: tuple[tuple[str, tuple[int, ...]], ...]

    def __post_init__(self) -> None:
        rows = list(self.table.items() if isinstance(self.table, Mapping) else self.table)
        if any(isinstance(row, str) or len(row) != 2 for row in rows):
            raise TypeError(f"regions must be names with their labels, got {self.table!r:.200}")
        check_names("regions", [row[0] for row in rows])
        found = []
        for name, labels in rows:
            if isinstance(labels, (str, int)) or not labels:
                raise ValueError(f"regions: {name} must have a list of labels, one at least, got {labels!r:.80}")
            values = tuple(checks.integer(f"regions: a label of {name}", label, 1) for label in labels)
            if max(values) > LARGEST_LABEL:
                raise ValueError(f"regions: a label of {name} must be at most {LARGEST_LABEL}, got {max(values)}")
            found.append((name, tuple(sorted(set(values)))))
        object.__setattr__(self, "table", tuple(found))

    @classmethod
    def parse(cls, text: str) -> Regions:
        """Regions from words such as "WT=1,2,4 TC=1,4 ET=4".

        Raises:
            ValueError: naming the argument ``regions``.
        """
        rows = []
        for word in text.split():
            name, equals, labels = word.partition("=")
            if not equals or not re.fullmatch(r"\d{1,5}(,\d{1,5})*", labels):
                raise ValueError(f"regions must be NAME=LABEL,LABEL,... as in WT=1,2,4 TC=1,4 ET=4, got {word!r:.80}")
            rows.append((name, tuple(int(label) for label in labels.split(","))))
        return cls(tuple(rows))

    def __str__(self) -> str:
        return " ".join(f"{name}={','.join(map(str, labels))}" for name, labels in self.table)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.table)

    @property
    def labels(self) -> set[int]:
        """All labels that a region has."""
        return {label for _, labels in self.table for label in labels}

    @property
    def inside(self) -> tuple[tuple[int, int], ...]:
        sets = [set(labels) for _, labels in self.table]
        return tuple((k, j) for k, a in enumerate(sets) for j, b in enumerate(sets) if a < b)

    def masks_of(self, label_map: np.ndarray) -> np.ndarray:
        """A mask of each region: bool (K, *shape), of labels (*shape)."""
        return np.stack([self.mask_of(label_map, name) for name in self.names])

    def mask_of(self, label_map: np.ndarray, name: str) -> np.ndarray:
        """The mask of one region: bool, of the labels' shape."""
        return np.isin(label_map, dict(self.table)[name])

    @property
    def own_labels(self) -> tuple[int, ...]:
        """The label that a region gives to what is in no smaller region of it: oedema for the whole tumour.

        Where several are left to a region, the least of them, since a mask cannot tell them apart.
        """
        sets, inside = [set(labels) for _, labels in self.table], self.inside
        smaller = [set().union(*(sets[k] for k, j in inside if j == own)) for own in range(len(sets))]
        return tuple(min(own - less or own) for own, less in zip(sets, smaller, strict=True))

    def labels_of(self, masks: np.ndarray) -> np.ndarray:
        """Labels (*shape) uint8 (or uint16) of masks (K, *shape): larger regions first, smaller ones over them."""
        own = self.own_labels
        found = np.zeros(masks.shape[1:], np.uint8 if max(own) < 256 else np.uint16)
        for k in sorted(range(len(self.table)), key=lambda k: -len(self.table[k][1])):
            found[masks[k] != 0] = own[k]
        return found


def nest(values: torch.Tensor, inside: Iterable[tuple[int, int]], dims: int) -> torch.Tensor:
    """Make regions contain those that are parts of them, as nnU-Net does: a parent has what a part has.

    Args:
        values: (..., K, *spatial) masks, or their probabilities.
        inside: pairs (part, parent) of channels, with all of a parent's parents named too.
        dims: how many spatial dimensions.

    Returns:
        The same tensor, changed in place.
    """
    channels = values.movedim(-dims - 1, 0)
    given = {part: channels[part].clone() for part, _ in inside}
    for part, parent in inside:
        torch.maximum(channels[parent], given[part], out=channels[parent])
    return values
