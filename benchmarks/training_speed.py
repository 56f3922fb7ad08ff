#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Training images per second of the published U-Net: this package's trainer against the published recipe.

    python benchmarks/training_speed.py --output benchmarks/results/training.json

The published recipe, written again in plain PyTorch: float32, the network run twice per step (once for each term of
the loss), noise by torch.bernoulli, one small operation after another. Ours is the trainer itself, data loading
included, on slices made for the purpose. Both in one run. What does not fit into the memory is tried with half the
batch, and says so. Figures count on a GPU only; ``--small`` tries it on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import torch
from torch.utils.flop_counter import FlopCounterMode

import berdiff_fast as bf
from berdiff_fast.bench.baselines import PUBLISHED, PublishedStep
from berdiff_fast.bench.training import SMALL
from berdiff_fast.data import phantom
from berdiff_fast.files import write_text
from berdiff_fast.training import loop
from berdiff_fast.training.config import TrainConfig

#: Dense bf16 of one GPU, as its data sheet says.
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def published(batch: int, size: int, network: dict, steps: int, device: torch.device) -> dict:
    """Images per second of the published recipe, median over steps after three to warm up."""
    torch.manual_seed(0)
    step = PublishedStep(bf.BerDiff(bf.UNet(**network)).to(device))
    img = torch.randn(batch, 1, size, size, device=device)
    y_0 = (torch.rand(batch, 1, size, size, device=device) < 0.1).float()
    times = []
    for _ in range(steps + 3):
        start = time.perf_counter()
        step(img, y_0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {"images_per_second": batch / statistics.median(times[3:])}


def trainer(folder: Path, batch: int, size: int, network: dict, steps: int, **options) -> dict:
    """Images per second of the trainer: the median of its own log after the first line."""
    file = folder / "slices.h5"
    if not file.is_file():
        cases = phantom.generate(max(64, batch), size)
        with h5py.File(file, "w") as f:
            f["image"] = ((cases.images[:, 0] + 1) * 127).to(torch.uint8).numpy()
            f["mask"] = cases.raters[:, :, 0].to(torch.uint8).numpy()
    output = folder / "-".join(["run", str(batch), *map(str, options.values())])
    loop.train(
        TrainConfig(
            train_data=str(file),
            output=str(output),
            batch_size=batch,
            steps=steps,
            log_every=max(steps // 6, 1),
            checkpoint_every=10**6,
            tensorboard=False,
            **network,
            **options,
        )
    )
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return {"images_per_second": statistics.median(line["images_per_second"] for line in lines[1:]), **options}


def fitting(measure: Callable[[int], dict], batch: int) -> dict:
    """What ``measure`` says of the largest batch that fits: this one, or half of it, and so on."""
    while True:
        try:
            return {"batch": batch, **measure(batch)}
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        # Out of the handler, which keeps the failed attempt's tensors alive.
        batch //= 2
        gc.collect()
        torch.cuda.empty_cache()


def flops_per_image(network: dict, size: int) -> int:
    """Of one forward and backward pass."""
    model = bf.UNet(**network).to("meta")
    y = torch.zeros(1, 1, size, size, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(y, torch.zeros(1, device="meta"), y).sum().backward()
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--small", action="store_true", help="a small network and 32 x 32 slices")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, size = (SMALL, 32) if args.small else (PUBLISHED, 128)
    flops = flops_per_image(network, size)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = next((v for k, v in PEAK.items() if k in name), None)
    results: dict = {"device": name, "torch": torch.__version__, "flops_per_image": flops}
    results["published_recipe"] = fitting(lambda b: published(b, size, network, args.steps, device), args.batch)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for options in (
            {"precision": "fp32"},
            {"precision": "bf16", "channels_last": True},
            *([{"precision": "bf16", "channels_last": True, "compile": True}] if device.type == "cuda" else []),
        ):
            row = fitting(
                lambda b, o=options: trainer(Path(folder), b, size, network, args.steps, workers=args.workers, **o),  # type: ignore[misc]
                args.batch,
            )
            row["ratio"] = row["images_per_second"] / results["published_recipe"]["images_per_second"]
            if peak:
                row["mfu"] = row["images_per_second"] * flops / peak
            rows.append(row)
            results["trainer"] = rows
            write_text(args.output, json.dumps(results, indent=1) + "\n")
            print(row, flush=True)


if __name__ == "__main__":
    main()
