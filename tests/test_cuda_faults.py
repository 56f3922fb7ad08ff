# SPDX-License-Identifier: Apache-2.0
"""The checks of the emulated CUDA kernels find what they are for: each fault here is planted in a copy of the sources,
which is compiled and run through tests/cuda_checks.py."""

from __future__ import annotations

import concurrent.futures
import json
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from emulated_cuda import ROOT, build
from support import ENVIRONMENT

pytestmark = pytest.mark.slow

#: The checks that a fault in a file is shown to; all of them, if it is not here.
CHECKS = {"cuda/loss.cu": "loss", "cuda/overlap.cu": "overlap"}


class Fault(NamedTuple):
    file: str  # below csrc
    old: str
    new: str
    which: int = 0  # of the places where `old` is
    count: int = 1  # how many of those there are


SHORT = "rest < chunk ? static_cast<int>(rest) : chunk"
FAULTS = {
    "nothing": Fault("cuda/chunks.cuh", "constexpr int chunk = 16;", "constexpr int chunk = 16; "),
    # A missing barrier: each of those that there are, and one that only some reach.
    "barrier after the constants": Fault("cuda/loss.cu", "__syncthreads();", "", 0, 2),
    "barrier before the block's sum": Fault("cuda/loss.cu", "__syncthreads();", "", 1, 2),
    "barrier after packing": Fault("cuda/overlap.cu", "__syncthreads();", "", 0, 2),
    "barrier before packing again": Fault("cuda/overlap.cu", "__syncthreads();", "", 1, 2),
    "barrier for half of a block": Fault(
        "cuda/overlap.cu", "__syncthreads();", "if (threadIdx.x < 128) __syncthreads();", 1, 2
    ),
    "shuffle for those that have pixels": Fault(
        "cuda/loss.cu", "if (rest <= 0) break;", "if (rest <= 0 && i == 0) return;\nif (rest <= 0) break;"
    ),
    # A wrong tail.
    "tail of a row as a whole chunk": Fault("cuda/chunks.cuh", SHORT, "chunk"),
    "tail one pixel short": Fault("cuda/chunks.cuh", f"{SHORT}}};", SHORT.replace("(rest)", "(rest) - 1") + "};"),
    "tail read past its end": Fault("cuda/chunks.cuh", "i < live ? p[i] : T(0)", "p[i]"),
    "tail written past its end": Fault("cuda/chunks.cuh", "if (i < live) p[i] = x[i];", "p[i] = x[i];"),
    "tail read in wide words": Fault("cuda/chunks.cuh", "if (live == n && ", "if (", 0, 2),
    "tail written in wide words": Fault("cuda/chunks.cuh", "if (live == n && ", "if (", 1, 2),
    "tail of a mask's pixels in overlap": Fault("cuda/overlap.cu", SHORT, "chunk"),
    "tail of the masks in overlap": Fault("cuda/overlap.cu", "first + mask < a.masks() && ", ""),
    "tail of a row in the loss": Fault("cuda/loss.cu", "rest < quad ? static_cast<int>(rest) : quad", "quad"),
    "tail that counts in the loss": Fault("cuda/loss.cu", "i < c.live && !ignored[i]", "!ignored[i]"),
    # Off by one in the chunk.
    "chunk too many in a row": Fault("cuda/chunks.cuh", "(pixels + chunk - 1) / chunk", "(pixels + chunk) / chunk"),
    "chunk too few in a row": Fault("cuda/chunks.cuh", "(pixels + chunk - 1) / chunk", "pixels / chunk"),
    "chunk too many in all": Fault("cuda/chunks.cuh", "i < total; i += stride", "i <= total; i += stride"),
    "chunk too few in all": Fault("cuda/chunks.cuh", "i < total; i += stride", "i < total - 1; i += stride"),
    "pixel beside the chunk": Fault("cuda/chunks.cuh", "row * pixels + pixel,", "row * pixels + pixel + 1,"),
    "next block of random words": Fault("cuda/chunks.cuh", "(pixel >> 2) + b;", "(pixel >> 2) + b + 1;"),
    "next random word": Fault("cuda/chunks.cuh", "quads[i / 4][i % 4]", "quads[i / 4][(i + 1) % 4]"),
    "bit beside the pixel's": Fault("cuda/overlap.cu", "(pixels[j] & 1u) << j", "(pixels[j] & 1u) << (j + 1)"),
    # A swapped key.
    "halves of the seed": Fault(
        "include/berdiff/arguments.h",
        "static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)",
        "static_cast<std::uint32_t>(seed >> 32), static_cast<std::uint32_t>(seed)",
    ),
    "keys of a round": Fault(
        "include/berdiff/philox.h", "L::high(product1), c1[i], keys.k0", "L::high(product1), c1[i], keys.k1"
    ),
    "stream of another op": Fault("cuda/draw.cu", "stream_sampling_step", "stream_training_noise"),
    # A missing grid stride.
    "stride of the chunks": Fault("cuda/chunks.cuh", "i < total; i += stride", "i < total; i += total"),
    "stride that is one too long": Fault("cuda/chunks.cuh", "(gridDim.x) * blockDim.x", "(gridDim.x) * blockDim.x + 1"),
    "stride of the overlap": Fault("cuda/overlap.cu", "work += gridDim.x", "work += total"),
    "stride of the tiles": Fault("cuda/loss.cu", "tile += gridDim.x", "tile += a.rows * tiles_per_row"),
    "stride of the rows": Fault("cuda/loss.cu", "row += gridDim.x", "row += a.rows"),
    # Addresses that only a GPU minds.
    "wide words read anywhere": Fault(
        "cuda/chunks.cuh", " && reinterpret_cast<std::uintptr_t>(p) % sizeof(W) == 0", "", 0, 2
    ),
    "wide words written anywhere": Fault(
        "cuda/chunks.cuh", " && reinterpret_cast<std::uintptr_t>(p) % sizeof(W) == 0", "", 1, 2
    ),
}  # fmt: skip


