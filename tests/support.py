# SPDX-License-Identifier: Apache-2.0
"""What several test files share: golden values, toy networks, and exact tests of probabilities."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import safetensors.torch
import scipy.stats
import torch
from safetensors import safe_open
from torch import nn

from berdiff_fast import NoiseSchedule
from berdiff_fast.backends import select
from berdiff_fast.data import phantom
from berdiff_fast.network.unet import UNet

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared"

METHODS = ("ddim", "ddpm", "d3pm")
PREDICTIONS = ("epsilon", "y_0")

#: Backends every CPU can be asked for; the module of ``cpp`` may not have been built.
CPU_BACKENDS = [
    "reference",
    pytest.param(
        "cpp", marks=pytest.mark.skipif(not select.can_run("cpp", "cpu"), reason="berdiff_fast._cpu not built")
    ),
]

#: The fast one of them, for tests that draw many bits: equal bits are shown elsewhere.
FASTEST = "cpp" if select.can_run("cpp", "cpu") else "reference"

#: Chance that a family of statistical tests fails although all is well. The seeds are fixed, so a test that passes once
#: passes for ever; this is how surprising a failure has to be before it counts.
ALPHA = 1e-6


def shared(name: str) -> Path:
    """A file or folder of ``shared/``; skips the test where it is not at hand."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"not here: shared/{name}")
    return path


def golden_path(name: str) -> Path:
    """A file of values of the published code (``tests/golden/README.md``)."""
    return Path(__file__).parent / "golden" / name


def data_path(name: str) -> Path:
    """A file or folder of real data; skips the test where it is not at hand."""
    return shared(f"data/{name}")


def golden(name: str) -> dict[str, torch.Tensor]:
    """The tensors of ``tests/golden/<name>``; what ``scripts/make_golden.py`` packed is as it was."""
    path = golden_path(f"{name}.npz")
    if not path.exists():
        return safetensors.torch.load_file(golden_path(f"{name}.safetensors"))
    found = {}
    with np.load(path) as stored:
        for key, values in stored.items():
            if key.startswith("bits:"):
                _, width, dtype, key = key.split(":", 3)
                values = np.unpackbits(values, axis=-1)[..., : int(width)].astype(dtype)
            found[key] = torch.from_numpy(values)
    return found


def phantom_file(path: Path, first: int, count: int) -> Path:
    """Phantoms of 32 x 32 with four raters, a patient each, as an HDF5 file of slices."""
    cases = phantom.generate(count, 32, seed=1, first=first)
    with h5py.File(path, "w") as file:
        file["image"] = ((cases.images[:, 0] + 1) * 127.5).round().to(torch.uint8).numpy()
        file["mask"] = cases.raters[:, :, 0].to(torch.uint8).numpy()
        file["patient_id"] = np.arange(first, first + count)
    return path


#: For processes that tests start: one thread, since with several the sums in convolutions may differ from run to run.
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    "CUDA_VISIBLE_DEVICES": "",
}


def phantom_data(folder: Path) -> dict[str, str]:
    """Settings of a run on a few phantoms, and on others for its validation."""
    train, val = phantom_file(folder / "train.h5", 0, 8), phantom_file(folder / "val.h5", 100, 4)
    return {"train_data": str(train), "val_data": str(val)}


