#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What chunks of many slices cost where an HDF5 file is read slice by slice: by how large they are, packed or not.

    python benchmarks/chunking.py --output benchmarks/results/chunking.json

The same phantoms are written in several layouts, and each is read as training reads them (the image and one rater's
mask of slices in random order) and as evaluation does (whole slices, one after another). Two minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from berdiff_fast.data import phantom
from berdiff_fast.data.chunking import slices_unpacked
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.data.rechunking import rechunk
from berdiff_fast.files import write_text

#: Slices of a chunk (None: not in chunks, "h5py": as h5py cuts them by itself), and whether chunks are packed.
LAYOUTS = ((1, "gzip"), (2, "gzip"), (4, "gzip"), (8, "gzip"), (16, "gzip"), (64, "gzip"), ("all", "gzip"))
LAYOUTS += (("h5py", "gzip"), (None, None), (64, None), ("h5py", None))


def write(path: Path, cases: Any, slices: int | str | None, packing: str | None) -> None:
    with h5py.File(path, "w") as file:
        for name, data in (("image", cases.images[:, 0].numpy()), ("mask", cases.raters[:, :, 0].numpy())):
            chunks: Any = True if slices == "h5py" else None
            if slices not in (None, "h5py"):
                chunks = (len(data) if slices == "all" else slices, *data.shape[1:])
            if name == "image":
                data = ((data + 1) * 127.5).round().astype(np.uint8)
            file.create_dataset(name, data=data.astype(np.uint8), chunks=chunks, compression=packing)


def timed(work: Callable[[RaterDataset], object], path: Path, repeats: int) -> float:
    """Milliseconds of the median."""
    found = []
    for _ in range(repeats):
        data = RaterDataset(path)  # opened anew: nothing is unpacked yet
        start = time.perf_counter()
        work(data)
        found.append(1000 * (time.perf_counter() - start))
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the JSON of results")
    parser.add_argument("--slices", type=int, default=1024)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--reads", type=int, default=32, help="slices that are read")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    logging.getLogger("berdiff_fast").setLevel(logging.ERROR)  # it would warn of what is measured
    cases = phantom.generate(args.slices, args.size, field=args.size)
    order = np.random.default_rng(0).permutation(args.slices)[: args.reads]
    raters = np.random.default_rng(1).integers(4, size=args.reads)
    in_turn = range(args.reads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for slices, packing in LAYOUTS:
            path = Path(folder) / "slices.h5"
            write(path, cases, slices, packing)
            with h5py.File(path) as file:
                row = {"slices_per_chunk": slices, "packed": packing, "unpacked": slices_unpacked(file["image"])}
                row["chunk_of_image"] = list(file["image"].chunks or ())
            row["megabytes"] = round(path.stat().st_size / 1e6, 2)
            row["training_ms"] = timed(lambda data: data.rows(order, raters), path, args.repeats) / args.reads
            row["evaluation_ms"] = timed(lambda data: [data[i] for i in in_turn], path, args.repeats) / args.reads
            if slices == 64 and packing:
                anew = rechunk(path, Path(folder) / "anew.h5")
                row["rechunked_training_ms"] = (
                    timed(lambda data: data.rows(order, raters), anew, args.repeats) / args.reads
                )
            path.unlink()
            rows.append({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
            print(rows[-1], flush=True)
    if args.output:
        shape = {"slices": args.slices, "size": args.size, "raters": 4, "reads": args.reads, "repeats": args.repeats}
        versions = {"h5py": h5py.__version__, "hdf5": h5py.version.hdf5_version}
        write_text(args.output, json.dumps({**shape, "versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
