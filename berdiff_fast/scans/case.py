# SPDX-License-Identifier: Apache-2.0
"""One scan, from its files to a folder of results: what the command ``sample`` does for each."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from berdiff_fast.io import raters as raters_io
from berdiff_fast.model import BerDiff, fingerprint
from berdiff_fast.scans import results
from berdiff_fast.scans.inputs import read_scan, scan_names
from berdiff_fast.scans.sample import sample_volume


@dataclass(frozen=True)
class Request:
    """How masks are drawn, whatever the scan.

    Attributes:
        model: on its device.
        model_name: what the summary calls it.
        n, steps: as in ``sample``.
        options: further arguments of ``sample_volume``.
        report, anonymize, overwrite: as the command has them.
    """

    model: BerDiff
    model_name: str
    n: int
    steps: int
    options: dict[str, Any] = field(default_factory=dict)
    report: bool = False
    anonymize: bool = False
    overwrite: bool = False

    def check(self) -> None:
        """Raise ValueError for a model that results cannot be written of."""
        if self.model.mask_channels > 1 and self.model.regions is None:
            raise ValueError(
                f"model: {self.model_name} has {self.model.mask_channels} mask channels and does not say which labels "
                "they stand for; sample_volume (in Python) gives the masks of each"
            )

    @property
    def region_names(self) -> tuple[str, ...]:
        """Names of the model's regions, where it has several."""
        return self.model.regions.names if self.model.regions is not None and self.model.mask_channels > 1 else ()


def sample_case(
    request: Request,
    inputs: Sequence[str],
    output: str | os.PathLike[str],
    *,
    series: str | None = None,
    raters: Sequence[str] = (),
    progress: bool = False,
    note: Mapping[str, Any] | None = None,
    **where: Any,
) -> dict[str, Any]:
    """Draw masks of a scan and write them; the same call again goes on after an interruption.

    Args:
        request: how.
        inputs: files or a folder (``read_scan``).
        output: the folder of results.
        series: of a DICOM folder.
        raters: files of masks to compare with.
        progress: show a bar.
        note: what the summary is to say further.
        **where: slices, center, center_mm or roi, as ``sample_volume`` has them.

    Returns:
        The summary.

    Raises:
        ValueError, OSError, ...: see ``read_scan``, ``results.folder`` and ``sample_volume``.
    """
    request.check()
    model = request.model
    channels = read_scan(inputs, model, series)
    volume = channels[0]
    files = raters_io.read(raters, volume)
    regions = model.regions if request.region_names else None
    theirs = results.check_raters(files, volume, regions)
    read = (*files, *channels[1:])
    with results.folder(
        output, volume, request.n, raters=read, regions=request.region_names, overwrite=request.overwrite
    ) as work:
        scan = channels if len(channels) > 1 else volume
        options = {**request.options, **where}
        sampled = sample_volume(model, scan, request.n, request.steps, work=work, progress=progress, **options)
        provenance = results.provenance(
            volume,
            sampled,
            request.model_name,
            fingerprint(model),
            next(model.parameters()).device.type,
            series,
            files,
            channels=scan_names(model) or (),
            anonymize=request.anonymize,
        )
        return results.write(
            sampled,
            output,
            work,
            provenance={**provenance, **(note or {})},
            raters=theirs,
            report=request.report,
            anonymize=request.anonymize,
        )
