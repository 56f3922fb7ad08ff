# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a model on a file of slices: numbers, yardsticks, files, and the share-out among processes."""

from __future__ import annotations

import csv
import json
import subprocess

import h5py
import numpy as np
import pytest
import torch
from support import ENVIRONMENT, data_path, phantom_file, torchrun

import berdiff_fast as bf
from berdiff_fast import cli, metrics
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.training import evaluate

pytest.importorskip("accelerate", reason="evaluation needs accelerate")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> RaterDataset:
    return RaterDataset(phantom_file(tmp_path_factory.mktemp("data") / "phantoms.h5", 0, 10))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> str:
    """A network that answers something, untrained."""
    torch.manual_seed(0)
    network = bf.UNet(model_channels=32, channel_mult=(1,), attention_resolutions=(), patch_size=4, norm_groups=8)
    for p in network.out[2].parameters():
        torch.nn.init.normal_(p, std=0.1)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    bf.BerDiff(network, preprocessing=bf.Preprocessing()).save(path)
    return str(path)


def test_what_is_written(data, model_file, tmp_path, capsys):
    words = ["--model", model_file, "--data", str(data.path), "--output", str(tmp_path), "--n", "6", "--steps", "4"]
    assert cli.main(["evaluate", *words, "--batch", "4", "--save-masks", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "10 of 10 slices of 10 patients, n = 6" in text and "yardstick: majority" in text
    summary = json.loads((tmp_path / "summary.json").read_text())
    with (tmp_path / "slices.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(r["index"]) for r in rows] == list(range(10)) == summary["indices"]
    with h5py.File(tmp_path / "masks.h5") as file:
        masks = torch.from_numpy(file["mask"][()])
    assert masks.shape == (10, 6, 1, 32, 32)
    raters = data.batch(range(10))[1]
    # The numbers are those of the masks that were kept.
    for name, function in (("ged", metrics.generalized_energy_distance), ("hm_iou", metrics.hm_iou)):
        expected = function(raters, masks)
        assert [float(r[name]) for r in rows] == pytest.approx(expected.tolist(), rel=1e-5)
        assert summary["model"][name] == pytest.approx(float(expected.mean()))
        low, high = summary["model"]["interval_95"][name]
        assert low < summary["model"][name] < high
    assert summary["model"]["ged_of_4"] == pytest.approx(
        float(metrics.generalized_energy_distance(raters, masks[:, :4]).mean())
    )
    assert summary["perfect"]["ged"] < summary["majority"]["ged"] < summary["empty"]["ged"]
    assert summary["versions"]["draw_contract"] == bf.DRAW_CONTRACT and len(summary["weights"]["sha256"]) == 64
    pytest.importorskip("matplotlib")
    assert (tmp_path / "cases.png").read_bytes().startswith(b"\x89PNG")


def test_parquet_and_a_choice_of_slices(data, model_file, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    words = ["--model", model_file, "--data", str(data.path), "--output", str(tmp_path), "--n", "2", "--steps", "2"]
    assert cli.main(["evaluate", *words, "--slice-count", "4", "--table", "parquet", "--json", "--device", "cpu"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["indices"] == evaluate.choose(10, 4, 0) and len(set(summary["indices"])) == 4
    table = parquet.read_table(tmp_path / "slices.parquet").to_pylist()
    assert [row["index"] for row in table] == summary["indices"] and "majority_ged" in table[0]


@pytest.mark.slow
def test_two_processes_give_the_same(data, model_file, tmp_path):
    def run(processes: int) -> dict:
        output = tmp_path / str(processes)
        words = ["evaluate", "--model", model_file, "--data", str(data.path), "--output", str(output)]
        options = ["--samples", "3", "--steps", "3", "--batch", "2", "--save-masks"]
        command = [*torchrun(processes, tmp_path), *words, *options]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("yardstick: empty") == 1
        with h5py.File(output / "masks.h5") as file:
            masks = file["mask"][()]
        return {
            "masks": masks,
            "table": (output / "slices.csv").read_text(),
            **json.loads((output / "summary.json").read_text()),
        }

    one, two = run(1), run(2)
    assert np.array_equal(one.pop("masks"), two.pop("masks"))
    assert one == two


def test_yardsticks_on_real_slices():
    """The table that comes with the data, on all of val."""
    data = RaterDataset(data_path("lidc/val.h5"), in_memory=True)
    found: dict[str, list] = {}
    for start in range(0, len(data), 100):
        indices = list(range(start, min(start + 100, len(data))))
        raters = data.batch(indices)[1]
        for name in evaluate.YARDSTICKS:
            masks = evaluate.yardstick(name, raters, 16, indices)
            numbers = metrics.evaluate(raters, masks, ["ged", "hm_iou"])
            found.setdefault(name, []).append(torch.stack([numbers["ged"], numbers["hm_iou"]]))
    means = {name: torch.cat(parts, dim=1).mean(1).tolist() for name, parts in found.items()}
    # "perfect" draws at random; its published row is another draw.
    assert means["perfect"] == pytest.approx([0.025, 0.914], abs=0.003)
    assert means["majority"] == pytest.approx([0.268, 0.672], abs=0.0006)
    assert means["empty"] == pytest.approx([0.834, 0.389], abs=0.0006)


def test_choices():
    assert evaluate.choose(10, None, 0) == evaluate.choose(10, 99, 0) == list(range(10))
    assert evaluate.choose(1000, 5, 1) == evaluate.choose(1000, 5, 1) != evaluate.choose(1000, 5, 2)
    assert evaluate.spread(10, 4) == [0, 2, 5, 7] and evaluate.spread(3, 9) == [0, 1, 2]
    with pytest.raises(ValueError, match="slices must be at least 1"):
        evaluate.choose(10, 0, 0)


def test_intervals_are_over_patients():
    # One patient with all the weight: slices are many, patients two, so the interval reaches from one to the other.
    values, groups = [0.0] * 50 + [1.0] * 50, np.array([0] * 50 + [1] * 50)
    assert evaluate._interval(values, groups) == (0.0, 1.0)
    assert evaluate._interval([0.5] * 10, np.arange(10)) == (0.5, 0.5)


def test_bad_calls(data, model_file, tmp_path):
    model = bf.load(model_file)
    with pytest.raises(ValueError, match="table must be one of"):
        evaluate.evaluate(model, data, tmp_path / "x", table="xlsx")
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        evaluate.evaluate(model, data, tmp_path / "x", n=0)
    with pytest.raises(ValueError, match="method must be one of"):
        evaluate.evaluate(model, data, tmp_path / "x", n=1, method="euler")
    two = bf.BerDiff(bf.UNet(model_channels=32, channel_mult=(1,), img_channels=2), preprocessing=bf.Preprocessing())
    with pytest.raises(ValueError, match="the model works on 2 img_channels, and the file has 1"):
        evaluate.evaluate(two, data, tmp_path / "x")
    with pytest.raises(ValueError, match="steps must be"):
        evaluate.evaluate(model, data, tmp_path / "x", steps=5000)
    with pytest.raises(ValueError, match="slices must be at least 1, got 0"):
        evaluate.evaluate(model, data, tmp_path / "x", count=0)
    deep = bf.BerDiff(bf.UNet(model_channels=32, channel_mult=(1,) * 7), preprocessing=bf.Preprocessing())
    with pytest.raises(ValueError, match="must have a height and width divisible by 64"):
        evaluate.evaluate(deep, data, tmp_path / "x")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="output must be a folder"):
        evaluate.evaluate(model, data, tmp_path / "file")
    assert cli.main(["evaluate", "--model", "nope", "--data", str(data.path), "--output", str(tmp_path / "x")]) == 1
    assert not (tmp_path / "x").exists()
