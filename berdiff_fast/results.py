# SPDX-License-Identifier: Apache-2.0
"""What the command ``sample`` leaves: masks and maps on the scan's own grid, and how they were made as JSON."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import berdiff_fast
from berdiff_fast import metrics
from berdiff_fast.files import write_text
from berdiff_fast.imaging import volumes
from berdiff_fast.imaging.summary import disagreement, spread
from berdiff_fast.imaging.volumes import Volume
from berdiff_fast.io import raters as raters_io
from berdiff_fast.scans import SampledVolume, sampled_region

logger = logging.getLogger("berdiff_fast")

SUMMARY = "summary.json"
WORK = ".unfinished"

#: The ending of results by the format of the scan.
_ENDINGS = {
    "nifti": ".nii.gz",
    "nrrd": ".nrrd",
    "metaimage": ".mha",
    "dicom": ".nii.gz",
    "picture": ".png",
    "numpy": ".npy",
    "hdf5": ".npy",
}


@contextlib.contextmanager
def folder(
    output: str | os.PathLike[str], volume: Volume, n: int, *, raters: Sequence[Volume] = (), overwrite: bool = False
) -> Iterator[Path]:
    """The folder of results, to be filled; yields one inside for what is unfinished, which is removed in the end.

    After an interruption, or an error once slices are done, that stays, and the same call goes on there. After any
    other error nothing is left.

    Args:
        output: the folder; made if it is not there.
        volume, raters: what is read, which is never written over.
        n: how many masks there will be.
        overwrite: replace earlier results, and files that have the names of results.

    Raises:
        FileExistsError: it holds results or files with their names, and ``overwrite`` is False; or what is read.
        ValueError: it has a summary that is not of results, which is not replaced.
        OSError: it cannot be made or written to.
    """
    root = Path(output)
    if root.exists() and not root.is_dir():
        raise FileExistsError(f"output must be a folder, and {root} is a file")
    work = root / WORK
    if (root / SUMMARY).exists():
        _read_summary(root)
        if not overwrite:
            raise FileExistsError(f"output: {root} holds results already; choose another folder, or overwrite them")
    there = [name for name in _names(volume, n) if (root / name).exists()]
    read = {one.path.resolve() for one in (volume, *raters)}
    for name in there:
        if (root / name).resolve() in read:
            raise FileExistsError(f"output: {root / name} is read, and would be written over; choose another folder")
    if there and not overwrite and not (work / "done").exists():
        raise FileExistsError(f"output: {root} holds {there[0]}, which is of no results; choose another folder")
    made = [p for p in (root, *root.parents) if not p.exists()]
    try:
        work.mkdir(parents=True, exist_ok=True)
        yield work
    except BaseException as error:
        kept = (work / "done").exists() or isinstance(error, KeyboardInterrupt)
        if not kept:
            shutil.rmtree(work, ignore_errors=True)
            for path in made:
                with contextlib.suppress(OSError):
                    path.rmdir()
        raise
    shutil.rmtree(work)


def _names(volume: Volume, n: int) -> list[str]:
    """Names of what is written: masks, mean and entropy, and what there may be beside."""
    ending = _ENDINGS[volume.format]
    if ending == ".png" and len(volume.array) > 1:
        ending = ".npy"
    digits = max(3, len(str(n - 1)))
    masks = [f"mask_{k:0{digits}d}{ending}" for k in range(n)]
    return [*masks, f"mean{ending}", f"entropy{ending}", "masks.dcm", "mean.dcm", "report.html"]


def _read_summary(root: Path) -> dict[str, Any]:
    """Of results; ValueError if it is not."""
    try:
        summary = json.loads((root / SUMMARY).read_text(encoding="utf-8"))
        if not {"masks", "mean", "entropy", "segmentations", "input", "input_sha256"} <= summary.keys():
            raise ValueError("it has other keys")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{root / SUMMARY} is not of results of berdiff-fast sample: {error}") from None
    return summary


def check_raters(raters: Sequence[Volume], volume: Volume) -> np.ndarray | None:
    """Raters' masks (R, S, H, W), bool, of the volume's grid; None if there are none.

    Raises:
        ValueError: another grid, or values that are not those of a mask.
    """
    found = []
    for rater in raters:
        rater = raters_io.onto(rater, volume)
        values = np.unique(rater.array)
        if len(values) > 2 or (len(values) == 2 and values[0] != 0 and values[1] != 0):
            raise ValueError(f"raters: {rater.path} must hold a mask, of 0 and one other value")
        found.append(rater.array != 0)
    return np.stack(found) if found else None


def write(
    sampled: SampledVolume,
    output: str | os.PathLike[str],
    work: Path,
    *,
    provenance: dict[str, Any],
    raters: np.ndarray | None = None,
    report: bool = False,
) -> dict[str, Any]:
    """Write masks, the mean and the disagreement (entropy, in bits), and the summary, which comes last.

    Args:
        sampled: what was drawn.
        output: the folder.
        work: where files are made before they are moved into place.
        provenance: what the summary is to say beside sizes: seed, model, versions.
        raters: bool (R, S, H, W), to compare with.
        report: also write ``report.html``.

    Returns:
        The summary.
    """
    volume, root = sampled.volume, Path(output)
    stage = work / "results"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    *names, mean_name, entropy_name = _names(volume, sampled.n)[: sampled.n + 2]
    voxels = []
    for k, name in enumerate(names):
        mask = sampled.mask(k)
        voxels.append(int(mask.sum()))
        volumes.write(stage / name, mask, volume)
    mean = sampled.mean
    volumes.write(stage / mean_name, mean, volume)
    volumes.write(stage / entropy_name, disagreement(mean).numpy(), volume)
    summary = {
        **provenance,
        "masks": names,
        "mean": mean_name,
        "entropy": entropy_name,
        "segmentations": _segmentations(stage, sampled, mean) if volume.format == "dicom" and any(voxels) else [],
        "sizes": _sizes(voxels, volume),
    }
    if raters is not None:
        raters, outside = _where_sampled(raters, provenance)
        summary["raters"] = {**_against(sampled, raters), "voxels_not_compared": outside}
    if report:
        try:
            _report(stage / "report.html", volume, sampled.masks, raters, provenance)
            summary["report"] = "report.html"
        except ValueError as error:  # too large, say: no reason to throw masks away
            logger.warning("no report: %s", error)
    _remove_former(root)
    for path in sorted(stage.iterdir()):
        os.replace(path, root / path.name)
    write_text(root / SUMMARY, json.dumps(summary, indent=1) + "\n")
    return summary


def _segmentations(stage: Path, sampled: SampledVolume, mean: np.ndarray) -> list[str]:
    """Write them; none, with a warning, of a series that lacks what a segmentation has to say."""
    masks = {f"mask {k}": sampled.mask(k) for k in range(sampled.n)}
    try:
        volumes.write_segmentation(
            stage / "masks.dcm", masks, sampled.volume, description="berdiff_fast: sampled masks"
        )
        volumes.write_segmentation(
            stage / "mean.dcm",
            {"mean": mean},
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


def _where_sampled(raters: np.ndarray, plan: dict[str, Any]) -> tuple[np.ndarray, int]:
    """Raters' masks where masks were drawn, and how many voxels that they marked lie elsewhere."""
    inside = raters & sampled_region(plan, raters.shape[1:])
    outside = int(raters.sum()) - int(inside.sum())
    if outside:
        logger.warning("raters: %d voxels that they marked lie where nothing was sampled; not compared", outside)
    return inside, outside


