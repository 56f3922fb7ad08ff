# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels without a GPU: their sources, compiled as C++ (csrc/emulated_cuda), have to pass the tests that they
would pass on one, in both orders of the threads, with a grid too small for its work, behind fences, and under
sanitizers. Needs Linux, CMake and a C++ compiler. That these checks find faults is shown in test_cuda_faults.py."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import pytest
from emulated_cuda import ROOT, build, start_pytest, tool

TESTS = ROOT / "tests"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fsanitize-sections=emulated_shared -g1"


@pytest.fixture(scope="module")
def module(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("emulated"))


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-4000:]
    assert " passed" in output
    return output


@pytest.mark.slow
def test_the_tests_of_a_gpu(module, tmp_path):
    """Those of equal bits, overlap and loss, as they are; one process for each order."""
    files = [str(TESTS / f"test_{name}.py") for name in ("equal_bits", "loss", "overlap")]
    chosen = "(not interpreted and not 1000- and not 50-) and (test_equal_bits or cuda)"
    processes = [
        start_pytest(module, [*files, "-k", chosen], tmp_path, BERDIFF_FAST_TEST_VARIANTS=f"cuda {order}")
        for order in ("forward", "reversed")
    ]
    for process in processes:
        assert "skipped" not in finish(process)


@pytest.mark.slow
def test_offsets_sizes_types_and_small_grids(module, tmp_path):
    assert "skipped" not in finish(start_pytest(module, [str(TESTS / "cuda_checks.py")], tmp_path))


@pytest.mark.slow
def test_under_sanitizers(tmp_path):
    """The same, with GCC's AddressSanitizer and UndefinedBehaviorSanitizer looking."""
    compiler = tool("c++")
    library = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    command = [compiler, *SANITIZERS.split(), str(tmp_path / "empty.cpp"), "-o", str(tmp_path / "empty")]
    if not Path(library).is_absolute() or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip(f"{compiler} has no sanitizers that can be loaded before Python (GCC's libasan and libubsan)")
    module = build(tmp_path, flags=SANITIZERS)
    # Python itself leaks by design; its tensors have no fences here, so that the sanitizer sees where they end.
    environment = dict(
        LD_PRELOAD=library, ASAN_OPTIONS="detect_leaks=0",
        BERDIFF_FAST_TEST_FENCED="0",
    )  # fmt: skip
    output = finish(start_pytest(module, [str(TESTS / "cuda_checks.py"), "-s"], tmp_path, **environment))
    assert "skipped" not in output


# ---------------------------------------------------------------------- the emulation itself

KERNEL = r"""
#include <cuda_fp16.h>

#include <cstdio>
#include <cstdlib>

struct Arguments {
    int fault;
    unsigned* out;
};

__global__ void kernel(Arguments a) {
    __shared__ unsigned words[64];
    const unsigned me = threadIdx.x;
    if (a.fault == 1 && me >= 40) return;
    if (a.fault != 5) words[me] = blockIdx.x + me;
    if (a.fault != 2 || me < 40) __syncthreads();
    if (a.fault == 3) {
        if (me < 32) __syncthreads();
        else
            __syncthreads();
    }
    unsigned x = words[63 - me];
    if (a.fault != 4 || me % 32 != 7) x = 1000 * x + __shfl_down_sync(0xffffffffu, x, 1);
    if (a.fault == 6) *reinterpret_cast<uint2*>(a.out + 1) = uint2();
    if (a.fault == 7) __ldg(reinterpret_cast<const uint4*>(a.out + 2));
    a.out[blockIdx.x * blockDim.x + me] = x;
}

int main(int, char** arguments) {
    alignas(16) static unsigned out[128];
    const int fault = std::atoi(arguments[1]);
    berdiff::emulated::settings.reversed = std::atoi(arguments[2]) != 0;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(fault == 8 ? 0 : 2);
    config.blockDim = dim3(fault == 9 ? 1025 : 64);
    const Arguments a = {fault, out};
    std::puts(cudaGetErrorString(cudaLaunchKernelEx(&config, kernel, a)));
    for (const unsigned x : out) std::printf("%d ", static_cast<int>(x));
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "kernel.cpp").write_text(KERNEL)
    include = [f"-I{ROOT / 'csrc' / 'emulated_cuda'}", f"-I{ROOT / 'csrc'}"]
    subprocess.run(
        [tool("c++"), "-std=c++17", "-O1", *include, folder / "kernel.cpp", "-o", folder / "kernel"], check=True
    )
    return folder / "kernel"


@pytest.mark.parametrize("is_reversed", [0, 1])
def test_threads_meet(program, is_reversed):
    done = subprocess.run([program, "0", str(is_reversed)], capture_output=True, text=True, check=True)
    words, numbers = done.stdout.splitlines()
    assert words == "no error"
    # Thread i has what thread 63 - i left, and its neighbour's; the last of a warp has none and gets its own.
    expected = [
        1000 * (block + 63 - i) + block + 63 - (i if i % 32 == 31 else i + 1) for block in range(2) for i in range(64)
    ]
    assert [int(x) for x in numbers.split()] == expected


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (1, r"threads 0 to 39 are at the barrier of .*kernel.cpp:\d+; threads 40 to 63 have returned;"),
        (2, r"threads 0 to 39 are at the barrier of .*; threads 40 to 63 are at the shuffle of"),
        (3, r"threads 0 to 31 are at the barrier of .*; threads 32 to 63 are at the barrier of"),
        (4, r"threads 0 to 6 are at the shuffle of .*; threads 7 to 7 have returned; threads 8 to 38 are at the"),
        (6, "a word of 8 bytes at an address that is not a multiple of 8"),
        (7, "a word of 16 bytes at an address that is not a multiple of 16"),
    ],
)
@pytest.mark.parametrize("is_reversed", [0, 1])
def test_what_is_wrong_ends_the_process_with_words(program, fault, words, is_reversed):
    done = subprocess.run([program, str(fault), str(is_reversed)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGABRT
    assert done.stderr.startswith("emulated CUDA: ") and re.search(words, done.stderr), done.stderr


def test_shared_memory_is_not_zero_at_first(program):
    done = subprocess.run([program, "5", "0"], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "-1001"  # all ones, a thousand times and once more


@pytest.mark.parametrize("fault", [8, 9])
def test_a_launch_that_a_gpu_would_refuse(program, fault):
    done = subprocess.run([program, str(fault), "0"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("invalid configuration argument\n0 0 0")
