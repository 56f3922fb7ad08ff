#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How many calls of the network ``sample(parallel=)`` needs, and, on a GPU, what they cost.

    python benchmarks/parallel_in_time.py --data val.h5 --output benchmarks/results/parallel_in_time.json
    python benchmarks/parallel_in_time.py --device cuda --output parallel_in_time-gpu.json

On a CPU it counts calls and evaluations (a mask at a step each), and pixels that differ from the sequential sampler's,
on `lidc-v1` and on a network of the published size with random weights, at 32 x 32. Rows that the output has already
are left out, so it may be stopped and started. On a GPU it times calls of n = 1, in bfloat16, in under half a minute.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import berdiff_fast as bf
from berdiff_fast.bench.calls import _published_unet
from berdiff_fast.data import phantom
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.files import write_text
from berdiff_fast.info import collect
from berdiff_fast.network import inference
from berdiff_fast.sampling import parallel_in_time
from berdiff_fast.training import evaluate

#: Steps, masks and windows to count, in this order, and on how many slices of `lidc-v1`.
COUNTED = [(steps, n, window, 4) for steps in (10, 20, 50) for n in (1, 4) for window in (8, 16)]
COUNTED += [(250, 1, 8, 2), (250, 1, 16, 2), (250, 4, 8, 1), (250, 4, 16, 1)]
TIMED = (10, 50, 250)
WINDOWS = (8, 16)


