#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The recipe of `lidc` against that of `lidc-v1`, at equal minutes of a CPU.

    python benchmarks/equal_minutes.py train.h5 val.h5 --folder runs/equal --output equal_minutes.json

Each recipe is the shipped config with as many steps as fit: the cost of a step is measured first, in time of the
process, which does not count what others do on the machine. What a config says in steps (the change from the middle to
whole slices, the warm-up) keeps its share. `--only lidc_v1:0` runs one of them. Judged on the 200 listed validation
slices, 16 masks in 10 steps. Every result is kept in the folder, so that the same command goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from berdiff_fast.training import loop
from berdiff_fast.training.config import TrainConfig
from berdiff_fast.training.yaml_files import read_yaml

RECIPES = ("lidc_v1", "lidc")


def config_of(recipe: str, train: str, output: Path, seed: int, steps: int, precision: str) -> TrainConfig:
    """The recipe with another number of steps, without validation."""
    config = TrainConfig(**read_yaml(recipe))
    share = steps / config.optimiser.steps
    warmup = max(1, min(config.optimiser.warmup, round(steps / 10)))
    optimiser = dataclasses.replace(config.optimiser, steps=steps, warmup=warmup, precision=precision)
    augmentation = config.augmentation
    if augmentation.crop_steps:
        augmentation = dataclasses.replace(augmentation, crop_steps=max(1, round(share * augmentation.crop_steps)))
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, train=train),
        prior=dataclasses.replace(config.prior, steps=min(steps, round(share * config.prior.steps))),
        optimiser=optimiser,
        augmentation=augmentation,
        records=dataclasses.replace(config.records, checkpoint_every=10**6),
        output=str(output),
        seed=seed,
        quiet=True,
    )


def train_for(config: TrainConfig) -> tuple[Path, float]:
    """The model's path, and the seconds of this process that it took."""
    start = time.process_time()
    path = loop.train(config)
    return path, time.process_time() - start


def steps_within(recipe: str, train: str, seconds: float, precision: str, few: int = 24) -> int:
    """How many steps take so many seconds: the difference of a short run and one of twice the length."""
    with tempfile.TemporaryDirectory() as folder:
        costs = [
            train_for(config_of(recipe, train, Path(folder) / str(k), 0, times * few, precision))[1]
            for k, times in enumerate((1, 2, 1, 2))
        ]
    each = (min(costs[1], costs[3]) - min(costs[0], costs[2])) / few
    return max(few, int((seconds - min(costs[0], costs[2]) + few * each) / each))


def judged(model: Path, val: str, folder: Path) -> dict[str, Any]:
    """What `evaluate` says on the 200 listed slices."""
    words = ["evaluate", "--model", str(model), "--data", val, "--output", str(folder), "-n", "16", "--json"]
    command = [sys.executable, "-m", "berdiff_fast.cli", *words, "--slice-count", "200"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("val")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--only", nargs="+", default=[f"{r}:{s}" for r in RECIPES for s in (0, 1)])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for one in arguments.only:
        recipe, seed = one.split(":")
        kept = arguments.folder / f"{recipe}-{seed}.json"
        if kept.exists():
            continue
        run = arguments.folder / f"{recipe}-{seed}"
        plan = arguments.folder / f"{recipe}-steps.json"
        if not plan.exists():
            plan.write_text(
                str(steps_within(recipe, arguments.train, 60 * arguments.minutes, arguments.precision)), "utf-8"
            )
        steps = int(plan.read_text("utf-8"))
        model, seconds = train_for(config_of(recipe, arguments.train, run, int(seed), steps, arguments.precision))
        found = judged(model, arguments.val, run / "evaluation")
        result = {"recipe": recipe, "seed": int(seed), "steps": steps, "cpu_minutes": seconds / 60, "evaluation": found}
        kept.write_text(json.dumps(result, indent=1), "utf-8")
        print(one, steps, f"{seconds / 60:.1f} min", flush=True)
    results = [json.loads(path.read_text("utf-8")) for path in sorted(arguments.folder.glob("lidc*-[0-9]*.json"))]
    if arguments.output:
        arguments.output.write_text(
            json.dumps({"minutes": arguments.minutes, "runs": results}, indent=1) + "\n", "utf-8"
        )


if __name__ == "__main__":
    main()
