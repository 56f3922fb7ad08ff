#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Whether the trainer learns how often raters draw what: samples against the exact distribution of phantoms.

    python benchmarks/mode_frequency.py --folder runs/modes --output benchmarks/results/mode_frequency.json

Every phantom has four modes of known probability (``data.phantom``). A model is trained on the masks of many raters,
whose own frequencies are told too, then draws 1,000 masks of each phantom; a mask counts for the mode with which its
IoU is largest. Beside it the exact posterior in the model's place: what is left is the sampler's own error. On two
cores the training takes an hour and a quarter, and the rows from half a minute to four.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from tqdm.auto import tqdm

import berdiff_fast as bf
from berdiff_fast.data import phantom
from berdiff_fast.files import write_text
from berdiff_fast.training import loop
from berdiff_fast.training.config import TrainConfig

#: Whose predictions are sampled, how, and the first phantom's seed; the others have the next ones.
ROWS = (
    ("exact posterior", "ddim", 10, "trailing-quadratic", 100),
    ("exact posterior", "ddim", 10, "trailing", 100),
    ("exact posterior", "d3pm", 10, "trailing", 100),
    ("exact posterior", "ddim", 50, "trailing", 100),
    ("exact posterior", "d3pm", 50, "trailing", 100),
    ("network", "d3pm", 50, "trailing", 100),
    ("network", "d3pm", 50, "trailing", 200),
    ("network", "ddim", 50, "trailing", 100),
    ("network", "ddim", 10, "trailing-quadratic", 100),
)
PHANTOM_SEED = 11


def exact_posterior(modes: torch.Tensor, probabilities: torch.Tensor, schedule: bf.NoiseSchedule) -> Callable:
    """A model that knows the modes (4, K, H, W) and their probabilities: logits of P(y_0 = 1 | y_t), pixel by pixel.

    What is wrong with the samples of this model is the sampler's share: it draws the pixels of a step independently.
    """
    masks, prior = modes.flatten(1).double(), probabilities.double().log()

    def model(y_t: torch.Tensor, t: torch.Tensor, img: torch.Tensor) -> torch.Tensor:
        A = schedule.alphas_cumprod[t.long()][:, None, None]
        one = A * masks + (1 - A) / 2  # q(y_t = 1 | mode), (N, 4, pixels)
        likelihood = torch.where(y_t.flatten(1)[:, None] > 0, one, 1 - one).log().sum(-1)
        mean = torch.softmax(likelihood + prior, 1) @ masks
        return torch.logit(mean.clamp(1e-7, 1 - 1e-7)).float().view(y_t.shape)

    return model


def frequencies(masks: torch.Tensor, modes: torch.Tensor) -> np.ndarray:
    """Of n masks (1, n, K, H, W), the share that overlaps each of the modes (1, 4, K, H, W) most."""
    iou = 1 - bf.metrics.iou_distance(masks, modes)[0]
    return np.bincount(iou.argmax(1).numpy(), minlength=4) / masks.shape[1]


def excess_and_floor(masks: torch.Tensor, modes: torch.Tensor, probabilities: torch.Tensor) -> tuple[float, float]:
    """GED of n masks against the distribution itself, above its floor for n masks; and that floor, E d(Y, Y') / n."""
    d = bf.metrics.iou_distance(modes, modes)[0]
    cross = bf.metrics.iou_distance(modes, masks)[0].mean(1) @ probabilities
    within = bf.metrics.iou_distance(masks, masks).mean()
    spread = probabilities @ d @ probabilities
    floor = spread / masks.shape[1]
    return float(2 * cross - spread - within - floor), float(floor)


