#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make the files of tests/golden/before, by the code of the time: phantoms, a model of random weights, and its masks.

git worktree add ../before b558997
PYTHONPATH=../before python scripts/make_files_before.py tests/golden/before
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import berdiff_fast as bf
from berdiff_fast import cli
from berdiff_fast.data import phantom


def write_tree(tree: Path, phantoms: phantom.Phantom) -> None:
    """A picture of each phantom, and of what each rater drew."""
    for folder in ("images", *(f"masks_{r}" for r in range(phantoms.raters.shape[1]))):
        (tree / folder).mkdir(parents=True)
    for k, image in enumerate(phantoms.images[:, 0]):
        Image.fromarray(((image + 1) * 127.5).round().byte().numpy()).save(tree / "images" / f"p{k}.png")
        for r, mask in enumerate(phantoms.raters[k, :, 0]):
            Image.fromarray((mask.numpy() * 255).astype(np.uint8)).save(tree / f"masks_{r}" / f"p{k}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    phantoms = phantom.generate(6, size=64, raters=3, seed=7)
    with tempfile.TemporaryDirectory() as folder:
        tree, imported = Path(folder) / "tree", Path(folder) / "imported"
        write_tree(tree, phantoms)
        assert cli.main(["import", str(tree), str(imported), "--layout", "plain", "--split", "70/30/0"]) == 0
        shutil.copy(imported / "train.h5", output / "format-1.h5")
    torch.manual_seed(3)
    network = bf.UNet(model_channels=16, norm_groups=8, channel_mult=(1,), num_res_blocks=1, attention_resolutions=())
    with torch.no_grad():
        for weights in network.parameters():
            if weights.ndim > 1:
                weights.copy_(torch.randn_like(weights) * 0.06)
    model = bf.BerDiff(network, prediction="y_0", preprocessing=bf.Preprocessing()).eval()
    model.save(output / "model.safetensors")
    masks = bf.sample(model, phantoms.images[:1], n=4, steps=5, seed=11).numpy().astype(bool)
    np.savez_compressed(
        output / "expected.npz",
        image=phantoms.images[:1].numpy(),
        masks=np.packbits(masks),
        shape=np.array(masks.shape),
        raters=np.packbits(phantoms.raters.numpy()),
    )


if __name__ == "__main__":
    main()