class Counter(logging.Handler):
    """Reads off the package's log how many calls and evaluations the last trajectory took."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.calls = self.evaluations = 0
        logger = logging.getLogger("berdiff_fast")
        logger.setLevel(logging.DEBUG)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("parallel in time"):
            _, self.calls, self.evaluations = record.args


def drawn_from_guesses(noise: Any, steps: Any, window: Any, predict: Any, draw: Any, *rest: Any) -> Any:
    """``trajectory`` as the plain fixed-point iteration: a state is drawn from the one that was *guessed* before it."""
    guesses: dict[int, torch.Tensor] = {}

    def remember(states: torch.Tensor, of: slice) -> torch.Tensor:
        guesses.clear()
        guesses.update(zip(range(of.start, of.stop), states.split(len(noise)), strict=True))
        return predict(states, of)

    def from_guess(y: torch.Tensor, logits: torch.Tensor, step: int, flag: torch.Tensor) -> torch.Tensor:
        return draw(guesses.get(step, y), logits, step, flag)

    return _TRAJECTORY(noise, steps, window, remember, from_guess, *rest)


_TRAJECTORY = parallel_in_time.trajectory


def row(model: bf.BerDiff, images: dict[int, torch.Tensor], steps: int, n: int, window: int) -> dict[str, Any]:
    """Counts of n masks of each image, by its seed."""
    counter, calls, evaluations, differing = Counter(), [], [], 0
    for seed, img in images.items():
        masks = bf.Sampler(model, n, steps, parallel=window, max_batch=n * window)(img, seed=[seed])
        calls.append(counter.calls)
        evaluations.append(counter.evaluations / steps)
        differing += int((masks != bf.Sampler(model, n, steps)(img, seed=[seed])).sum())
    logging.getLogger("berdiff_fast").removeHandler(counter)
    return {
        "calls": calls,
        "evaluations_per_step": [round(x, 2) for x in evaluations],
        "differing_pixels": differing,
        "pixels": n * sum(img[0, 0].numel() for img in images.values()),
    }


def count(data: Path | None, output: Path) -> None:
    found: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {"machine": collect(), "rows": {}}

    def add(name: str, make: Callable[[], dict]) -> None:
        if name not in found["rows"]:
            start = time.perf_counter()
            found["rows"][name] = make()
            write_text(output, json.dumps(found, indent=1) + "\n")
            print(f"{name}: {found['rows'][name]} ({time.perf_counter() - start:.0f} s)", flush=True)

    published = _published_unet()
    image = {1: bf.Preprocessing()(phantom.generate(1, 32).images)}
    slices: dict[int, torch.Tensor] = {}
    if data is None or not data.exists():
        print(f"lidc-v1: not counted, there are no slices at {data}")
    else:
        lidc, dataset = bf.load("lidc-v1"), RaterDataset(data)
        slices = {i: lidc.preprocess(dataset.batch([i])[0]) for i in evaluate.spread(len(dataset), 4)}

    def lidc_rows(which: Iterable[tuple[int, int, int, int]], how: str = "") -> None:
        for steps, n, window, many in which if slices else ():
            some = dict(itertools.islice(slices.items(), many))
            add(f"lidc-v1{how}, steps={steps}, n={n}, window={window}", lambda: row(lidc, some, steps, n, window))  # noqa: B023

    def published_rows(which: Iterable[tuple[int, int, int, int]]) -> None:
        for steps, n, window, _ in which:
            name = f"published U-Net, random weights, 32 x 32, steps={steps}, n={n}, window={window}"
            add(name, lambda: row(published, image, steps, n, window))  # noqa: B023

    lidc_rows(COUNTED[:12])
    with mock.patch.object(parallel_in_time, "trajectory", drawn_from_guesses):
        lidc_rows([(10, 1, 8, 1), (50, 1, 8, 1)], ", drawn from guesses")
    published_rows(c for c in COUNTED if c[0] < 50 and c[1] == 1)
    lidc_rows(COUNTED[12:14])
    published_rows(c for c in COUNTED if c[0] == 50 and c[1] == 1)
    published_rows(c for c in COUNTED if c[0] == 10 and c[1] == 4)
    lidc_rows(COUNTED[14:])
    published_rows(c for c in COUNTED if c[0] == 20 and c[1] == 4)
    published_rows([(250, 1, 8, 0)])


def milliseconds(run: Callable[[], Any], seconds: float, warm: int) -> float:
    """The median of as many runs as fit, at most 20, after some to warm up."""
    times: list[float] = []
    start = time.perf_counter()
    for turn in range(20 + warm):
        torch.cuda.synchronize()
        before = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if turn >= warm:
            times.append(time.perf_counter() - before)
            if time.perf_counter() - start > seconds:
                break
    return round(1000 * statistics.median(times), 3)


def measure(output: Path, seconds: float) -> None:
    """Calls one after the other and in parallel, and the network alone at 1, 8 and 16 masks, at 128 x 128."""
    end = time.perf_counter() + seconds
    found: dict[str, Any] = {"machine": collect(), "network": {}, "calls": {}}
    for name, model in (("published U-Net, random weights", _published_unet()), ("lidc-v1", bf.load("lidc-v1"))):
        model.to("cuda")
        img = bf.Preprocessing()(phantom.generate(1, 128, field=128).images).cuda()
        prepared = inference.prepare(model.network, [900.0] * 16, dtype=torch.bfloat16)
        features = prepared.encode(img)
        for masks in (1, *WINDOWS):
            y = torch.zeros(masks, 1, 128, 128, dtype=torch.bfloat16, device="cuda")
            of = 0 if masks == 1 else slice(0, masks)
            with torch.no_grad():
                ms = milliseconds(lambda: prepared(y, of, features), 0.3, 2)  # noqa: B023
            found["network"][f"{name}, {masks} states"] = ms
        for steps, window in itertools.product(TIMED, (None, *WINDOWS)):
            if time.perf_counter() > end:
                print("no time left")
                return
            counter = Counter()
            sampler = bf.Sampler(model, 1, steps, dtype=torch.bfloat16, parallel=window)
            # A call one step after another is a graph from its third time on.
            ms = milliseconds(lambda: sampler(img, seed=1), 0.3, 2 if window is None else 1)  # noqa: B023
            told = {"ms": ms} if window is None else {"ms": ms, "calls": counter.calls, "states": counter.evaluations}
            found["calls"][f"{name}, steps={steps}, parallel={window}"] = told
            logging.getLogger("berdiff_fast").removeHandler(counter)
            print(f"{name}, steps={steps}, parallel={window}: {told}", flush=True)
            write_text(output, json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--data", type=Path, help="slices of LIDC-IDRI, for the counts")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=18, help="on a GPU, no further row is begun after that")
    args = parser.parse_args()
    if args.device == "cuda":
        measure(args.output, args.seconds)
    else:
        count(args.data, args.output)


if __name__ == "__main__":
    main()