def report_again(
    folder: str | os.PathLike[str],
    scan: str | os.PathLike[str] | None = None,
    raters: Sequence[Volume | str | os.PathLike[str]] = (),
) -> Path:
    """``report.html`` of results that are there.

    Args:
        folder: of results.
        scan: where it is, if no longer where the summary says.
        raters: masks to compare with, or their paths.

    Raises:
        FileNotFoundError, ValueError: no results, or another scan than they were made of.
    """
    root = Path(folder)
    if not (root / SUMMARY).is_file():
        raise FileNotFoundError(f"{root} holds no results: there is no {SUMMARY}")
    summary = _read_summary(root)
    volume = volumes.read(summary["input"] if scan is None else scan, series=summary["series"])
    if volume.fingerprint() != summary["input_sha256"]:
        raise ValueError(f"{volume.path} is not what the results in {root} were made of: voxels or geometry differ")
    masks = np.stack([volumes.read(root / name).array != 0 for name in summary["masks"]])
    read = raters_io.read(raters, volume)
    provenance = {k: v for k, v in summary.items() if k not in _RESULTS} | _files(read)
    theirs = check_raters(read, volume)
    if theirs is not None:
        theirs, _ = _where_sampled(theirs, summary)
    _report(root / "report.html", volume, masks, theirs, provenance)
    return root / "report.html"


#: What the summary says of results, beside how they were made.
_RESULTS = ("masks", "mean", "entropy", "segmentations", "sizes", "raters", "rater_files", "report")


