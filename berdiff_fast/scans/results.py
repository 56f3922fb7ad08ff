# SPDX-License-Identifier: Apache-2.0
"""What the command ``sample`` leaves: masks and maps on the scan's own grid, and how they were made as JSON."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from berdiff_fast._version import __version__
from berdiff_fast.files import whole_file
from berdiff_fast.imaging import volumes
from berdiff_fast.imaging.volumes import Volume
from berdiff_fast.io import raters as raters_io
from berdiff_fast.io.slices import Slices
from berdiff_fast.io.stack import mm
from berdiff_fast.rng import DRAW_CONTRACT
from berdiff_fast.scans.coverage import Coverage
from berdiff_fast.scans.result_files import (
    SUMMARY,
    WORK,
    as_private_as,
    file_name,
    folder,
    install,
    names,
    read_summary,
    stage,
)
from berdiff_fast.scans.sampled import SampledVolume, sampled_region
from berdiff_fast.scans.sizes import against, elsewhere, sizes_of
from berdiff_fast.words import shown

__all__ = ["SUMMARY", "WORK", "as_text", "check_raters", "folder", "provenance", "report_again", "write"]

logger = logging.getLogger("berdiff_fast")


def check_raters(raters: Sequence[Volume], volume: Volume) -> np.ndarray | None:
    """Raters' masks (R, S, H, W), bool, of the volume's grid; None if there are none.

    Raises:
        ValueError: another grid, or values that are not those of a mask.
    """
    if not raters:
        return None
    found = np.zeros((len(raters), *volume.array.shape), bool)
    for mask, rater in zip(found, raters, strict=True):
        rater = raters_io.onto(rater, volume)
        values: set[float] = set()
        # Slice by slice, and what is empty is not written to: memory follows what they marked.
        for s, part in enumerate(rater.array):
            if part.any():
                values |= set(np.unique(part).tolist())
                mask[s] = part != 0
        if len(values - {0}) > 1:
            raise ValueError(f"raters: {rater.path} must hold a mask, of 0 and one other value")
    return found


def write(
    sampled: SampledVolume,
    output: str | os.PathLike[str],
    work: Path,
    *,
    provenance: dict[str, Any],
    raters: np.ndarray | None = None,
    report: bool = False,
    anonymize: bool = False,
) -> dict[str, Any]:
    """Write masks, the mean and the disagreement (entropy, in bits), and the summary, which comes last.

    Args:
        sampled: what was drawn.
        output: the folder.
        work: where files are made before they are moved into place.
        provenance: what the summary is to say beside sizes: seed, model, versions.
        raters: bool (R, S, H, W), to compare with.
        report: also write ``report.html``.
        anonymize: the report is to be passed on; it names no file.

    Returns:
        The summary.
    """
    volume, root = sampled.volume, Path(output)
    staged = stage(work)
    *mask_names, mean_name, entropy_name = names(volume, sampled.n)[: sampled.n + 2]
    voxels = []
    for k, name in enumerate(mask_names):
        mask, count = _counted(sampled.mask_slices(k))
        volumes.write(staged / name, mask, volume)
        voxels.append(sum(count))
    volumes.write(staged / mean_name, sampled.mean_slices(), volume)
    volumes.write(staged / entropy_name, sampled.entropy_slices(), volume)
    coverage = Coverage.of(volume, provenance)
    summary = {
        **provenance,
        "sampled": coverage.as_json(),
        "masks": mask_names,
        "mean": mean_name,
        "entropy": entropy_name,
        "segmentations": _segmentations(staged, sampled) if volume.format == "dicom" and any(voxels) else [],
        "sizes": {"of": str(coverage), **sizes_of(voxels, volume)},
    }
    outside: list[int] = []
    if raters is not None:
        raters, outside = _where_sampled(raters, provenance)
        marked = sizes_of(raters.sum((1, 2, 3)).tolist(), volume, spreads=False)
        summary["raters"] = {
            **against(sampled.drawn(), raters),
            "sizes": {"of": str(coverage), **marked},
            "voxels_not_compared": sum(outside),
            "sizes_not_compared": sizes_of(outside, volume, spreads=False),
        }
    if report:
        try:
            _report(staged / "report.html", volume, sampled.drawn(), raters, provenance, coverage, outside, anonymize)
            summary["report"] = "report.html"
        except ValueError as error:  # too large, say: no reason to throw masks away
            logger.warning("no report: %s", error)
    (staged / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    install(staged, root, volume)
    return summary


def _counted(mask: Slices) -> tuple[Slices, list[int]]:
    """A mask, and a list that gets the voxels that each slice marks as it is written."""
    counts: list[int] = []

    def make(s: int) -> np.ndarray:
        found = mask[s]
        counts.append(int(found.sum()))
        return found

    return Slices(mask.shape, mask.dtype, make), counts


def _segmentations(stage: Path, sampled: SampledVolume) -> list[str]:
    """Write them; none, with a warning, of a series that lacks what a segmentation has to say."""
    masks = {f"mask {k}": sampled.mask_slices(k) for k in range(sampled.n)}
    try:
        volumes.write_segmentation(
            stage / "masks.dcm", masks, sampled.volume, description="berdiff_fast: sampled masks"
        )
        volumes.write_segmentation(
            stage / "mean.dcm",
            {"mean": sampled.mean_slices()},
            sampled.volume,
            fractional=True,
            description="berdiff_fast: share of masks",
        )
    except OSError:
        raise
    except Exception as error:  # no reason to throw masks away
        logger.warning("no DICOM segmentation of %s: %s", sampled.volume.path, error)
        (stage / "masks.dcm").unlink(missing_ok=True)
        return []
    return ["masks.dcm", "mean.dcm"]


def _where_sampled(raters: np.ndarray, plan: Mapping[str, Any]) -> tuple[np.ndarray, list[int]]:
    """Raters' masks in the slices that were sampled, (R, slices, h, w), and how many voxels each marked elsewhere."""
    region = _sampled_slices(sampled_region(plan, raters.shape[1:]), plan)
    inside = np.stack([_sampled_slices(mask, plan) & region for mask in raters])
    outside = (raters.sum((1, 2, 3)) - inside.sum((1, 2, 3))).tolist()
    if any(outside):
        logger.warning("raters: %d voxels that they marked lie where nothing was sampled; not compared", sum(outside))
    return inside, outside


