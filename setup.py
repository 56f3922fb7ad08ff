# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled modules with CMake; everything else about the package is in pyproject.toml.

One ``Extension`` per module, each built as its own CMake target in a shared build folder. Environment variables are
described in docs/env.md.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

#: Real code for these, PTX of the newest; those that the compiler at hand does not know are left out.
CUDA_ARCHITECTURES = ("80", "86", "89", "90", "100", "120")


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME or CUDA_PATH, of the PATH, or of the usual place."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").is_file():
            return str(Path(home) / "bin" / "nvcc")
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.is_file() else None)


def wanted_nvcc() -> str | None:
    """The CUDA compiler to build with, by BERDIFF_FAST_CUDA; a visible GPU plays no part."""
    choice = os.environ.get("BERDIFF_FAST_CUDA", "auto").lower()
    if choice not in ("auto", "1", "0"):
        sys.exit(f"BERDIFF_FAST_CUDA must be 'auto', '1' or '0', got {choice!r}")
    nvcc = None if choice == "0" else find_nvcc()
    if choice == "1" and nvcc is None:
        sys.exit("BERDIFF_FAST_CUDA=1, but nvcc was not found: put it on the PATH, set CUDA_HOME, or use auto or 0")
    return nvcc


def architectures(nvcc: str) -> str:
    """CMake's list: "80-real;...;120" has code for each and PTX of the last."""
    asked = os.environ.get("BERDIFF_FAST_CUDA_ARCHS")
    if asked:
        names = [a.replace(".", "") for a in re.split(r"[;, ]+", asked.strip()) if a]
        if not names or not all(re.fullmatch(r"\d+[a-z]?", a) for a in names):
            sys.exit(f"BERDIFF_FAST_CUDA_ARCHS must be a list as '80;90', got {asked!r}")
    else:
        listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
        known = set(re.findall(r"compute_(\d+)", listing))
        names = [a for a in CUDA_ARCHITECTURES if a in known] or [max(known, key=int)]
    names.sort(key=lambda a: int(re.sub(r"\D", "", a)))
    return ";".join([f"{a}-real" for a in names[:-1]] + [names[-1]])


class CMakeBuild(build_ext):
    """Each extension is a CMake target that puts its module where setuptools wants it."""

    def build_extension(self, extension: Extension) -> None:
        import pybind11

        target = extension.name.rpartition(".")[2]
        destination = Path(self.get_ext_fullpath(extension.name)).resolve()
        # The folder is per target: two configurations never meet in one cache.
        folder = Path(self.build_temp).resolve() / target
        folder.mkdir(parents=True, exist_ok=True)
        destination.parent.mkdir(parents=True, exist_ok=True)
        arguments = [
            "-S",
            str(ROOT),
            "-B",
            str(folder),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={destination.parent}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        if target == "_cuda":
            nvcc = wanted_nvcc()
            assert nvcc is not None
            arguments += [
                "-DBERDIFF_FAST_CUDA=ON",
                f"-DCMAKE_CUDA_COMPILER={nvcc}",
                f"-DCMAKE_CUDA_ARCHITECTURES={architectures(nvcc)}",
            ]
        cmake = shutil.which("cmake")
        if cmake is None:
            sys.exit("cmake was not found; pip installs it for an isolated build, without isolation it has to be there")
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        build = [cmake, "--build", str(folder), "--target", target, "--parallel", jobs]
        if subprocess.call([cmake, *arguments]) or subprocess.call(build):
            hint = "; BERDIFF_FAST_CUDA=0 builds without it" if target == "_cuda" else ""
            sys.exit(f"building {extension.name} failed, CMake says why above{hint}")
        if not destination.is_file():
            sys.exit(f"the build of {target} left no {destination}")


extensions = [Extension("berdiff_fast._cpu", sources=[])]
if wanted_nvcc():
    extensions.append(Extension("berdiff_fast._cuda", sources=[]))

setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
