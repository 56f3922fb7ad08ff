# SPDX-License-Identifier: Apache-2.0
"""The AVX-512 kernels on a CPU without AVX-512: their source is compiled against SIMDe's emulation and has to pass the
same tests of equal bits. Needs the headers of SIMDe (Debian: libsimde-dev) and CMake."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("berdiff_fast._cpu", reason="the CPU module was not built")
from berdiff_fast.backends import cpp

ROOT = Path(__file__).parent.parent
INCLUDE = Path("/usr/include")


def test_avx512_source_gives_equal_bits(tmp_path):
    if "avx512" in cpp.available_isas():
        pytest.skip("this CPU has AVX-512: tests/test_equal_bits.py runs the real thing")
    if "avx2" not in cpp.available_isas():
        pytest.skip("the emulation is built on AVX2, which this CPU lacks")
    if not (INCLUDE / "simde" / "x86" / "avx512.h").is_file():
        pytest.skip("no SIMDe headers (Debian: apt-get install libsimde-dev)")
    if not (ROOT / "CMakeLists.txt").is_file() or shutil.which("cmake", path=_path()) is None:
        pytest.skip("needs CMake and the package's source")
    import pybind11

    cmake = shutil.which("cmake", path=_path())
    subprocess.run(
        [
            cmake, "-S", ROOT, "-B", tmp_path / "build", f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DBERDIFF_FAST_SIMDE={INCLUDE}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={tmp_path}",
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    subprocess.run(
        [cmake, "--build", tmp_path / "build", "--target", "_cpu", "--parallel", "2"], check=True, capture_output=True
    )
    (module,) = tmp_path.glob("_cpu*")
    environment = {**os.environ, "BERDIFF_FAST_TEST_CPU_MODULE": str(module), "BERDIFF_FAST_TEST_VARIANTS": "avx512"}
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT),
            *(str(ROOT / "tests" / f"test_{name}.py") for name in ("equal_bits", "loss", "overlap", "inference")),
            "-k", "(not interpreted and not 1000- and not 50-) and (test_equal_bits or test_overlap or avx512)",
        ],
        env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
