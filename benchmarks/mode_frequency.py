#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Whether the trainer learns how often raters draw what: samples against the exact distribution of phantoms.

    python benchmarks/mode_frequency.py --folder runs/modes --output benchmarks/results/mode_frequency.json

Every phantom has four modes of known probability (``data.phantom``). A model is trained on masks of 1,000 raters, whose
own frequencies are told too, then draws 1,000 masks of each phantom; a mask counts for the mode with which its IoU is
largest. Beside it the exact posterior in the model's place: what is left is the sampler's own error.
"""

from __future__ import annotations

import argparse
import dataclasses
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
)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the run is kept")
    parser.add_argument("--output", type=Path, required=True, help="the JSON of results")
    parser.add_argument("--phantoms", type=int, default=8)
    parser.add_argument("--raters", type=int, default=1000)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--more-steps", type=int, default=3000, help="of a second training, with twice the batch")
    parser.add_argument("--samples", type=int, default=1000)
    args = parser.parse_args()

    args.folder.mkdir(parents=True, exist_ok=True)
    cases = phantom.generate(args.phantoms, args.size, raters=args.raters, seed=11)
    file = args.folder / "phantoms.h5"
    with h5py.File(file, "w") as f:
        f["image"] = cases.images[:, 0].numpy()
        f["mask"] = cases.raters[:, :, 0].to(torch.uint8).numpy()
    config = TrainConfig(
        train_data=str(file),
        output=str(args.folder / "run"),
        steps=args.steps,
        batch_size=32,
        num_res_blocks=1,
        patch_size=2,
        prediction="y_0",
        channel_mult=[1, 2, 2],
        attention_resolutions=[4],
        norm_groups=8,
        use_scale_shift_norm=True,
        flip=False,
        rotate90=False,
        checkpoint_every=500,
        tensorboard=False,
    )
    longer = dataclasses.replace(
        config,
        output=str(args.folder / "second"),
        steps=args.more_steps,
        batch_size=64,
        learning_rate=6e-4,
        warmup=50,
        checkpoint_every=250,
    )
    models: dict[str, bf.BerDiff] = {}
    models["first training"] = bf.load(loop.train(config))
    first = str(args.folder / "run" / "model.safetensors")
    models["second training"] = bf.load(loop.train(dataclasses.replace(longer, initial_weights=first)))

    def frequencies(masks: torch.Tensor, i: int) -> np.ndarray:
        iou = 1 - bf.metrics.iou_distance(masks, cases.modes[i : i + 1])[0]
        return np.bincount(iou.argmax(1).numpy(), minlength=4) / masks.shape[1]

    of_raters = np.stack([frequencies(cases.raters[i : i + 1], i) for i in range(args.phantoms)])
    results = {
        "phantoms": args.phantoms,
        "size": args.size,
        "raters_per_phantom": args.raters,
        "training": {"steps": [args.steps, args.more_steps], "batch_size": [config.batch_size, longer.batch_size]},
        "samples_per_phantom": args.samples,
        "truth": cases.probabilities.round(decimals=4).tolist(),
        "largest_error_of_the_raters": round(float(np.abs(of_raters - cases.probabilities.numpy()).max()), 4),
        "samplers": [],
    }
    if args.output.is_file():  # measured before an interruption
        results["samplers"] = json.loads(args.output.read_text())["samplers"]
    measured = {(row["predictions"], row["method"], row["steps"], row["spacing"]) for row in results["samplers"]}
    for predictions, method, steps, spacing in ROWS:
        if (predictions, method, steps, spacing) in measured:
            continue
        found, geds, exact = [], [], []
        for i in tqdm(range(args.phantoms), desc=f"{predictions}, {method}, {steps} steps", unit="phantom"):
            if predictions == "exact posterior":
                schedule = models["first training"].schedule
                model: Any = exact_posterior(cases.modes[i], cases.probabilities[i], schedule)
                options: dict[str, Any] = {"schedule": schedule, "prediction": "y_0"}
            else:
                model, options = models[predictions], {}
            img = models["first training"].preprocess(cases.images)[i : i + 1]
            masks = bf.sample(
                model,
                img,
                n=args.samples,
                steps=steps,
                method=method,
                spacing=spacing,
                seed=100 + i,
                max_batch=250,
                **options,
            )
            found.append(frequencies(masks, i))
            # GED against the distribution itself: its floor for n samples is D / n (phantom.expected_ged).
            d, p = bf.metrics.iou_distance(cases.modes[i : i + 1], cases.modes[i : i + 1])[0], cases.probabilities[i]
            cross = bf.metrics.iou_distance(cases.modes[i : i + 1], masks)[0].mean(1) @ p
            within = bf.metrics.iou_distance(masks, masks).mean()
            spread = p @ d @ p
            geds.append(float(2 * cross - spread - within))
            exact.append(float(spread / args.samples))
        error = np.abs(np.array(found) - cases.probabilities.numpy())
        row = {
            "predictions": predictions,
            "method": method,
            "steps": steps,
            "spacing": spacing,
            "frequencies": np.array(found).tolist(),
            "largest_error": round(float(error.max()), 4),
            "mean_error": round(float(error.mean()), 4),
            "ged": round(float(np.mean(geds)), 4),
            "ged_floor": round(float(np.mean(exact)), 4),
            "largest_ged_above_floor": round(float(np.max(np.array(geds) - np.array(exact))), 4),
        }
        results["samplers"].append(row)
        write_text(args.output, json.dumps(results, indent=1) + "\n")
        print({k: v for k, v in row.items() if k != "frequencies"}, flush=True)


if __name__ == "__main__":
    main()
