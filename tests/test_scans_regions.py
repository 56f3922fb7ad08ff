# SPDX-License-Identifier: Apache-2.0
"""The command ``sample`` with several channels and regions: label maps, maps and pages of each, raters, DICOM."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from scans import write_series

import berdiff_fast as bf
from berdiff_fast import cli, metrics
from berdiff_fast.imaging import volumes
from berdiff_fast.imaging.volumes import Volume

SHAPE = (4, 24, 20)
PLACE = dict(spacing=(0.9, 1.1, 3.0), origin=(-12.0, 20.0, 4.5))
TABLE = {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}


def write_moved(path: Path, slices: int = SHAPE[0], **place) -> None:
    array = study()[1].array[:slices]
    volumes.write(path, array, Volume(array, **{**PLACE, **place}))


def two_channel_model(path: Path, *, channels=("flair", "t1"), regions=TABLE) -> Path:
    torch.manual_seed(1)
    network = bf.UNet(in_channels=3, img_channels=2, model_channels=16, channel_mult=(1,), norm_groups=4)
    with torch.no_grad():
        network.out[-1].weight.normal_(0, 0.3)
    preprocessing = bf.Preprocessing("z-score", size=(16, 16), per_channel=True, by_volume=True, foreground=True)
    bf.BerDiff(network, prediction="y_0", preprocessing=preprocessing, channels=channels, regions=regions).save(path)
    return path


def study() -> list[Volume]:
    draws = np.random.default_rng(0)
    head = np.zeros(SHAPE, bool)
    head[:, 3:19, 2:18] = True
    return [Volume((draws.normal(a, a / 5, SHAPE) * head).astype(np.int16), **PLACE) for a in (100, 5000)]


@pytest.fixture
def case(tmp_path) -> Path:
    folder = tmp_path / "GLI-1"
    folder.mkdir()
    for volume, name in zip(study(), ("t2f", "t1n"), strict=True):
        volumes.write(folder / f"GLI-1-{name}.nii.gz", volume.array, volume)
    (folder / "notes.txt").write_text("no channel")
    return folder


@pytest.fixture
def model(tmp_path) -> Path:
    return two_channel_model(tmp_path / "model.safetensors")


def command(model: Path, output: Path, *more) -> list[str]:
    return ["sample", *map(str, more), "--model", str(model), "--output", str(output), "-n", "3", "--steps", "2"]


def test_label_maps_and_maps_of_each_region(case, model, tmp_path, capsys):
    output = tmp_path / "out"
    assert cli.main(command(model, output, case)) == 0
    said = capsys.readouterr().out
    assert all(f"\n{name}: median " in said for name in TABLE)
    files = [volumes.read(case / f"GLI-1-{name}.nii.gz") for name in ("t2f", "t1n")]
    expected = bf.sample_volume(bf.load(model), files, n=3, steps=2)
    summary = json.loads((output / "summary.json").read_text())
    reference = nibabel.load(case / "GLI-1-t2f.nii.gz")
    for k, name in enumerate(summary["masks"]):
        found = nibabel.load(output / name)
        assert np.abs(found.affine - reference.affine).max() < 1e-6 and found.shape == reference.shape
        labels = np.asarray(found.dataobj).T
        assert labels.dtype == np.uint8 and set(np.unique(labels)) <= {0, 1, 2, 4}
        for region, values in TABLE.items():
            assert np.array_equal(np.isin(labels, values), expected[region].mask(k))
    assert [*summary["regions"]] == [*TABLE] and summary["regions"]["TC"]["labels"] == [1, 4]
    for region in TABLE:
        about = summary["regions"][region]
        mean = np.asarray(nibabel.load(output / f"mean_{region}.nii.gz").dataobj).T
        assert about["mean"] == f"mean_{region}.nii.gz" and np.allclose(mean, expected[region].mean)
        assert about["sizes"]["voxels"] == expected[region].masks.sum((1, 2, 3)).tolist() and mean.any()
    joint = np.asarray(nibabel.load(output / "mean.nii.gz").dataobj).T
    assert np.allclose(joint, expected["WT"].mean)  # which has the others in it
    assert [*summary["channels"]] == ["flair", "t1"]
    assert summary["channels"]["t1"]["file"] == "GLI-1-t1n.nii.gz"


def test_files_by_name_in_any_order_or_as_told(case, model, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    flair, t1 = (case / f"GLI-1-{name}.nii.gz" for name in ("t2f", "t1n"))
    for path in (flair, t1):
        (folder / f"x{path.name[6]}{path.name[-8]}.nii.gz").write_bytes(path.read_bytes())
    told = [f"t1={folder / 'xtn.nii.gz'}", f"flair={folder / 'xtf.nii.gz'}"]
    found = []
    for k, inputs in enumerate(([case], [t1, flair], told)):
        assert cli.main(command(model, tmp_path / f"out{k}", *inputs, "--quiet")) == 0
        found.append({p.name: p.read_bytes() for p in (tmp_path / f"out{k}").glob("*.nii.gz")})
    assert found[0] == found[1] == found[2] and len(found[0]) == 3 + 2 + 6


def test_raters_of_label_maps(case, model, tmp_path, capsys):
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:3, 6:14, 5:15], labels[1:3, 8:12, 7:12], labels[1, 9:11, 8:10] = 2, 1, 4
    raters = [labels, np.where(labels == 4, 1, labels).astype(np.uint8)]
    paths = [tmp_path / f"reader{r}.nii.gz" for r in range(2)]
    for path, rater in zip(paths, raters, strict=True):
        volumes.write(path, rater, study()[0])
    output = tmp_path / "out"
    assert cli.main(command(model, output, case, "--raters", *paths, "--report")) == 0
    summary = json.loads((output / "summary.json").read_text())
    read = [volumes.read(output / name).array for name in summary["masks"]]
    for region, values in {"": (1, 2, 4), **TABLE}.items():
        about = summary["regions"][region] if region else summary
        theirs, ours = (torch.from_numpy(np.isin(np.stack(x), values)).reshape(1, len(x), -1) for x in (raters, read))
        assert about["raters"]["ged"] == pytest.approx(float(metrics.generalized_energy_distance(theirs, ours)[0]))
        assert about["raters"]["sizes"]["voxels"] == theirs[0].sum(1).tolist()
        page = (output / (f"report_{region}.html" if region else "report.html")).read_text()
        told = float(re.search(r'id="ged" data-value="([^"]+)"', page)[1])
        assert told == pytest.approx(about["raters"]["ged"])
    assert summary["regions"]["ET"]["raters"]["sizes"]["voxels"] == [4, 0]
    volumes.write(paths[0], np.where(labels == 4, 3, labels).astype(np.uint8), study()[0])  # as BraTS of 2023 has it
    assert cli.main(command(model, tmp_path / "no", case, "--raters", *paths)) == 1
    assert "has the label 3, which no region of the model has" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_page_of_each_region(case, model, tmp_path, monkeypatch):
    output = tmp_path / "out"
    assert cli.main(command(model, output, case, "--report", "--quiet")) == 0
    names = ["report.html", *(f"report_{name}.html" for name in TABLE)]
    pages = {name: (output / name).read_bytes() for name in names}
    for name, page in pages.items():
        text = page.decode()
        links = re.findall(r'<a href="(report[^"]*)">', text)
        assert sorted([*links, name]) == sorted(names), name
        assert re.search(r'<select id="channel"><option value="0">flair</option><option value="1">t1</option>', text)
        data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
        assert (
            len(data["images"]) == 2 * len(data["slices"]) and data["images"][0] != data["images"][len(data["slices"])]
        )
    monkeypatch.chdir(case)  # where the channels are
    assert cli.main(["report", str(output)]) == 0
    again = {name: (output / name).read_bytes() for name in names}
    assert again == pages
    write_moved(case / "GLI-1-t1n.nii.gz", origin=(0.0, 0.0, 0.0))  # other than masks were drawn of: not shown
    assert cli.main(["report", str(output)]) == 0
    assert '<option value="1">t1</option>' not in (output / "report.html").read_text()
    volumes.write(case / "GLI-1-t1n.nii.gz", study()[1].array + np.int16(1), study()[1])  # and so are other values
    assert cli.main(["report", str(output)]) == 0
    assert '<option value="1">t1</option>' not in (output / "report.html").read_text()
    monkeypatch.chdir(tmp_path)
    (case / "GLI-1-t1n.nii.gz").unlink()  # the first channel is enough
    assert cli.main(["report", str(output), "--input", str(case / "GLI-1-t2f.nii.gz")]) == 0
    assert "<h1>" in (output / "report_TC.html").read_text()


def test_results_that_are_replaced_leave_nothing(case, model, tmp_path):
    output = tmp_path / "out"
    assert cli.main(command(model, output, case, "--report", "--quiet")) == 0
    other = two_channel_model(tmp_path / "other.safetensors", regions={"WT": (1, 2, 4), "AB": (1, 4), "ET": (4,)})
    assert cli.main(command(other, output, case, "--overwrite", "--quiet")) == 0
    left = {path.name for path in output.iterdir()}
    assert not [name for name in left if "TC" in name or name.endswith("html")] and "mean_AB.nii.gz" in left


def test_segmentations_have_a_segment_for_each_region_and_mask(model, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    pytest.importorskip("highdicom")
    for volume, name in zip(study(), ("flair", "t1"), strict=True):
        (tmp_path / name).mkdir()
        write_series(tmp_path / name, volume)
    output = tmp_path / "out"
    inputs = [f"{name}={tmp_path / name}" for name in ("t1", "flair")]
    assert cli.main(command(model, output, *inputs, "--quiet")) == 0
    summary = json.loads((output / "summary.json").read_text())
    assert summary["segmentations"] == ["masks.dcm", "mean.dcm"]
    labels = [s.SegmentLabel for s in pydicom.dcmread(output / "masks.dcm").SegmentSequence]
    voxels = {f"{r}, mask {k}": summary["regions"][r]["sizes"]["voxels"][k] for k in range(3) for r in TABLE}
    assert labels == [name for name, count in voxels.items() if count] and len(labels) >= 3
    mean = pydicom.dcmread(output / "mean.dcm")
    assert {s.SegmentLabel for s in mean.SegmentSequence} <= {f"{r}, mean" for r in TABLE}


def test_results_are_as_private_as_the_most_private_channel(case, model, tmp_path):
    for name, mode in (("t2f", 0o644), ("t1n", 0o600)):
        (case / f"GLI-1-{name}.nii.gz").chmod(mode)
    assert cli.main(command(model, tmp_path / "out", case, "--quiet")) == 0
    assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in (tmp_path / "out").iterdir()} == {0}


def test_a_folder_beside_the_channels_does_not_make_a_cohort(case, model, tmp_path):
    (case / "old").mkdir()
    (case / "old" / "notes.txt").write_text("of before")
    assert cli.main(command(model, tmp_path / "out", case, "--quiet")) == 0
    assert (tmp_path / "out" / "mask_000.nii.gz").is_file()


def test_names_stay_out_of_what_is_passed_on(case, model, tmp_path):
    output = tmp_path / "out"
    assert cli.main(command(model, output, case, "--report", "--anonymize", "--quiet")) == 0
    for path in (*output.glob("*.html"), output / "summary.json"):
        assert "GLI" not in path.read_text(), path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "GLI-1-t1n.nii.gz").unlink(), "t1 is missing"),
        (lambda folder: (folder / "GLI-1-t1n.nii.gz").rename(folder / "GLI-1-dwi.nii.gz"), "t1 is missing"),
        (
            lambda folder: (folder / "b_t1.nii.gz").write_bytes((folder / "GLI-1-t1n.nii.gz").read_bytes()),
            "are both named after the channel t1",
        ),
        (lambda folder: (folder / "GLI-1-t1n.nii.gz").write_bytes(b"x"), "GLI-1-t1n.nii.gz: cannot be read"),
        (lambda folder: write_moved(folder / "GLI-1-t1n.nii.gz", spacing=(1, 1, 3)), "channels must lie on one grid"),
        (lambda folder: write_moved(folder / "GLI-1-t1n.nii.gz", 3), "channels must lie on one grid"),
    ],
)
def test_bad_cases(case, model, tmp_path, capsys, change, message):
    change(case)
    assert cli.main(command(model, tmp_path / "out", case)) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "out").exists(), said


def test_other_bad_inputs(case, model, tmp_path, capsys):
    flair, t1 = (case / f"GLI-1-{name}.nii.gz" for name in ("t2f", "t1n"))
    odd = tmp_path / "odd.nii.gz"
    odd.write_bytes(t1.read_bytes())

    def refused(message: str, *arguments, by: Path = model) -> None:
        assert cli.main(command(by, tmp_path / "out", *arguments)) == 1
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1 and not (tmp_path / "out").exists(), said

    refused("and t1 is missing", flair)
    refused("is named after none of the model's 2 channels (flair, t1)", flair, odd)
    refused("are both named after the channel flair", flair, f"flair={odd}")
    refused("there is no such file", flair, f"t1={tmp_path / 'none.nii.gz'}")
    refused("series is for a scan of one channel", case, "--series", "1.2")
    nameless = two_channel_model(tmp_path / "nameless.safetensors", channels=None)
    refused("must be a file of each of the model's 2 channels, in their order, got 1", flair, by=nameless)
    unsaid = two_channel_model(tmp_path / "unsaid.safetensors", regions=None)
    refused("does not say which labels they stand for", case, by=unsaid)
    (tmp_path / "empty").mkdir()
    refused("holds no file that is named after one of the model's 2 channels", tmp_path / "empty")
    assert cli.main(command(nameless, tmp_path / "fine", flair, t1, "--quiet")) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda summary: summary.update(regions=["WT"]),
        lambda summary: summary.update(regions={"WT": 3}),
        lambda summary: summary["regions"]["TC"].pop("mean"),
        lambda summary: summary["regions"]["TC"].update(mean="../mean_TC.nii.gz"),
        lambda summary: summary["regions"]["TC"].update(mean="mean_WT.nii.gz"),
        lambda summary: summary["regions"]["TC"].update(labels=[]),
        lambda summary: summary["regions"].update({"../x": summary["regions"].pop("TC")}),
    ],
)
def test_forged_summaries(case, model, tmp_path, capsys, change):
    output = tmp_path / "out"
    assert cli.main(command(model, output, case, "--quiet")) == 0
    summary = json.loads((output / "summary.json").read_text())
    change(summary)
    (output / "summary.json").write_text(json.dumps(summary))
    before = {path.name for path in output.iterdir()}
    assert cli.main(["report", str(output), "--input", str(case / "GLI-1-t2f.nii.gz")]) == 1
    assert "is not of results of berdiff-fast sample" in capsys.readouterr().err
    assert {path.name for path in output.iterdir()} == before
