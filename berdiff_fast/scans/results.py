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
from berdiff_fast.imaging import volumes
from berdiff_fast.imaging.volumes import Volume
from berdiff_fast.io.slices import Slices
from berdiff_fast.io.stack import mm
from berdiff_fast.rng import DRAW_CONTRACT
from berdiff_fast.scans.comparison import check_raters, where_sampled
from berdiff_fast.scans.coverage import Coverage
from berdiff_fast.scans.pages import Pages, rater_files, report_again
from berdiff_fast.scans.result_files import SUMMARY, WORK, file_name, folder, install, map_names, names, stage
from berdiff_fast.scans.sampled import SampledRegions, SampledVolume
from berdiff_fast.scans.sizes import against, sizes_of

__all__ = ["SUMMARY", "WORK", "as_text", "check_raters", "folder", "provenance", "report_again", "write"]

logger = logging.getLogger("berdiff_fast")


def write(
    sampled: SampledVolume | SampledRegions,
    output: str | os.PathLike[str],
    work: Path,
    *,
    provenance: dict[str, Any],
    raters: np.ndarray | None = None,
    report: bool = False,
    anonymize: bool = False,
) -> dict[str, Any]:
    """Write masks, the mean and the disagreement (entropy, in bits), and the summary, which comes last.

    Of several regions, masks are label maps; mean, entropy, sizes and the report are of what any region marks, and of
    each region, in files that bear its name.

    Args:
        sampled: what was drawn.
        output: the folder.
        work: where files are made before they are moved into place.
        provenance: what the summary is to say beside sizes: seed, model, versions.
        raters: (R, S, H, W) from ``check_raters``, to compare with.
        report: also write ``report.html``.
        anonymize: the report is to be passed on; it names no file.

    Returns:
        The summary.
    """
    volume, root = sampled.volume, Path(output)
    staged = stage(work)
    if isinstance(sampled, SampledRegions):
        joint, parts, regions = sampled.joint(), sampled.of_region, sampled.regions
    else:
        joint, parts, regions = sampled, {}, None
    mask_names = names(volume, sampled.n)[: sampled.n]
    voxels = []
    for k, name in enumerate(mask_names):
        mask = sampled.label_map_slices(k) if isinstance(sampled, SampledRegions) else sampled.mask_slices(k)
        mask, count = _counted(mask)
        volumes.write(staged / name, mask, volume)
        voxels.append(sum(count))
    coverage = Coverage.of(volume, provenance)
    outside: list[int] = []
    if raters is not None:
        raters, outside = where_sampled(raters, provenance)
    summary: dict[str, Any] = {
        **provenance,
        "sampled": coverage.as_json(),
        "masks": mask_names,
        **_maps(staged, joint, ""),
        "segmentations": _segmentations(staged, joint, parts) if volume.format == "dicom" and any(voxels) else [],
        "sizes": {"of": str(coverage), **sizes_of(voxels, volume)},
    }
    if raters is not None:
        summary["raters"] = {
            **_against(joint, raters != 0, coverage),
            "voxels_not_compared": sum(outside),
            "sizes_not_compared": sizes_of(outside, volume, spreads=False),
        }
    if regions is not None:
        of_region: dict[str, dict[str, Any]] = {}
        for name, labels in regions.table:
            part = parts[name]
            about: dict[str, Any] = {"labels": [*labels], **_maps(staged, part, f"_{name}")}
            about["sizes"] = {"of": str(coverage), **sizes_of(part.voxels(), volume)}
            if raters is not None:
                about["raters"] = _against(part, regions.mask_of(raters, name), coverage)
            of_region[name] = about
        summary["regions"] = of_region
    if report:
        drawn = {name: one.drawn() for name, one in parts.items()}
        pages = Pages(volume, joint.channels, regions, provenance, coverage, anonymize)
        try:
            written = pages.write(staged, joint.drawn(), drawn, raters, outside)
        except ValueError as error:  # too large, say: no reason to throw masks away
            logger.warning("no report: %s", error)
        else:
            summary["report"] = written.pop("")
            for name, page in written.items():
                summary["regions"][name]["report"] = page
    (staged / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    install(staged, root, volume, joint.channels)
    return summary


def _counted(mask: Slices) -> tuple[Slices, list[int]]:
    """A mask, and a list that gets the voxels that each slice marks as it is written."""
    counts: list[int] = []

    def make(s: int) -> np.ndarray:
        found = mask[s]
        counts.append(int(np.count_nonzero(found)))
        return found

    return Slices(mask.shape, mask.dtype, make), counts


def _maps(staged: Path, part: SampledVolume, suffix: str) -> dict[str, str]:
    """Write the mean and the entropy of masks; their file names."""
    found = map_names(part.volume, suffix)
    volumes.write(staged / found["mean"], part.mean_slices(), part.volume)
    volumes.write(staged / found["entropy"], part.entropy_slices(), part.volume)
    return found


def _against(part: SampledVolume, raters: np.ndarray, coverage: Coverage) -> dict[str, Any]:
    """How masks compare with raters' (R, slices, h, w), in the slices that were sampled."""
    marked = sizes_of(raters.sum((1, 2, 3)).tolist(), part.volume, spreads=False)
    return {**against(part.drawn(), raters), "sizes": {"of": str(coverage), **marked}}


def _segmentations(stage: Path, joint: SampledVolume, parts: Mapping[str, SampledVolume]) -> list[str]:
    """Write them, a segment for each mask and region; none, with a warning, of a series that lacks what a segmentation
    has to say."""
    if parts:
        masks = {f"{name}, mask {k}": part.mask_slices(k) for k in range(joint.n) for name, part in parts.items()}
        means = {f"{name}, mean": part.mean_slices() for name, part in parts.items()}
    else:
        masks = {f"mask {k}": joint.mask_slices(k) for k in range(joint.n)}
        means = {"mean": joint.mean_slices()}
    try:
        volumes.write_segmentation(stage / "masks.dcm", masks, joint.volume, description="berdiff_fast: sampled masks")
        volumes.write_segmentation(
            stage / "mean.dcm", means, joint.volume, fractional=True, description="berdiff_fast: share of masks"
        )
    except OSError:
        raise
    except Exception as error:  # no reason to throw masks away
        logger.warning("no DICOM segmentation of %s: %s", joint.volume.path, error)
        (stage / "masks.dcm").unlink(missing_ok=True)
        return []
    return ["masks.dcm", "mean.dcm"]


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
    for name, about in summary.get("regions", {}).items():
        found = about["sizes"][f"spread_{unit}"]
        line = f"{name}: median {found['median']:.4g}, 90 % from {found['p05']:.4g} to {found['p95']:.4g} {unit}"
        if "raters" in about:
            line += f"; GED {about['raters']['ged']:.3f}, HM-IoU {about['raters']['hm_iou']:.3f}"
        lines.append(line)
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
    sampled: SampledVolume | SampledRegions,
    model_name: str,
    model_hash: str,
    device: str,
    series: str | None = None,
    raters: Sequence[Volume] = (),
    *,
    channels: Sequence[str] = (),
    anonymize: bool = False,
) -> dict[str, Any]:
    """How masks came about, enough to draw them again; and what they are compared with.

    Files are named without their folders, which may be named after patients; with ``anonymize`` not at all.
    ``channels`` are the names of the model's, where there are several.
    """
    called = channels or [f"channel_{k}" for k in range(len(sampled.channels))]
    of_channels = {
        name: {**({} if anonymize else {"file": file_name(one)}), "sha256": one.fingerprint()}
        for name, one in zip(called, sampled.channels, strict=False)
    }
    return {
        "input": "scan" if anonymize else file_name(volume),
        "series": None if anonymize else series,
        "input_sha256": volume.fingerprint(),
        **({"channels": of_channels} if len(sampled.channels) > 1 else {}),
        **({"colour": True} if volume.colour is not None else {}),
        **({"anonymized": True} if anonymize else {}),
        "model": Path(model_name).name,
        "model_sha256": model_hash,
        "berdiff_fast": __version__,
        "draw_contract": DRAW_CONTRACT,
        "torch": torch.__version__,
        "device": device,
        **sampled.plan,
        **rater_files(raters, anonymize),
        "notice": "Not a medical device.",
    }
