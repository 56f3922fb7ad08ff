# SPDX-License-Identifier: Apache-2.0
"""What ``make sanitize`` runs: the CPU module under GCC's AddressSanitizer and UndefinedBehaviorSanitizer, through the
kernel tests; and its threads under ThreadSanitizer, by a program without Python (``threads.cpp``).

Whatever is found ends it with status 1. First each sanitizer has to find a fault that is planted for it in a copy of
``csrc/cpu/dispatch.cpp``: one that finds nothing there would find nothing anywhere. Needs Linux, GCC and CMake.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitize"

#: By sanitizer: text of dispatch.cpp, what takes its place, and what the sanitizer has to say of that.
PLANTED = {
    "address": ("std::min(begin + pixels_per_tile, pixels)", "pixels + 1", "heap-buffer-overflow"),
    "undefined": ("rows * pixels / pixels_per_thread", "(rows << 62) * pixels", "signed integer overflow"),
    "thread": (
        "work(tiles * i / count, tiles * (i + 1) / count)",
        "work(tiles * i / count, std::min(tiles, tiles * (i + 1) / count + 1))",
        "data race",
    ),
}

#: Kernel tests that meet every kernel, type, size and instruction set.
TESTS = [
    *(f"tests/test_{name}.py" for name in ("equal_bits", "overlap", "loss", "inference")),
    "-k", "(equal_bits or overlap or loss or portable or avx) and not (interpreted or compile or 1000- or 50-)",
]  # fmt: skip

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    "OMP_NUM_THREADS": "2",
    "CUDA_VISIBLE_DEVICES": "",
    "BERDIFF_FAST_TEST_VARIANTS": "portable,avx2,avx512",
    # Python leaks by design.
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}

#: One op, by the module that is named.
ONE_OP = """import conftest, berdiff_fast as bf
bf.ops.initial_noise(bf.image_seeds(0, 1), (1, 5, 7), backend="cpp")"""


def main() -> int:
    started = time.perf_counter()
    module, program = build("address,undefined", "_cpu"), build("thread", "threads")
    # libstdc++ too: libasan looks for its exceptions when it is loaded, and Python itself brings none.
    libraries = [run(["c++", f"-print-file-name={name}"], name).strip() for name in ("libasan.so", "libstdc++.so.6")]
    preloaded = {**ENVIRONMENT, "LD_PRELOAD": " ".join(libraries), "BERDIFF_FAST_TEST_CPU_MODULE": str(module)}

    for sanitizer in ("address", "undefined"):
        faulty = {**preloaded, "BERDIFF_FAST_TEST_CPU_MODULE": str(plant(sanitizer, module))}
        must_find(sanitizer, [sys.executable, "-c", ONE_OP], faulty)
    must_find("thread", [str(plant("thread", program))], ENVIRONMENT)

    said = run([sys.executable, "-c", ONE_OP], "the module without a fault", preloaded)
    said += run([str(program)], "ThreadSanitizer", ENVIRONMENT)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", "--durations=12", *TESTS]
    said += run(command, "AddressSanitizer or UndefinedBehaviorSanitizer", preloaded)
    (tests,) = re.findall(r"(\d+) passed", said)
    (comparisons,) = re.findall(r"(\d+) comparisons, 0 wrong", said)
    print(
        f"sanitize: nothing found by address and undefined in {tests} tests, by thread in {comparisons} comparisons; "
        f"3 of 3 planted faults found; {time.perf_counter() - started:.0f} s"
    )
    return 0


def build(sanitizers: str, target: str) -> Path:
    """A target of the package's own CMakeLists, in a folder of its own."""
    import pybind11

    folder = BUILD / sanitizers.partition(",")[0]
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if cmake is None:
        sys.exit("sanitize: needs CMake")
    configure = [
        cmake, "-S", str(ROOT), "-B", str(folder), f"-DBERDIFF_FAST_SANITIZE={sanitizers}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}", f"-DCMAKE_RUNTIME_OUTPUT_DIRECTORY={folder}",
        "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
    ]  # fmt: skip
    run(configure, "configuring")
    run([cmake, "--build", str(folder), "--target", target, "--parallel", "2"], "building")
    (built,) = (path for path in folder.glob(f"{target}*") if path.is_file())
    return built


def plant(sanitizer: str, built: Path) -> Path:
    """A second build of a target, with a fault in dispatch.cpp; all else are its objects."""
    folder = built.parent
    target = built.name.partition(".")[0]
    old, new, _ = PLANTED[sanitizer]
    source = (ROOT / "csrc" / "cpu" / "dispatch.cpp").read_text()
    if source.count(old) != 1:
        sys.exit(f"sanitize: dispatch.cpp does not hold {old!r} once: adapt PLANTED")
    faulty = folder / f"planted-{sanitizer}.cpp"
    faulty.write_text(source.replace(old, new))
    (command,) = {
        entry["command"]
        for entry in json.loads((folder / "compile_commands.json").read_text())
        if entry["file"].endswith("csrc/cpu/dispatch.cpp") and f"{target}.dir" in entry["output"]
    }
    words = shlex.split(command)
    words[words.index("-o") + 1], words[-1] = str(faulty.with_suffix(".o")), str(faulty)
    run(words, "compiling a planted fault", cwd=folder)
    objects = [
        str(path) for path in (folder / "CMakeFiles" / f"{target}.dir").rglob("*.o") if path.name != "dispatch.cpp.o"
    ]
    linked = folder / (f"planted-{sanitizer}.so" if target == "_cpu" else f"planted-{sanitizer}")
    flags = [word for word in words if word.startswith("-fsanitize")] + (["-shared"] if target == "_cpu" else [])
    run([words[0], *flags, *objects, str(faulty.with_suffix(".o")), "-pthread", "-o", str(linked)], "linking")
    return linked


def must_find(sanitizer: str, command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    words = PLANTED[sanitizer][2]
    if done.returncode == 0 or words not in done.stderr:
        sys.exit(f"sanitize: a planted fault ({words}) was not found (status {done.returncode}): {done.stderr[-2000:]}")


def run(command: list[str], what: str, environment: dict[str, str] | None = None, cwd: Path = ROOT) -> str:
    """What a command prints; ends everything where it fails."""
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd
    )
    if done.returncode != 0:
        found = re.search(r"^.*(ERROR: |WARNING: |runtime error: |CHECK failed).*", done.stdout, re.MULTILINE)
        start = found.start() if found else max(0, len(done.stdout) - 6000)
        sys.exit(f"{done.stdout[start : start + 6000]}\nsanitize: failed: {what} (status {done.returncode})")
    return done.stdout


if __name__ == "__main__":
    raise SystemExit(main())
