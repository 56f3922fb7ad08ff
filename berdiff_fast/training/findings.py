# SPDX-License-Identifier: Apache-2.0
"""What an evaluation finds beside means: GED's chance, existence and shape, intervals, regions; and words for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from berdiff_fast import metrics
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.regions import Regions

#: What is told of a single mask channel beside ``metrics.DECOMPOSITION``.
OF_REGIONS = ("ged", "hm_iou", "dice_majority")
#: What has an interval.
WITH_INTERVAL = ("ged", "hm_iou", "soft_dice", *metrics.DECOMPOSITION)

_BOOTSTRAPS = 1000
#: So few patients that drawing them anew says little about patients in general.
_FEW = 10


def take_apart(raters: torch.Tensor, samples: torch.Tensor, valid: np.ndarray | None = None) -> dict[str, torch.Tensor]:
    """(N,) columns: GED taken apart, and for K > 1 mask channels what ``OF_REGIONS`` and that say of each of them.

    Masks (N, R or n, K, H, W), of raters who are ``valid`` (N, R). Columns of channel 1 begin with ``region1_``.
    """
    columns = dict(metrics.decompose_ged(raters, samples, rater_valid=valid))
    channels = raters.shape[2]
    for k in range(channels if channels > 1 else 0):
        one = raters[:, :, k : k + 1], samples[:, :, k : k + 1]
        found = metrics.evaluate(*one, OF_REGIONS, rater_valid=valid) | metrics.decompose_ged(*one, rater_valid=valid)
        columns |= {region_name(k, name): values for name, values in found.items()}
    return columns


def region_name(channel: int, name: str) -> str:
    """The column of a number of one mask channel."""
    return f"region{channel}_{name}"


# ---------------------------------------------------------------------- intervals


def groups(slices: RaterDataset, indices: Sequence[int]) -> np.ndarray:
    """What is drawn anew by the bootstrap: each slice's patient, or its index where the file names no patients."""
    return slices.provenance["patient_id"][list(indices)] if slices.names_patients else np.array(indices)


def interval(values: Sequence[float], of: np.ndarray) -> tuple[float, float] | None:
    """95 % by percentiles of the mean when groups, not slices, are drawn anew: slices of a nodule resemble each other.

    None where it would claim too much: of a single group, or where a value is not known.
    """
    _, group = np.unique(of, return_inverse=True)
    total, size = np.bincount(group, values), np.bincount(group)
    if len(total) < 2 or not np.isfinite(total).all():
        return None
    picks = np.random.default_rng(0).integers(len(total), size=(_BOOTSTRAPS, len(total)))
    low, high = np.percentile(total[picks].sum(1) / size[picks].sum(1), [2.5, 97.5])
    return float(low), float(high)


def known(value: Any) -> Any:
    """The value, or None for NaN, which neither JSON nor a table has a place for."""
    return None if isinstance(value, float) and math.isnan(value) else value


# ---------------------------------------------------------------------- summaries


def summarize(
    rows: Sequence[dict[str, float]], of: np.ndarray, raters: np.ndarray, n: int, named: Regions | None = None
) -> dict[str, Any]:
    """Means of every number over slices, ``interval_95``, ``existence``, and ``regions`` where there are several.

    Args:
        rows: a dict for each slice, as ``evaluate.measure`` and ``take_apart`` fill it.
        of: (N,) each slice's group, see ``groups``.
        raters: (N,) how many raters read each slice.
        n: how many masks were compared with theirs.
        named: what the mask's channels stand for.
    """
    channels = sum(name.endswith("_ged") and name.startswith("region") for name in rows[0])
    summary = _of_one({k: [row[k] for row in rows] for k in rows[0] if not k.startswith("region")}, of, raters, n)
    if channels:
        names = (*OF_REGIONS, *metrics.DECOMPOSITION)
        summary["regions"] = [
            {
                "channel": k,
                **({} if named is None else {"name": named.names[k]}),
                **_of_one({name: [row[region_name(k, name)] for row in rows] for name in names}, of, raters, n),
            }
            for k in range(channels)
        ]
    return summary


def _of_one(columns: dict[str, list[float]], of: np.ndarray, raters: np.ndarray, n: int) -> dict[str, Any]:
    summary: dict[str, Any] = {name: known(float(np.mean(values))) for name, values in columns.items()}
    summary["interval_95"] = {name: interval(columns[name], of) for name in WITH_INTERVAL if name in columns}
    r, e = np.array(columns["empty_raters"]), np.array(columns["empty_samples"])
    calibration = metrics.existence_calibration(r, e, raters, n)
    squares = interval((e - r) ** 2, of)
    bins = metrics.existence_table(r, e, n)
    summary["existence"] = {
        **{name: known(value) for name, value in calibration._asdict().items()},
        "interval_95": None if squares is None else [math.sqrt(end) for end in squares],
        "calibration_error": float(metrics.calibration_error(bins)),
        "table": [
            {
                "above": k / len(bins),
                "to": (k + 1) / len(bins),
                "slices": int(count),
                "samples": s / count,
                "raters": y / count,
            }
            for k, (count, s, y) in enumerate(bins.tolist())
            if count
        ],
    }
    return summary


# ---------------------------------------------------------------------- words


