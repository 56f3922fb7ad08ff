#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Pack values of the published code, as they were recorded, into ``tests/golden``.

    python scripts/make_golden.py FOLDER

FOLDER has ``maths``, ``metrics_lidc`` and ``unet_concat.safetensors`` and ``unet_lidc128_parameter_shapes.json``. Bits
are packed, and of the 64 random examples of the mathematics the first 32 are kept; no number is changed.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

source, target = Path(sys.argv[1]), Path(__file__).parents[1] / "tests" / "golden"


def is_binary(values: np.ndarray) -> bool:
    return values.ndim > 2 and bool(((values == 0) | (values == 1)).all())


for name in ("maths", "metrics_lidc"):
    packed = {}
    for key, values in load_file(source / f"{name}.safetensors").items():
        if name == "maths" and values.shape[:1] == (64,):
            values = values[:32]
        if is_binary(values):  # restored by tests/support.py
            packed[f"bits:{values.shape[-1]}:{values.dtype.name}:{key}"] = np.packbits(values != 0, axis=-1)
        else:
            packed[key] = values
    np.savez_compressed(target / f"{name}.npz", **packed)
for name in ("unet_concat.safetensors", "unet_lidc128_parameter_shapes.json"):
    shutil.copyfile(source / name, target / name)
    (target / name).chmod(0o644)
print(sum(path.stat().st_size for path in target.iterdir()), "bytes")
