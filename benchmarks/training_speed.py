#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Images per second of the trainer, and where the time of a step goes.

    python benchmarks/training_speed.py --device cpu               # the loop, with the network of lidc_v1.yaml
    python benchmarks/training_speed.py --device cuda --batch-sizes 64 256 1024 --precisions bf16
    python benchmarks/training_speed.py --device cpu --parts       # a step in parts, as they were and as they are
    python benchmarks/training_speed.py --published                # the published U-Net, and by the published recipe

The loop is the trainer itself, on the middle 64 x 64 of slices of 128 x 128, made for the purpose unless ``--data``
names a file. Each setting runs for some seconds (``--seconds``) and is then stopped as by SIGTERM; what counts is the
median over the lines of its log but the first. Less than a minute on a GPU.

``--published`` compares with the published recipe, written again in plain PyTorch: float32, the network run twice per
step (once for each term of the loss), noise by torch.bernoulli, one small operation after another. All in one run. What
does not fit into the memory is tried with half the batch, and says so. Figures count on a GPU only; ``--small`` tries
it on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import BatchSampler, DataLoader
from torch.utils.flop_counter import FlopCounterMode

import berdiff_fast as bf
from berdiff_fast.bench.baselines import PUBLISHED, PublishedStep
from berdiff_fast.bench.training import SMALL
from berdiff_fast.data import phantom
from berdiff_fast.data.batches import Batches
from berdiff_fast.data.examples import TrainingExamples
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.files import write_text
from berdiff_fast.training import loop, setup
from berdiff_fast.training.average import Average
from berdiff_fast.training.config import TrainConfig, read_yaml

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


# ---------------------------------------------------------------------- the loop of `lidc-v1`