def plant(fault: Fault, source: Path) -> None:
    path = source / "csrc" / fault.file
    text = path.read_text()
    assert text.count(fault.old) == fault.count, f"{fault.file} has changed: {fault.old!r}"
    pieces = text.split(fault.old)
    kept, rest = pieces[: fault.which + 1], pieces[fault.which + 1 :]
    path.write_text(fault.old.join(kept) + fault.new + fault.old.join(rest))


def compile_again(fault: Fault, base: Path, folder: Path) -> Path:
    """The module with a fault: what it concerns compiled as CMake did, the other objects as they are.

    Of a header that is the draws, for speed; they come first, so that the linker takes functions from them that other
    kernels share.
    """
    shutil.copytree(base / "csrc", folder / "csrc")
    plant(fault, folder)
    concerned = (Path(fault.file).name,) if fault.file.endswith(".cu") else ("draw.cu",)
    faulty, others = [], []
    for entry in json.loads((base / "build" / "compile_commands.json").read_text()):
        name, command = Path(entry["file"]).name, shlex.split(entry["command"])
        place = command.index("-o") + 1
        if "_cuda.dir" not in command[place]:
            continue
        if name not in concerned:
            others.append(base / "build" / command[place])
            continue
        faulty.append(folder / f"{name}.o")
        command = [c.replace(f"{base}/csrc", f"{folder}/csrc") for c in command]
        command[place] = str(faulty[-1])
        subprocess.run(command, check=True, capture_output=True, cwd=entry["directory"])
    module = folder / "_cuda.so"
    subprocess.run([command[0], "-shared", "-o", module, *faulty, *others], check=True, capture_output=True)
    return module


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    """How the checks ended for every fault: on two processors, since compilers and checks take one each."""
    base = tmp_path_factory.mktemp("faults")
    for part in ("csrc", "CMakeLists.txt"):
        whole = ROOT / part
        shutil.copytree(whole, base / part) if whole.is_dir() else shutil.copy(whole, base / part)
    build(base, source=base)

    def some(names: list[str]) -> dict[str, dict]:
        modules = [compile_again(FAULTS[n], base, base / n.replace(" ", "_")) for n in names]
        jobs = json.dumps([(str(m), CHECKS.get(FAULTS[n].file, "")) for n, m in zip(names, modules, strict=True)])
        command = [sys.executable, str(Path(__file__).parent / "emulated_cuda.py"), jobs]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, cwd=base, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return dict(zip(names, json.loads(done.stdout.splitlines()[-1]), strict=True))

    names = sorted(FAULTS, key=lambda n: FAULTS[n].file)
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        halves = executor.map(some, (names[::2], names[1::2]))
        return {n: result for half in halves for n, result in half.items()}


def test_the_sources_as_they_are_pass(found):
    assert found["nothing"]["status"] == 0, found["nothing"]["output"]


@pytest.mark.parametrize("name", [n for n in FAULTS if n != "nothing"])
def test_a_planted_fault_is_found(found, name):
    status, output = found[name]["status"], found[name]["output"]
    # A check says no, or the emulation or a fence ends the process.
    by_a_check = status == 1 and "FAILED" in output
    by_the_emulation = status == -signal.SIGABRT and "emulated CUDA: " in output
    assert by_a_check or by_the_emulation or status == -signal.SIGSEGV, (status, output)
    if name in ("barrier for half of a block", "shuffle for those that have pixels"):
        assert by_the_emulation, (status, output)
