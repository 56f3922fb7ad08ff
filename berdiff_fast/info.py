# SPDX-License-Identifier: Apache-2.0
"""``python -m berdiff_fast.info``: versions, instruction sets and backends, and why each missing one is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from typing import Any

import torch

from berdiff_fast._version import __version__
from berdiff_fast.backends import select
from berdiff_fast.loading import bundled_models
from berdiff_fast.rng import DRAW_CONTRACT


def collect() -> dict[str, Any]:
    """What ``main`` prints, as a dict of JSON-able values."""
    gpu = torch.cuda.is_available()
    # A reason for the device that the backend is made for: "it runs on an NVIDIA GPU" helps nobody without one.
    home = {"cuda": "cuda", "cpp": "cpu", "triton": "cuda" if gpu else "cpu", "reference": "cpu"}
    return {
        "berdiff_fast": __version__,
        "draw contract": DRAW_CONTRACT,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "packages": {name: _version(name) for name in ("torch", "triton", "numpy", "safetensors", "matplotlib")},
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "instruction sets": _isas(),
        "cuda architectures": _architectures(),
        "backends": {name: select.why_not(name, home[name]) for name in select.BACKENDS},
        "auto": {device: _auto(device) for device in (["cpu", "cuda"] if gpu else ["cpu"])},
        "bundled models": bundled_models(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Print it."""
    parser = argparse.ArgumentParser(prog="berdiff-fast info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args(arguments).json
    report = collect()
    if as_json:
        print(json.dumps(report, indent=2))
        return 0
    backends, packages = report.pop("backends"), report.pop("packages")
    for key, value in {**report, **packages}.items():
        if isinstance(value, dict):
            value = ", ".join(f"{v} on {k}" for k, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(value) or "none"
        print(f"{key:20s} {'not installed' if value is None and key in packages else value or 'none'}")
    print("\nbackends")
    for name, reason in backends.items():
        print(f"  {name:18s} {'ready' if reason is None else 'not here: ' + reason}")
    return 0


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _isas() -> list[str]:
    if not select.can_run("cpp", "cpu"):
        return []
    from berdiff_fast.backends import cpp

    return [f"{name} (in use)" if name == cpp.isa() else name for name in cpp.available_isas()]


def _architectures() -> str | None:
    try:
        import berdiff_fast._cuda as _cuda
    except ImportError:  # not built, or it does not load; the backend's line says which
        return None
    return _cuda.architectures


def _auto(device_type: str) -> str:
    return select.resolve("auto", device_type)


if __name__ == "__main__":
    raise SystemExit(main())
