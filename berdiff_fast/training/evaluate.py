# SPDX-License-Identifier: Apache-2.0
"""How well a model's masks agree with the raters', slice by slice, beside what simple predictors reach."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from berdiff_fast import checks, metrics, rng
from berdiff_fast._version import __version__
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.files import remove_link, write_bytes, write_text
from berdiff_fast.imaging import shown
from berdiff_fast.model import BerDiff
from berdiff_fast.network.unet import check_size
from berdiff_fast.sampling import Sampler, sample
from berdiff_fast.training import findings

#: What is told of every slice; see ``metrics``.
NUMBERS = ("ged", "hm_iou", "soft_dice", "dice_majority", "iou_majority", "sample_diversity", "ece")
#: Predictors that look at the raters: yardsticks, not models.
YARDSTICKS = ("perfect", "majority", "empty")
TABLES = ("csv", "parquet")

_interval = findings.interval


def choose(length: int, count: int | None, seed: int) -> list[int]:
    """``count`` of ``length`` slices drawn by a seed, ascending; all of them by default."""
    if count is None or count >= length:
        return list(range(length))
    checks.integer("slices", count, 1)
    return sorted(np.random.default_rng(seed).choice(length, count, replace=False).tolist())


def spread(length: int, count: int) -> list[int]:
    """``count`` indices (or all) evenly spread over ``length``."""
    count = min(length, count)
    return [i * length // count for i in range(count)]


def sample_slices(
    model: BerDiff,
    slices: RaterDataset,
    indices: Sequence[int],
    *,
    n: int,
    seed: int,
    batch: int = 8,
    process_index: int = 0,
    num_processes: int = 1,
    **options: Any,
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Draw n masks for each slice: indices, images, raters and samples of one batch after another.

    Slice i draws with the seed that ``image_seeds(seed, ...)`` gives i, whatever the selection. Processes take whole
    batches in turn, so the network sees the same batches however many there are.

    Args:
        model: with its own preprocessing.
        slices, indices: which slices.
        n, seed: as in ``sample``.
        batch: slices per call of ``sample``.
        process_index, num_processes: this process's share.
        **options: of ``sample``.
    """
    device = next(model.network.parameters()).device
    for start in range(process_index * batch, len(indices), num_processes * batch):
        chosen = list(indices[start : start + batch])
        images, raters = slices.batch(chosen)
        seeds = [rng.splitmix64(seed, i) for i in chosen]
        assert model.preprocessing is not None
        img = model.preprocess(images, slices.statistics_for(model.preprocessing, chosen)).to(device)
        samples = sample(model, img, n=n, seed=seeds, **options)
        assert isinstance(samples, torch.Tensor)
        samples = samples.cpu()
        ignored = slices.ignored(chosen)
        if ignored is not None:  # what does not count is marked by nobody
            counts = ~torch.from_numpy(ignored)[:, None]
            raters, samples = raters & counts, samples & counts
        yield chosen, images, raters, samples


def measure(
    raters: torch.Tensor, samples: torch.Tensor, counts: Sequence[int] = (), valid: np.ndarray | None = None
) -> list[dict[str, float]]:
    """One dict for each image: ``NUMBERS`` of all samples, and GED of the first ``counts`` of them as ``ged_of_8``;
    against the raters who are ``valid`` (N, R)."""
    n = samples.shape[1]
    columns = dict(metrics.evaluate(raters, samples, NUMBERS, rater_valid=valid))
    fewer = metrics.evaluate_counts(raters, samples, [c for c in counts if c < n], ["ged"], rater_valid=valid)
    columns |= {f"ged_of_{c}": v["ged"] for c, v in fewer.items()}
    return [{k: float(v[i]) for k, v in columns.items()} for i in range(len(raters))]


