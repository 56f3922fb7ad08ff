#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make the six CT slices that travel in the package, from a file of LIDC-IDRI's validation patients.

    python scripts/make_lidc_slices.py val.h5

Two slices each that two, three and all four radiologists marked, each of another patient, drawn by a seed among those
whose marks have 60 pixels or more on average: large enough to be seen in a picture. No model has a say in it.
"""

import sys
from pathlib import Path

import h5py
import numpy as np

TARGET = Path(__file__).parents[1] / "berdiff_fast" / "data" / "lidc_slices.npz"

with h5py.File(sys.argv[1], "r") as file:
    images, masks, patients = (file[name][:] for name in ("image", "mask", "patient_id"))
    places = np.stack([file["nodule"][:], file["slice"][:]], axis=1)
areas = masks.sum((2, 3), dtype=np.int64)
readers = (areas > 0).sum(1)
large = areas.sum(1) / np.maximum(readers, 1) >= 60

chosen: list[int] = []
order = np.random.default_rng(0).permutation(len(images)).tolist()
for count in (2, 3, 4, 2, 3, 4):  # so that the first three show all there is
    chosen.append(next(i for i in order if readers[i] == count and large[i] and patients[i] not in patients[chosen]))

np.savez_compressed(
    TARGET,
    images=images[chosen],
    masks=np.packbits(masks[chosen] != 0, axis=-1),
    patients=patients[chosen],
    places=places[chosen],
)
print(f"{TARGET}: rows {chosen}, {TARGET.stat().st_size} bytes")
