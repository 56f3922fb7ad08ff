#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The step and loss kernels on an NVIDIA GPU, as a share of the copy bandwidth measured in the same run; writes JSON.

    python benchmarks/kernels_gpu.py --output benchmarks/results/gpu.json

Results are compared with the reference before anything is timed. Times are medians of CUDA events; those of small
cases, which take less time than their launch, are of a CUDA graph of a hundred calls, and say nothing about the memory:
what they touch stays in the cache.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch

from berdiff_fast import NoiseSchedule, image_seeds, ops
from berdiff_fast.backends import select
from berdiff_fast.info import collect

SCHEDULE = NoiseSchedule("cosine2")
TAUS = SCHEDULE.subsequence(10)


#: Bytes moved below which a call is timed in a graph. The cache of an H200 has 50 MiB.
SMALL = 32 << 20


def median_ms(function: Callable[[], object], repeats: int = 30) -> float:
    for _ in range(5):
        function()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def case(name: str, backend: str, function: Callable[[], object], moved: int, bandwidth: float) -> dict:
    """What there is to say of a call that moves so many bytes."""
    found = {"case": name, "backend": backend, "bytes": moved}
    if moved >= SMALL:
        seconds = median_ms(function) / 1e3
        return {
            **found,
            "ms": seconds * 1e3,
            "GB_per_s": moved / seconds / 1e9,
            "share_of_copy": moved / seconds / bandwidth,
        }
    with_launch = median_ms(function)
    if backend == "reference":  # not made for graphs
        return {**found, "ms": with_launch}
    graph, calls = torch.cuda.CUDAGraph(), 100
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return {**found, "ms": median_ms(graph.replay) / calls, "ms_with_launch": with_launch}


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large device-to-device copy."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / (median_ms(lambda: target.copy_(source)) * 1e-3)


def step_case(backend: str, masks: int, size: int, logits: torch.dtype, mask: torch.dtype, bandwidth: float) -> dict:
    torch.manual_seed(0)
    z = torch.randn(masks, 1, size, size, device="cuda", dtype=torch.float32).mul_(3).to(logits)
    y = (torch.rand(masks, 1, size, size, device="cuda") < 0.5).to(mask)
    seeds = image_seeds(0, 1).cuda()
    coefficients = SCHEDULE.step_table(TAUS).float()[5].cuda()
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")

    def step(name: str, rows: int = masks) -> torch.Tensor:
        return ops.sample_step(
            y[:rows], z[:rows], seeds, coefficients, TAUS[5], samples_per_image=masks, nan_flag=flag, backend=name
        )

    few = min(masks, 16)
    expected = ops.sample_step(
        y[:few].cpu(), z[:few].cpu(), seeds.cpu(), coefficients.cpu(), TAUS[5], samples_per_image=masks, backend="cpp"
    )
    assert torch.equal(step(backend, few).cpu(), expected), "the bits differ; nothing is timed"
    name = f"step {masks} x {size} x {size}, logits {logits}, masks {mask}"
    moved = y.numel() * (2 * y.element_size() + z.element_size())
    return case(name, backend, lambda: step(backend), moved, bandwidth)


def loss_case(backend: str, masks: int, size: int, logits: torch.dtype, mask: torch.dtype, bandwidth: float) -> dict:
    """Value and gradient: reads logits and two masks, writes the gradient."""
    torch.manual_seed(0)
    z = torch.randn(masks, 1, size, size, device="cuda", dtype=torch.float32).mul_(3).to(logits)
    y_t, y_0 = ((torch.rand(masks, 1, size, size, device="cuda") < 0.5).to(mask) for _ in range(2))
    rows = SCHEDULE.loss_rows(torch.randint(SCHEDULE.timesteps, (masks,), device="cuda"))

    def loss(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.berdiff_fast.diffusion_loss(z, y_t, y_0, rows, None, "epsilon", name)

    few = min(masks, 16)
    arguments = [x[:few].cpu() for x in (z, y_t, y_0, rows)]
    expected = torch.ops.berdiff_fast.diffusion_loss(
        arguments[0].double(), *arguments[1:], None, "epsilon", "reference"
    )
    for a, b, rtol in zip(loss(backend), expected, (1e-6, 1e-6 if logits is torch.float32 else 4e-3), strict=True):
        torch.testing.assert_close(a[:few].cpu().double(), b, rtol=rtol, atol=0)
    name = f"loss {masks} x {size} x {size}, logits {logits}, masks {mask}"
    moved = z.numel() * 2 * (z.element_size() + y_t.element_size())
    return case(name, backend, lambda: loss(backend), moved, bandwidth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    output = parser.parse_args().output
    bandwidth = copy_bandwidth()
    report: dict = {"machine": collect(), "copy_GB_per_s": bandwidth / 1e9, "cases": []}
    for backend in ("cuda", "triton", "reference"):
        for kernel, masks, size, logits, mask in (
            (step_case, 4096, 256, torch.bfloat16, torch.bool),
            (step_case, 4096, 256, torch.bfloat16, torch.bfloat16),
            (step_case, 16, 128, torch.bfloat16, torch.bfloat16),
            (loss_case, 4096, 256, torch.float32, torch.bool),
            (loss_case, 4096, 256, torch.float32, torch.float32),
            (loss_case, 4096, 256, torch.bfloat16, torch.bfloat16),
            (loss_case, 16, 128, torch.float32, torch.float32),
        ):
            if not select.can_run(backend, "cuda") or (backend == "reference" and masks > 16):
                continue
            found = kernel(backend, masks, size, logits, mask, bandwidth)
            share = f"{found['share_of_copy']:6.1%} of copy" if "share_of_copy" in found else ""
            print(f"{backend:10s} {found['ms']:9.4f} ms  {share:15s}  {found['case']}", flush=True)
            # After every case: a run that is cut short keeps what it measured.
            report["cases"].append(found)
            with open(output, "w") as file:
                json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
