# SPDX-License-Identifier: Apache-2.0
"""Sixteen plausible masks for one CT-like slice, what they say together, and a picture if matplotlib is there.

python examples/quick_start.py
"""

import importlib.util

import berdiff_fast as bf

model = bf.load("lidc")  # a bundled model, a folder, or a .safetensors file
raw = bf.data.phantom.generate(1, 128, field=128).images  # float32 (1, 1, 128, 128); or a slice of your own
img = model.preprocess(raw)

masks = bf.sample(model, img, n=16, steps=10, seed=7)  # bool (1, 16, 1, 128, 128)
more = bf.sample(model, img, n=4, steps=10, seed=7, first_sample=16)  # masks 16 to 19 of the same sequence
print(f"{masks.shape[1]} masks, and {more.shape[1]} more")

areas = masks.sum((2, 3, 4))[0]
print(f"areas in pixels: {areas.tolist()}; {int((areas == 0).sum())} of {len(areas)} masks are empty")

probability = masks.float().mean(1)  # how often each pixel was marked
disagreement = bf.imaging.figures.disagreement(probability)  # 0 where all masks agree
print(f"pixels that some masks mark and others do not: {int((disagreement > 0).sum())}")

if importlib.util.find_spec("matplotlib"):
    bf.figures.contact_sheet("quick_start.png", raw[:, 0], masks[:, :, 0])
    print("quick_start.png")
