#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What arithmetic does to masks and to GED: the prepared network in float32, by Winograd, in bfloat16 and from fp8.

    python benchmarks/precision.py --data val.h5 --output benchmarks/results/precision.json
    python benchmarks/precision.py --published --output benchmarks/results/precision.json

Same slices, same seeds. Masks are compared with those of the network as it is, in float32. With ``--published``, a
network of the published size and phantoms of 64 x 64: it is not trained, so only differing pixels are told, and logits.
The output holds the totals of the slices done so far. A run that was stopped goes on, when started again with the same
options, at the slice where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fp8
import torch
from tqdm.auto import tqdm

import berdiff_fast as bf
from berdiff_fast.bench.calls import _published_unet
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.files import write_text
from berdiff_fast.info import collect
from berdiff_fast.training import evaluate

REFERENCE = "as it is, float32"
WAYS: dict[str, dict[str, Any]] = {
    REFERENCE: {"prepare": False},
    "prepared, float32": {},
    "prepared, Winograd": {"prepare": "winograd"},
    "prepared, bfloat16": {"dtype": torch.bfloat16},
    "fp8, a scale per tensor": {"fp8": {"scale": "tensor"}},
    "fp8, a scale per mask": {"fp8": {"scale": "mask"}},
    "fp8, no scale": {"fp8": {"scale": "none"}},
    "fp8, a scale per tensor, first and last convolution too": {"fp8": {"scale": "tensor", "ends": True}},
}
STEPS = 10
#: Of the comparison of logits: much noise, some, little.
LEVELS = (0.02, 0.3, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="slices with raters; not with --published")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="lidc-v1")
    parser.add_argument("--published", action="store_true")
    parser.add_argument("--slices", type=int, default=24)
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="WAY")
    args = parser.parse_args()
    if (args.data is None) != args.published:
        parser.error("give one of --data and --published")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # what torch takes convolutions in float32 for
    model = (_published_unet() if args.published else bf.load(args.model)).to(device)
    name = "published" if args.published else args.model
    ways = [REFERENCE, *(w for w in args.ways if w != REFERENCE and (device == "cpu" or "Winograd" not in w))]
    setting = {"slices": args.slices, "n": args.n, "steps": STEPS, "weights_sha256": evaluate._fingerprint(model)}
    # What is done is kept slice by slice, so that a run that was stopped goes on.
    partial = args.output.with_suffix(f".{name}.partial.json")
    done: dict[str, dict[str, Any]] = {}
    if partial.is_file() and (found := json.loads(partial.read_text()))["setting"] == setting:
        done = found["done"]
    for index, img, raters in tqdm(_slices(args, model), total=args.slices):
        if all(way in done.get(str(index), {}) for way in ways):
            continue
        of_slice = done.setdefault(str(index), {})
        of_slice |= _measure(model, img.to(device), raters, index, args.n, [w for w in ways if w not in of_slice])
        write_text(partial, json.dumps({"setting": setting, "done": done}) + "\n")
        _write(args.output, name, setting, ways, done)
    _write(args.output, name, setting, ways, done)
    partial.unlink(missing_ok=True)


def _write(output: Path, name: str, setting: dict[str, Any], ways: list[str], done: dict[str, dict[str, Any]]) -> None:
    """The totals over the slices done so far, beside those of other models."""
    models = json.loads(output.read_text()).get("models", {}) if output.is_file() else {}
    indices = sorted(int(index) for index, of_slice in done.items() if all(way in of_slice for way in ways))
    totals = {way: _total([done[str(index)][way] for index in indices]) for way in ways}
    models[name] = {**setting, "slices": len(indices), "asked": setting["slices"], "indices": indices, "ways": totals}
    write_text(output, json.dumps({"machine": collect(), "models": models}, indent=1) + "\n")


def _measure(
    model: bf.BerDiff, img: torch.Tensor, raters: torch.Tensor | None, seed: int, n: int, ways: list[str]
) -> dict[str, dict[str, float]]:
    """Of one slice, what each way changes of the reference's masks and logits."""
    logits = _logits(model, img, seed, {})
    found: dict[str, dict[str, float]] = {}
    expected = None
    for way in dict.fromkeys([REFERENCE, *ways]):
        options = dict(WAYS[way])
        rounding = fp8.Rounded(**options.pop("fp8")) if "fp8" in options else contextlib.nullcontext()
        with rounding:
            masks = bf.sample(model, img, n, STEPS, seed=[seed], **options).cpu()
        if isinstance(rounding, fp8.Rounded) and not rounding.count:
            raise RuntimeError(f"{way}: no convolution was rounded")
        expected = masks if expected is None else expected
        differs = (masks != expected).flatten(2)
        found[way] = {
            "pixels": masks.numel(),
            "marked": int(masks.sum()),
            "differing_pixels": int(differs.sum()),
            "masks": n,
            "masks_with_any": int(differs.any(2).sum()),
        }
        if raters is not None:
            measured = evaluate.measure(raters, masks)[0]
            found[way] |= {"ged": measured["ged"], "hm_iou": measured["hm_iou"]}
        if {"fp8", "dtype"} & WAYS[way].keys():
            found[way]["logit_error"] = _error(_logits(model, img, seed, WAYS[way]), logits)
    return found


def _total(rows: list[dict[str, float]]) -> dict[str, float]:
    """Sums of what is counted, means of the rest."""
    total: dict[str, float] = {}
    for key, value in rows[0].items():
        values = [row[key] for row in rows]
        total[key] = sum(values) if isinstance(value, int) else sum(values) / len(values)
    return total


def _slices(args: argparse.Namespace, model: bf.BerDiff) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
    """Index, image (1, C, H, W) as the network expects it, and raters, if what they say is of use."""
    if args.published:
        cases = bf.data.phantom.generate(args.slices, 64, field=64)
        preprocess = bf.Preprocessing()
        for index in range(args.slices):
            yield index, preprocess(cases.images[index : index + 1]), None
        return
    data = RaterDataset(args.data)
    chosen = evaluate.spread(len(data), args.slices)
    for index in chosen[::3] + chosen[1::3] + chosen[2::3]:  # the first of them are spread, too
        images, raters = data.batch([index])
        yield index, model.preprocess(images), raters


def _logits(model: bf.BerDiff, img: torch.Tensor, seed: int, options: dict[str, Any]) -> torch.Tensor:
    """Of the network as it is, in the type of numbers that a way asks for."""
    dtype = options.get("dtype", torch.float32)
    if dtype != torch.float32:
        model = copy.deepcopy(model).to(dtype)
    rounding = fp8.Rounded(**options["fp8"]) if "fp8" in options else contextlib.nullcontext()
    generator = torch.Generator().manual_seed(seed)
    kept = model.schedule.alphas_cumprod
    img = img.to(dtype)
    shape = (1, model.mask_channels or 1, *img.shape[2:])
    out = []
    with rounding, torch.no_grad():
        for level in LEVELS:
            t = int((kept - level).abs().argmin())
            y_t = (torch.rand(shape, generator=generator) < 0.5 * (1 - kept[t])).to(img)
            out.append(model(y_t, torch.full((1,), t, device=img.device), img).float())
    return torch.cat(out)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, over the standard deviation of the logits."""
    return float((found - expected).square().mean().sqrt() / expected.std())


if __name__ == "__main__":
    main()
