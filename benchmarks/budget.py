#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a sampling step of the prepared network costs a GPU: kernels, FLOP and bytes, counted without one.

    python benchmarks/budget.py            # counts, and compares with the record
    python benchmarks/budget.py --update   # and writes benchmarks/results/budget.json and docs/performance.md

A step of 16 masks of 128 x 128 in bfloat16 runs on meta tensors, which have shapes and no contents. Every operation
that reaches PyTorch's dispatcher is looked up in ``OPERATIONS`` below, and every Triton kernel that is launched without
one in ``LAUNCHES``. **A new op or kernel wants an entry there**; one that is missing stops the count.
tests/test_budget.py fails where kernels, FLOP or bytes are above the record: they may only fall.

What is counted: a multiplication and an addition of a convolution or a product as two FLOP, and nothing else as any;
every byte of what a kernel has to read and write, once, as if nothing stayed in a cache between kernels.

The times are an **estimate**: each operation takes as long as its FLOP or its bytes at a rate that such GPUs reach,
whichever is longer, and nothing else takes any. It is not a measurement.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from berdiff_fast import UNet, load, ops
from berdiff_fast.backends.triton import group_norm as norms
from berdiff_fast.bench.baselines import PUBLISHED
from berdiff_fast.files import write_text
from berdiff_fast.network.fused import FusedUNet
from berdiff_fast.network.inference import PreparedUNet

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "results" / "budget.json"
PAGE = ROOT / "docs" / "performance.md"

MASKS, SIDE, STEPS, DTYPE = 16, 128, 10, torch.bfloat16

#: FLOP and bytes a second: what large convolutions in bfloat16 and large copies are said to reach.
GPUS = {"H200": (620e12, 4.3e12), "H100": (600e12, 3.0e12)}

CONVOLUTION, TRANSPOSED, SMALL = "3 x 3 convolutions", "transposed convolutions", "other convolutions"
BIAS = "biases of convolutions, passes of their own"
SUMS, FACTORS, APPLY = "norms: sums", "norms: factors", "norms: apply"
LINEAR, ATTENTION, RESIDUAL, DRAW, OTHER = "linear, addmm", "attention", "residuals", "draw of the step", "others"
KINDS = (CONVOLUTION, TRANSPOSED, SMALL, BIAS, SUMS, FACTORS, APPLY, LINEAR, ATTENTION, RESIDUAL, DRAW, OTHER)


@dataclass(frozen=True)
class Work:
    """A kernel."""

    kind: str
    bytes: int
    flop: int = 0


def size(*tensors: Any) -> int:
    """Bytes of tensors; what an expanded one repeats is there once. What is no tensor has none."""
    total = 0
    for x in tensors:
        if isinstance(x, torch.Tensor):
            pairs = zip(x.shape, x.stride(), strict=True)
            total += x.element_size() * math.prod(n for n, stride in pairs if stride or not n)
    return total


# ---------------------------------------------------------------------- what each operation launches
#
# Each is called with the operation's result and its arguments, by position and by name, and gives its kernels.

Rule = Callable[..., list[Work]]


def convolution(out, x, weight, bias, stride, padding, dilation, transposed, *_) -> list[Work]:
    kind = TRANSPOSED if transposed else CONVOLUTION if set(weight.shape[2:]) == {3} else SMALL
    flop = 2 * (x if transposed else out).numel() * weight[0].numel()
    found = [Work(kind, size(x, weight, out), flop)]
    if bias is not None:  # ATen adds it to what cuDNN has written
        found.append(Work(BIAS, size(bias) + 2 * size(out)))
    return found


def product(kind: str = LINEAR) -> Rule:
    """Of the last two tensors; what comes before them, if anything, is added."""

    def rule(out, *arguments, **_) -> list[Work]:
        tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
        return [Work(kind, size(*tensors, out), 2 * out.numel() * tensors[-2].shape[-1])]

    return rule


def attention(out, q, k, v, *_, **__) -> list[Work]:
    """One fused kernel: of heads too wide for flash attention, the one that saves memory."""
    return [Work(ATTENTION, size(q, k, v, out), 2 * out.numel() * k.shape[-2] + 2 * q.numel() * k.shape[-2])]


def sum_of_two(out, x, other, *_, **__) -> list[Work]:
    is_residual = isinstance(other, torch.Tensor) and other.shape == x.shape and x.ndim > 2
    return [Work(RESIDUAL if is_residual else OTHER, size(x, other, out))]


def rewritten(out, *arguments, **_) -> list[Work]:
    """Reads its tensors, also those in a list, and writes its result."""
    tensors = [x for a in arguments for x in (a if isinstance(a, (list, tuple)) else [a])]
    return [Work(OTHER, size(*tensors, out))]


def copied(out, x, source, *_, **__) -> list[Work]:
    return [Work(OTHER, size(source, out))]