def train(folder: Path, phantoms: int, size: int, raters: int, steps: int) -> tuple[bf.BerDiff, dict[str, Any]]:
    """The model, and what is to be told of how it was trained."""
    cases = phantom.generate(phantoms, size, raters=raters, seed=PHANTOM_SEED)
    file = folder / "phantoms.h5"
    with h5py.File(file, "w") as f:
        f["image"] = cases.images[:, 0].numpy()
        f["mask"] = cases.raters[:, :, 0].to(torch.uint8).numpy()
    config = TrainConfig(
        train_data=str(file),
        output=str(folder / "run"),
        channel_mult=[1, 2, 2],
        attention_resolutions=[1, 2],
        use_scale_shift_norm=True,
        norm_groups=8,
        patch_size=4,  # what a mode is shows over many pixels: a coarse grid sees four times the masks in the same time
        prediction="y_0",
        flip=False,
        rotate90=False,
        steps=steps,
        batch_size=64,
        tensorboard=False,
    )
    model = bf.load(loop.train(config))
    theirs = [frequencies(cases.raters[i : i + 1], cases.modes[i : i + 1]) for i in range(phantoms)]
    return model, {
        "raters_per_phantom": raters,
        "largest_error_of_the_raters": round(float(np.abs(theirs - cases.probabilities.numpy()).max()), 4),
        "steps": config.steps,
        "batch_size": config.batch_size,
        "parameters": sum(p.numel() for p in model.network.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--output", type=Path, required=True, help="the JSON of results")
    parser.add_argument("--phantoms", type=int, default=8)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--raters", type=int, default=10000, help="masks of each phantom to train on")
    parser.add_argument("--steps", type=int, default=20000, help="of the training, 64 masks each")
    parser.add_argument("--samples", type=int, default=1000)
    args = parser.parse_args()

    args.folder.mkdir(parents=True, exist_ok=True)
    network, training = train(args.folder, args.phantoms, args.size, args.raters, args.steps)
    cases = phantom.generate(args.phantoms, args.size, seed=PHANTOM_SEED)
    img = network.preprocess(cases.images)
    results = {
        "phantoms": args.phantoms,
        "size": args.size,
        "training": training,
        "samples_per_phantom": args.samples,
        "truth": cases.probabilities.round(decimals=4).tolist(),
        "samplers": [],
    }
    if args.output.is_file():  # measured before an interruption
        results["samplers"] = json.loads(args.output.read_text())["samplers"]
    columns = ("predictions", "method", "steps", "spacing", "first_seed")
    measured = {tuple(row[c] for c in columns) for row in results["samplers"]}
    for description in ROWS:
        if description in measured:
            continue
        predictions, method, steps, spacing, first_seed = description
        found, geds = [], []
        for i in tqdm(range(args.phantoms), desc=f"{predictions}, {method}, {steps} steps", unit="phantom"):
            modes, probabilities = cases.modes[i : i + 1], cases.probabilities[i]
            model: Any = network
            options: dict[str, Any] = {}
            if predictions == "exact posterior":
                model = exact_posterior(modes[0], probabilities, network.schedule)
                options = {"schedule": network.schedule, "prediction": "y_0"}
            masks = bf.sample(
                model,
                img[i : i + 1],
                n=args.samples,
                steps=steps,
                method=method,
                spacing=spacing,
                seed=first_seed + i,
                max_batch=250,
                **options,
            )
            found.append(frequencies(masks, modes))
            geds.append(excess_and_floor(masks, modes, probabilities))
        error = np.abs(np.array(found) - cases.probabilities.numpy())
        excess, floor = np.array(geds).T
        row = {
            **dict(zip(columns, description, strict=True)),
            "frequencies": np.array(found).tolist(),
            "largest_error": round(float(error.max()), 4),
            "mean_error": round(float(error.mean()), 4),
            "ged": round(float((excess + floor).mean()), 4),
            "ged_floor": round(float(floor.mean()), 4),
            "largest_ged_above_floor": round(float(excess.max()), 4),
        }
        results["samplers"].append(row)
        write_text(args.output, json.dumps(results, indent=1) + "\n")
        print({k: v for k, v in row.items() if k != "frequencies"}, flush=True)


if __name__ == "__main__":
    main()