def summarize(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of every number over the slices."""
    return {k: float(np.mean([row[k] for row in rows])) for k in rows[0]} if rows else {}


def yardstick(
    name: str, raters: torch.Tensor, n: int, seeds: Sequence[int], valid: np.ndarray | None = None
) -> torch.Tensor:
    """n masks (N, n, K, H, W) of a predictor that looks at the raters who are ``valid`` (N, R).

    "perfect" draws from the raters, as an exact model of them would; "majority" repeats what at least half of them
    marked; "empty" marks nothing.
    """
    valid = np.ones(raters.shape[:2], bool) if valid is None else valid
    if name == "perfect":
        who = [np.flatnonzero(row) for row in valid]
        picks = [w[np.random.default_rng(s).integers(len(w), size=n)] for w, s in zip(who, seeds, strict=True)]
        return torch.stack([r[torch.from_numpy(p)] for r, p in zip(raters, picks, strict=True)])
    read = torch.from_numpy(valid).reshape(*valid.shape, *[1] * (raters.ndim - 2))
    votes, count = (raters & read).sum(1, keepdim=True), read.sum(1, keepdim=True)
    one = 2 * votes >= count if name == "majority" else torch.zeros_like(raters[:, :1])
    return one.expand(-1, n, *one.shape[2:])


def evaluate(
    model: BerDiff,
    slices: RaterDataset,
    output: str | os.PathLike[str],
    *,
    count: int | None = None,
    n: int = 16,
    seed: int = 0,
    counts: Sequence[int] = (4, 8),
    batch: int = 8,
    table: str = "csv",
    save_masks: bool = False,
    name: str = "",
    progress: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Sample slices, compare with their raters, and write what came out.

    The folder ``output`` gets ``slices.csv`` (or .parquet; a row for each slice), ``summary.json``, ``cases.png``
    (best, median and worst slice) and ``existence.png`` (whether P(empty) is calibrated), where matplotlib is there,
    and with ``save_masks`` ``masks.h5``. Under ``accelerate
    launch`` the slices are shared out among the processes; masks and numbers are the same as of one process.

    Args:
        model, slices: what to evaluate on what.
        output: the folder; made if it is not there.
        count: how many slices, drawn by ``seed``; all by default.
        n, seed: masks per slice and their seed.
        counts: smaller numbers of samples for which GED is told as well.
        batch: slices per call of ``sample``.
        table: "csv" or "parquet".
        save_masks: keep all masks.
        name: of the model, for the record.
        progress: show a progress bar.
        **options: of ``sample``: steps, method, spacing, ...

    Returns:
        The summary: means over slices of the model and the yardsticks, GED taken apart, the floor, and 95 % intervals
        by bootstrap over patients, or over slices where the file names no patients (see docs/metrics.md).

    Raises:
        ValueError, TypeError: naming the argument, before any work.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    checks.integer("n", n, 1)
    checks.integer("batch", batch, 1)
    if table not in TABLES:
        raise ValueError(f"table must be one of {list(TABLES)}, got {table!r}")
    if table == "parquet":
        import pyarrow  # noqa: F401  before any work
    if model.preprocessing is None:
        raise ValueError(
            f"model: {name or 'it'} does not know how its images were prepared; save it as "
            "BerDiff(..., preprocessing=bf.Preprocessing(...))"
        )
    for attribute in ("spatial_dims", "img_channels", "mask_channels", "context_slices"):
        theirs, ours = getattr(slices, attribute), getattr(model, attribute)
        if ours is not None and theirs != ours:
            raise ValueError(f"{slices.path}: the model works on {ours} {attribute}, and the file has {theirs}")
    for attribute in ("channels", "regions"):
        theirs, ours = getattr(slices, attribute), getattr(model, attribute)
        if None not in (theirs, ours) and theirs != ours:
            raise ValueError(f"{slices.path}: the model's {attribute} are {ours}, and the file's are {theirs}")
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output must be a folder, and {output} is a file")
    state = PartialState()
    chosen = choose(len(slices), count, seed)
    # All that can be refused is refused before the folder is made.
    Sampler(model, n, **options)
    check_size(slices.image_size, model.size_multiple)
    model.output_window.check(f"images of {slices.path}", slices.image_size)
    slices.batch(chosen[:1])
    output.mkdir(parents=True, exist_ok=True)

    rows: list[dict[str, Any]] = []
    kept: list[tuple[int, np.ndarray]] = []
    bins: dict[str, np.ndarray] = {}
    with tqdm(
        total=len(chosen), unit="slice", desc="evaluating", disable=not (progress and state.is_main_process)
    ) as bar:
        for indices, _, raters, samples in sample_slices(
            model,
            slices,
            chosen,
            n=n,
            seed=seed,
            batch=batch,
            process_index=state.process_index,
            num_processes=state.num_processes,
            **options,
        ):
            valid, seeds = slices.rater_valid[indices], [rng.splitmix64(seed, i) for i in indices]
            predictors = {"model": samples}
            predictors |= {y: yardstick(y, raters, n, seeds, valid) for y in YARDSTICKS}
            measured = {p: measure(raters, m, counts, valid) for p, m in predictors.items()}
            for p, m in predictors.items():
                for column, values in findings.take_apart(raters, m, valid).items():
                    for row, value in zip(measured[p], values.tolist(), strict=True):
                        row[column] = value
            for k, index in enumerate(indices):
                rows.append({**slices.describe(index), **{p: numbers[k] for p, numbers in measured.items()}})
                kept.append((index, np.packbits(samples[k].numpy(), axis=-1)))
            for p, m in predictors.items():
                found = metrics.calibration_bins(raters, m, rater_valid=valid)
                bins[p] = bins.get(p, 0) + found.sum(0).cpu().numpy()
            bar.update(min(len(indices) * state.num_processes, bar.total - bar.n))
    # Summed in the order of the slices, so that the share-out leaves no trace.
    rows = sorted(gather_object(rows), key=lambda row: row["index"])
    kept = sorted(gather_object(kept), key=lambda pair: pair[0])
    all_bins = gather_object([bins])
    if not state.is_main_process:
        return {}
    predictors_seen = ("model", *YARDSTICKS)
    pooled = {p: np.sum([b[p] for b in all_bins if p in b], axis=0) for p in predictors_seen}
    indices = [row["index"] for row in rows]
    groups = findings.groups(slices, indices)
    distinct = len(np.unique(groups))
    readers = slices.rater_valid[indices].sum(1)
    summary: dict[str, Any] = {
        "weights": {"name": name, "sha256": _fingerprint(model)},
        "data": {
            "file": slices.path.name,
            "slices": len(rows),
            "of": len(slices),
            "patients": distinct if slices.names_patients else None,
            "raters": slices.raters,
            "readers_per_slice": [int(readers.min()), int(readers.max())],
            **({"spatial_dims": 3} if slices.spatial_dims == 3 else {}),
            **({"channels": list(slices.channels)} if slices.channels else {}),
            **({"regions": str(slices.regions)} if slices.regions else {}),
        },
        "sampling": {"n": n, "seed": seed, "batch": batch, **options},
        "versions": {
            "berdiff_fast": __version__,
            "torch": torch.__version__,
            "draw_contract": rng.DRAW_CONTRACT,
        },
        "bootstrap": {"over": "patients" if slices.names_patients else "slices", "groups": distinct},
        "indices": indices,
    }
    for p in predictors_seen:
        summary[p] = findings.summarize([row[p] for row in rows], groups, readers, n, slices.regions)
        summary[p]["ece_pooled"] = float(metrics.calibration_error(torch.from_numpy(pooled[p])))
    # Of the raters and n alone, so every predictor has the same.
    summary["floor"] = {
        "ged": summary["model"]["ged_floor"],
        "interval_95": summary["model"]["interval_95"]["ged_floor"],
    }
    _write_table(output, table, rows)
    if save_masks:
        _write_masks(output / "masks.h5", kept, slices)
    write_text(output / "summary.json", json.dumps(summary, indent=1) + "\n", follow=False)
    _draw_cases(output / "cases.png", slices, rows, dict(kept))
    findings.draw_existence(output, [row["model"] for row in rows], n)
    return summary


def as_text(summary: dict[str, Any]) -> str:
    """The tables that people read."""
    return findings.as_text(summary, NUMBERS[:6], YARDSTICKS)


def _fingerprint(model: BerDiff) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(model.weights().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write_table(output: Path, table: str, rows: Sequence[dict[str, Any]]) -> None:
    flat = [
        {k: v for k, v in row.items() if not isinstance(v, dict)}
        | {
            f"{p}_{k}" if p != "model" else k: findings.known(v)
            for p in ("model", *YARDSTICKS)
            for k, v in row[p].items()
        }
        for row in rows
    ]
    if table == "parquet":
        import pyarrow
        import pyarrow.parquet

        data = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(flat), data)
        write_bytes(output / "slices.parquet", data.getvalue(), follow=False)
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in flat)
    write_text(output / "slices.csv", text.getvalue(), follow=False)


def _write_masks(path: Path, kept: Sequence[tuple[int, np.ndarray]], slices: RaterDataset) -> None:
    import h5py

    data = io.BytesIO()
    masks = np.stack([np.unpackbits(packed, axis=-1, count=slices.image_size[-1]) for _, packed in kept])
    with h5py.File(data, "w") as file:
        file.create_dataset("mask", data=masks, compression="gzip", chunks=(1, *masks.shape[1:]))
        file["index"] = np.array([index for index, _ in kept])
    write_bytes(path, data.getvalue(), follow=False)


def _draw_cases(path: Path, slices: RaterDataset, rows: Sequence[dict[str, Any]], kept: dict[int, np.ndarray]) -> None:
    try:
        from berdiff_fast.imaging import figures

        figures.require_matplotlib()
    except ImportError:
        return
    ordered = sorted(rows, key=lambda row: row["model"]["ged"])
    cases = {"best": ordered[0], "median": ordered[len(ordered) // 2], "worst": ordered[-1]}
    images, raters = slices.batch([row["index"] for row in cases.values()])
    width = slices.image_size[-1]
    packed = np.stack([kept[row["index"]] for row in cases.values()])
    samples = torch.from_numpy(np.unpackbits(packed, axis=-1, count=width).astype(bool))
    labels = [f"{case}: slice {row['index']}, GED {row['model']['ged']:.3f}" for case, row in cases.items()]
    remove_link(path)
    figures.contact_sheet(
        path,
        shown.of_images(images, slices.channels, slices.context_slices),
        shown.of_masks(samples),
        raters=shown.of_masks(raters),
        labels=labels,
        title="Best, median, worst",
    )