def _sampled_slices(array: np.ndarray, plan: Mapping[str, Any]) -> np.ndarray:
    """Of (S, H, W) the slices that were sampled, stacked along their axis: (slices, h, w)."""
    first, last = plan["slices"]
    return np.moveaxis(array, plan["axis"], 0)[first:last]


def report_again(
    folder: str | os.PathLike[str],
    scan: str | os.PathLike[str] | None = None,
    raters: Sequence[Volume | str | os.PathLike[str]] = (),
    *,
    anonymize: bool = False,
) -> Path:
    """``report.html`` of results that are there.

    Args:
        folder: of results.
        scan: where it is; by default a file of its name is looked for in the folder, beside it, and here.
        raters: masks to compare with, or their paths.
        anonymize: the report is to be passed on; it names no file.

    Raises:
        FileNotFoundError, ValueError: no results, or another scan than they were made of.
    """
    root = Path(folder)
    if not (root / SUMMARY).is_file():
        raise FileNotFoundError(f"{root} holds no results: there is no {SUMMARY}")
    summary = read_summary(root)
    place = _scan_of(summary, root) if scan is None else scan
    volume = volumes.read(place, series=summary.get("series"), colour=summary.get("colour") is True)
    if volume.fingerprint() != summary["input_sha256"]:
        raise ValueError(f"{volume.path} is not what the results in {root} were made of: voxels or geometry differ")
    read = raters_io.read(raters, volume)
    told = {k: v for k, v in summary.items() if k not in _RESULTS} | _files(read, anonymize)
    theirs = check_raters(read, volume)
    try:
        coverage = Coverage.of(volume, summary)
        masks = []
        for name in summary["masks"]:
            mask = volumes.read(root / name).array
            if mask.shape != volume.array.shape:
                raise ValueError(f"{root / name} has the shape {mask.shape}, and the scan {volume.array.shape}")
            masks.append(_sampled_slices(mask, summary) != 0)
        outside: list[int] = []
        if theirs is not None:
            theirs, outside = _where_sampled(theirs, summary)
        with whole_file(root / "report.html", follow=False) as new:
            _report(new, volume, np.stack(masks), theirs, told, coverage, outside, anonymize)
            as_private_as(new, volume)
    except (KeyError, TypeError, IndexError, RuntimeError) as error:
        raise ValueError(f"{root / SUMMARY} is not of results of berdiff-fast sample: {error!r}") from None
    except ValueError as error:
        raise ValueError(f"{root / SUMMARY}: {error}") from None
    return root / "report.html"


def _scan_of(summary: dict[str, Any], root: Path) -> Path:
    """Where the scan of results may be."""
    name = Path(summary["input"])  # with its folders, in results of before
    for place in (name, *(here / name.name for here in (root, root.absolute().parent, Path()))):
        if place.is_file() or (place.is_dir() and place.is_absolute()):
            return place
    raise FileNotFoundError(f"there is no such file as {name.name}, the scan of {root}, beside it; name it as --input")


#: What the summary says of results, beside how they were made.
_RESULTS = ("sampled", "masks", "mean", "entropy", "segmentations", "sizes", "raters", "rater_files", "report")


