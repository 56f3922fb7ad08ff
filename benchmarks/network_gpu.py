#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The network on an NVIDIA GPU: its convolutions, a step of each of its forms, and whole calls; writes JSON and tables.

    python benchmarks/network_gpu.py --output network.json                 # measures, in about two minutes
    python benchmarks/network_gpu.py --from network.json --update README.md docs/performance.md

Forms are compared with float32 before they are timed, and calls with each other. Times of kernels and steps are medians
of replays of a CUDA graph of ten; times of calls are medians of whole calls, from images on the device to masks there.
The file is written after every figure, so that a run that is cut short keeps what it measured.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import berdiff_fast as bf
from berdiff_fast.bench import baselines, calls
from berdiff_fast.files import write_text
from berdiff_fast.info import collect
from berdiff_fast.network import fused
from berdiff_fast.network.inference import PreparedUNet

#: Side, inputs, outputs, taps (4: after repeating each pixel 2 x 2 times) of the published U-Net's convolutions.
CONVOLUTIONS = (
    (128, 128, 128, 9), (128, 256, 128, 9), (64, 128, 128, 9), (64, 256, 128, 9), (32, 256, 256, 9), (32, 512, 256, 9),
    (16, 384, 384, 9), (8, 512, 512, 9), (64, 128, 128, 4),
)  # fmt: skip
MASKS, SIDE, STEPS = 16, 128, 10


class Report:
    """What was measured so far; on the disk after every row."""

    def __init__(self, output: str) -> None:
        self.output, self.found = output, {"machine": collect(), "rows": []}

    def say(self, part: str, name: str, **figures: Any) -> None:
        row = {"part": part, "name": name, **figures}
        print(
            part,
            name,
            *(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()),
            flush=True,
        )
        self.found["rows"].append(row)
        write_text(Path(self.output), json.dumps(self.found, indent=1))


