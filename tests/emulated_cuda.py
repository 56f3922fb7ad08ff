# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on a CPU: their sources compiled as C++ against ``csrc/emulated_cuda``, as the backend ``cuda``.

Tests of it run in processes of their own, since a faulty kernel may end the process: ``BERDIFF_FAST_TEST_CUDA_MODULE``
names the module, and ``conftest.py`` calls ``install``.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support import ENVIRONMENT

from berdiff_fast.backends import select
from berdiff_fast.backends.native import NativeBackend
from berdiff_fast.backends.protocol import Rows

ROOT = Path(__file__).parent.parent

#: Ways to run a grid, all of which have to give the same: the order of threads and blocks, and a grid so small that
#: blocks have to walk on.
WAYS = {
    "forward": {},
    "reversed": {"reversed": True},
    "forward in two blocks": {"most_blocks": 2},
    "reversed in one block": {"reversed": True, "most_blocks": 1},
}


# ---------------------------------------------------------------------- building


def tool(name: str) -> str:
    """The path of a program beside Python or on the PATH; skips the test where there is none."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def build(folder: Path, *, source: Path = ROOT, flags: str = "") -> Path:
    """The module, built in a folder by the package's own CMakeLists; skips the test where that cannot be."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the emulation wants ucontext and the linker's section limits, as Linux has them")
    if not (source / "CMakeLists.txt").is_file():
        pytest.skip("needs the package's source")
    import pybind11

    cmake = tool("cmake")
    configure = [
        cmake, "-S", source, "-B", folder / "build", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DBERDIFF_FAST_EMULATE_CUDA=ON", f"-DCMAKE_CXX_FLAGS={flags}",
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo", "-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=",  # so that symbols are kept
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
    ]  # fmt: skip
    for command in (configure, [cmake, "--build", folder / "build", "--target", "_cuda", "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (module,) = folder.glob("_cuda*")
    return module


PYTEST = ["-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]


def start_pytest(module: Path, arguments: Sequence[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
    """pytest on tests of this folder, with the emulated backend in place."""
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *PYTEST, *arguments],
        env={**ENVIRONMENT, "BERDIFF_FAST_TEST_CUDA_MODULE": str(module), **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
    )  # fmt: skip


# ---------------------------------------------------------------------- running


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install(path: Path) -> None:
    """Makes the module the backend ``cuda`` of tensors on the CPU, in this process."""
    fenced = os.environ.get("BERDIFF_FAST_TEST_FENCED", "1") == "1"  # a sanitizer has fences of its own
    backend = (FencedBackend if fenced else NativeBackend)(load(path), context=lambda out: 0)
    select._found["cuda", "cpu"] = backend


@contextmanager
def run_grids(way: str, **more: int) -> Iterator[None]:
    module = select.get("cuda", "cpu").module
    module.emulate(**WAYS[way], **more)
    try:
        yield
    finally:
        module.emulate()


class Fence:
    """A copy of a tensor before pages that nobody may touch: what reads or writes past its end ends the process.

    One that begins its storage ends at the very fence. A view at a storage offset keeps its place within 16 bytes, by
    which kernels choose how they read it; the few bytes between it and the fence must not change.
    """

    def __init__(self, source: torch.Tensor, *, is_output: bool) -> None:
        size = source.numel() * source.element_size()
        gap = (-source.data_ptr() - size) % 16 if source.storage_offset() else 0
        self._pages = mmap.mmap(-1, -(-max(size + gap, 1) // mmap.PAGESIZE) * mmap.PAGESIZE + mmap.PAGESIZE)
        end = len(self._pages) - mmap.PAGESIZE
        first = end - gap - size
        self._bytes = torch.frombuffer(self._pages, dtype=torch.uint8)
        self._around = [self._bytes[:first], self._bytes[first + size : end]]
        for part in self._around:
            part.fill_(0xA5)
        kind = torch.uint8 if source.dtype is torch.bool else source.dtype
        self.tensor = self._bytes[first : first + size].view(kind).view(source.dtype).view(source.shape)
        self.tensor.copy_(source)
        self._before = None if is_output else self._bytes.clone()
        address = self._bytes.data_ptr() + end
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, 0) == 0

    def close(self) -> None:
        """Looks what was written where it should not have been."""
        assert all(bool((part == 0xA5).all()) for part in self._around), "a kernel wrote outside its tensor"
        if self._before is not None:
            end = len(self._pages) - mmap.PAGESIZE
            assert torch.equal(self._before[:end], self._bytes[:end]), "a kernel wrote into its input"


def _fenced(op: str, *written: int):
    def call(self: NativeBackend, *arguments) -> None:
        fences = {i: Fence(a, is_output=i in written) for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)}
        if op != "overlap":  # which adds to what is there
            _forget(fences[0].tensor)
        behind = [fences[i].tensor if i in fences else a for i, a in enumerate(arguments)]
        for i, a in enumerate(arguments):
            if isinstance(a, Rows):
                fences[i] = Fence(a.seeds, is_output=False)
                behind[i] = a._replace(seeds=fences[i].tensor)
        getattr(NativeBackend, op)(self, *behind)
        for i, fence in fences.items():
            fence.close()
            if i in written:
                arguments[i].copy_(fence.tensor)

    return call


def _forget(out: torch.Tensor) -> None:
    """So that an element which no thread writes is not taken for one that was."""
    out.view(-1).view(torch.uint8).fill_(0xFF)


class FencedBackend(NativeBackend):
    """Every tensor of a call behind a fence; for each op the places of those that it writes."""

    initial_noise = _fenced("initial_noise", 0)
    q_sample = _fenced("q_sample", 0)
    sample_step = _fenced("sample_step", 0, 4)
    posterior = _fenced("posterior", 0)
    overlap = _fenced("overlap", 0)
    diffusion_loss = _fenced("diffusion_loss", 0, 1)


# ---------------------------------------------------------------------- several modules, for test_cuda_faults.py


def check_all(modules: list[tuple[Path, str]]) -> list[dict]:
    """How those checks of ``cuda_checks.py`` end that a keyword chooses for each module: in a child each, which has the
    reference's results from its parent."""
    import cuda_checks

    for name, prepare in vars(cuda_checks).items():
        if name.endswith("_cases"):
            prepare()
    results = []
    for module, keyword in modules:
        log = module.with_suffix(".log")
        child = os.fork()
        if child == 0:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.environ["BERDIFF_FAST_TEST_CUDA_MODULE"] = str(module)
            os._exit(pytest.main([*PYTEST, "-s", str(ROOT / "tests" / "cuda_checks.py"), "-k", keyword]))
        _, status = os.waitpid(child, 0)
        results.append({"status": os.waitstatus_to_exitcode(status), "output": log.read_text()[:20000]})
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)  # no pool, which a child would not have
    print(json.dumps(check_all([(Path(name), keyword) for name, keyword in json.loads(sys.argv[1])])))