def slices_file(path: Path, count: int = 1024) -> Path:
    """Slices of 128 x 128 with four raters: 32 phantoms, again and again."""
    cases = phantom.generate(32, 128)
    with h5py.File(path, "w") as file:
        file["image"] = ((cases.images[:, 0] + 1) * 127).to(torch.uint8).repeat(count // 32, 1, 1).numpy()
        file["mask"] = cases.raters[:, :, 0].to(torch.uint8).repeat(count // 32, 1, 1, 1).numpy()
    return path


def settings(args: argparse.Namespace, data: Path, output: Path, batch: int, precision: str, **more) -> TrainConfig:
    return TrainConfig.from_dict(
        {
            **read_yaml("lidc_v1"),
            "train_data": str(data),
            "output": str(output),
            "device": "cpu" if args.device == "cpu" else "auto",
            "batch_size": batch,
            "precision": precision,
            "channels_last": True,
            "crop_steps": 0,
            "steps": 10**6,
            "log_every": 2 if args.device == "cpu" else 20,
            "checkpoint_every": 10**6,
            "tensorboard": False,
            "quiet": True,
            **more,
        }
    )


def lidc_loop(config: TrainConfig, seconds: float) -> dict:
    """Images per second of the trainer, stopped so long after the first line of its log."""
    log = Path(config.output) / "log.jsonl"

    def lines() -> list[str]:
        return log.read_text().splitlines() if log.is_file() else []

    def stop() -> None:
        while not lines():
            time.sleep(0.05)
            if done.is_set():
                return
        done.wait(seconds)
        while len(lines()) < 3 and not done.is_set():
            time.sleep(0.05)
        if not done.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    done = threading.Event()
    watcher = threading.Thread(target=stop)
    watcher.start()
    try:
        loop.train(config)
    finally:
        done.set()
        watcher.join()
    speeds = [json.loads(line)["images_per_second"] for line in lines()][1:]
    return {
        "batch": config.optimiser.batch_size,
        "precision": config.optimiser.precision,
        "compile": config.optimiser.compile,
        "images_per_second": statistics.median(speeds),
        "from": min(speeds),
        "to": max(speeds),
    }


def loops(args: argparse.Namespace, data: Path, folder: Path) -> list[dict]:
    rows = []
    for number, (precision, batch) in enumerate((p, b) for p in args.precisions for b in args.batch_sizes):
        config = settings(args, data, folder / f"run{number}", batch, precision, compile=args.compile)
        try:
            rows.append(lidc_loop(config, args.seconds))
        except torch.OutOfMemoryError:
            rows.append({"batch": batch, "precision": precision, "images_per_second": None})
        print(rows[-1], flush=True)
        gc.collect()
    return rows


# ---------------------------------------------------------------------- the parts of a step


def parts(args: argparse.Namespace, data: Path, folder: Path) -> list[dict]:
    """Median times of what a step does, in turns: as it was (one example at a time, AdamW and average of torch's lists
    of tensors) and as it is."""
    device = torch.device(args.device)
    config = settings(args, data, folder / "none", args.batch_sizes[0], "fp32")
    batch = config.optimiser.batch_size
    torch.manual_seed(0)
    model = setup.build_model(config, 1, 1, (128, 128)).to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network = model.network
    examples = TrainingExamples(
        RaterDataset(data, in_memory=True),
        model.preprocessing,
        1000,
        0,
        setup.augmentation(config),
        config.augmentation.crop,
    )
    loader = DataLoader(examples, batch_sampler=BatchSampler(range(10**9), batch, drop_last=True))
    one_by_one = iter(loader)
    at_once = Batches(examples, device, resident=True).stream(range(i, i + batch) for i in range(0, 10**9, batch))
    now = next(at_once)
    y_0, t = now["y_0"], now["t"]
    y_t = bf.ops.q_sample(y_0, t, now["noise_seed"], model.schedule)

    def gradients() -> None:
        network.zero_grad()
        logits = network(y_t, t, now["img"])
        bf.ops.diffusion_loss(logits, y_t, y_0, t, model.schedule, prediction="y_0").mean().backward()

    gradients()
    lists, fused = (
        torch.optim.AdamW(network.parameters(), lr=1e-9, fused=f, foreach=not f) for f in (device.type == "cuda", True)
    )
    torchs, ours = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.999)), Average(network, 0.999)
    work: dict[str, tuple[Callable, Callable]] = {
        "forward, loss, backward": (gradients, gradients),
        "examples": (lambda: {k: v.to(device) for k, v in next(one_by_one).items()}, lambda: next(at_once)),
        "noise": (lambda: bf.ops.q_sample(y_0, t, now["noise_seed"], model.schedule),) * 2,
        "clipping": (lambda: torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0),) * 2,
        "AdamW": (lists.step, fused.step),
        "average": (lambda: torchs.update_parameters(network), ours.update),
        "seed of dropout": (lambda: torch.manual_seed(7),) * 2,
    }

    def timed(run: Callable) -> float:
        """Seconds; on a CPU, those of all its threads, so that what else runs on the machine counts little."""
        if device.type == "cpu":
            start = time.process_time()
            run()
            return time.process_time() - start
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    times: dict[tuple[str, int], list[float]] = {(name, i): [] for name in work for i in (0, 1)}
    for turn in range(args.turns + 3):
        for (name, i), list_ in times.items():
            if name == "forward, loss, backward" and i:
                continue
            seconds = timed(work[name][i])
            if turn >= 3:
                list_.append(seconds)
    base = statistics.median(times["forward, loss, backward", 0])
    rows = []
    for name in work:
        before, after = (statistics.median(times[name, i] or times[name, 0]) for i in (0, 1))
        rows.append({"part": name, "before": before / base, "after": after / base, "before_ms": 1e3 * before})
        print(f"{name:25}{before / base:8.2%}{after / base:8.2%}   {1e3 * before:.3f} ms, {1e3 * after:.3f} ms")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", type=Path, help="HDF5 file of slices of 128 x 128 with one mask channel")
    parser.add_argument("--batch-sizes", type=int, nargs="+")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "tf32", "bf16", "fp16"))
    parser.add_argument("--compile", action="store_true", help="torch.compile the network, which takes a minute")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each setting (default: %(default)s)")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--turns", type=int, default=15, help="of --parts (default: %(default)s)")
    parser.add_argument("--published", action="store_true")
    parser.add_argument("--batch", type=int, default=128, help="of --published")
    parser.add_argument("--steps", type=int, default=30, help="of --published")
    parser.add_argument("--workers", type=int, default=0, help="of --published")
    parser.add_argument("--small", action="store_true", help="with --published: a small network and 32 x 32 slices")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no usable NVIDIA GPU")
    logging.getLogger("berdiff_fast").setLevel(logging.WARNING)
    if args.published:
        against_published(args)
        return
    gpu = args.device == "cuda"
    args.batch_sizes = args.batch_sizes or ([64, 256, 1024] if gpu else [16])
    args.precisions = args.precisions or (["bf16", "tf32"] if gpu else ["fp32"])
    name = torch.cuda.get_device_name() if gpu else "cpu"
    results: dict = {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or slices_file(Path(folder) / "slices.h5")
        results["parts" if args.parts else "loop"] = (parts if args.parts else loops)(args, data, Path(folder))
    if args.output:
        write_text(args.output, json.dumps(results, indent=1) + "\n")


def against_published(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
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
            if args.output:
                write_text(args.output, json.dumps(results, indent=1) + "\n")
            print(row, flush=True)


if __name__ == "__main__":
    main()
