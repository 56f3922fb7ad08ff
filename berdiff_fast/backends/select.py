# SPDX-License-Identifier: Apache-2.0
"""Which backend runs an op, and why another one cannot. Modules are imported when first asked for."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import torch

from berdiff_fast import choices
from berdiff_fast.backends.protocol import Backend, HasGroupNorm, HasWinograd

logger = logging.getLogger("berdiff_fast")

BACKENDS = get_args(choices.Backend)

#: What ``auto`` tries, in this order. Triton's interpreter is for tests, so a CPU never gets it unasked.
_CANDIDATES = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}

#: Ops that a backend has no kernel of. "auto" passes it over for these, and asking for it by name is an error.
LACKING = {
    # Of the norm memory is the limit, and CUDA C++ would do nothing better than Triton's kernels.
    "cuda": ("group_norm_silu", "winograd"),
    "triton": ("winograd",),  # on a GPU, cuDNN's convolutions are faster
}


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for cannot run here; the message says why."""


def _obstacle(name: str, device_type: str) -> str | None:
    """What is known to stand in the way before the backend is imported."""
    if name == "reference":
        return None
    if name == "cpp":
        if device_type != "cpu":
            return f"it runs on the CPU, and the tensors are on {device_type!r}"
        if importlib.util.find_spec("berdiff_fast._cpu") is None:
            return "the module berdiff_fast._cpu was not built; install the package with a C++ compiler at hand"
    if name == "cuda":
        if device_type != "cuda":
            return f"it runs on an NVIDIA GPU, and the tensors are on {device_type!r}"
        if importlib.util.find_spec("berdiff_fast._cuda") is None:
            return (
                "the module berdiff_fast._cuda was not built; install with nvcc on the PATH (or BERDIFF_FAST_CUDA=1 "
                "to make a missing nvcc an error)"
            )
        if not torch.cuda.is_available():
            return "torch sees no usable NVIDIA GPU"
        return _cuda_obstacle()
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed (pip install triton)"
        if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton kernels run on the CPU only under its interpreter (TRITON_INTERPRET=1)"
        if device_type not in ("cpu", "cuda"):
            return f"it runs on an NVIDIA GPU, and the tensors are on {device_type!r}"
    return None


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for CMake's list of architectures ("80-real 90-real 120") runs on a GPU of a compute capability.

    Real code runs on its own major version from its minor on; what is not "-real" is also there as PTX, for all newer.
    """
    for entry in architectures.split():
        number = int("".join(c for c in entry if c.isdigit()))
        built = divmod(number, 10)
        if built <= capability and (built[0] == capability[0] or not entry.endswith("-real")):
            return True
    return False


def _cuda_obstacle() -> str | None:
    import berdiff_fast._cuda as _cuda

    try:
        _cuda.device_count()
    except RuntimeError as error:  # as of a driver older than the runtime that is linked in
        return str(error)
    capability = torch.cuda.get_device_capability()
    if not covers(_cuda.architectures, capability):
        return (
            f"it was built for compute capabilities {_cuda.architectures} and this GPU has "
            f"{capability[0]}{capability[1]}; set BERDIFF_FAST_CUDA_ARCHS and install again"
        )
    return None


def why_not(name: str, device_type: str) -> str | None:
    """Why a backend cannot run ops on tensors of a device type ("cpu", "cuda"); None if it can.

    Raises:
        ValueError: there is no backend of that name.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {sorted(BACKENDS)}, got {name!r}")
    try:
        reason = _obstacle(name, device_type)
    except ImportError as error:
        reason = f"importing it failed: {error}"
    if reason is None and name != "reference":
        try:
            importlib.import_module(f"berdiff_fast.backends.{name}")
        except Exception as error:
            reason = f"importing it failed: {error}"
    return reason


def can_run(name: str, device_type: str, *, raise_error: bool = False) -> bool:
    """Whether a backend can run; the same test serves the automatic choice and the error text of an explicit one.

    Raises:
        ValueError: there is no backend of that name.
        BackendUnavailableError: it cannot, and ``raise_error`` is set; the message says why.
    """
    reason = why_not(name, device_type)
    if reason is not None and raise_error:
        raise BackendUnavailableError(f"backend {name!r} cannot run here: {reason}")
    return reason is None


#: Backends by name and device type and, where it was named, op.
_found: dict[tuple[str, ...], Any] = {}


@overload
def get(name: str, device_type: str) -> Backend: ...
@overload
def get(name: str, device_type: str, op: Literal["group_norm_silu"]) -> HasGroupNorm: ...
@overload
def get(name: str, device_type: str, op: Literal["winograd"]) -> HasWinograd: ...
def get(name: str, device_type: str, op: str = "") -> Any:
    """The backend that runs ops on a device type. An op that some backends lack has to be named.

    "auto" takes the fastest that can run and has a kernel of ``op``, and logs the choice once. An explicit name never
    falls back.

    Raises:
        ValueError: there is no backend of that name.
        BackendUnavailableError: the named backend cannot run here, or has no kernel of ``op``.
    """
    key = (name, device_type, op) if op else (name, device_type)
    try:
        return _found[key]
    except KeyError:
        _found[key] = found = _find(name, device_type, op)
        return found


def _find(name: str, device_type: str, op: str) -> Any:
    if op in LACKING.get(name, ()):
        others = [b for b in BACKENDS if op not in LACKING.get(b, ())]
        raise BackendUnavailableError(f"backend {name!r} has no kernel of {op}; 'auto' and {others} have")
    if name == "auto":
        candidates = _CANDIDATES.get(device_type, ("reference",))
        reasons = {b: _why_not_for(op, b, device_type) for b in candidates}
        chosen = next(b for b in candidates if reasons[b] is None)
        if chosen == "reference":
            told = "; ".join(f"{b}: {reason}" for b, reason in reasons.items() if reason is not None)
            logger.warning("backend 'auto' uses the slow 'reference' on %r (%s)", device_type, told)
        else:
            logger.info("backend 'auto' uses %r on %r", chosen, device_type)
        return get(chosen, device_type)
    can_run(name, device_type, raise_error=True)
    module = importlib.import_module(f"berdiff_fast.backends.{name}")
    return getattr(module, "backend", module)  # some are modules themselves


def _why_not_for(op: str, name: str, device_type: str) -> str | None:
    return f"it has no kernel of {op}" if op in LACKING.get(name, ()) else why_not(name, device_type)


def resolve(name: str, device_type: str) -> str:
    """The name of the backend that ``get`` returns."""
    backend = get(name, device_type)
    return next(b for b in BACKENDS if can_run(b, device_type) and get(b, device_type) is backend)


if TYPE_CHECKING:  # here mypy compares every backend with what a backend is
    from berdiff_fast.backends import cpp, cuda, reference, triton

    _ALL: tuple[Backend, ...] = (reference, cpp.backend, cuda.backend, triton)
    _WITH_NORMS: tuple[HasGroupNorm, ...] = (reference, cpp.backend, triton)
    _WITH_WINOGRAD: tuple[HasWinograd, ...] = (reference, cpp.backend)
