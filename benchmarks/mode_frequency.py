#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Whether the trainer learns how often raters draw what: samples against the exact distribution of phantoms.

    python benchmarks/mode_frequency.py --folder runs/modes --output benchmarks/results/mode_frequency.json

Every phantom has four modes of known probability (``data.phantom``). A model is trained on the masks of many raters,
whose own frequencies are told too, then draws 1,000 masks of each phantom; a mask counts for the mode with which its
IoU is largest. Beside it the exact posterior in the model's place: what is left is the sampler's own error. On two
cores the trainings take an hour and a half, the first rows a minute or two and those of 50 steps eight each.
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

#: Whose predictions are sampled, and how.
ROWS = (
    ("exact posterior", "ddim", 10, "trailing-quadratic"),
    ("exact posterior", "ddim", 10, "trailing"),
    ("exact posterior", "d3pm", 10, "trailing"),
    ("exact posterior", "ddim", 50, "trailing"),
    ("exact posterior", "d3pm", 50, "trailing"),
    ("first training", "ddim", 10, "trailing-quadratic"),
    ("first training", "d3pm", 50, "trailing"),
    ("second training", "d3pm", 50, "trailing"),
    ("second training", "ddim", 10, "trailing-quadratic"),
    ("third training", "d3pm", 50, "trailing"),
    ("third training", "ddim", 50, "trailing"),
    ("third training", "ddim", 10, "trailing-quadratic"),
    ("fourth training", "d3pm", 50, "trailing"),
    ("fourth training", "ddim", 10, "trailing-quadratic"),
)

#: Each goes on from the weights of the one before: its raters per phantom, and what it changes of the config.
TRAININGS: dict[str, tuple[int, dict[str, Any]]] = {
    "first training": (1000, dict(steps=2500, batch_size=32, checkpoint_every=500)),
    "second training": (1000, dict(steps=3000, batch_size=64, learning_rate=6e-4, warmup=50, checkpoint_every=250)),
    "third training": (10000, dict(steps=4000, batch_size=64, learning_rate=6e-4, warmup=50, checkpoint_every=250)),
    "fourth training": (10000, dict(steps=2500, batch_size=64, learning_rate=6e-4, warmup=50, checkpoint_every=250)),
}
SEED = 11


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


def train(folder: Path, phantoms: int, size: int) -> tuple[dict[str, bf.BerDiff], list[dict[str, Any]]]:
    """The models, and what is to be told of how they were trained."""
    models, told, weights = {}, [], ""
    for name, (raters, changes) in TRAININGS.items():
        cases = phantom.generate(phantoms, size, raters=raters, seed=SEED)
        file = folder / f"phantoms_{raters}.h5"
        with h5py.File(file, "w") as f:
            f["image"] = cases.images[:, 0].numpy()
            f["mask"] = cases.raters[:, :, 0].to(torch.uint8).numpy()
        config = TrainConfig(
            train_data=str(file),
            output=str(folder / name.replace(" ", "_")),
            initial_weights=weights,
            num_res_blocks=1,
            patch_size=2,
            prediction="y_0",
            channel_mult=[1, 2, 2],
            attention_resolutions=[4],
            norm_groups=8,
            use_scale_shift_norm=True,
            flip=False,
            rotate90=False,
            tensorboard=False,
            **changes,
        )
        weights = str(loop.train(config))
        models[name] = bf.load(weights)
        theirs = [frequencies(cases.raters[i : i + 1], cases.modes[i : i + 1]) for i in range(phantoms)]
        told.append(
            {
                "name": name,
                "raters_per_phantom": raters,
                "largest_error_of_the_raters": round(float(np.abs(theirs - cases.probabilities.numpy()).max()), 4),
                "steps": config.steps,
                "batch_size": config.batch_size,
            }
        )
    return models, told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--output", type=Path, required=True, help="the JSON of results")
    parser.add_argument("--phantoms", type=int, default=8)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--samples", type=int, default=1000)
    args = parser.parse_args()

    args.folder.mkdir(parents=True, exist_ok=True)
    models, trainings = train(args.folder, args.phantoms, args.size)
    cases = phantom.generate(args.phantoms, args.size, seed=SEED)
    schedule = models["first training"].schedule
    img = models["first training"].preprocess(cases.images)
    results = {
        "phantoms": args.phantoms,
        "size": args.size,
        "trainings": trainings,
        "samples_per_phantom": args.samples,
        "truth": cases.probabilities.round(decimals=4).tolist(),
        "samplers": [],
    }
    if args.output.is_file():  # measured before an interruption
        results["samplers"] = json.loads(args.output.read_text())["samplers"]
    measured = {(row["predictions"], row["method"], row["steps"], row["spacing"]) for row in results["samplers"]}
    for predictions, method, steps, spacing in ROWS:
        if (predictions, method, steps, spacing) in measured:
            continue
        found, geds = [], []
        for i in tqdm(range(args.phantoms), desc=f"{predictions}, {method}, {steps} steps", unit="phantom"):
            modes, probabilities = cases.modes[i : i + 1], cases.probabilities[i]
            model: Any = models.get(predictions)
            options: dict[str, Any] = {}
            if predictions == "exact posterior":
                model = exact_posterior(modes[0], probabilities, schedule)
                options = {"schedule": schedule, "prediction": "y_0"}
            masks = bf.sample(
                model,
                img[i : i + 1],
                n=args.samples,
                steps=steps,
                method=method,
                spacing=spacing,
                seed=100 + i,
                max_batch=250,
                **options,
            )
            found.append(frequencies(masks, modes))
            geds.append(excess_and_floor(masks, modes, probabilities))
        error = np.abs(np.array(found) - cases.probabilities.numpy())
        excess, floor = np.array(geds).T
        row = {
            "predictions": predictions,
            "method": method,
            "steps": steps,
            "spacing": spacing,
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
