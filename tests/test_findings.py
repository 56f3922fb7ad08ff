# SPDX-License-Identifier: Apache-2.0
"""What an evaluation says beside means: floor, parts, existence, regions, intervals; and what it does not claim."""

from __future__ import annotations

import csv
import json
import shutil

import h5py
import numpy as np
import pytest
import torch
from support import phantom_file

import berdiff_fast as bf
from berdiff_fast import cli, metrics
from berdiff_fast.data.hdf5 import RaterDataset, check_disjoint
from berdiff_fast.imaging import figures

pytest.importorskip("accelerate", reason="evaluation needs accelerate")


def changed(source, target, drop=(), attrs=None, **new):
    """A copy of a file with some datasets dropped or replaced."""
    shutil.copy(source, target)
    with h5py.File(target, "a") as file:
        for name in (*drop, *new):
            if name in file:
                del file[name]
        for name, values in new.items():
            file[name] = values
        file.attrs.update(attrs or {})
    return target


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    """Twelve phantoms; in some of them some raters marked nothing."""
    folder = tmp_path_factory.mktemp("data")
    plain = phantom_file(folder / "plain.h5", 0, 12)
    with h5py.File(plain) as file:
        mask = file["mask"][()]
    for i in range(12):
        mask[i, : i % 4] = 0
    return changed(plain, folder / "slices.h5", mask=mask, patient_id=np.arange(12) // 2)


def model(folder, **options) -> str:
    torch.manual_seed(0)
    network = bf.UNet(
        model_channels=32, channel_mult=(1,), attention_resolutions=(), patch_size=4, norm_groups=8, **options
    )
    for p in network.out[2].parameters():
        torch.nn.init.normal_(p, std=0.1)
    path = folder / "model.safetensors"
    bf.BerDiff(network, preprocessing=bf.Preprocessing()).save(path)
    return str(path)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> str:
    return model(tmp_path_factory.mktemp("model"))


def refuse(value):
    raise AssertionError(f"{value} is no JSON")


def run(model_file, data, output, capsys, n=6, *more) -> tuple[dict, list[dict[str, str]], str]:
    words = ["--model", model_file, "--data", str(data), "--output", str(output), "--n", str(n), "--steps", "3"]
    assert cli.main(["evaluate", *words, "--save-masks", "--device", "cpu", *more]) == 0
    summary = json.loads((output / "summary.json").read_text(), parse_constant=refuse)
    with (output / "slices.csv").open() as file:
        return summary, list(csv.DictReader(file)), capsys.readouterr().out


def both(data, output) -> tuple[torch.Tensor, torch.Tensor]:
    with h5py.File(output / "masks.h5") as file:
        return RaterDataset(data).batch(range(12))[1], torch.from_numpy(file["mask"][()])


def test_floor_and_fault(slices, model_file, tmp_path, capsys):
    summary, rows, text = run(model_file, slices, tmp_path, capsys)
    raters, masks = both(slices, tmp_path)
    parts = metrics.decompose_ged(raters, masks)
    found = summary["model"]
    for name, values in parts.items():
        assert found[name] == pytest.approx(values.mean().item(), abs=1e-12), name
        assert [float(row[name]) for row in rows] == pytest.approx(values.tolist(), rel=1e-5, abs=1e-9), name
        low, high = found["interval_95"][name]
        assert low <= found[name] <= high
    floor = summary["floor"]["ged"]
    assert floor == found["ged_floor"] == summary["perfect"]["ged_floor"] > 0
    assert found["ged"] == pytest.approx(found["ged_existence"] + found["ged_shape"])
    # What draws from the raters at hand is below what draws from their distribution; what says nothing is at fault.
    assert summary["perfect"]["ged"] < floor < summary["empty"]["ged"]
    assert summary["empty"]["existence_unbiased"] > summary["perfect"]["existence_unbiased"]
    existence = found["existence"]
    r, e = parts["empty_raters"], parts["empty_samples"]
    assert existence["rmse"] == pytest.approx((r - e).square().mean().sqrt().item())
    assert existence["constant"] == pytest.approx(r.std(unbiased=False).item())
    assert existence["floor"] == pytest.approx((r * (1 - r) / 3).mean().sqrt().item())
    low, high = existence["interval_95"]
    assert low <= existence["rmse"] <= high
    assert sum(row["slices"] for row in existence["table"]) == 12
    assert sum(row["slices"] * row["raters"] for row in existence["table"]) == pytest.approx(r.sum().item())
    assert summary["data"]["patients"] == 6 and summary["bootstrap"] == {"over": "patients", "groups": 6}
    assert "12 of 12 slices of 6 patients, n = 6" in text
    assert [f"floor, 4 raters, n = 6 {floor:.3f}"] == [
        " ".join(line.split()) for line in text.splitlines() if line.startswith("floor")
    ]
    assert "bootstrap over 6 patients, too few to trust it" in text
    assert f"{found['existence_unbiased']:.3f}" in text and f"P(empty): RMSE {existence['rmse']:.3f}" in text
    # D (1/R + 1/n), for fewer samples too.
    assert f"{found['ged_of_4']:.3f} with 4 (floor {floor * (1 / 4 + 1 / 4) / (1 / 4 + 1 / 6):.3f})" in text
    pytest.importorskip("matplotlib")
    assert (tmp_path / "existence.png").read_bytes().startswith(b"\x89PNG")


def test_patients_that_are_not_named(slices, model_file, tmp_path, capsys):
    """A file without patient_id, and one whose numbers are those of cases: no count of patients, no draws of them."""
    nameless = changed(slices, tmp_path / "nameless.h5", drop=["patient_id"])
    cases = changed(slices, tmp_path / "cases.h5", attrs={"source": "cimd"}, patient_id=np.arange(12))
    for data in (nameless, cases):
        summary, _, text = run(model_file, data, tmp_path / data.stem, capsys, 2)
        assert summary["data"]["patients"] is None
        assert summary["bootstrap"] == {"over": "slices", "groups": 12}
        assert "12 of 12 slices (the file names no patients), n = 2" in text
        assert "bootstrap over 12 slices" in text and "too narrow" in text and "12 patients" not in text


def test_one_patient_has_no_interval(slices, model_file, tmp_path, capsys):
    one = changed(slices, tmp_path / "one.h5", patient_id=np.full(12, 7))
    summary, _, text = run(model_file, one, tmp_path / "out", capsys, 2)
    assert summary["data"]["patients"] == 1
    assert set(summary["model"]["interval_95"].values()) == {None}
    assert summary["model"]["existence"]["interval_95"] is None and summary["floor"]["interval_95"] is None
    assert "without an interval" in text and "95 % interval" not in text
    # One slice of a file without names is one group, too.
    nameless = changed(slices, tmp_path / "nameless.h5", drop=["patient_id"])
    summary, _, text = run(model_file, nameless, tmp_path / "single", capsys, 2, "--slice-count", "1")
    assert summary["model"]["interval_95"]["ged"] is None and "without an interval" in text


def test_one_rater_or_sample_leaves_gaps(slices, model_file, tmp_path, capsys):
    """What two masks would be needed for is null, an empty cell and words, never NaN."""
    with h5py.File(slices) as file:
        mask = file["mask"][:, :1]
    lone = changed(slices, tmp_path / "lone.h5", mask=mask)
    for data, n, nothing in ((lone, 4, "ged_floor"), (slices, 1, "ged_unbiased")):
        summary, rows, text = run(model_file, data, tmp_path / f"{n}", capsys, n)
        assert summary["model"][nothing] is None and {row[nothing] for row in rows} == {""}
        assert summary["model"]["ged_existence"] is not None and "nan" not in text.lower()
        assert summary["model"]["interval_95"]["ged_unbiased"] is None
    assert "floor, 1 rater, n = 4" in run(model_file, lone, tmp_path / "again", capsys, 4)[2]


def test_regions(slices, tmp_path, capsys):
    """Two mask channels: each by itself as if it were the file's only one, and both together."""
    with h5py.File(slices) as file:
        mask = file["mask"][()]
    second = mask.copy()
    second[:, :, :16] = 0
    two = changed(slices, tmp_path / "two.h5", mask=np.stack([mask, second], axis=2))
    summary, rows, text = run(model(tmp_path, in_channels=2), two, tmp_path / "out", capsys, 3)
    raters, masks = both(two, tmp_path / "out")
    assert raters.shape[2] == masks.shape[2] == 2
    assert [region["channel"] for region in summary["model"]["regions"]] == [0, 1]
    for k, region in enumerate(summary["model"]["regions"]):
        one = raters[:, :, k : k + 1], masks[:, :, k : k + 1]
        expected = metrics.decompose_ged(*one) | metrics.evaluate(*one, ["ged", "hm_iou", "dice_majority"])
        for name, values in expected.items():
            assert region[name] == pytest.approx(values.mean().item(), abs=1e-12), name
            assert [float(row[f"region{k}_{name}"]) for row in rows] == pytest.approx(
                values.tolist(), rel=1e-5, abs=1e-9
            )
        assert region["interval_95"]["ged"][0] <= region["ged"] and region["existence"]["rmse"] >= 0
        assert f"mask channel {k}: HM-IoU {region['hm_iou']:.3f}" in text
    joint = metrics.decompose_ged(raters, masks)["empty_raters"].mean().item()
    assert summary["model"]["empty_raters"] == pytest.approx(joint)
    assert summary["model"]["regions"][1]["empty_raters"] > joint
    assert "regions" in summary["perfect"] and not any(name.startswith("region0") for name in summary["model"])
    pytest.importorskip("matplotlib")
    assert (tmp_path / "out" / "existence_region1.png").is_file()


def test_parquet_has_gaps_too(slices, model_file, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    words = ["--model", model_file, "--data", str(slices), "--output", str(tmp_path), "--n", "1", "--steps", "2"]
    assert cli.main(["evaluate", *words, "--table", "parquet", "--device", "cpu"]) == 0
    rows = parquet.read_table(tmp_path / "slices.parquet").to_pylist()
    assert {row["ged_unbiased"] for row in rows} == {None} and {row["ged_existence"] for row in rows} != {None}


# ---------------------------------------------------------------------- files that share slices


def test_files_that_name_no_patients_and_share_slices(slices, tmp_path):
    train = changed(slices, tmp_path / "train.h5", drop=["patient_id"])
    with h5py.File(train) as file:
        image, mask = file["image"][()], file["mask"][()]
    link, copy = tmp_path / "link.h5", tmp_path / "copy.h5"
    link.symlink_to(train)
    shutil.copy(train, copy)
    some = changed(
        train, tmp_path / "some.h5", image=np.ascontiguousarray(image[[9, 3]]).astype(np.float32), mask=mask[:2]
    )
    for other in (train, link):
        with pytest.raises(ValueError, match="are one file; train and validate on different patients"):
            check_disjoint(RaterDataset(train), RaterDataset(other))
    with pytest.raises(ValueError, match="12 slices are in both .* the first are slices 0 and 0; split by patient"):
        check_disjoint(RaterDataset(train, in_memory=True), RaterDataset(copy))
    with pytest.raises(ValueError, match="2 slices are in both .* the first are slices 9 and 0"):
        check_disjoint(RaterDataset(train), RaterDataset(some))
    # One of the two names patients: that says nothing about the other.
    with pytest.raises(ValueError, match="12 slices are in both"):
        check_disjoint(RaterDataset(slices), RaterDataset(copy))
    # Blank slices are alike everywhere.
    blank = changed(train, tmp_path / "blank.h5", image=np.zeros_like(image[:2]), mask=mask[:2])
    check_disjoint(RaterDataset(train), RaterDataset(blank))
    check_disjoint(RaterDataset(blank), RaterDataset(changed(blank, tmp_path / "blank2.h5")))
    other = changed(train, tmp_path / "other.h5", image=image[:, ::-1] // 2)
    check_disjoint(RaterDataset(train), RaterDataset(other))


def test_a_copy_of_a_large_file_is_found(slices, tmp_path, monkeypatch):
    """Not all slices are compared then, but the same ones of a copy."""
    from berdiff_fast.data import hdf5

    monkeypatch.setattr(hdf5, "_COMPARED", (4, 2))
    train = changed(slices, tmp_path / "train.h5", drop=["patient_id"])
    with pytest.raises(ValueError, match="2 slices are in both"):
        check_disjoint(RaterDataset(train), RaterDataset(changed(train, tmp_path / "copy.h5")))


def test_training_refuses_them(slices, tmp_path, capsys):
    train = changed(slices, tmp_path / "train.h5", drop=["patient_id"])
    words = ["train", "--train-data", str(train), "--val-data", str(train), "--output", str(tmp_path / "run")]
    assert cli.main([*words, "--steps", "1", "--device", "cpu"]) == 1
    assert "are one file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------- the diagram


def test_existence_diagram(tmp_path):
    pytest.importorskip("matplotlib")
    e, r = torch.tensor([0.0, 0.25, 0.25, 1.0]), [0.5, 0.0, 0.5, 1.0]
    figure = figures.existence_diagram(e, r, 4, bins=4, title="x", path=tmp_path / "a.png")
    above, below = figure.axes
    assert above.lines[1].get_xydata().tolist() == [[pytest.approx(0.5 / 3), pytest.approx(1 / 3)], [1, 1]]
    assert [bar.get_height() for bar in below.patches] == [3, 0, 0, 1]
    assert [text.get_text() for text in above.texts] == [f"RMSE over images {((0.25 + 0.0625 * 2) / 4) ** 0.5:.3f}"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"empty_samples must be \(N,\) shares"):
        figures.existence_diagram([2.0], [0.5], 4)
