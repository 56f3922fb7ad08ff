# SPDX-License-Identifier: Apache-2.0
"""Files made before HDF5 format 2 are read, and give what they gave: a data file, and a model file with its masks.

Both are of phantoms and of random weights; the code of 26 November 2026, before readers could be absent, made them.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import berdiff_fast as bf
from berdiff_fast import cli
from berdiff_fast.data.hdf5 import RaterDataset

BEFORE = Path(__file__).parent / "golden" / "before"


@pytest.fixture(scope="module")
def expected():
    with np.load(BEFORE / "expected.npz") as file:
        return dict(file)


def test_a_model_file_draws_the_masks_that_it_drew(expected):
    model = bf.load(BEFORE / "model.safetensors")
    shape = tuple(expected["shape"])
    wanted = np.unpackbits(expected["masks"], count=int(np.prod(shape))).reshape(shape)
    assert 0.01 < wanted.mean() < 0.99  # it would tell
    masks = bf.sample(model, torch.from_numpy(expected["image"]), n=4, steps=5, seed=11)
    np.testing.assert_array_equal(masks.numpy(), wanted)


def test_a_data_file_of_format_1_is_read(expected):
    path = BEFORE / "format-1.h5"
    with h5py.File(path) as file:
        assert file.attrs["format"] == 1 and "rater_valid" not in file
        assert [*file["path"].asstr()] == ["images/p0.png", "images/p1.png"]
    drawn = np.unpackbits(expected["raters"])[: 6 * 3 * 64 * 64].reshape(6, 3, 1, 64, 64)
    grey = np.rint((expected["image"][0] + 1) * 127.5)
    for in_memory in (False, True):
        slices = RaterDataset(path, in_memory=in_memory)
        assert len(slices) == 2 and slices.rater_valid.all() and slices.rater_valid.shape == (2, 3)
        assert np.abs(slices[0][0].numpy() - grey).max() <= 1
        for k in range(2):
            np.testing.assert_array_equal(slices[k][1].numpy(), drawn[k])


def test_one_trains_and_evaluates_with_both(tmp_path, capsys):
    data = str(BEFORE / "format-1.h5")
    words = ["--train-data", data, "--output", str(tmp_path / "run"), "--steps", "2", "--batch-size", "2"]
    assert cli.main(["train", *words, "--channel-mult", "1", "--quiet"]) == 0
    model = str(BEFORE / "model.safetensors")
    assert cli.main(["evaluate", "--model", model, "--data", data, "-n", "2", "--output", str(tmp_path / "e")]) == 0
    assert "yardstick" in capsys.readouterr().out


def test_a_model_without_preprocessing_is_not_evaluated(tmp_path, capsys):
    model = bf.load(BEFORE / "model.safetensors")
    bf.BerDiff(model.network, prediction="y_0").save(tmp_path / "bare.safetensors")
    words = ["evaluate", "--model", str(tmp_path / "bare.safetensors"), "--data", str(BEFORE / "format-1.h5")]
    assert cli.main([*words, "--output", str(tmp_path / "e")]) == 1
    assert "does not know how its images were prepared" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()