def as_text(summary: dict[str, Any], numbers: Sequence[str], yardsticks: Sequence[str]) -> str:
    """The tables and sentences that people read.

    Args:
        summary: as ``evaluate.evaluate`` returns it.
        numbers, yardsticks: which columns, six of them, and which rows beside the model's.
    """
    heads = ("GED", "HM-IoU", "soft Dice", "Dice", "IoU", "diversity")
    data, n = summary["data"], summary["sampling"]["n"]
    patients = f"of {data['patients']} patients" if data["patients"] is not None else "(the file names no patients)"
    what = "volumes" if data.get("spatial_dims") == 3 else "slices"
    lines = [
        f"{data['slices']} of {data['of']} {what} {patients}, n = {n}",
        f"{'':24s}" + "".join(f"{h:>11s}" for h in heads),
    ]
    for p, title in (("model", "model"), *((y, f"yardstick: {y}") for y in yardsticks)):
        lines.append(f"{title:24s}" + "".join(f"{summary[p][k]:11.3f}" for k in numbers))
    floor, (fewest, raters) = summary["floor"]["ged"], data["readers_per_slice"]
    who = f"{raters} rater{'s' * (raters > 1)}" if fewest == raters else f"{fewest} to {raters} raters"
    title = f"floor, {who}, n = {n}"
    lines.append(
        f"{title:24s}" + (f"{floor:11.3f}" if floor is not None else "  not known: of two raters one cannot tell")
    )
    model = summary["model"]
    lines.append(_about("GED of the model", "ged", model, summary["bootstrap"]))
    fewer = {int(k.rpartition("_")[2]): v for k, v in model.items() if "_of_" in k}
    if fewer:
        alike = floor and fewest == raters  # the floor of fewer samples follows from that of n
        ends = {c: alike and f" (floor {floor * (1 / raters + 1 / c) / (1 / raters + 1 / n):.3f})" for c in fewer}
        told = ", ".join(f"{v:.3f} with {c}{ends[c] or ''}" for c, v in fewer.items())
        lines.append("GED with fewer samples: " + told)
    lines += _parts(model)
    lines += _existence(model["existence"], who, n)
    for region in model.get("regions", ()):
        lines.append("")
        name = region.get("name") or f"mask channel {region['channel']}"
        lines.append(f"{name}: HM-IoU {region['hm_iou']:.3f}, Dice {region['dice_majority']:.3f}")
        lines.append(_about("GED of the model", "ged", region, summary["bootstrap"]))
        lines += _parts(region) + _existence(region["existence"], who, n)
    return "\n".join(lines)


def _about(title: str, name: str, numbers: dict[str, Any], bootstrap: dict[str, Any]) -> str:
    ends = numbers["interval_95"][name]
    if ends is None:
        return f"{title}: {numbers[name]:.3f}, without an interval: there is one {bootstrap['over'][:-1]}"
    over = f"bootstrap over {bootstrap['groups']} {bootstrap['over']}"
    if bootstrap["over"] != "patients":
        over += "; those of one patient resemble each other, so it is too narrow"
    elif bootstrap["groups"] < _FEW:
        over += ", too few to trust it"
    return f"{title}: {numbers[name]:.3f}, 95 % interval {ends[0]:.3f} to {ends[1]:.3f} ({over})"


def _parts(numbers: dict[str, Any]) -> list[str]:
    ged, unbiased = numbers["ged"], numbers["ged_unbiased"]
    lines = []
    if unbiased is not None:
        terms = [f"{ged - unbiased:.3f} chance"]
        terms += [f"{_with_ends(numbers, f'{part}_unbiased')} {part}" for part in ("existence", "shape")]
        lines.append(f"  = {' + '.join(terms)}")
        lines.append(f"  without i = j pairs (unbiased): {_with_ends(numbers, 'ged_unbiased')}; a perfect model has 0")
    existence, shape = (_with_ends(numbers, f"ged_{part}") for part in ("existence", "shape"))
    lines.append(f"  = {existence} existence, 2 (r - e)^2, + {shape} the rest, chance in both")
    return lines


def _with_ends(numbers: dict[str, Any], name: str) -> str:
    ends = numbers["interval_95"][name]
    return f"{numbers[name]:.3f}" + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else "")


def _existence(found: dict[str, Any], raters: str, n: int) -> list[str]:
    ends = found["interval_95"]
    text = f"P(empty): RMSE {found['rmse']:.3f}" + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else "")
    beside = [f"{found['constant']:.3f} a constant"]
    if found["floor"] is not None:
        beside += [
            f"{found['floor']:.3f} the true P among {raters}",
            f"{found['floor_of_draws']:.3f} {n} draws of it",
        ]
    lines = [f"{text}; beside it: " + ", ".join(beside)]
    lines.append(f"  {'share of empty samples':24s}{'slices':>8s}{'their mean':>12s}{'raters':>9s}")
    for row in found["table"]:
        bounds = f"{'[0' if row['above'] == 0 else '(' + format(row['above'], '.1f')}, {row['to']:.1f}]"
        lines.append(f"  {bounds:24s}{row['slices']:8d}{row['samples']:12.2f}{row['raters']:9.2f}")
    return lines


# ---------------------------------------------------------------------- pictures


def draw_existence(output: Path, rows: Sequence[dict[str, float]], n: int) -> None:
    """``existence.png`` in the folder, and one for each of several mask channels; nothing without matplotlib."""
    try:
        from berdiff_fast.imaging import figures

        figures.require_matplotlib()
    except ImportError:
        return
    prefixes = {"": "existence.png"}
    prefixes |= {k[: -len("ged")]: f"existence_{k[: -len('_ged')]}.png" for k in rows[0] if k.endswith("_ged")}
    for prefix, name in prefixes.items():
        samples, raters = ([row[f"{prefix}empty_{whose}"] for row in rows] for whose in ("samples", "raters"))
        title = (
            "Is there anything?" if not prefix else f"Is there anything in mask channel {prefix[len('region') : -1]}?"
        )
        figures.existence_diagram(samples, raters, n, title=title, path=output / name)
