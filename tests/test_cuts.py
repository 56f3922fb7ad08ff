# SPDX-License-Identifier: Apache-2.0
"""Cuts of slices and volumes that reach beyond them: what is there, and what is outside the scan."""

from __future__ import annotations

import numpy as np
import pytest

from berdiff_fast.io import cuts

X = np.arange(1.0, 61.0, dtype=np.float32).reshape(3, 4, 5)


@pytest.mark.parametrize("begin", [(0, 0, 0), (-1, 2, -3), (1, -2, 4), (2, 3, 4), (5, 0, 0), (-9, 0, 0)])
def test_a_cut_is_a_part_of_the_padded_whole(begin):
    """Also one that has nothing of it."""
    padded = np.pad(X, 12, constant_values=-7.0)
    part = tuple(slice(b + 12, b + 12 + n) for b, n in zip(begin, (2, 3, 4), strict=True))
    assert np.array_equal(cuts.cut(X, begin, (2, 3, 4), beyond=-7.0), padded[part])
    lowest = np.pad(X, 12, constant_values=1.0)
    assert np.array_equal(cuts.cut(X, begin, (2, 3, 4)), lowest[part])
    masks = np.stack([X > 20, X > 40])
    nothing = np.pad(masks, ((0, 0), *((12, 12),) * 3))
    assert np.array_equal(cuts.cut_masks(masks, begin, (2, 3, 4)), nothing[(slice(None), *part)])


def test_what_is_outside_is_the_lowest_of_the_cuts_rest():
    """Not of the slice's: it has no share in the minimum by which a tile is scaled."""
    raw = X[0].copy()
    outside = np.zeros(raw.shape, bool)
    outside[:, 4] = True
    raw[outside] = -3024
    x = cuts.tissue(raw, outside)
    assert (x[outside] == 1).all() and x.dtype == np.float32 and raw[0, 4] == -3024
    found = cuts.cut(x, (2, 3), (2, 3), outside)
    assert found.tolist() == [[14, 14, 1], [19, 14, 1]]  # the lowest of the cut; beyond, that of the slice
    everything = np.ones(raw.shape, bool)
    assert cuts.cut(raw, (0, 0), (1, 2), everything).tolist() == [[1, 2]]


def test_where_a_cut_begins():
    assert cuts.starts((27, 39), (32, 48)) == [-3, -5] and cuts.starts((10, 10), (4, 5)) == [3, 2]
    assert cuts.starts((27, 39), (4, 4), [(3, 8), (10, 20)]) == [4, 13]


def test_masks_go_back_to_where_they_were_cut():
    masks = np.random.default_rng(0).random((2, 3, 4, 5)) < 0.5
    there = cuts.cut_masks(masks, (-1, -2, -3), (5, 9, 9))
    assert np.array_equal(cuts.cut_masks(there, (1, 2, 3), (3, 4, 5)), masks)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_box_of_what_is_not_0(axis):
    one, other = np.zeros((2, 6, 7, 8))
    one[2, 3, 4], other[4, 1, 4] = 5, -5
    box = {0: (2, 5), 1: (1, 4), 2: (4, 5)}
    wanted = [box[axis], *(box[k] for k in range(3) if k != axis)]
    assert list(cuts.foreground([one, other], axis)) == wanted
    assert cuts.foreground([one * 0], axis) is None
