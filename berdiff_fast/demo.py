# SPDX-License-Identifier: Apache-2.0
"""The demo: sixteen plausible masks for CT-like slices whose raters are known exactly, and one picture of them."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from berdiff_fast import metrics, ops
from berdiff_fast.backends import select
from berdiff_fast.data import phantom
from berdiff_fast.model import load
from berdiff_fast.sampler import sample

#: Seed of the slices. The bundled model was trained on others.
SLICES_SEED = 20231

MODEL = "phantom64"


@dataclass(frozen=True)
class Result:
    """What the demo found.

    Attributes:
        picture: the PNG.
        masks: (B, n, 1, H, W) bool.
        seconds: of the whole call of ``sample``; of it, in the network, and in the step kernel (all steps).
        backend: that drew the masks.
        ged, expected_ged: mean generalised energy distance to the raters, and what a perfect model would reach.
    """

    picture: Path
    masks: torch.Tensor
    seconds: float
    network_seconds: float
    step_seconds: float
    backend: str
    ged: float
    expected_ged: float


class _Timed(torch.nn.Module):
    """A model that adds up the time spent in it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.seconds = 0.0
        for name in ("schedule", "prediction", "mask_channels", "img_channels", "spatial_dims"):
            setattr(self, name, getattr(model, name))

    def forward(self, y_t: torch.Tensor, t: torch.Tensor, img: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        logits = self.model(y_t, t, img)
        if logits.is_cuda:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - start
        return logits


def run(
    output: str | os.PathLike[str] = "demo.png",
    *,
    slices: int = 3,
    n: int = 16,
    steps: int = 10,
    seed: int = 7,
    backend: str = "auto",
    progress: bool = True,
) -> Result:
    """Draw n masks for a few phantoms with the bundled model and write one PNG.

    Args:
        output: the picture's path.
        slices, n, steps, seed, backend, progress: how many slices; the rest as in ``sample``.

    Raises:
        ImportError: matplotlib is not installed.
        FileNotFoundError: the folder of ``output`` does not exist.
        ValueError, TypeError, BackendUnavailableError: as ``sample``.
    """
    # Imported here: the package does without matplotlib, and the demo should say so before it computes.
    from berdiff_fast.imaging import figures

    figures.require_matplotlib()
    if not Path(output).absolute().parent.is_dir():
        raise FileNotFoundError(f"output: there is no folder {Path(output).absolute().parent}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = phantom.generate(slices, 64, seed=SLICES_SEED)
    model = _Timed(load(MODEL).to(device))
    img = model.model.preprocess(cases.images).to(device)
    start = time.perf_counter()
    masks = sample(model, img, n=n, steps=steps, seed=seed, backend=backend, progress=progress)
    assert isinstance(masks, torch.Tensor)
    masks = masks.cpu()
    seconds = time.perf_counter() - start

    name = select.resolve(backend, device)
    a = cases.probabilities
    figures.contact_sheet(
        output,
        cases.images[:, 0],
        masks[:, :, 0],
        raters=cases.raters[:, :, 0],
        title=f"{n} plausible masks in {steps} steps",
        labels=[
            f"Slice {i + 1}: p(rim) {a[i, 1] + a[i, 3]:.2f}, p(lobe) {a[i, 2] + a[i, 3]:.2f}" for i in range(slices)
        ],
    )
    return Result(
        picture=Path(output),
        masks=masks,
        seconds=seconds,
        network_seconds=model.seconds,
        step_seconds=steps * _time_step(masks, device, name),
        backend=name,
        ged=float(metrics.generalized_energy_distance(cases.raters, masks).mean()),
        expected_ged=float(phantom.expected_ged(cases, n).mean()),
    )


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