def _report(
    path: Path,
    volume: Volume,
    masks: np.ndarray,
    raters: np.ndarray | None,
    provenance: dict[str, Any],
    coverage: Coverage,
    outside: Sequence[int],
    anonymize: bool = False,
) -> None:
    """Write it of masks, and raters' masks if there are any, in the slices that were sampled: (n, slices, h, w).

    ``outside`` is how many voxels each rater marked elsewhere.
    """
    from berdiff_fast.imaging import windows
    from berdiff_fast.imaging.report import write_report

    image = _sampled_slices(volume.array, provenance)
    several, unit = windows.of(volume, image)
    write_report(
        path,
        image,
        masks,
        title="Scan" if anonymize or provenance.get("anonymized") else shown(file_name(volume)),
        raters=raters,
        windows=several,
        intensity=unit,
        stack=coverage.stack,
        coverage=str(coverage),
        notes=elsewhere(outside, volume),
        provenance=_without_names(provenance, anonymize),
    )


#: What tells where masks come from: names, and what finds the scan again for who has it.
_NAMES = ("input", "series", "input_sha256", "rater_files")


def _without_names(provenance: Mapping[str, Any], anonymize: bool) -> dict[str, Any]:
    """Provenance as a report may hold it: no folders, and no names at all where it is to be passed on."""
    if anonymize or provenance.get("anonymized"):
        return {k: v for k, v in provenance.items() if k not in _NAMES}
    plain = dict(provenance)
    for key in ("input", "model"):  # of results of before
        if isinstance(plain.get(key), str):
            plain[key] = shown(Path(plain[key]).name)
    return plain


def as_text(summary: dict[str, Any], output: str | os.PathLike[str]) -> str:
    """A few lines for people."""
    sizes = summary["sizes"]
    what, unit = ("volume", "mL") if "mL" in sizes else ("size", "voxels")
    found = sizes[f"spread_{unit}"]
    middle = f"median {found['median']:.4g}, 90 % of them from {found['p05']:.4g} to {found['p95']:.4g} {unit}"
    tiles = f", {len(summary['tiles'])} tiles a slice" if len(summary["tiles"]) > 1 else ""
    lines = [
        f"{summary['n']} masks of {_where(summary['sampled'])}{tiles}",
        f"{what} of {sizes['of']}: {middle}",
        f"empty: {sum(v == 0 for v in sizes['voxels'])} of {summary['n']}",
    ]
    if not any(sizes["voxels"]):
        lines.append(
            "no mask marks anything: is what the model knows in the --slices, and in the middle of a --center?"
        )
    if "raters" in summary:
        raters = summary["raters"]
        theirs = ", ".join(f"{size:.4g}" for size in raters["sizes"][unit])
        lines.append(f"raters, {what} of {sizes['of']}: {theirs} {unit}")
        if raters["voxels_not_compared"]:
            elsewhere = ", ".join(f"{size:.4g}" for size in raters["sizes_not_compared"][unit])
            lines.append(f"raters, elsewhere and not compared: {elsewhere} {unit}")
        lines.append(f"against {raters['count']} raters: GED {raters['ged']:.3f}, HM-IoU {raters['hm_iou']:.3f}")
    lines.append(f"written: {Path(output) / summary.get('report', SUMMARY)}")
    return "\n".join(lines)


def _where(sampled: Mapping[str, Any]) -> str:
    """Which slices, and where: "slices 80 to 95 of 0 to 119, z -112.5 to -75 mm, instances 81 to 96"."""
    index, total = sampled["index"], sampled["slices_of_scan"]

    def ends(values: Sequence[Any]) -> str:
        return f"{values[0]}" if len(values) == 1 else f"{values[0]} to {values[-1]}"

    words = f"slice{'s' * (len(index) > 1)} {ends(index)}"
    words += f" of 0 to {total - 1}" if total > 1 else ""
    if "z_mm" in sampled:
        words += f", z {ends([mm(z) for z in sampled['z_mm']])} mm"
    if None not in sampled.get("instance_number", [None]):
        words += f", instance{'s' * (len(index) > 1)} {ends(sampled['instance_number'])}"
    return words


def provenance(
    volume: Volume,
    sampled: SampledVolume,
    model_name: str,
    model_hash: str,
    device: str,
    series: str | None = None,
    raters: Sequence[Volume] = (),
    *,
    anonymize: bool = False,
) -> dict[str, Any]:
    """How masks came about, enough to draw them again; and what they are compared with.

    Files are named without their folders, which may be named after patients; with ``anonymize`` not at all.
    """
    return {
        "input": "scan" if anonymize else file_name(volume),
        "series": None if anonymize else series,
        "input_sha256": volume.fingerprint(),
        **({"colour": True} if volume.colour is not None else {}),
        **({"anonymized": True} if anonymize else {}),
        "model": Path(model_name).name,
        "model_sha256": model_hash,
        "berdiff_fast": __version__,
        "draw_contract": DRAW_CONTRACT,
        "torch": torch.__version__,
        "device": device,
        **sampled.plan,
        **_files(raters, anonymize),
        "notice": "Not a medical device.",
    }


def _files(raters: Sequence[Volume], anonymize: bool) -> dict[str, list[str]]:
    named = [f"rater {k}" if anonymize else file_name(rater) for k, rater in enumerate(raters, start=1)]
    return {"rater_files": named} if raters else {}