def in_graph(function: Callable[[], Any], calls: int = 10, replays: int = 5) -> float:
    """Milliseconds of one of ``calls`` calls in a CUDA graph."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def ceilings(report: Report) -> None:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    report.say(
        "ceiling", "product of 8192 x 8192 matrices, bfloat16", TFLOPs=2 * 8192**3 / in_graph(lambda: a @ b) / 1e9
    )


def convolutions(report: Report) -> None:
    """Ours leaves the next norm's sums and has its bias added; cuDNN's has not."""
    from berdiff_fast.backends.triton.layers import TritonLayers

    layers, maker = TritonLayers(), fused._Maker(torch.bfloat16, None, 0)
    for side, inputs, outputs, taps in CONVOLUTIONS:
        torch.manual_seed(0)
        module = torch.nn.Conv2d(inputs, outputs, 3, padding=1, device="cuda")
        x = torch.randn(MASKS, side, side, inputs, device="cuda", dtype=torch.bfloat16)
        image, kernel = x.movedim(-1, 1), module.weight.detach().bfloat16().to(memory_format=torch.channels_last)
        name = f"{inputs} to {outputs} at {side} x {side}{', upsampling' if taps == 4 else ''}"
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            exact = image[:1].float() if taps == 9 else F.interpolate(image[:1].float(), scale_factor=2.0)
            exact = F.conv2d(exact, kernel.float(), module.bias, padding=1).movedim(1, -1)
        weight = maker.weight(module) if taps == 9 else maker.upsample(module)
        got = layers.convolution(x, weight, weight.bias).x[:1].float()
        error = float((got - exact).norm() / exact.norm())
        assert error < 5e-3, f"{name}: off by {error}"
        flop = 2 * exact[0].numel() * MASKS * 9 * inputs
        row = {"ours": in_graph(lambda x=x, w=weight: layers.convolution(x, w, w.bias))}
        for benchmark in (False, True):
            with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark), torch.no_grad():
                if taps == 9:
                    bias = module.bias.detach().bfloat16()
                    row[f"cuDNN, benchmark={benchmark}"] = in_graph(lambda i=image, k=kernel: F.conv2d(i, k, padding=1))
                    if not benchmark:
                        row["cuDNN with bias"] = in_graph(
                            lambda i=image, k=kernel, b=bias: F.conv2d(i, k, b, padding=1)
                        )
                else:
                    row[f"repeated, cuDNN, benchmark={benchmark}"] = in_graph(
                        lambda i=image, k=kernel: F.conv2d(F.interpolate(i, scale_factor=2.0), k, padding=1)
                    )
        report.say(
            "convolution", name, error=error, TFLOPs=flop / row["ours"] / 1e9, **{k: v * 1e3 for k, v in row.items()}
        )


def ends_and_attention(report: Report) -> None:
    for inputs, outputs in ((1, 128), (128, 1)):
        x = torch.randn(MASKS, SIDE, SIDE, inputs, device="cuda", dtype=torch.bfloat16).movedim(-1, 1)
        kernel = torch.randn(outputs, inputs, 3, 3, device="cuda", dtype=torch.bfloat16)
        kernel = kernel.to(memory_format=torch.channels_last)
        us = in_graph(lambda x=x, k=kernel: F.conv2d(x, k, padding=1)) * 1e3
        report.say("end", f"cuDNN, {inputs} to {outputs} at {SIDE} x {SIDE}", us=us)
    for tokens, width in ((256, 384), (64, 512)):
        q, k, v = torch.randn(3, MASKS, 1, tokens, width, device="cuda", dtype=torch.bfloat16)
        us = in_graph(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v)) * 1e3
        report.say("attention", f"scaled_dot_product_attention, {tokens} tokens of {width}", us=us)
        q, k, v = q[:, 0], k[:, 0], v[:, 0]
        us = in_graph(lambda q=q, k=k, v=v: torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1), v)) * 1e3
        report.say("attention", f"bmm, softmax, bmm, {tokens} tokens of {width}", us=us)


def steps(report: Report) -> None:
    """A step of each form, at n = 16 and 1."""
    for name, model in (("published U-Net", calls._published_unet()), ("lidc-v1", bf.load("lidc-v1"))):
        network, img = model.network.cuda().eval(), image()
        for n in (MASKS, 1):
            y = torch.rand(n, 1, SIDE, SIDE, device="cuda") < 0.5
            with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                exact = network(
                    y[:2].float(), torch.full((len(y[:2]),), 500, device="cuda"), img.expand(len(y[:2]), -1, -1, -1)
                )
            for form, kind in (("fused", fused.FusedUNet), ("prepared", PreparedUNet)):
                if form == "fused" and (why := fused.why_not(network, img.device, torch.bfloat16)):
                    report.say("step", f"{name}, n = {n}, fused", why_not=why)
                    continue
                made = kind(network, [500.0], dtype=torch.bfloat16)
                with torch.no_grad():
                    start = time.perf_counter()
                    features, states = made.encode(img), y.bfloat16()
                    got = made(states, 0, features)
                    torch.cuda.synchronize()
                    seconds = time.perf_counter() - start
                    error = float((got[:2].float() - exact).norm() / exact.norm())
                    assert error < 2e-2, f"{name}, {form}: off by {error}"
                    assert torch.equal(got, made(states, 0, features)), f"{name}, {form}: other bits the second time"
                    ms = in_graph(lambda m=made, s=states, f=features: m(s, 0, f))
                report.say("step", f"{name}, n = {n}, {form}", ms=ms, error=error, first_seconds=seconds)


def image() -> torch.Tensor:
    return bf.Preprocessing()(bf.data.phantom.generate(1, SIDE, field=SIDE).images).cuda()


def whole_calls(report: Report, modes: list[str]) -> None:
    """sample(n=16, steps=10) of the published U-Net, and what one would write in plain PyTorch."""
    model, img = calls._published_unet().cuda(), image()
    taus = model.schedule.subsequence(STEPS, model.spacing)
    low = img.bfloat16()
    half = copy.deepcopy(model).to(memory_format=torch.channels_last).bfloat16()  # type: ignore[call-overload]

    def ours(n: int, **options: Any) -> torch.Tensor:
        return bf.sample(model, low, n, taus, seed=1, dtype=torch.bfloat16, **options)[0]  # type: ignore[return-value]

    expected = bf.sample(model, img, MASKS, taus, seed=1, prepare=False)[0]
    differing = float((ours(MASKS) != expected).float().mean())
    assert differing < 0.05, f"{differing:.1%} of the pixels differ from float32's masks"

    def timed(name: str, function: Callable[[], Any], repeats: int = 7, **more: Any) -> None:
        function()
        function()  # graphs are captured at a second call
        times = []
        for _ in range(repeats):
            torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start) * 1e3)
        report.say("call", name, ms=statistics.median(times), least=min(times), most=max(times), **more)

    timed("ours, bfloat16, n = 16", lambda: ours(MASKS), differing_pixels=differing)
    timed("ours, bfloat16, n = 1", lambda: ours(1))
    timed(
        "PyTorch, batched, float32 (TF32 convolutions)",
        lambda: baselines.batched(model, img, MASKS, taus, model.schedule),
        3,
    )
    timed(
        "PyTorch, batched, bfloat16, channels last",
        lambda: baselines.batched(half, low, MASKS, taus, model.schedule),
        5,
    )
    timed(
        "PyTorch, one mask after another, float32 (published)",
        lambda: baselines.one_after_another(model, img, MASKS, taus, model.schedule), 1,
    )  # fmt: skip
    for mode in modes:
        net = torch.compile(half, mode=None if mode == "default" else mode, dynamic=False)
        start = time.perf_counter()
        baselines.batched(net, low, MASKS, taus, model.schedule)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        timed(
            f"torch.compile ({mode}), batched, bfloat16, channels last",
            lambda net=net: baselines.batched(net, low, MASKS, taus, model.schedule), 5, first_seconds=seconds,
        )  # fmt: skip


# ---------------------------------------------------------------------- tables


def table(found: dict[str, Any]) -> str:
    """Markdown of a report: the calls, beside what they are compared with."""
    machine = found["machine"]
    packages = machine["packages"]
    lines = [f"{machine['gpu']}, torch {packages['torch']}, Triton {packages['triton']}, {found['date']}.", ""]
    rows = [row for row in found["rows"] if row["part"] == "call"]
    ours = next(row["ms"] for row in rows if row["name"] == "ours, bfloat16, n = 16")
    lines += [
        f"**sample(n=16, steps=10), {SIDE} x {SIDE}, published U-Net**",
        "",
        "| | median | ours is faster by |",
        "|---|---|---|",
    ]
    for row in rows:
        times = "" if row["name"].startswith("ours") else f"{row['ms'] / ours:.2f} times"
        bold = "**" if row["name"].startswith("ours") else ""
        lines.append(f"| {bold}{row['name']}{bold} | {row['ms']:.1f} ms | {times} |")
    return "\n".join(lines)


def update(page: Path, text: str) -> None:
    """Puts a table between the page's markers."""
    before = page.read_text()
    pattern = re.compile(r"(<!-- gpu -->\n).*?(<!-- /gpu -->)", re.S)
    if not pattern.search(before):
        raise ValueError(f"{page} has no <!-- gpu --> and <!-- /gpu --> to put a table between")
    write_text(page, pattern.sub(lambda m: m[1] + text + "\n" + m[2], before))


PARTS = {"ceilings": ceilings, "steps": steps, "convolutions": convolutions, "ends": ends_and_attention}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="JSON to write")
    parser.add_argument("--parts", nargs="+", default=["steps", "calls", "ceilings", "convolutions", "ends"])
    parser.add_argument("--compile", nargs="*", default=["default"], help="modes of torch.compile among the calls")
    parser.add_argument("--from", dest="source", help="JSON of a former run, instead of measuring")
    parser.add_argument("--update", nargs="+", default=[], help="pages whose table is made of it")
    options = parser.parse_args()
    if options.source:
        found = json.loads(Path(options.source).read_text())
    else:
        if not options.output:
            parser.error("--output or --from must be given")
        report = Report(options.output)
        report.found["date"] = time.strftime("%Y-%m-%d")
        for part in options.parts:
            whole_calls(report, options.compile) if part == "calls" else PARTS[part](report)
        found = report.found
    for page in options.update:
        update(Path(page), table(found))


if __name__ == "__main__":
    main()
