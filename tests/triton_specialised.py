# SPDX-License-Identifier: Apache-2.0
"""Compiles what the Triton backend launches, as Triton's JIT specialises it for an architecture, and reads the result.

python tests/triton_specialised.py 90 [--all] [--shard I N] [--collect] [--without METHOD]

No GPU is needed: Triton is given a driver that knows its architecture and nothing else, and launches end before
anything would run. Prints a JSON report on the last line. It is a program because ``TRITON_INTERPRET`` must not be set
when Triton is imported.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import pkgutil
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

assert os.environ.get("TRITON_INTERPRET") != "1", "interpreted kernels are not compiled"

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from berdiff_fast.backends import triton as backend  # noqa: E402
from berdiff_fast.backends.triton import common  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
import triton_cases  # noqa: E402


class Driver:
    """All of a driver that compiling needs."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@triton.jit
def division_kernel(out, a, b, size, BLOCKS: tl.constexpr):
    """As many divisions as the posterior has: they are made of fused operations, and nothing else of it may be."""
    at = tl.program_id(0).to(tl.int64) * (4 * BLOCKS) + tl.arange(0, 4 * BLOCKS).to(tl.int64)
    live = at < size
    quotient = tl.div_rn(tl.load(a + at, mask=live, other=0.0), tl.load(b + at, mask=live, other=0.0))
    tl.store(out + at, quotient, mask=live)


class Compiler:
    """Stands in for the end of every launch: compiles, and keeps what came of it.

    Args:
        shard, shards: of the specialisations, in the order of their first launch, every ``shards``-th is compiled.
        collect: none is.
    """

    def __init__(self, shard: int, shards: int, collect: bool) -> None:
        self.shard, self.shards, self.collect = shard, shards, collect
        self.found: dict[Any, dict[str, Any]] = {}
        self.compiled: dict[int, tuple[Any, dict[str, Any]]] = {}
        self.case: triton_cases.Case | None = None
        self._last: dict[str, Any] = {}
        triton.knobs.runtime.jit_cache_hook = self._specialised
        self._run = JITFunction.run
        JITFunction.run = lambda function, *arguments, **options: self._launch(function, *arguments, **options)

    def _specialised(self, *, key: Any, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Called by Triton before it compiles; True keeps it from that."""
        number = len(self.found)
        (attributes,) = compile["configs"]
        self._last = self.found.setdefault(
            (fn.name, str(key)),
            {
                "kernel": fn.name,
                "number": number,
                "signature": dict(compile["signature"]),
                "constants": {name: repr(value) for name, value in _by_name(fn, compile["constants"]).items()},
                "told": {name: str(value) for name, value in _by_name(fn, attributes).items() if value},
                "cases": [],
                "wide": 0,
            },
        )
        return self.collect or self._last["number"] % self.shards != self.shard

    def _launch(self, function: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        self._last = {}
        compiled = self._run(function, *arguments, grid=grid, warmup=True, **options)
        if compiled is not None:
            found = self.compiled.setdefault(id(compiled), (compiled, self._last))[1]
        else:
            found = self._last
        if self.case is not None:
            found["cases"].append(self.case.label)
            found["wide"] = max(found["wide"], self.case.wide.get(found["kernel"], 0))
        return compiled


def _by_name(fn: Any, values: dict[tuple[int, ...], Any]) -> dict[str, Any]:
    names = fn.jit_function.arg_names
    return {names[place[0]]: value for place, value in values.items()}


# ---------------------------------------------------------------------- what there is to launch


def all_functions() -> dict[str, JITFunction]:
    """Every Triton function of the package."""
    found = {}
    for module in pkgutil.iter_modules(backend.__path__, f"{backend.__name__}."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, JITFunction) and value.fn.__module__.startswith("berdiff_fast."):
                found[value.fn.__name__] = value
    return found


def owner(call: Any) -> Any:
    """The class of a method; the backend for what is a function of it."""
    return type(call.__self__) if hasattr(call, "__self__") else backend


def launchers(owners: set[Any]) -> set[tuple[Any, str]]:
    """Public functions of the backend, or methods of classes, but for context managers, which launch nothing."""
    public = ((o, name, value) for o in owners for name, value in vars(o).items() if name[0] != "_")
    return {(o, name) for o, name, value in public if inspect.isfunction(value) and not hasattr(value, "__wrapped__")}


def reached(names: set[str], functions: dict[str, JITFunction]) -> set[str]:
    """Those functions and all that they call."""
    todo, seen = list(names), set()
    while todo:
        name = todo.pop()
        if name in functions and name not in seen:
            seen.add(name)
            todo += functions[name].fn.__code__.co_names
    return seen


# ---------------------------------------------------------------------- machine code


def tool(name: str) -> str | None:
    """Where a tool of CUDA lies: in Triton's wheel, or on the PATH."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(bundled) if bundled.is_file() else shutil.which(name)


def machine_code(cubin: bytes) -> bytes:
    """The instructions in an ELF file."""
    (start,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, of_names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, start + size * i) for i in range(count)]
    names = sections[of_names][4]
    texts = [s for s in sections if cubin[names + s[0] :].startswith(b".text.")]
    return b"".join(cubin[s[4] : s[4] + s[5]] for s in texts)


INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*)", re.MULTILINE)


def disassemble(cubins: list[bytes], architecture: str) -> list[Counter[str]]:
    """How often each instruction occurs in each; one run of nvdisasm, since starting it takes longer than its work."""
    codes = [machine_code(cubin) for cubin in cubins]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "code")
        path.write_bytes(b"".join(codes))
        command = [str(tool("nvdisasm")), "--binary", architecture.upper().replace("_", "").replace("A", "a"), path]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts: list[Counter[str]] = [Counter() for _ in codes]
    at, end = 0, len(codes[0]) if codes else 0
    for address, name, operands in INSTRUCTION.findall(listing):
        while int(address, 16) >= end:
            at += 1
            end += len(codes[at])
        # Zero times zero and a constant is how a constant is loaded.
        if not (name.startswith("HFMA2") and re.match(r"\w+, -RZ, RZ, ", operands)):
            counts[at][name] += 1
    return counts


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of a kernel, as ptxas wrote them down."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [str(tool("cuobjdump")), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", listing)
    return {name.lower(): int(number) for name, number in found}


def read(compiled: list[Any]) -> list[dict[str, Any]]:
    """What the tests ask about kernels."""
    read = []
    for kernel in compiled:
        ptx = kernel.asm["ptx"]
        read.append(
            {
                "target": re.search(r"\.target (sm_\w+)", ptx).group(1),
                "fuses": bool(kernel.metadata.enable_fp_fusion),
                "flushes": ".ftz" in ptx,
                "divides": "div.rn.f32" in ptx,
                "fused_in_ptx": len(re.findall(r"\bfma\.rn(?:\.ftz)?\.f32", ptx)),
                "resources": resources(kernel.asm["cubin"]) if tool("cuobjdump") else None,
                "sass": None,
            }
        )
    if tool("nvdisasm"):
        for of_target in {entry["target"] for entry in read}:
            chosen = [i for i, entry in enumerate(read) if entry["target"] == of_target]
            counts = disassemble([compiled[i].asm["cubin"] for i in chosen], of_target)
            for i, count in zip(chosen, counts, strict=True):
                read[i]["sass"] = dict(count)
    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architecture", type=int)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--shard", type=int, nargs=2, default=(0, 1))
    parser.add_argument("--collect", action="store_true")
    parser.add_argument("--without", default="")
    chosen = parser.parse_args()
    driver.set_active(Driver(chosen.architecture))
    torch.cuda.get_device_capability = lambda device=None: divmod(chosen.architecture, 10)
    compiler = Compiler(*chosen.shard, chosen.collect)
    functions = all_functions()

    failures, called = [], set()
    for compiler.case in triton_cases.cases(quick=not chosen.all):
        method = compiler.case.method
        if method.__name__ == chosen.without or chosen.architecture not in compiler.case.architectures:
            continue
        called.add((owner(method), method.__name__))
        try:
            method(*compiler.case.arguments, **compiler.case.options)
        except Exception as error:  # the test names them all
            failures.append(f"{compiler.case.label}: {type(error).__name__}: {str(error).strip()[-600:]}")

    launched = {entry["kernel"] for entry in compiler.found.values()}
    report: dict[str, Any] = {
        "triton": triton.__version__,
        "failures": failures,
        "launched": sorted(launched),
        "not_launched": sorted(set(functions) - reached(launched, functions)),
        "not_called": sorted(name for kind, name in launchers({kind for kind, _ in called}) - called),
        "kept_as_they_are": {
            name: [p.name for p in function.params if p.do_not_specialize] for name, function in functions.items()
        },
        "specialisations": len(compiler.found),
        "tools": {name: tool(name) is not None for name in ("nvdisasm", "cuobjdump")},
    }
    compiler.case, compiler.shard, compiler.shards = None, 0, 1
    size = 4 * common.BLOCKS
    a = triton_cases.gpu(size)
    # Beside the posterior: of itself the shard may have none.
    division = division_kernel[(1,)](a, a, a, 16 * size, BLOCKS=common.BLOCKS, **common.LAUNCH_OPTIONS)

    entries = [(kernel, entry) for kernel, entry in compiler.compiled.values() if kernel is not division]
    if not chosen.collect:
        *reads, of_division = read([kernel for kernel, _ in entries] + [division])
        report["division"] = of_division
        for (_, entry), found in zip(entries, reads, strict=True):
            entry |= found
    report["kernels"] = list(compiler.found.values()) if chosen.collect else [entry for _, entry in entries]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
