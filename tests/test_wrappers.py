# SPDX-License-Identifier: Apache-2.0
"""Networks in the wrappers that people use, and torch in the states that they leave it in."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from support import ENVIRONMENT
from torch import nn

import berdiff_fast as bf
from berdiff_fast import ops
from berdiff_fast.schedule import SPACINGS


class Net(nn.Module):
    """A convolution of masks and image; K masks."""

    spatial_dims = 2

    def __init__(self, channels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mask_channels = channels
        self.convolution = nn.Conv2d(channels + 1, channels, 5, padding=2)

    def forward(self, y_t, t, img):
        return 8 * self.convolution(torch.cat([y_t, img], 1))


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "compiled average": lambda m: torch.compile(torch.optim.swa_utils.AveragedModel(m), backend="eager"),
}
IMG = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
OPTIONS = dict(n=3, steps=3, seed=7)


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("channels", [1, 2])
def test_what_a_wrapped_network_says_of_itself_is_found(name, channels):
    network = Net(channels)
    expected = bf.sample(network, IMG, schedule="cosine2", prediction="epsilon", **OPTIONS)
    assert expected.shape == (2, 3, channels, 16, 16)
    options = dict(schedule="cosine2", prediction="epsilon", **OPTIONS)
    assert torch.equal(bf.sample(WRAPPERS[name](network), IMG, **options), expected)
    model = bf.BerDiff(network, spacing="trailing")
    expected = bf.sample(model, IMG, **OPTIONS)
    assert torch.equal(bf.sample(WRAPPERS[name](model), IMG, **OPTIONS), expected), "schedule, prediction, spacing"


def test_mask_channels_of_a_callable():
    network = Net(2)
    options = dict(schedule="cosine2", prediction="epsilon", **OPTIONS)
    expected = bf.sample(network, IMG, **options)
    assert torch.equal(bf.sample(lambda *a: network(*a), IMG, mask_channels=2, **options), expected)
    with pytest.raises(ValueError, match="mask_channels must be the model's own 2, got 1"):
        bf.sample(network, IMG, mask_channels=1, **options)
    with pytest.raises(ValueError, match="mask_channels must be at least 1, got 0"):
        bf.sample(lambda *a: network(*a), IMG, mask_channels=0, **options)


def test_a_float64_default_changes_nothing(tmp_path):
    img = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    model = bf.load("phantom64")
    expected = bf.sample(model, img, **OPTIONS)
    model.save(tmp_path / "m.safetensors")
    torch.set_default_dtype(torch.float64)
    try:
        for place in ("phantom64", tmp_path / "m.safetensors"):
            loaded = bf.load(place)
            assert {p.dtype for p in loaded.parameters()} == {torch.float32}
            assert torch.equal(bf.sample(loaded, img, **OPTIONS), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_one_step_works_with_every_spacing(spacing):
    assert bf.NoiseSchedule(timesteps=1000).subsequence(1, spacing) == [999], "where y_t is noise"
    assert bf.NoiseSchedule(timesteps=2).subsequence(1, spacing) == [1]
    masks = bf.sample(Net(1), IMG, n=2, steps=1, spacing=spacing, schedule="cosine2", prediction="epsilon", seed=1)
    assert masks.shape == (2, 2, 1, 16, 16)


PROGRAM = """
import sys, torch, berdiff_fast as bf
from berdiff_fast import ops
schedule = bf.NoiseSchedule("cosine2")
taus = schedule.subsequence(4)
row, seeds = schedule.step_table(taus).float()[1], bf.image_seeds(1, 1)
y, z = torch.zeros(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
class Step(torch.nn.Module):
    def forward(self, y, z):
        return ops.sample_step(y, z, seeds, row, taus[1], samples_per_image=2)
step = Step()
expected = step(y, z)
if sys.argv[1] == "fullgraph":
    how = torch.compile(step, backend="aot_eager", fullgraph=True)
else:
    how = torch.export.export(step, (y, z)).module()
assert torch.equal(how(y, z), expected)
z[0, 0, 0, 0] = float("nan")
try:
    how(y, z)
except Exception as error:
    assert "NaN" in str(error), error
else:
    sys.exit("a NaN went unnoticed")
"""


@pytest.mark.parametrize("how", ["fullgraph", "export"])
def test_a_step_without_a_flag_in_a_fresh_process(how):
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_op_without_a_flag_is_a_proper_op():
    y, z = torch.zeros(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    row = bf.NoiseSchedule().step_table([0, 400]).float()[1]
    arguments = (y, z, bf.image_seeds(0, 2), row, 400, 1, 0, 0, "epsilon", False, torch.float32, "reference")
    torch.library.opcheck(torch.ops.berdiff_fast.sample_step_checked.default, arguments)
    with pytest.raises(FloatingPointError, match="timestep 400"):
        ops.sample_step(y, z * float("nan"), bf.image_seeds(0, 2), row, 400)
