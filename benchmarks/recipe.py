#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What each part of the training recipe is worth: one small network per variant and seed, at equal budget.

    python benchmarks/recipe.py train.h5 val.h5 --folder runs/recipe --output benchmarks/results/recipe.json

A variant differs from the first in what its name says; so do the samplers, which all draw with the bundled model, for
each seed once. Every result is kept in the folder as it comes, so the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import h5py
import torch

import berdiff_fast as bf
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.files import write_text
from berdiff_fast.training import evaluate, loop
from berdiff_fast.training.config import TrainConfig

#: The budget that all share: the middle of the slices (64 x 64 pixels hold all but a thousandth of what raters marked)
#: and a small network, so that a run takes minutes on one core.
CROP = 64
BUDGET = dict(
    patch_size=2,
    channel_mult=[1, 1, 2],
    attention_resolutions=[4],
    norm_groups=8,
    use_scale_shift_norm=True,
    warmup=50,
    ema_decay=0.99,
)

#: The others differ from the first by what their name says; the second is the paper's recipe.
VARIANTS: dict[str, dict] = {
    "y_0, KL + BCE": {},
    "epsilon, KL + BCE (the paper)": {"prediction": "epsilon"},
    "published noise (as_released)": {"as_released": True},
    "BCE alone": {"kl_weight": 0.0},
    "leave-one-out KL + BCE": {"leave_one_out": True},
    "more noise (input_scale 0.5)": {"input_scale": 0.5},
    "less noise (input_scale 2)": {"input_scale": 2.0},
}

#: What measures the variants, and the sampler from which the others differ.
SAMPLER = {"method": "ddim", "spacing": "trailing-quadratic"}

SAMPLERS: dict[str, dict] = {
    "ddim, trailing-quadratic": {},
    "ddim, first step at t = 999 (trailing)": {"spacing": "trailing"},
    "ddim, first step at t = 900 (uniform)": {"spacing": "uniform"},
    "ddim, last step drawn": {"final": "sample"},
    "ddim, leave-one-out": {"leave_one_out": True},
    "ddpm": {"method": "ddpm"},
    "ddpm, leave-one-out": {"method": "ddpm", "leave_one_out": True},
    "d3pm": {"method": "d3pm"},
    "d3pm, leave-one-out": {"method": "d3pm", "leave_one_out": True},
    "d3pm, first step at t = 900 (uniform)": {"method": "d3pm", "spacing": "uniform"},
}


def crop(source: Path, folder: Path) -> str:
    """A copy of a file of slices that has their middles only."""
    target = folder / source.name
    if not target.is_file():
        with h5py.File(source) as old, h5py.File(target.with_suffix(".part"), "w") as new:
            for name, values in old.items():
                cut = (values.shape[-1] - CROP) // 2 if values.ndim > 1 else 0
                new[name] = values[()][..., cut : cut + CROP, cut : cut + CROP] if cut else values[()]
        target.with_suffix(".part").rename(target)
    return str(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train_data")
    parser.add_argument("val_data")
    parser.add_argument("--folder", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--output", type=Path, required=True, help="the JSON of results")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--slices", type=int, default=48)
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--tables", nargs="+", default=["training", "samplers"], choices=["training", "samplers"])
    args = parser.parse_args()

    args.folder.mkdir(parents=True, exist_ok=True)
    whole = RaterDataset(args.val_data)
    args.train_data, args.val_data = (crop(Path(p), args.folder) for p in (args.train_data, args.val_data))
    slices = RaterDataset(args.val_data)
    budget = {"steps": args.steps, "batch_size": args.batch_size, **BUDGET}
    results: dict = {
        "budget": budget | {"crop": CROP},
        "validation": {"slices": args.slices, "n": args.n, "sampling_steps": 10, **SAMPLER},
        "samplers_of": {"model": "lidc-v1", "slices": args.slices // 2, "n": args.n // 2, "sampling_steps": 10},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "training": [],
        "samplers": [],
    }

    def score(
        folder: Path,
        table: str,
        name: str,
        seed: int,
        model: bf.BerDiff,
        data: RaterDataset,
        slices: int,
        n: int,
        options: dict,
        **more: int,
    ) -> None:
        """Measure one model with one sampler, unless that was done before, and write all there is."""
        kept = folder / f"{table}-{name}.json".replace(" ", "")
        if not kept.is_file():
            chosen = evaluate.spread(len(data), slices)
            drawn = evaluate.sample_slices(model, data, chosen, n=n, steps=10, **SAMPLER | options)
            rows = [row for _, _, raters, masks in drawn for row in evaluate.measure(raters, masks)]
            numbers = {k: round(v, 4) for k, v in evaluate.summarize(rows).items()}
            write_text(kept, json.dumps({"variant": name, "seed": seed, **more, **numbers}))
        results[table].append(json.loads(kept.read_text()))
        write_text(args.output, json.dumps(results, indent=1) + "\n")
        print(results[table][-1], flush=True)

    for seed in args.seeds:
        for number, (name, changes) in enumerate(VARIANTS.items() if "training" in args.tables else ()):
            folder = args.folder / f"{number}-seed{seed}"
            start = time.monotonic()
            config = TrainConfig(
                train_data=args.train_data,
                output=str(folder),
                checkpoint_every=args.steps,
                tensorboard=False,
                seed=seed,
                **{"prediction": "y_0", **budget, **changes},
            )
            model = bf.load(loop.train(config))
            seconds = folder / "seconds.json"
            if not seconds.is_file():
                write_text(seconds, str(round(time.monotonic() - start)))
            score(
                *(folder, "training", name, seed, model, slices, args.slices, args.n, {"seed": 0}),
                train_seconds=json.loads(seconds.read_text()),
            )
        folder = args.folder / f"samplers-seed{seed}"
        for name, options in SAMPLERS.items() if "samplers" in args.tables else ():
            folder.mkdir(exist_ok=True)
            score(
                *(folder, "samplers", name, seed, bf.load("lidc-v1"), whole, args.slices // 2, args.n // 2),
                options | {"seed": seed},
            )


if __name__ == "__main__":
    main()
