# SPDX-License-Identifier: Apache-2.0
"""The folder that the command ``sample`` fills: who may, what its files are called, and how they take their places."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from berdiff_fast import checks, limits, locks
from berdiff_fast.files import keep_mode, own_folder, refuse_link, sync
from berdiff_fast.imaging.volumes import Volume
from berdiff_fast.regions import Regions

SUMMARY = "summary.json"
WORK = ".unfinished"

#: Of n: each mask is a file.
MOST_MASKS = 100_000

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

_SEGMENTATIONS = ("masks.dcm", "mean.dcm")
_ONE = r"(\.nii\.gz|\.nrrd|\.mha|\.png|\.npy)"
_MASK, _MEAN, _ENTROPY = (re.compile(name + _ONE) for name in (r"mask_\d{3,9}", "mean", "entropy"))
#: Of a region: its name stands between.
_OF_REGION = r"{}_{}" + _ONE


@contextlib.contextmanager
def folder(
    output: str | os.PathLike[str],
    volume: Volume,
    n: int,
    *,
    raters: Sequence[Volume] = (),
    regions: Sequence[str] = (),
    overwrite: bool = False,
) -> Iterator[Path]:
    """The folder of results, to be filled; yields one inside for what is unfinished, which is removed in the end.

    After an interruption, or an error once slices are done, that stays, and the same call goes on there. After any
    other error nothing is left. As long as it is in use nobody else gets it.

    Args:
        output: the folder; made if it is not there.
        volume, raters: what is read, which is never written over; further channels go with the raters.
        n: how many masks there will be.
        regions: their names, where there are several.
        overwrite: replace earlier results, and files that have the names of results.

    Raises:
        BusyError: another run is at work there.
        FileExistsError: it holds results or files with their names, and ``overwrite`` is False; or what is read; or a
            symbolic link stands where we would write.
        ValueError: it has a summary that is not of results, which is not replaced; a name that cannot be written to.
        OSError: it cannot be made or written to.
    """
    root = Path(output)
    checks.integer("n", n, 1)
    if n > MOST_MASKS:
        raise ValueError(f"n must be at most {MOST_MASKS:,}, a file for each mask, got {n:,}")
    wanted = names(volume, n, regions)
    _refuse(root, volume, wanted, raters, overwrite)
    work = root / WORK
    made = [p for p in (root, *root.parents) if not p.exists()]
    try:
        with contextlib.ExitStack() as stack:
            _lock(stack, work)
            try:
                _refuse(root, volume, wanted, raters, overwrite)  # again: a run may just have come to its end
                yield work
            except BaseException as error:
                if not ((work / "done").exists() or isinstance(error, KeyboardInterrupt)):
                    _empty(work)
                raise
            _empty(work)
    except locks.BusyError:
        raise
    except BaseException:
        for path in (work, *made):
            with contextlib.suppress(OSError):  # what is empty goes
                path.rmdir()
        raise
    with contextlib.suppress(OSError):  # the next run has it already
        work.rmdir()


def clear_up(root: Path) -> None:
    """Remove what a run left in a folder of results that was killed once they were there; nothing while one works."""
    work = root / WORK
    if work.is_symlink() or not work.is_dir():
        return
    with contextlib.suppress(OSError, locks.BusyError):  # another run's, or gone meanwhile
        with locks.exclusive(work):
            _empty(work)
        work.rmdir()


def _lock(stack: contextlib.ExitStack, work: Path) -> None:
    for attempt in range(10):
        own_folder(work, 0o700)
        try:
            stack.enter_context(locks.exclusive(work))
            return
        except FileNotFoundError:  # the run before removed it just now
            if attempt == 9:
                raise


def _empty(work: Path) -> None:
    """Remove all but the lock, which its owner removes."""
    for path in work.iterdir():
        if path.name != locks.NAME:
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it; nothing is removed through a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _refuse(root: Path, volume: Volume, wanted: Sequence[str], raters: Sequence[Volume], overwrite: bool) -> None:
    """Raise what ``folder`` does, before anything is made."""
    if root.exists() and not root.is_dir():
        raise FileExistsError(f"output must be a folder, and {root} is a file")
    work = root / WORK
    refuse_link(work)
    if os.path.lexists(root / SUMMARY):
        read_summary(root)
        if not overwrite:
            raise FileExistsError(f"output: {root} holds results already; choose another folder, or overwrite them")
    there = [name for name in wanted if os.path.lexists(root / name)]
    read = {one.path.resolve() for one in (volume, *raters)}
    for name in there:
        if (root / name).resolve() in read:
            raise FileExistsError(f"output: {root / name} is read, and would be written over; choose another folder")
        if stat.S_ISDIR(os.lstat(root / name).st_mode):
            raise FileExistsError(f"output: {root / name} is a folder, and a file is to have its name")
    if there and not overwrite and not (work / "done").exists():
        raise FileExistsError(
            f"output: {root} holds {there[0]}, which `sample` did not write; choose another folder, or overwrite it"
        )


def names(volume: Volume, n: int, regions: Sequence[str] = ()) -> list[str]:
    """Names of what is written: masks, mean and entropy, and what there may be beside."""
    digits = max(3, len(str(n - 1)))
    masks = [f"mask_{k:0{digits}d}{_ending(volume)}" for k in range(n)]
    of_regions = [name for region in regions for name in (*map_names(volume, f"_{region}").values(), page_name(region))]
    return [*masks, *map_names(volume).values(), *_SEGMENTATIONS, page_name(), *of_regions]


def map_names(volume: Volume, suffix: str = "") -> dict[str, str]:
    """Names of the mean and the entropy; ``suffix`` is "_" and a region."""
    return {what: f"{what}{suffix}{_ending(volume)}" for what in ("mean", "entropy")}


def page_name(region: str = "") -> str:
    """The report's name; of a region, that of its page."""
    return f"report_{region}.html" if region else "report.html"


