# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels' index arithmetic.

What they compute is in test_equal_bits.py and its like, what they compile to in test_triton_specialised.py.
"""

from __future__ import annotations

import os

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")

from berdiff_fast.backends.triton.common import locate  # noqa: E402


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the probe below runs under the interpreter")
@pytest.mark.parametrize("chunk", [0, 5, 2**29 - 1, 2**29, 2**31 + 3])
def test_locate_in_64_bits(chunk):
    @triton.jit
    def probe(out, program, chunks_per_row, BLOCKS: tl.constexpr):
        row, blocks, pixels = locate(tl.load(program), chunks_per_row, BLOCKS)
        at = tl.arange(0, 4 * BLOCKS)
        tl.store(out + at, row + at * 0)
        tl.store(out + 4 * BLOCKS + at, pixels)
        tl.store(out + 8 * BLOCKS + tl.arange(0, BLOCKS), blocks)

    blocks, rows = 8, 7
    per_row = 2**32 + 11
    out = torch.empty(9 * blocks, dtype=torch.int64)
    probe[(1,)](out, torch.tensor([rows * per_row + chunk]), per_row, BLOCKS=blocks)
    assert torch.equal(out[: 4 * blocks], torch.full((4 * blocks,), rows))
    assert torch.equal(out[4 * blocks : 8 * blocks], chunk * 4 * blocks + torch.arange(4 * blocks))
    assert torch.equal(out[8 * blocks :], chunk * blocks + torch.arange(blocks))
