#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What each part of the training recipe is worth: one small network per variant and seed, at equal budget.

    python benchmarks/recipe.py train.h5 val.h5 --folder runs/recipe --output benchmarks/results/recipe.json

A variant differs from the first in what its name says. Results are kept as they come, so the same command goes
on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import h5py
import numpy as np
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
    args = parser.parse_args()

    args.folder.mkdir(parents=True, exist_ok=True)
    args.train_data, args.val_data = (crop(Path(p), args.folder) for p in (args.train_data, args.val_data))
    slices = RaterDataset(args.val_data)
    chosen = evaluate.spread(len(slices), args.slices)
    budget = {"steps": args.steps, "batch_size": args.batch_size, **BUDGET}
    results: dict = {
        "budget": budget
        | {"crop": CROP}
        | {"validation_slices": args.slices, "n": args.n, "sampling": "10 steps, ddim, uniform"},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "runs": [],
    }
    for seed in args.seeds:
        for number, (name, changes) in enumerate(VARIANTS.items()):
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
            seconds = time.monotonic() - start
            drawn = folder / f"masks-{args.slices}x{args.n}.npy"
            if not drawn.is_file():
                masks = [s for *_, s in evaluate.sample_slices(model, slices, chosen, n=args.n, seed=0, steps=10)]
                np.save(drawn, np.packbits(torch.cat(masks).numpy(), axis=-1))
            samples = torch.from_numpy(np.unpackbits(np.load(drawn), axis=-1).astype(bool))
            rows = evaluate.measure(slices.batch(chosen)[1], samples)
            numbers = {k: round(v, 4) for k, v in evaluate.summarize(rows).items()}
            results["runs"].append({"variant": name, "seed": seed, "train_seconds": round(seconds), **numbers})
            write_text(args.output, json.dumps(results, indent=1) + "\n")
            print(f"seed {seed}  {name:32s} {numbers}", flush=True)


if __name__ == "__main__":
    main()
