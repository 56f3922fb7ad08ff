# SPDX-License-Identifier: Apache-2.0
"""Every launch of the Triton backend, compiled as Triton's JIT specialises it, for GPUs that are not here.

What is launched is in triton_cases.py, how it is compiled in triton_specialised.py. The sizes and types that sampling
and training meet are compiled for sm_90; all of them, for every architecture, by ``make test-all``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ARCHITECTURES = (80, 90, 100)

#: Kernels that draw, or give what is drawn from: their bits are those of every other backend.
SAME_BITS = {"initial_noise_kernel", "q_sample_kernel", "sample_step_kernel", "posterior_kernel"}


def start(architecture: int, *options: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    script = Path(__file__).parent / "triton_specialised.py"
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), str(script.parents[1])]))
    return subprocess.Popen(
        [sys.executable, str(script), str(architecture), *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 300) -> dict[str, Any]:
    try:
        out, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-3000:]
    return json.loads(out.splitlines()[-1])


@lru_cache
def compiled(architecture: int, everything: bool) -> dict[str, Any]:
    """The report of all shards, one to a processor that this worker may call its own."""
    shards = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    options = ["--all"] if everything else []
    running = [start(architecture, *options, "--shard", str(i), str(shards)) for i in range(shards)]
    try:
        reports = [finish(process, timeout=3600 if everything else 900) for process in running]
    finally:
        for process in running:
            process.kill()
    report = reports[0]
    report["kernels"] = [kernel for r in reports for kernel in r["kernels"]]
    return report


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((90, False), id="sm_90"),
        *(pytest.param((a, True), id=f"sm_{a}-all", marks=pytest.mark.slow) for a in ARCHITECTURES),
    ],
)
def report(request):
    architecture, everything = request.param
    return compiled(architecture, everything) | {"architecture": architecture}


def of(report: dict[str, Any], tool: str) -> list[dict[str, Any]]:
    """Its kernels; skips the test where the tool is missing that would have looked into them."""
    if not report["tools"][tool]:
        pytest.skip(f"{tool} is neither in Triton's wheel nor on the PATH")
    return report["kernels"]


def told(kernel: dict[str, Any]) -> str:
    return f"{kernel['kernel']} {kernel['constants']} of {kernel['cases'][0]}"


def test_every_launch_compiles(report):
    assert not report["failures"], "\n".join(report["failures"])
    assert len(report["kernels"]) == report["specialisations"] > len(report["launched"])
    for kernel in report["kernels"]:
        assert kernel["target"].rstrip("a") == f"sm_{report['architecture']}", told(kernel)


def test_no_kernel_is_forgotten(report):
    if report["architecture"] != 90:
        pytest.skip("some kernels are for one architecture; sm_90 has them all")
    missing = "a case is missing in tests/triton_cases.py"
    assert not report["not_launched"], f"{missing}: nothing launches {report['not_launched']}"
    assert not report["not_called"], f"{missing}: nothing calls {report['not_called']}"


def test_no_spills(report):
    for kernel in of(report, "cuobjdump"):
        assert kernel["resources"]["local"] == kernel["resources"]["stack"] == 0, (told(kernel), kernel["resources"])
    for kernel in of(report, "nvdisasm"):
        assert not [i for i in kernel["sass"] if i.startswith(("LDL", "STL"))], told(kernel)


def test_large_and_aligned_means_loads_of_16_bytes(report):
    asked = set()
    for kernel in of(report, "nvdisasm"):
        loads = {i: n for i, n in kernel["sass"].items() if i.startswith("LDG.")}
        wide = sum(n for i, n in loads.items() if ".128" in i or ".256" in i)
        assert wide >= kernel["wide"], (told(kernel), kernel["wide"], loads)
        asked |= {kernel["kernel"]} if kernel["wide"] else set()
    expected = {
        "sample_step_kernel",
        "posterior_kernel",
        "diffusion_loss_kernel",
        "group_norm_sums_kernel",
        "group_norm_apply_kernel",
    }
    assert asked >= expected


def fused(kernel: dict[str, Any]) -> dict[str, int]:
    return {i: n for i, n in kernel["sass"].items() if i.startswith(("FFMA", "DFMA", "HFMA2"))}


def test_nothing_is_fused_where_bits_are_promised(report):
    found = [kernel for kernel in report["kernels"] if kernel["kernel"] in SAME_BITS]
    assert {kernel["kernel"] for kernel in found} == SAME_BITS
    for kernel in found:
        assert not kernel["fuses"] and not kernel["flushes"] and not kernel["fused_in_ptx"], told(kernel)
        assert kernel["divides"] == (kernel["kernel"] == "posterior_kernel"), told(kernel)
    of(report, "nvdisasm")
    division = fused(report["division"])
    assert division  # a division is made of fused operations: those of the posterior's, and no other
    for kernel in found:
        assert fused(kernel) == (division if kernel["divides"] else {}), (told(kernel), fused(kernel), division)


def test_the_loss_keeps_small_numbers(report):
    for kernel in report["kernels"]:
        assert not (kernel["kernel"].startswith("diffusion_loss") and kernel["flushes"]), told(kernel)


# ---------------------------------------------------------------------- the harness itself


@pytest.fixture(scope="module")
def collected():
    return finish(start(90, "--collect"))


def test_arguments_are_specialised_as_in_a_launch(collected):
    found = [kernel for kernel in collected["kernels"] if kernel["kernel"] == "initial_noise_kernel"]
    constant = {kernel["constants"].get("samples_per_image") for kernel in found}
    assert constant == {"1", None}
    assert any("samples_per_image" in kernel["told"] for kernel in found)
    large = [kernel for kernel in found if "16384" in kernel["cases"][0]]
    assert large and all({"out", "pixels", "chunks_per_row", "seeds"} <= set(kernel["told"]) for kernel in large)
    small = [kernel for kernel in found if "4, 1]" in kernel["cases"][0]]
    assert small and all({"pixels", "chunks_per_row"} <= set(kernel["constants"]) for kernel in small)


def test_what_is_not_to_be_specialised_is_not(collected):
    kept = collected["kept_as_they_are"]
    assert set(kept["sample_step_kernel"]) == {"timestep", "first_row", "first_sample"}
    for kernel in collected["kernels"]:
        names = set(kept.get(kernel["kernel"], ()))
        assert not names & set(kernel["constants"]) and not names & set(kernel["told"]), told(kernel)
    # The first row and sample, 0, 1 or 16, make no difference to which code runs.
    (shared,) = [k for k in collected["kernels"] if any("16, 16, 16)" in case for case in k["cases"])]
    assert sum(case.endswith((" 0, 0))", " 1, 1))", " 16, 16))")) for case in shared["cases"]) == 3


def test_a_kernel_that_nothing_launches_is_found():
    report = finish(start(90, "--collect", "--without", "posterior"))
    assert report["not_launched"] == ["posterior_kernel"]
    assert report["not_called"] == ["posterior"]
