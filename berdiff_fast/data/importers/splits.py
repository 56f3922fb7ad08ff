# SPDX-License-Identifier: Apache-2.0
"""Which patient is for training, which for validation and which for the test."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from berdiff_fast import checks
from berdiff_fast.data.importers.trees import SPLITS, Slice

DEFAULT_SPLIT = (70, 10, 20)


OWN = "the source's own"
RULE = (
    "place = int(sha256(patient), 16) mod 100, where a seed other than 0 is appended to the patient as '#seed'; "
    "below shares[0]: train, below shares[0] + shares[1]: val, else test"
)


def split_of(patient: str, split: Sequence[int] = DEFAULT_SPLIT, seed: int = 0) -> str:
    """Return a patient's split, which follows from the name, the shares and the seed alone.

    So no patient ever moves because others were added. A patient's place is the SHA-256 of the name modulo 100, or of
    "name#seed" for a seed other than 0.

    Args:
        patient: the name, such as "LIDC-IDRI-0001".
        split: train, val and test in per cent.
        seed: at least 0.

    Returns:
        "train", "val" or "test".

    Raises:
        ValueError: the shares are not three that add up to 100, or the seed is negative.
    """
    train, val, _ = shares_of(split)
    text = f"{patient}#{seed}" if checks.integer("seed", seed, 0) else patient
    place = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100
    return "train" if place < train else "val" if place < train + val else "test"


def shares_of(split: Sequence[int] | str) -> tuple[int, int, int]:
    try:
        shares = [int(part) for part in split.split("/")] if isinstance(split, str) else list(split)
        train, val, test = (checks.integer("split", share, 0) for share in shares)
        good = train + val + test == 100
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(f"split must be train/val/test in per cent that add up to 100, as 70/10/20, got {split!r}")
    return train, val, test


def read_splits(path: Path) -> dict[str, list[str]]:
    """Split to patients, no patient twice."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"split_file: there is no file {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"split_file: {path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not any(name in content for name in SPLITS):
        raise ValueError(f'split_file: {path} must hold lists of patients under "train", "val" and "test"')
    lists = {name: content.get(name, []) for name in SPLITS}
    for name, patients in lists.items():
        if not isinstance(patients, list) or not all(isinstance(patient, str) for patient in patients):
            raise ValueError(f"split_file: {name!r} in {path} must be a list of patients' names, got {patients!r:.60}")
    _check_disjoint(f"split_file: {path}", [(name, patient) for name in SPLITS for patient in lists[name]])
    return lists


def assign(
    slices: list[Slice], keep: bool, shares: tuple[int, int, int] | None, lists: dict[str, list[str]] | None, seed: int
) -> tuple[dict[str, list[str]], str]:
    """Split to patients, and by which rule: the tree's own splits, lists that were given, or shares and a seed."""
    if keep and any(one.split for one in slices):
        return _own_splits(slices), OWN
    if lists is not None:
        return lists, "a split file"
    drawn: dict[str, list[str]] = {name: [] for name in SPLITS}
    for patient in {one.patient: None for one in slices}:
        drawn[split_of(patient, shares or DEFAULT_SPLIT, seed)].append(patient)
    return drawn, RULE


def _own_splits(slices: list[Slice]) -> dict[str, list[str]]:
    pairs = {(one.split or "", one.patient): None for one in slices}
    _check_disjoint("source", list(pairs), "; split anew with split=70/10/20 or a split_file")
    return {name: [patient for split, patient in pairs if split == name] for name in SPLITS}


def _check_disjoint(what: str, pairs: list[tuple[str, str]], advice: str = "") -> None:
    """A patient in two splits makes a test set worthless, so it is never just skipped."""
    counts = Counter(patient for _, patient in pairs)
    twice = [patient for patient, count in counts.items() if count > 1]
    if twice:
        where = " and ".join(name for name, patient in pairs if patient == twice[0])
        more = f", and {len(twice) - 1} more" if len(twice) > 1 else ""
        raise ValueError(f"{what}: patient {twice[0]!r} is in {where}{more}{advice}")
