# SPDX-License-Identifier: Apache-2.0
"""Report pages of results, when they are written and again later: one of all regions together, and one of each."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from berdiff_fast.files import whole_file
from berdiff_fast.imaging import volumes
from berdiff_fast.imaging.volumes import Volume
from berdiff_fast.io import raters as raters_io
from berdiff_fast.regions import Regions
from berdiff_fast.scans.comparison import check_raters, sampled_slices, where_sampled
from berdiff_fast.scans.coverage import Coverage
from berdiff_fast.scans.result_files import SUMMARY, as_private_as, file_name, page_name, read_summary
from berdiff_fast.scans.sizes import elsewhere
from berdiff_fast.words import shown

logger = logging.getLogger("berdiff_fast")

#: What the page of all regions together is called on the others.
_ANY = "any region"

#: What tells where masks come from: names, and what finds the scan again for who has it.
_NAMES = ("input", "series", "input_sha256", "rater_files")

#: What the summary says of results, beside how they were made.
_RESULTS = (
    "sampled",
    "masks",
    "mean",
    "entropy",
    "segmentations",
    "sizes",
    "raters",
    "rater_files",
    "report",
    "regions",
)


@dataclass(frozen=True)
class Pages:
    """What all pages of a scan's results share.

    Attributes:
        volume: the scan; of several channels the first.
        channels: all of them; none: that one alone.
        regions: those of the model, or None.
        provenance: how masks were drawn, with the names of channels.
        coverage: where.
        anonymize: name no file.
    """

    volume: Volume
    channels: tuple[Volume, ...]
    regions: Regions | None
    provenance: Mapping[str, Any]
    coverage: Coverage
    anonymize: bool = False

    def write(
        self,
        folder: Path,
        masks: np.ndarray,
        of_region: Mapping[str, np.ndarray],
        raters: np.ndarray | None,
        outside: Sequence[int],
    ) -> dict[str, str]:
        """Write the pages.

        Args:
            folder: where to.
            masks: bool (n, slices, h, w), in the slices that were sampled: what any region marks.
            of_region: the same, of each region.
            raters: labels or masks (R, slices, h, w) to compare with.
            outside: how many voxels each rater marked elsewhere.

        Returns:
            File names by region; "" is the page of all together.

        Raises:
            ValueError: a page would be too large; none is left.
        """
        written: dict[str, str] = {}
        try:
            for name, drawn in {"": masks, **of_region}.items():
                written[name] = page_name(name)
                self.page(folder / written[name], name, drawn, raters, outside)
        except ValueError:
            for page in written.values():
                (folder / page).unlink(missing_ok=True)
            raise
        return written

    def page(
        self, path: Path, region: str, masks: np.ndarray, raters: np.ndarray | None, outside: Sequence[int]
    ) -> None:
        """Write the page of one region, or with "" of all together; arguments as for ``write``."""
        from berdiff_fast.imaging import windows
        from berdiff_fast.imaging.report import write_report

        hidden = self.anonymize or bool(self.provenance.get("anonymized"))
        title = "Scan" if hidden else shown(file_name(self.volume))
        several = len(self.channels) > 1
        images = [sampled_slices(one.array, self.provenance) for one in (self.channels if several else (self.volume,))]
        window, unit = windows.of(self.volume, images[0])
        names = None if self.regions is None else ("", *self.regions.names)
        theirs = None if raters is None else raters != 0
        if raters is not None and self.regions is not None and region:
            theirs = self.regions.mask_of(raters, region)
        write_report(
            path,
            np.stack([image.astype(np.float32) for image in images]) if several else images[0],
            masks,
            title=f"{title}: {region}" if region else title,
            raters=theirs,
            windows=None if several else window,
            intensity="" if several else unit,
            stack=self.coverage.stack,
            coverage=str(self.coverage),
            notes=[] if region else elsewhere(outside, self.volume),
            provenance=_without_names(self.provenance, self.anonymize),
            channels=[*self.provenance["channels"]][: len(images)] if several else (),
            pages=None if names is None else {name or _ANY: page_name(name) for name in names},
        )


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
    told = {k: v for k, v in summary.items() if k not in _RESULTS} | rater_files(read, anonymize)
    regions = _regions(summary)
    theirs = check_raters(read, volume, regions)
    try:
        coverage = Coverage.of(volume, summary)
        masks = []
        for name in summary["masks"]:
            mask = volumes.read(root / name).array
            if mask.shape != volume.array.shape:
                raise ValueError(f"{root / name} has the shape {mask.shape}, and the scan {volume.array.shape}")
            masks.append(sampled_slices(mask, summary))
        outside: list[int] = []
        if theirs is not None:
            theirs, outside = where_sampled(theirs, summary)
        labels = np.stack(masks)
        of_region = {name: regions.mask_of(labels, name) for name in regions.names} if regions else {}
        pages = Pages(volume, _channels(summary, volume, root), regions, told, coverage, anonymize)
        for name, drawn in {"": labels != 0, **of_region}.items():
            with whole_file(root / page_name(name), follow=False) as new:
                pages.page(new, name, drawn, theirs, outside)
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


def _regions(summary: Mapping[str, Any]) -> Regions | None:
    """Those that results are of."""
    found = summary.get("regions")
    return None if not found else Regions(tuple((name, tuple(about["labels"])) for name, about in found.items()))


def _channels(summary: Mapping[str, Any], volume: Volume, root: Path) -> tuple[Volume, ...]:
    """All channels of the scan, if the others still are where they were."""
    found = [volume]
    for name, about in [*summary.get("channels", {}).items()][1:]:
        try:
            channel = raters_io.onto(volumes.read(_scan_of({"input": about["file"]}, root)), volume)
        except (KeyError, OSError, ValueError):
            channel = None
        if channel is None or channel.fingerprint() != about.get("sha256"):
            logger.warning(
                "report: the channel %s is not found as it was, so the report shows the first one alone", name
            )
            return ()
        found.append(channel)
    return tuple(found) if len(found) > 1 else ()


def rater_files(raters: Sequence[Volume], anonymize: bool) -> dict[str, list[str]]:
    """What the summary says of the files of raters."""
    named = [f"rater {k}" if anonymize else file_name(rater) for k, rater in enumerate(raters, start=1)]
    return {"rater_files": named} if raters else {}


def _without_names(provenance: Mapping[str, Any], anonymize: bool) -> dict[str, Any]:
    """Provenance as a report may hold it: no folders, and no names at all where it is to be passed on."""
    if anonymize or provenance.get("anonymized"):
        plain = {k: v for k, v in provenance.items() if k not in _NAMES}
        return plain | ({"channels": [*plain["channels"]]} if "channels" in plain else {})
    plain = dict(provenance)
    if "channels" in plain:
        plain["channels"] = {name: about.get("file", "") for name, about in plain["channels"].items()}
    for key in ("input", "model"):  # of results of before
        if isinstance(plain.get(key), str):
            plain[key] = shown(Path(plain[key]).name)
    return plain