def _report(
    path: Path, volume: Volume, masks: np.ndarray, raters: np.ndarray | None, provenance: dict[str, Any]
) -> None:
    from berdiff_fast.imaging.report import write_report

    axis, (first, last) = provenance["axis"], provenance["slices"]  # the slices that were sampled are those to be shown
    count = volume.array.shape[axis]
    part = "" if last - first == count else f", slices {first + 1} to {last} of {count}"
    spacing = None if volume.spacing is None else [volume.spacing[2 - a] for a in (axis, *({0, 1, 2} - {axis}))]
    write_report(
        path,
        np.moveaxis(volume.array, axis, 0)[first:last],
        np.moveaxis(masks, axis + 1, 1)[:, first:last],
        title=volume.path.name + part,
        spacing=spacing and tuple(spacing),
        raters=None if raters is None else np.moveaxis(raters, axis + 1, 1)[:, first:last],
        provenance=provenance,
    )


def _sizes(voxels: list[int], volume: Volume) -> dict[str, Any]:
    """Of each mask, and how they spread."""
    found: dict[str, Any] = {"voxels": voxels, "spread_voxels": spread(voxels)}
    if volume.voxel_mm3 is not None:
        mm3 = [v * volume.voxel_mm3 for v in voxels]
        found |= {"mm3": mm3, "mL": [v / 1000 for v in mm3], "spread_mm3": spread(mm3)}
        found["spread_mL"] = {k: v / 1000 for k, v in found["spread_mm3"].items()}
    return found


def _against(sampled: SampledVolume, raters: np.ndarray) -> dict[str, float]:
    """GED and HM-IoU, all that was sampled being one mask."""
    theirs, ours = torch.from_numpy(raters)[None].flatten(3, -1), torch.from_numpy(sampled.masks)[None].flatten(3, -1)
    found = metrics.evaluate(theirs, ours, ("ged", "hm_iou"))
    return {"count": len(raters), **{name: float(value[0]) for name, value in found.items()}}


def _remove_former(root: Path) -> None:
    """Earlier results, which are now being replaced: the summary first, which says what else there is."""
    if (root / SUMMARY).is_file():
        former = _read_summary(root)
        named = [*former["masks"], former["mean"], former["entropy"], *former["segmentations"], "report.html"]
        (root / SUMMARY).unlink()
        for name in named:
            (root / Path(name).name).unlink(missing_ok=True)


def as_text(summary: dict[str, Any], output: str | os.PathLike[str]) -> str:
    """A few lines for people."""
    sizes = summary["sizes"]
    unit = "mL" if "mL" in sizes else "voxels"
    found = sizes[f"spread_{unit}"]
    middle = f"median {found['median']:.4g}, 90 % of them from {found['p05']:.4g} to {found['p95']:.4g} {unit}"
    tiles = f", {len(summary['tiles'])} tiles each" if len(summary["tiles"]) > 1 else ""
    lines = [
        f"{summary['n']} masks of {summary['slices'][1] - summary['slices'][0]} slices{tiles}: {middle}",
        f"empty: {sum(v == 0 for v in sizes['voxels'])} of {summary['n']}",
    ]
    if not any(sizes["voxels"]):
        lines.append(
            "no mask marks anything: is what the model knows in the --slices, and in the middle of a --center?"
        )
    if "raters" in summary:
        raters = summary["raters"]
        lines.append(f"against {raters['count']} raters: GED {raters['ged']:.3f}, HM-IoU {raters['hm_iou']:.3f}")
    lines.append(f"written: {Path(output) / summary.get('report', SUMMARY)}")
    return "\n".join(lines)


def provenance(
    volume: Volume,
    sampled: SampledVolume,
    model_name: str,
    model_hash: str,
    device: str,
    series: str | None = None,
    raters: Sequence[Volume] = (),
) -> dict[str, Any]:
    """How masks came about, enough to draw them again; and what they are compared with."""
    return {
        "input": str(volume.path.resolve()),
        "series": series,
        "input_sha256": volume.fingerprint(),
        "model": model_name,
        "model_sha256": model_hash,
        "berdiff_fast": berdiff_fast.__version__,
        "draw_contract": berdiff_fast.DRAW_CONTRACT,
        "torch": torch.__version__,
        "device": device,
        **sampled.plan,
        **_files(raters),
        "notice": "Not a medical device.",
    }


def _files(raters: Sequence[Volume]) -> dict[str, list[str]]:
    return {"rater_files": [str(rater.path.resolve()) for rater in raters]} if raters else {}
