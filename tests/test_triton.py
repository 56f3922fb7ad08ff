# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels: their index arithmetic, and that every one compiles for the GPUs we name, without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")

from berdiff_fast.backends.triton import locate  # noqa: E402


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


@pytest.mark.parametrize("architecture", [80, 90])
def test_every_kernel_compiles_to_a_cubin(architecture):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "compile_triton.py"
    done = subprocess.run(
        [sys.executable, str(script), str(architecture)], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    names = ["noise", "q_sample", "step", "posterior", "loss", "loss_value", "overlap"]
    names += [f"group_norm_{part}" for part in ("sums", "factors", "apply")]
    assert {k.split(":")[0] for k in report} == {f"{name}_kernel" for name in names}
    for name, kernel in report.items():
        assert kernel["cubin_bytes"] > 1000, name
        assert kernel["target"] == f"sm_{architecture}", (name, kernel)
        # The draw contract forbids fused operations; a division is built of them, and the posterior has one. The loss
        # and the norm draw nothing.
        assert (kernel["fused"] == 0) != name.startswith("loss_kernel"), name
        assert not kernel["flushes"] or name.startswith("group_norm"), name
        assert kernel["divides"] == name.startswith("posterior"), name
