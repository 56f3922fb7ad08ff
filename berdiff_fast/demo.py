# SPDX-License-Identifier: Apache-2.0
"""The demo: plausible masks for a few CT slices by the bundled model, and one picture of them."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from berdiff_fast import checks, metrics, ops
from berdiff_fast.backends import select
from berdiff_fast.data import lidc, phantom
from berdiff_fast.loading import load
from berdiff_fast.model import BerDiff
from berdiff_fast.sampling import sample

#: Trained on other patients than those shown (docs/model_card.md).
MODEL = "lidc"

#: Seed of the procedural slices, and their size in pixels.
SLICES_SEED, SIZE = 20231, 128


@dataclass(frozen=True)
class Result:
    """What the demo found.

    Attributes:
        picture: the PNG.
        masks: (B, n, 1, H, W) bool.
        seconds: how long the whole call of ``sample`` took.
        step_seconds: how long the step kernel took, over all steps (timed apart).
        network_seconds: the rest, which is the network.
        backend: that drew the masks.
        ged, majority_ged: mean generalised energy distance to the raters, of the masks and of the raters' majority.
    """

    picture: Path
    masks: torch.Tensor
    seconds: float
    network_seconds: float
    step_seconds: float
    backend: str
    ged: float
    majority_ged: float


def run(
    output: str | os.PathLike[str] = "demo.png",
    *,
    data: str | os.PathLike[str] | None = None,
    phantoms: bool = False,
    slices: int = 3,
    n: int = 16,
    steps: int = 10,
    seed: int = 7,
    backend: str = "auto",
    progress: bool = True,
) -> Result:
    """Draw n masks for a few slices with the bundled model and write one PNG.

    Args:
        output: the picture's path.
        data: an HDF5 file of slices (docs/data.md), of which the seed draws some that two raters or more marked; by
            default the CT slices of LIDC-IDRI that come with the package (``data.lidc``).
        phantoms: procedural slices instead.
        slices, n, steps, seed, backend, progress: how many slices; the rest as in ``sample``.

    Raises:
        ImportError: matplotlib is not installed.
        FileNotFoundError: the folder of ``output``, or ``data``, does not exist.
        ValueError, TypeError, BackendUnavailableError: as ``sample`` and ``RaterDataset``.
    """
    # Imported here: the package does without matplotlib, and the demo should say so before it computes.
    from berdiff_fast.imaging import figures

    figures.require_matplotlib()
    if not Path(output).absolute().parent.is_dir():
        raise FileNotFoundError(f"output: there is no folder {Path(output).absolute().parent}")
    checks.integer("slices", slices, 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(MODEL).to(device)
    if phantoms and data is not None:
        raise ValueError("phantoms and data exclude each other: which slices are to be shown?")
    if data is not None:
        images, raters, labels = _from_file(data, slices, seed, model)
    else:
        images, raters, labels = _phantoms(slices) if phantoms else _patients(slices)
    img = model.preprocess(images).to(device)
    start = time.perf_counter()
    masks = sample(model, img, n=n, steps=steps, seed=seed, backend=backend, progress=progress)
    assert isinstance(masks, torch.Tensor)
    masks = masks.cpu()
    seconds = time.perf_counter() - start

    name = select.resolve(backend, device)
    step_seconds = steps * _time_step(masks, device, name)
    majority = 2 * raters.sum(1, keepdim=True) >= raters.shape[1]
    figures.contact_sheet(
        output,
        images[:, 0].float(),
        masks[:, :, 0],
        raters=raters[:, :, 0],
        title=f"{n} plausible masks in {steps} steps" + ("" if phantoms or data else f" ({lidc.SHORT})"),
        labels=labels,
    )
    return Result(
        picture=Path(output),
        masks=masks,
        seconds=seconds,
        network_seconds=seconds - step_seconds,
        step_seconds=step_seconds,
        backend=name,
        ged=float(metrics.generalized_energy_distance(raters, masks).mean()),
        majority_ged=float(metrics.generalized_energy_distance(raters, majority).mean()),
    )


def _patients(slices: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    cases = lidc.load()
    if slices > len(cases.names):
        raise ValueError(
            f"slices must be at most the {len(cases.names)} that come with the package, got {slices}; "
            "data and phantoms have more"
        )
    return cases.images[:slices], cases.raters[:slices], cases.names[:slices]


def _phantoms(slices: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    cases = phantom.generate(slices, SIZE, seed=SLICES_SEED, field=SIZE)
    return cases.images, cases.raters, [f"Phantom {i + 1}" for i in range(slices)]


def _from_file(
    path: str | os.PathLike[str], slices: int, seed: int, model: BerDiff
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    from berdiff_fast.data.hdf5 import RaterDataset

    data = RaterDataset(path)
    if (data.img_channels, data.mask_channels) != (model.img_channels, model.mask_channels):
        raise ValueError(f"{data.path} must have one image channel and one mask channel")
    chosen: list[int] = []
    for index in np.random.default_rng(seed).permutation(len(data)).tolist():
        if len(chosen) < slices and int(data[index][1].flatten(1).any(1).sum()) >= min(2, data.raters):
            chosen.append(index)
    if len(chosen) < slices:
        raise ValueError(
            f"slices must be at most the {len(chosen)} of {data.path} that two raters marked, got {slices}"
        )
    return (*data.batch(chosen), [f"Slice {index}" for index in chosen])


def _time_step(masks: torch.Tensor, device: str, backend: str) -> float:
    """Median seconds of one ``sample_step`` on masks of this shape."""
    y = masks.flatten(0, 1).float().to(device)
    z, flag = torch.randn_like(y), torch.zeros(1, dtype=torch.int32, device=device)
    seeds = torch.zeros(masks.shape[0], dtype=torch.int64, device=device)
    coefficients = torch.tensor([0.5, 0.0, 1.0, 1.0], device=device)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        ops.sample_step(y, z, seeds, coefficients, 500, nan_flag=flag, backend=backend)
        if y.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