def torchrun(processes: int, folder: Path) -> list[str]:
    """What starts ``berdiff-fast`` in so many processes; add its words. Fails if they do not leave their group."""
    program = folder / "program.py"
    program.write_text(
        "import torch, berdiff_fast.cli as cli\n"
        "assert cli.main() == 0\n"
        # A group that is left to the interpreter's end aborts it now and then, and the other processes with it.
        "assert not torch.distributed.is_initialized(), 'the process group is still there'\n"
    )
    options = ["--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, "-m", "torch.distributed.run", *options, str(program)]


# ---------------------------------------------------------------------- probabilities


def theta(row: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """The probability (P + Q E) / (R + S E) to flip a bit, in float64; ``row`` is (..., 4), ``z`` broadcasts."""
    P, Q, R, S = row.double().unbind(-1)
    E = torch.exp(-z.double())
    return (P + Q * E) / (R + S * E)


def assert_binomial(ones: Any, trials: Any, probability: Any, *, alpha: float = ALPHA) -> None:
    """Exact two-sided binomial test of every cell of a family; Bonferroni keeps the family's error at ``alpha``."""
    ones, trials, probability = np.broadcast_arrays(
        *(np.asarray(x, dtype=np.float64) for x in (ones, trials, probability))
    )
    too_few = scipy.stats.binom.cdf(ones, trials, probability)
    too_many = scipy.stats.binom.sf(ones - 1, trials, probability)
    p = np.minimum(2 * np.minimum(too_few, too_many), 1.0)
    worst = np.unravel_index(np.argmin(p), p.shape)
    assert p[worst] >= alpha / p.size, (
        f"cell {worst}: {ones[worst]:.0f} of {trials[worst]:.0f} where {probability[worst]:.3g} was expected, "
        f"p = {p[worst]:.3g} < {alpha} / {p.size}"
    )


def assert_uncorrelated(pairs: list[tuple[str, torch.Tensor, torch.Tensor]], *, alpha: float = ALPHA) -> None:
    """Correlation of pairs of uniforms or fair bits, each of at least 10^4 numbers, in one Bonferroni family.

    With mean m and variance v known, sum((x - m)(y - m)) / (v sqrt(N)) has mean 0 and variance 1 for independent
    fair draws, also where the pairs overlap (as lags do: products of neighbours are uncorrelated). For N this large
    it is normal.
    """
    limit = scipy.stats.norm.isf(alpha / 2 / len(pairs))
    for name, x, y in pairs:
        if x.dtype is torch.bool:
            variance, x, y = 0.25, x.double() - 0.5, y.double() - 0.5
        else:
            variance, x, y = 1 / 12, x.double() - 0.5, y.double() - 0.5
        assert x.shape == y.shape and x.numel() >= 10**4
        score = float((x * y).sum()) / (variance * x.numel() ** 0.5)
        assert abs(score) <= limit, f"{name}: correlated, {score:.1f} deviations, at most {limit:.1f} expected"


# ---------------------------------------------------------------------- networks


class Toy(nn.Module):
    """A deterministic network whose logits for a row depend on that row's y_t, t and img alone, to the last bit.

    Only additions, multiplications and shifts: torch may compute other functions differently in a vector's tail, and
    then a row would depend on its place in the batch.
    """

    def __init__(self, mask_channels: int = 1, *, spatial_dims: int = 2, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.mask_channels = mask_channels
        self.spatial_dims = spatial_dims
        self.weight = nn.Parameter(torch.tensor([1.5, -2.0, 0.75], dtype=dtype))
        self.rows: list[int] = []
        self.seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def forward(self, y_t: torch.Tensor, t: torch.Tensor, img: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(y_t))
        self.seen.append((y_t, t, img))
        a, b, c = self.weight.unbind()
        time = (t.to(y_t.dtype) * 0.001).reshape(-1, *[1] * (y_t.ndim - 1))
        channel = torch.arange(y_t.shape[1], dtype=y_t.dtype).reshape(-1, *[1] * self.spatial_dims)
        return img[:, :1] * a + y_t.roll(1, -1) * c + y_t * b * time + channel * 0.25 - time


def toy_image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform_logits(logit: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A network that knows nothing but y_t and t."""

    def network(y_t: torch.Tensor, t: torch.Tensor, img: torch.Tensor) -> torch.Tensor:
        return logit(y_t, t.reshape(-1, *[1] * (y_t.ndim - 1)))

    return network


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's number of threads, which the C++ kernels follow, for the length of a ``with`` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def full_table(schedule: NoiseSchedule, method: str, **options: Any) -> torch.Tensor:
    """The step table over all timesteps: row t steps from t to t - 1."""
    return schedule.step_table(range(schedule.timesteps), method, **options)


#: The smallest network that has every kind of layer.
SMALL = dict(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,))
#: The arguments the published LIDC model was trained with; they are not the defaults of its scripts.
LIDC = dict(image_size=128, attention_resolutions="16", use_scale_shift_norm=False)


def published_unet() -> tuple[dict, dict, dict]:
    """A small network of the published code: its arguments, its weights, and all golden tensors beside them."""
    path = golden_path("unet_concat.safetensors")
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    tensors = safetensors.torch.load_file(path)
    weights = {k.removeprefix("state_dict."): v for k, v in tensors.items() if k.startswith("state_dict.")}
    return config, weights, tensors


def randomised(network: nn.Module) -> nn.Module:
    """Fills the zero-initialised layers too: a fresh network predicts 0 whatever is wrong inside it."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return network.eval()


def inputs(network: UNet, *spatial: int, batch: int = 2):
    y_t = torch.rand(batch, network.mask_channels, *spatial) < 0.5
    return y_t, torch.arange(batch) * 400 + 3, torch.randn(batch, network.img_channels, *spatial)