def written(out, *_, **__) -> list[Work]:
    return [Work(OTHER, size(out))]


def softmax(out, x, *_, **__) -> list[Work]:
    return [Work(ATTENTION, size(x, out))]


def nothing(out, *_, **__) -> list[Work]:
    return []


def made_channels_last(*tensors: torch.Tensor | None) -> list[Work]:
    """The copies that our ops make of what is not channels last in memory."""
    wrong = [x for x in tensors if x is not None and not x.movedim(1, -1).is_contiguous()]
    return [Work(OTHER, 2 * size(x)) for x in wrong]


def group_norm_silu(out, x, other, weight, bias, *_) -> list[Work]:
    n, channels, *spatial = out.shape
    pixels = math.prod(spatial)
    spans = -(-pixels // (norms.SIZES["PIXELS"] * norms.SUMS_STEPS))
    sums, factors, pivots = 4 * n * spans * 2 * channels, 4 * n * 2 * channels, size(out) // pixels
    return [
        *made_channels_last(x, other),
        Work(SUMS, size(x, other) + sums),
        Work(FACTORS, sums + pivots + size(weight, bias) + factors),
        Work(APPLY, size(x, other) + factors + size(out)),
    ]


def sample_step(out, y_t, logits, *_) -> list[Work]:
    return [Work(DRAW, size(y_t, logits, out))]


#: By the op's name without its overload.
OPERATIONS: dict[str, Rule] = {
    "berdiff_fast::group_norm_silu": group_norm_silu,
    "berdiff_fast::sample_step": sample_step,
    "aten::convolution": convolution,
    "aten::addmm": product(),
    "aten::addmm_": product(),
    "aten::mm": product(),
    "aten::bmm": product(ATTENTION),
    "aten::baddbmm": product(ATTENTION),
    "aten::baddbmm_": product(ATTENTION),
    "aten::_softmax": softmax,
    "aten::add": sum_of_two,
    "aten::add_": sum_of_two,
    "aten::cat": rewritten,
    "aten::clone": rewritten,
    "aten::_to_copy": rewritten,
    "aten::copy_": copied,
    "aten::pixel_shuffle": rewritten,
    "aten::pixel_unshuffle": rewritten,
    "aten::avg_pool2d": rewritten,
    "aten::upsample_nearest2d": rewritten,
    "aten::native_group_norm": rewritten,
    "aten::zeros": written,
    "aten::zero_": written,
    "aten::fill_": written,
    "aten::empty": nothing,
    "aten::empty_like": nothing,
    "aten::empty_strided": nothing,
    "aten::new_empty": nothing,
    "aten::new_empty_strided": nothing,
    "aten::_unsafe_view": nothing,
}


def once(kind: str, flop: Callable[[dict[str, Any]], int] = lambda given: 0) -> Callable[..., list[Work]]:
    """A launch that reads or writes each of its tensors once; ``flop`` is told its arguments by name."""

    def rule(given: dict[str, Any]) -> list[Work]:
        # Of a tensor descriptor, what it describes; of a tensor that is given twice, once.
        tensors = {id(x): x for x in (getattr(x, "base", x) for x in given.values())}
        return [Work(kind, size(*tensors.values()), flop(given))]

    return rule


def fused_convolution(given: dict[str, Any]) -> list[Work]:
    kind = {9: CONVOLUTION, 4: TRANSPOSED, 1: LINEAR}[given["TAPS"]]
    read = ["x", "weight", "bias"]
    read += [name for name, channels in (("a", "COUNT_A"), ("b", "COUNT_B")) if given[channels]]
    read += ["residual"] if given["RESIDUAL"] else []
    tensors = [getattr(given[name], "base", given[name]) for name in read]
    depth = given["TAPS"] * given["COUNT"] + given["COUNT_A"] + given["COUNT_B"]
    return [Work(kind, size(*tensors, given["out"], given["sums"]), 2 * given["out"].numel() * depth)]


#: By the Triton kernel's name, for those that no op of ours launches: called with the arguments by name.
LAUNCHES: dict[str, Callable[[dict[str, Any]], list[Work]]] = {
    "convolution_kernel": fused_convolution,
    "stem_kernel": once(SMALL, lambda given: 2 * given["out"].numel() * given["TAPS"]),
    "norm_factors_kernel": once(FACTORS),
    "group_norm_apply_kernel": once(APPLY),
    "head_products_kernel": once(SMALL, lambda given: 2 * given["products"].numel() * given["C"]),
    "head_sums_kernel": once(SMALL),
}

#: Forms of a network that a GPU may run, each of which has its budget.
FORMS: dict[str, Callable[..., Any]] = {"prepared": PreparedUNet, "fused": FusedUNet}


# What torch.compile makes of the plain network if it fuses all that can be: no pass for a bias, a norm that reads once
# and then reads and writes, one pass for a sum of two branches, and nothing for what is computed element by element.


def ideal_convolution(out, x, weight, bias, *rest) -> list[Work]:
    return [convolution(out, x, weight, None, *rest)[0]]


def ideal_norm(out, x, *_) -> list[Work]:
    once = x.numel() * DTYPE.itemsize  # converted to float32 on the way
    return [Work(SUMS, once), Work(APPLY, 2 * once)]


def ideal_sum(out, x, other, *_, **__) -> list[Work]:
    found = sum_of_two(out, x, other)
    return found if found[0].kind == RESIDUAL else []


def ideal_copy(out, *arguments, **_) -> list[Work]:
    """What is concatenated for a convolution has to be written; small vectors come along."""
    return rewritten(out, *arguments) if out.ndim > 3 else []


FUSED: dict[str, Rule] = OPERATIONS | {
    "aten::convolution": ideal_convolution,
    "aten::native_group_norm": ideal_norm,
    "aten::add": ideal_sum,
    "aten::cat": ideal_copy,
    "aten::clone": nothing,
    "aten::_to_copy": nothing,
    "aten::copy_": nothing,
    "aten::arange": nothing,
}


# ---------------------------------------------------------------------- counting


class UnknownOperationError(RuntimeError):
    """An op of which ``OPERATIONS`` does not say what it launches, or a kernel that is not in ``LAUNCHES``."""


class _Attention(TorchFunctionMode):
    """Keeps attention whole, which PyTorch would take apart on meta tensors."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        # Positions before heads, as the kernels write it.
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
        self.counter.work += attention(out, q, k, v)
        return out


class Counter(TorchDispatchMode):
    """Collects the kernels of what runs on meta tensors inside it.

    Args:
        rules: of each operation.
        fuses: what is computed element by element costs nothing.

    Raises:
        UnknownOperationError: by the operation.
    """

    def __init__(self, rules: dict[str, Rule], fuses: bool = False) -> None:
        super().__init__()
        self.rules, self.fuses = rules, fuses
        self.work: list[Work] = []

    def __enter__(self):
        self._around = ExitStack()
        self._around.enter_context(_Attention(self))
        # Under TRITON_INTERPRET kernels are of the second kind.
        for kind in (JITFunction, InterpretedFunction):
            self._around.enter_context(mock.patch.object(kind, "run", self._launcher()))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._around.close()

    def _launcher(self) -> Callable[..., None]:
        def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
            name = kernel.fn.__name__
            if name not in LAUNCHES:
                raise UnknownOperationError(
                    f"{name} is not in the table LAUNCHES of benchmarks/budget.py: add what it reads and writes"
                )
            self.work += LAUNCHES[name](dict(zip(kernel.arg_names, arguments, strict=False)) | options)

        return run

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.name().split(".")[0]
        if name == "aten::convolution" and out.ndim == 4:
            # A GPU keeps to channels last where x and weight have it; meta tensors do so only in part.
            out = torch.empty_like(out, memory_format=torch.channels_last)
        result = out[0] if isinstance(out, (tuple, list)) else out
        if name in self.rules:
            self.work += self.rules[name](result, *args, **kwargs)
        elif any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            pass  # a view
        elif not any(isinstance(x, torch.Tensor) for x in tree_leaves((out, args, kwargs))):
            pass  # a question about types
        elif torch.Tag.pointwise in func.tags:
            self.work += [] if self.fuses else rewritten(result, *args)
        else:
            raise UnknownOperationError(
                f"{func.name()} is not in the table OPERATIONS of benchmarks/budget.py: add what it launches"
            )
        return out


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Meta tensors say that they are on a GPU, for code that goes another way there."""
    is_cuda = property(lambda x: x.device.type in ("cuda", "meta"))
    with mock.patch.object(torch.Tensor, "is_cuda", is_cuda):
        yield


def networks() -> dict[str, UNet]:
    """The networks of the budget, on meta tensors."""
    with torch.device("meta"):
        published = UNet(**PUBLISHED).eval()
    return {"published": published, "lidc-v1": load("lidc-v1").network.to("meta")}


def step(network: UNet, make: Callable[..., Any]) -> list[Work]:
    """A step of a call: a form of the network, and the draw."""
    with _as_on_a_gpu(), torch.no_grad():
        form = make(network, torch.tensor([1.0, 2.0], device="meta"), dtype=DTYPE)
        features = form.encode(torch.empty(1, network.img_channels, SIDE, SIDE, device="meta", dtype=DTYPE))
        y = torch.empty(MASKS, network.mask_channels, SIDE, SIDE, device="meta", dtype=DTYPE)
        seeds, table = torch.empty(1, dtype=torch.int64, device="meta"), torch.empty(4, device="meta")
        flag = torch.empty(1, dtype=torch.int32, device="meta")
        with Counter(OPERATIONS) as counter:
            logits = form(y, 0, features)
            ops.sample_step(y, logits, seeds, table, 500, nan_flag=flag)
    return counter.work


def plain(network: UNet) -> list[Work]:
    """A step of the network as it is, fused as well as can be."""
    network = network.to(DTYPE)
    with _as_on_a_gpu(), torch.no_grad():
        y = torch.empty(MASKS, network.mask_channels, SIDE, SIDE, device="meta", dtype=DTYPE)
        img = torch.empty(MASKS, network.img_channels, SIDE, SIDE, device="meta", dtype=DTYPE)
        with Counter(FUSED, fuses=True) as counter:
            network(y, torch.empty(MASKS, device="meta"), img)
    return [*counter.work, Work(DRAW, 3 * size(y))]


def milliseconds(work: list[Work], gpu: str) -> float:
    """The estimate."""
    flop, bytes_ = GPUS[gpu]
    return 1e3 * sum(max(w.flop / flop, w.bytes / bytes_) for w in work)


def summed(work: list[Work]) -> dict[str, Any]:
    return {
        "kernels": len(work),
        "flop": sum(w.flop for w in work),
        "bytes": sum(w.bytes for w in work),
        "estimated_ms": {gpu: round(milliseconds(work, gpu), 3) for gpu in GPUS},
    }


def count() -> dict[str, Any]:
    """The budget of each network in each form."""
    found = {}
    for name, network in networks().items():
        steps = {form: step(network, make) for form, make in FORMS.items()}
        fused = summed(plain(network))
        for form, ours in steps.items():
            of_kind = {kind: summed(chosen) for kind in KINDS if (chosen := [w for w in ours if w.kind == kind])}
            found[f"{name}, {form}"] = {**summed(ours), "of": of_kind, "plain, ideally fused": fused}
    return found


def exceeded(found: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """Where a count is above the record, a line each."""
    return [
        f"{name}: {found[name][what]:,} {what}, and the record is {record[name][what]:,}"
        for name in found
        for what in ("kernels", "flop", "bytes")
        if name in record and found[name][what] > record[name][what]
    ]


# ---------------------------------------------------------------------- the table

_PLACE = re.compile(r"(<!-- budget -->\n).*?(<!-- /budget -->)", re.DOTALL)


def table(record: dict[str, Any]) -> str:
    """Markdown of a record."""
    lines = []
    for name, found in record.items():
        lines += [
            f"**a step of {MASKS} masks of {SIDE} x {SIDE}, {str(DTYPE).removeprefix('torch.')}: {name}**",
            "",
            "| | kernels | GFLOP | MB | " + " | ".join(f"{gpu}, ms, estimate" for gpu in GPUS) + " |",
            "|---|---|---|---|" + "---|" * len(GPUS),
            *(_row(kind, numbers) for kind, numbers in found["of"].items()),
            _row("**all of a step**", found),
            _row("torch.compile, if it fused all it could", found["plain, ideally fused"]),
            "",
            f"A call of {STEPS} steps, estimated: "
            + "; ".join(
                f"{STEPS * found['estimated_ms'][gpu]:.1f} ms on an {gpu}, and "
                f"{STEPS * found['plain, ideally fused']['estimated_ms'][gpu]:.1f} for torch.compile's"
                for gpu in GPUS
            )
            + ".",
            "",
        ]
    return "\n".join(lines)


def _row(name: str, numbers: dict[str, Any]) -> str:
    times = " | ".join(f"{numbers['estimated_ms'][gpu]:.3f}" for gpu in GPUS)
    return f"| {name} | {numbers['kernels']} | {numbers['flop'] / 1e9:,.1f} | {numbers['bytes'] / 1e6:,.1f} | {times} |"


def on_page(text: str, record: dict[str, Any]) -> str:
    """A page with the table where it asks for one.

    Raises:
        ValueError: it does not.
    """
    replaced, places = _PLACE.subn(lambda match: match[1] + table(record) + match[2], text)
    if places != 1:
        raise ValueError(f"the page must have <!-- budget --> and <!-- /budget --> once, got them {places} times")
    return replaced


def main() -> None:
    parser = argparse.ArgumentParser(description="Counts what a sampling step costs a GPU.")
    parser.add_argument("--update", action="store_true", help="write the record and the page")
    parser.add_argument("--allow-higher", action="store_true", help="even where the count is above the record")
    chosen = parser.parse_args()
    found = count()
    print(table(found))
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    worse = exceeded(found, record)
    if worse and not (chosen.update and chosen.allow_higher):
        sys.exit("\n".join(worse))
    if chosen.update:
        page = on_page(PAGE.read_text(encoding="utf-8"), found)
        write_text(RECORD, json.dumps(found, indent=1) + "\n")
        write_text(PAGE, page)


if __name__ == "__main__":
    main()
