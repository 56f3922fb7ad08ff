#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes a bundled model of a training: its weights in float16, which halves the package, and what became of it.

python scripts/bundle_model.py runs/lidc berdiff_fast/weights/lidc
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml

import berdiff_fast as bf
from berdiff_fast.files import write_text

#: Places, which say nothing of a training.
_PLACES = ("train_data", "val_data", "output")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a bundled model of a training.")
    parser.add_argument("run", type=Path, help="the training's folder")
    parser.add_argument("output", type=Path, help="the bundled model's folder")
    parser.add_argument("--minutes", type=int, help="how long it took")
    options = parser.parse_args()
    model = bf.load(options.run / "model.safetensors")
    model.half().save(options.output)
    rows = [json.loads(line) for line in (options.run / "log.jsonl").read_text().splitlines()]
    config = yaml.safe_load((options.run / "config.yaml").read_text())
    every = max(1, sum("loss" in row for row in rows) // 40)
    training = {
        "config": {key: value for key, value in config.items() if key not in _PLACES},
        "minutes": options.minutes,
        "loss_bits_per_pixel": {row["step"]: row["loss"] for row in [r for r in rows if "loss" in r][::every]},
        "prior_loss_nats": {row["step"]: row["prior_loss"] for row in [r for r in rows if "prior_loss" in r][::every]},
        "validation": [
            {key.removeprefix("validation_"): value for key, value in row.items()}
            for row in rows
            if any(key.startswith("validation_") for key in row)
        ],
    }
    write_text(options.output / "training.json", json.dumps(training, indent=1) + "\n")


if __name__ == "__main__":
    main()
