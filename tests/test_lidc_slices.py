# SPDX-License-Identifier: Apache-2.0
"""The CT slices that come with the package, and the demo that shows them."""

from __future__ import annotations

import json

import pytest
import torch
from support import shared

import berdiff_fast as bf
from berdiff_fast import cli, demo


def test_the_slices_are_what_they_say():
    cases = bf.data.lidc.load()
    assert cases.images.shape == (6, 1, 128, 128) and cases.images.dtype == torch.float32
    assert cases.raters.shape == (6, 4, 1, 128, 128) and cases.raters.dtype == torch.bool
    assert (cases.images.amin((1, 2, 3)) == 0).all() and (cases.images.amax((1, 2, 3)) == 255).all()
    assert cases.raters.flatten(2).any(2).sum(1).tolist() == [2, 3, 4, 2, 3, 4]
    assert len({name.split(",")[0] for name in cases.names}) == 6, "of six patients"
    assert "CC BY 3.0" in bf.data.lidc.ATTRIBUTION


def test_they_are_of_the_validation_file():
    h5py = pytest.importorskip("h5py")
    cases = bf.data.lidc.load()
    with h5py.File(shared("data/lidc/val.h5"), "r") as file:
        patients = {int(p) for p in file["patient_id"][:]}
        images = torch.from_numpy(file["image"][:]).float()
    for image, name in zip(cases.images[:, 0], cases.names, strict=True):
        assert int(name.split(",")[0].removeprefix("LIDC-IDRI-")) in patients
        assert (images == image).all((1, 2)).any()


def test_the_demo_shows_them_unless_told_otherwise(tmp_path, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr(bf.figures, "contact_sheet", lambda path, image, samples, **more: shown.append((image, more)))
    for arguments in ([], ["--phantoms"]):
        options = ["--slices", "1", "--n", "1", "--steps", "1", "--json", *arguments]
        assert cli.main(["demo", "--output", str(tmp_path / "demo.png"), *options]) == 0
        assert json.loads(capsys.readouterr().out)
    (real, at_first), (made_up, then) = shown
    assert torch.equal(real, bf.data.lidc.load().images[:1, 0]) and not torch.equal(real, made_up)
    assert bf.data.lidc.SHORT in at_first["title"] and "LIDC" not in then["title"]
    assert at_first["labels"][0].startswith("LIDC-IDRI-") and then["labels"] == ["Phantom 1"]


@pytest.mark.parametrize(
    "options, message", [({"slices": 7}, "slices must be at most the 6"), ({"phantoms": True, "data": "x"}, "exclude")]
)
def test_what_cannot_be_shown(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        demo.run(tmp_path / "demo.png", **options)