def _ending(volume: Volume) -> str:
    ending = _ENDINGS[volume.format]
    return ".npy" if ending == ".png" and len(volume.array) > 1 else ending


# ---------------------------------------------------------------------- the summary


def read_summary(root: Path) -> dict[str, Any]:
    """What ``summary.json`` says, once each part that is relied on is of its kind; its names are those of results.

    Raises:
        ValueError: it is not of results.
    """
    path = root / SUMMARY
    try:
        if not path.is_file():
            raise ValueError("it is no file")
        if path.stat().st_size > limits.HARMLESS:
            raise ValueError(f"it has {limits.size(path.stat().st_size)}")
        summary = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(summary, dict):
            raise ValueError(f"it is a {type(summary).__name__}")
        _check_summary(summary)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not of results of berdiff-fast sample: {error}") from None
    return summary


def _check_summary(summary: Mapping[str, Any]) -> None:
    if not {"masks", "mean", "entropy", "segmentations", "input", "input_sha256"} <= summary.keys():
        raise ValueError("it has other keys")

    def listed(name: str) -> list[Any]:
        if not isinstance(summary[name], list):
            raise ValueError(f"{name} must be a list, got {summary[name]!r:.80}")
        return summary[name]

    wanted = [(_MASK, one) for one in listed("masks")] + [(_MEAN, summary["mean"]), (_ENTROPY, summary["entropy"])]
    for pattern, name in wanted:
        if not isinstance(name, str) or not pattern.fullmatch(name):
            raise ValueError(f"{name!r:.80} is the name of no result")
    if not summary["masks"]:
        raise ValueError("it lists no masks")
    for name in listed("segmentations"):
        if name not in _SEGMENTATIONS:
            raise ValueError(f"{name!r:.80} is the name of no result")
    for name in ("input", "input_sha256"):
        if not isinstance(summary[name], str):
            raise ValueError(f"{name} must be a text, got {summary[name]!r:.80}")
    regions = summary.get("regions", {})
    if not isinstance(regions, dict):
        raise ValueError(f"regions must be a mapping, got {regions!r:.80}")
    if regions:
        if not all(isinstance(about, dict) for about in regions.values()):
            raise ValueError(f"regions must be mappings, got {regions!r:.80}")
        found = Regions(tuple((name, about.get("labels", ())) for name, about in regions.items()))
        for name in found.names:
            for what in ("mean", "entropy"):
                file = regions[name].get(what)
                if not isinstance(file, str) or not re.fullmatch(_OF_REGION.format(what, re.escape(name)), file):
                    raise ValueError(f"{file!r:.80} is the name of no result")
    if not isinstance(summary.get("series"), (str, type(None))):
        raise ValueError(f"series must be a text, got {summary['series']!r:.80}")


def file_name(volume: Volume) -> str:
    """What a scan is called in results: its file's name without folders, which may be named after patients."""
    return "DICOM series" if volume.path.is_dir() else volume.path.name


# ---------------------------------------------------------------------- taking their places


def stage(work: Path) -> Path:
    """An empty folder in which results are made."""
    path = work / "results"
    remove(path)
    path.mkdir(mode=0o700)
    return path


def install(staged: Path, root: Path, volume: Volume, channels: Sequence[Volume] = ()) -> None:
    """Move results, all of which are there, to their places, instead of earlier ones; the summary comes last.

    A file that takes another's place has its permissions, a new one at most those of the scan.
    """
    former: list[str] = []
    if os.path.lexists(root / SUMMARY):
        summary = read_summary(root)
        former = [*summary["masks"], summary["mean"], summary["entropy"], *summary["segmentations"], page_name()]
        for region, about in summary.get("regions", {}).items():
            former += [about["mean"], about["entropy"], page_name(region)]
    new = sorted(path for path in staged.iterdir() if path.name != SUMMARY)
    for path in (*new, staged / SUMMARY):
        if (root / path.name).is_dir() and not (root / path.name).is_symlink():
            raise FileExistsError(f"output: {root / path.name} is a folder, and a file is to have its name")
        path.chmod(stat.S_IMODE(path.stat().st_mode) & _allowed(volume, *channels))
        keep_mode(path, root / path.name)
        sync(path)
    # Without it the folder holds no results, until it is back as the last.
    (root / SUMMARY).unlink(missing_ok=True)
    for name in {*former} - {path.name for path in new}:
        remove_file(root / name)
    for path in (*new, staged / SUMMARY):
        os.replace(path, root / path.name)
    sync(root)


def remove_file(path: Path) -> None:
    """Remove a file or a link, if there is one; a folder stays."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)


def _allowed(*volumes: Volume) -> int:
    """Permissions that results may have: for others than the owner no more than the scan's files have."""
    mode = 0o777
    for path in (path for volume in volumes for path in volume.instances or (volume.path,)):
        with contextlib.suppress(OSError):
            if path.is_file():
                mode &= stat.S_IMODE(path.stat().st_mode) | 0o700
    return mode


def as_private_as(path: Path, volume: Volume) -> None:
    """Take from a file what others may do with it beyond what they may do with the scan."""
    path.chmod(stat.S_IMODE(path.stat().st_mode) & _allowed(volume))
