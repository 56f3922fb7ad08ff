#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains the bundled demo model ``phantom64`` on procedural slices, with this package's own noise and schedule.

    python scripts/train_phantom.py --output berdiff_fast/weights/phantom64

A plain loop for one small model; the weights are an exponential moving average, stored in float16.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import berdiff_fast as bf
from berdiff_fast.data import phantom


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    network = bf.UNet(
        model_channels=args.channels,
        channel_mult=(1, 1, 2, 3),
        num_res_blocks=1,
        attention_resolutions=(8,),
        num_heads=2,
    )
    model = bf.BerDiff(network, "cosine2", preprocessing=bf.Preprocessing("min-max"))
    ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.learning_rate, weight_decay=1e-4)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.steps, pct_start=0.05)
    print(f"{sum(p.numel() for p in network.parameters()):,} parameters")

    # The endless sequence of phantoms is read in blocks; validation (the demo) uses another seed.
    block, size = [], 64
    start, curve = time.monotonic(), []  # type: ignore[var-annotated]
    for step in range(args.steps):
        if not block:
            batch = phantom.generate(size, 64, raters=1, seed=args.seed + 1, first=step * args.batch)
            img = model.preprocess(batch.images)
            block = list(zip(img.split(args.batch), batch.raters[:, 0].float().split(args.batch), strict=True))
        img, y_0 = block.pop()
        t = torch.randint(model.schedule.timesteps, (len(y_0),))
        seeds = torch.empty(len(y_0), dtype=torch.int64).random_()
        y_t = bf.ops.q_sample(y_0, t, seeds, model.schedule)
        loss = bf.ops.diffusion_loss(model(y_t, t, img), y_t, y_0, t, model.schedule).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate.step()
        ema.update_parameters(network)
        curve.append(loss.item())
        if step % 100 == 99 or step + 1 == args.steps:
            recent = sum(curve[-100:]) / len(curve[-100:])
            elapsed = time.monotonic() - start
            left = elapsed / (step + 1) * (args.steps - step - 1)
            print(f"step {step + 1:6d}  loss {recent:.4f} bits/px  {elapsed:6.0f} s, {left:6.0f} s left", flush=True)
        if step % 500 == 499 or step + 1 == args.steps:
            network_state = {k: v.half() for k, v in ema.module.state_dict().items()}
            stored = bf.BerDiff(bf.UNet(**network.config).half(), model.schedule, preprocessing=model.preprocessing)
            stored.network.load_state_dict(network_state)
            stored.save(args.output)
    record = {
        "steps": args.steps,
        "batch": args.batch,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "seconds": round(time.monotonic() - start),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "loss_bits_per_pixel": [
            round(sum(curve[i : i + 100]) / len(curve[i : i + 100]), 5) for i in range(0, len(curve), 100)
        ],
    }
    (args.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
