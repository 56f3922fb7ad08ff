#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What arithmetic does to masks and to GED: the prepared network in float32, by Winograd and in bfloat16.

    python benchmarks/precision.py --data val.h5 --output benchmarks/results/precision.json

Same slices, same seeds. Masks are compared with those of the network as it is, in float32.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tqdm.auto import tqdm

import berdiff_fast as bf
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.files import write_text
from berdiff_fast.info import collect
from berdiff_fast.training import evaluate

WAYS = {
    "as it is, float32": {"prepare": False},
    "prepared, float32": {},
    "prepared, Winograd": {"prepare": "winograd"},
    "prepared, bfloat16": {"dtype": torch.bfloat16},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="lidc")
    parser.add_argument("--slices", type=int, default=48)
    parser.add_argument("--n", type=int, default=16)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # what torch takes convolutions in float32 for
    model = bf.load(args.model).to(device)
    data = RaterDataset(args.data)
    ways = {k: v for k, v in WAYS.items() if device == "cpu" or "Winograd" not in k}
    rows: dict[str, list] = {name: [] for name in ways}
    differing = dict.fromkeys(ways, 0)
    changed_masks = dict.fromkeys(ways, 0)
    for index in tqdm(evaluate.spread(len(data), args.slices)):
        images, raters = data.batch([index])
        img, first = model.preprocess(images).to(device), None
        for name, options in ways.items():
            masks = bf.sample(model, img, args.n, 10, seed=[index], **options).cpu()
            first = masks if first is None else first
            differing[name] += int((masks != first).sum())
            changed_masks[name] += int((masks != first).flatten(2).any(2).sum())
            rows[name] += evaluate.measure(raters, masks)
    assert first is not None
    pixels = args.slices * args.n * first[0, 0].numel()
    result = {
        "machine": collect(),
        "model": args.model,
        "slices": args.slices,
        "n": args.n,
        "pixels": pixels,
        "ways": {},
    }
    for name in ways:
        means = evaluate.summarize(rows[name])
        result["ways"][name] = {
            "differing_pixels": differing[name],
            "masks_with_any": changed_masks[name],
            "ged": means["ged"],
            "hm_iou": means["hm_iou"],
        }
        print(name, result["ways"][name])
    write_text(args.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
