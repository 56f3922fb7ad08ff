# SPDX-License-Identifier: Apache-2.0
"""Masks of whole scans: what they may depend on, cutting and putting together, and the command ``sample``."""

from __future__ import annotations

import json
import os

import h5py
import numpy as np
import pytest
import torch
from scans import GEOMETRIES, bright, scan, small_model, write_series
from support import data_path, threads

import berdiff_fast as bf
from berdiff_fast import cli, scans
from berdiff_fast.imaging import volumes
from berdiff_fast.imaging.volumes import Volume
from berdiff_fast.scans import results
from berdiff_fast.scans.store import Store
from berdiff_fast.scans.tiling import Tiling

needs_imaging = pytest.mark.skipif(
    any(__import__("importlib.util").util.find_spec(p) is None for p in ("SimpleITK", "highdicom")),
    reason='SimpleITK or highdicom is not installed: pip install "berdiff_fast[imaging]"',
)

BOX = (slice(1, 4), slice(4, 9), slice(11, 18))


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("model") / "small.safetensors", size=(16, 16))


@pytest.fixture(scope="module")
def model(model_path):
    return bf.load(model_path)


def draw(model, volume, n=3, steps=4, **options):
    return scans.sample_volume(model, volume, n, steps, **{"spacing": "trailing", **options})


# ---------------------------------------------------------------------- where masks land


@pytest.mark.parametrize("plane", [0, 1, 2])
@pytest.mark.parametrize("size", [None, (8, 8), (16, 12), (64, 64)])
def test_a_known_object_is_found_where_it_is(size, plane):
    """Whole slices, tiles that overlap, and tiles larger than the slice; odd sizes; along each axis."""
    volume = scan()
    sampled = draw(bright(mode="window", window=(-500, -400), size=size), volume, plane=plane)
    assert sampled.masks.shape == (3, *volume.array.shape)
    assert all(np.array_equal(mask, volume.array > 0) for mask in sampled.masks)
    assert np.array_equal(sampled.mean > 0.5, volume.array > 0)


def test_resampling_is_undone():
    """Pixels of 0.7 x 0.8 mm seen by a model of 0.35 x 0.4 and of 1.6 x 1.4 mm: the box, but for its edge."""
    volume = scan("anisotropic")  # W 0.703125 mm, H 0.8 mm
    fine = bright(mode="window", window=(-500, -400), pixel_spacing=(0.4, 0.3515625))
    assert np.array_equal(draw(fine, volume).mean > 0.5, volume.array > 0)
    coarse = draw(bright(mode="window", window=(-500, -400), pixel_spacing=(1.6, 1.40625)), volume).mean > 0.5
    off = coarse != (volume.array > 0)
    assert off.sum() > 0 and not off[:, 5:8, 13:16].any() and not off[:, :2].any() and not off[0].any()
    with pytest.raises(ValueError, match="volume must say its spacing for this model"):
        draw(fine, volume.array)


def test_slices_center_and_roi():
    model, volume = bright(mode="window", window=(-500, -400), size=(4, 6)), scan()
    inside = volume.array > 0
    some = draw(model, volume, slices=(2, 3)).mean
    assert np.array_equal(some[2] > 0, inside[2]) and not some[[0, 1, 3, 4]].any()
    sampled = draw(model, volume, center=(6.0, 14.0))
    expected = np.zeros_like(inside)
    expected[:, 4:8, 11:17] = inside[:, 4:8, 11:17]
    assert np.array_equal(sampled.mean > 0, expected) and sampled.plan["tiles"] == [[4, 11]]
    expected = np.zeros_like(inside)
    expected[:, 5:16, 2:13] = inside[:, 5:16, 2:13]
    assert np.array_equal(draw(model, volume, roi=(5, 16, 2, 13)).mean > 0, expected)
    assert np.array_equal(
        draw(bright(mode="window", window=(-500, -400)), volume, roi=(5, 16, 2, 13)).mean > 0, expected
    )


def test_tiles_cover_every_pixel_once():
    for shape, size, overlap in (((17, 23), (8, 8), 0.25), ((64, 5), (16, 16), 0.0), ((31, 31), (30, 16), 0.9)):
        tiling = Tiling.of(bright(size=size), scan(), 0, shape, None, None, overlap)
        assert torch.equal(torch.stack(tiling._owned()).sum(0), torch.ones(shape))
        rows, columns = torch.meshgrid(*(torch.arange(s) for s in shape), indexing="ij")
        pieces = tiling.cut((rows * 100 + columns).numpy())
        assert torch.equal(tiling.join(pieces[:, None] % 3 == 1), (rows * 100 + columns)[None] % 3 == 1)


# ---------------------------------------------------------------------- what masks depend on


def test_the_masks_of_a_slice_are_those_of_the_slice_alone(model):
    array = np.random.default_rng(3).integers(0, 255, (5, 16, 16), dtype=np.uint8)
    whole = draw(model, array, seed=5).masks
    assert 0.01 < whole.mean() < 0.99 and len(np.unique(whole.reshape(15, -1), axis=0)) == 15
    for i in range(5):
        alone = draw(model, array[i], seed=5).masks[:, 0]
        assert np.array_equal(alone, whole[:, i])
        plain = bf.sample(model, model.preprocess(array[i]), 3, 4, seed=5, spacing="trailing")[0, :, 0]
        assert np.array_equal(plain.numpy(), alone)
        assert np.array_equal(draw(model, array, seed=5, slices=(i, i + 1)).masks[:, i], alone)
    assert not np.array_equal(draw(model, array, seed=6).masks, whole)
    assert np.array_equal(draw(model, array, 5, seed=5).masks[:3], whole), "more masks begin with the same ones"
    assert np.array_equal(draw(model, array, seed=5, max_batch=1).masks, whole)


def test_more_than_eight_masks(model):
    array = np.random.default_rng(3).integers(0, 255, (1, 16, 16), dtype=np.uint8)
    sampled = draw(model, array, 19, seed=5)
    expected = bf.sample(model, model.preprocess(array[0]), 19, 4, seed=5, spacing="trailing")[0, :, 0].numpy()
    assert sampled.bits.shape == (3, 1, 16, 16) and np.array_equal(sampled.masks[:, 0], expected)
    np.testing.assert_allclose(sampled.mean[0], expected.mean(0), atol=1e-7)
    for k in (-1, 19):
        with pytest.raises(IndexError):
            sampled.mask(k)


def watch(model, limit=10**6):
    """Counts the calls of a model, and interrupts the one after ``limit``."""
    calls = []

    def hook(*_):
        if len(calls) == limit:
            raise KeyboardInterrupt
        calls.append(1)

    return calls, model.register_forward_pre_hook(hook)


@pytest.mark.parametrize("limit", [0, 3, 4, 9, 17])
def test_it_goes_on_where_it_stopped(tmp_path, limit):
    """Four calls a slice; stopped in the first, between two, within others. Other arguments start anew."""
    array = np.random.default_rng(3).integers(0, 255, (5, 64, 64), dtype=np.uint8)
    model, options = bright(), dict(n=64, work=tmp_path / "work")  # a slice fills a call
    expected = {seed: draw(model, array, n=64, seed=seed).masks for seed in (5, 6)}
    _, handle = watch(model, limit)
    with pytest.raises(KeyboardInterrupt):
        draw(model, array, seed=5, **options)
    handle.remove()
    calls, handle = watch(model)
    assert np.array_equal(draw(model, array, seed=5, **options).masks, expected[5])
    assert len(calls) == 20 - 4 * (limit // 4)
    assert (
        np.array_equal(draw(model, array, seed=5, **options).masks, expected[5]) and len(calls) == 20 - limit // 4 * 4
    )
    calls.clear()
    assert np.array_equal(draw(model, array, seed=6, **options).masks, expected[6]) and len(calls) == 20
    calls.clear()
    model.preprocessing = bf.Preprocessing("window", (0, 100))
    assert not np.array_equal(draw(model, array, seed=6, **options).masks, expected[6]) and len(calls) == 20
    model.preprocessing = bf.Preprocessing()
    calls.clear()
    with torch.no_grad():
        model.network.weight.mul_(-1)
    assert not np.array_equal(draw(model, array, seed=6, **options).masks, expected[6]) and len(calls) == 20


def test_another_region_starts_anew(tmp_path):
    """Two regions with the same middle have the same tile."""
    array = np.random.default_rng(3).integers(0, 255, (5, 64, 64), dtype=np.uint8)
    model, options = bright(size=(64, 64)), dict(n=64, work=tmp_path / "work")
    _, handle = watch(model, 9)
    with pytest.raises(KeyboardInterrupt):
        draw(model, array, roi=(24, 40, 24, 40), **options)
    handle.remove()
    expected = draw(model, array, n=64, roi=(10, 54, 10, 54)).masks
    assert np.array_equal(draw(model, array, roi=(10, 54, 10, 54), **options).masks, expected)


@pytest.mark.parametrize("where", [{}, {"slices": (1, 3)}, {"roi": (2, 9, 3, 15)}, {"center": (8, 8)}], ids=str)
@pytest.mark.parametrize("plane", [0, 2])
def test_the_region_that_was_sampled(plane, where):
    """A model that marks everything tells it."""
    model = bright(size=(8, 8))
    with torch.no_grad():
        model.network.weight.zero_()
    model.network.forward = lambda y_t, t, img: torch.full_like(y_t, 50.0)
    found = draw(model, np.zeros((16, 16, 16), np.uint8), n=1, steps=1, plane=plane, **where)
    region = scans.sampled_region(found.plan, (16, 16, 16))
    assert np.array_equal(region, found.mask(0)) and region.any() and region.all() == (where == {})


# ---------------------------------------------------------------------- until the mean is known


def test_sample_until(model):
    img = model.preprocess(np.random.default_rng(3).integers(0, 255, (2, 1, 16, 16), dtype=np.uint8))
    options = dict(steps=4, seed=5, spacing="trailing")
    masks, error = bf.sample_until(model, img, 0.2, batch=4, **options)
    n = masks.shape[1]
    assert n % 4 == 0 and 4 < n < 256 and float(error.max()) <= 0.2
    assert torch.equal(masks, bf.sample(model, img, n, **options))
    p = (masks.sum(1) + 1) / (n + 2)
    torch.testing.assert_close(error, (p * (1 - p) / n).sqrt())
    before = (masks[:, : n - 4].sum(1) + 1) / (n - 2)
    assert float((before * (1 - before) / (n - 4)).sqrt().max()) > 0.2, "one batch fewer was not enough"
    masks, error = bf.sample_until(model, img, 0.001, max_n=6, batch=4, **options)
    assert masks.shape[1] == 6 and float(error.max()) > 0.001
    torch.manual_seed(1)
    first, _ = bf.sample_until(model, img, 0.01, max_n=6, batch=4, steps=4, spacing="trailing")
    assert len(first.flatten(2).flatten(0, 1).unique(dim=0)) == 12, "batches repeat nothing without a seed either"
    for wrong, message in (({"tolerance": 0}, "tolerance"), ({"max_n": 0}, "max_n"), ({"n": 4}, "n is not an option")):
        with pytest.raises((ValueError, TypeError), match=message):
            bf.sample_until(model, img, **wrong)


def test_summarize():
    masks = torch.zeros(2, 4, 1, 3, 5, dtype=torch.bool)
    masks[0, :2, 0, 1, 1:4] = True
    masks[0, 3, 0, 1, 1] = True
    found = bf.summarize(masks, spacing=(2.0, 0.5))
    assert found.mean[0, 0, 1].tolist() == [0, 0.75, 0.5, 0.5, 0] and not found.mean[1].any()
    assert found.sizes[..., 0].tolist() == [[3, 3, 0, 1], [0, 0, 0, 0]] and found.unit == "mm2"
    assert found.majority[0, 0, 1].tolist() == [False, True, False, False, False]
    assert found.quantiles[0.5][0, 0, 1].tolist() == [False, True, True, True, False]
    assert int(found.quantiles[0.95].sum()) == 0 and int(found.quantiles[0.05].sum()) == 3
    h = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    np.testing.assert_allclose(found.entropy[0, 0, 1], [0, h, 1, 1, 0], rtol=1e-6)
    alone = bf.summarize(masks[0, :, 0].numpy())
    assert torch.equal(alone.mean, found.mean[0, 0]) and alone.unit == "pixels" and alone.sizes.tolist() == [3, 3, 0, 1]
    assert bf.summarize(torch.ones(3, 2, 2, 2, dtype=torch.bool), (1, 2, 3)).sizes.tolist() == [48.0] * 3
    two = torch.cat([masks, torch.zeros_like(masks)], dim=2)
    named = bf.summarize(two, regions=("WT", "TC"))
    assert named.of_region.tolist() == [[0.75, 0], [0, 0]] and named.existence.tolist() == [0.75, 0]
    assert str(named).splitlines()[0] == "probability that a reader marks something: 0.75 (WT 0.75, TC 0.00)"
    with pytest.raises(ValueError, match="regions must name the 2 channels of masks"):
        bf.summarize(two, regions=("WT",))
    for wrong, message in (
        ((masks.float(),), "masks must be bool"),
        ((masks[0, 0],), "masks must be"),
        ((masks, (1.0,)), "spacing must be 2 positive"),
        ((masks, (1.0, -1.0)), "spacing must be 2 positive"),
        ((masks, None, (0.0,)), "quantiles must be above 0"),
    ):
        if message == "masks must be":
            wrong = (masks[0, 0, 0],)
        with pytest.raises((ValueError, TypeError), match=message):
            bf.summarize(*wrong)


# ---------------------------------------------------------------------- the command


def command(*arguments):
    return cli.main(["sample", *map(str, arguments)])


def options(model_path, output):
    return ["--model", model_path, "-n", 3, "--steps", 4, "--spacing", "trailing", "--output", output, "--quiet"]


@needs_imaging
@pytest.mark.parametrize("kind", [".nii.gz", ".nrrd", ".mha", "dicom"])
def test_the_command_on_scans(tmp_path, model_path, kind, capsys):
    volume = scan("oblique")
    path = tmp_path / f"scan{kind}"
    if kind == "dicom":
        write_series(path, volume)
    else:
        volumes.write(path, volume.array, volume)
    assert command(path, *options(model_path, tmp_path / "out"), "--seed", 4, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    expected = draw(bf.load(model_path), volumes.read(path), seed=4)
    for k, name in enumerate(summary["masks"]):
        mask = volumes.read(tmp_path / "out" / name)
        assert np.array_equal(mask.array != 0, expected.mask(k))
        np.testing.assert_allclose(mask.origin, volume.origin, atol=2e-5)
        np.testing.assert_allclose(mask.direction, volume.direction, atol=1e-6)
    np.testing.assert_allclose(volumes.read(tmp_path / "out" / summary["mean"]).array, expected.mean)
    sizes = [int(expected.mask(k).sum()) for k in range(3)]
    assert summary["sizes"]["voxels"] == sizes and summary["seed"] == 4 and summary["draw_contract"] == 1
    np.testing.assert_allclose(summary["sizes"]["mL"], np.array(sizes) * 0.9 * 0.6 * 3 / 1000)
    assert set(os.listdir(tmp_path / "out")) == {
        *summary["masks"],
        summary["mean"],
        summary["entropy"],
        "summary.json",
        *summary["segmentations"],
    }
    assert summary["segmentations"] == (["masks.dcm", "mean.dcm"] if kind == "dicom" else [])
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").glob("m*[!m]")}
    assert command(path, *options(model_path, tmp_path / "out"), "--seed", 4) == 1
    assert "holds results already" in capsys.readouterr().err
    assert command(path, *options(model_path, tmp_path / "out"), "--seed", 4, "--overwrite") == 0
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "out").glob("m*[!m]")}, "byte for byte"


@needs_imaging
def test_real_slices_through_a_dicom_series(tmp_path, capsys):
    """From a series to segmentations, maps and a report: what the bundled model draws on each slice by itself."""
    import pydicom
    from highdicom.seg import segread

    with h5py.File(data_path("lidc/val.h5")) as file:
        images, raters = file["image"][67:71], file["mask"][67:71] > 0  # slices 2 to 5 of a nodule, marked by all four
    ct = Volume(images.astype(np.int16) * 6 - 1000, **GEOMETRIES["oblique"])
    write_series(tmp_path / "ct", ct)
    for k in range(4):
        volumes.write(tmp_path / f"rater{k}.nii.gz", raters[:, k], ct)
    theirs = [tmp_path / f"rater{k}.nii.gz" for k in range(4)]
    arguments = ["--n", 3, "--steps", 3, "--seed", 7, "--output", tmp_path / "out", "--report", "--json", "--quiet"]
    assert command(tmp_path / "ct", *arguments, "--center", 64, 64, "--raters", *theirs) == 0
    summary = json.loads(capsys.readouterr().out)
    model = bf.load("lidc")
    expected = torch.stack([bf.sample(model, model.preprocess(image), 3, 3, seed=7)[0, :, 0] for image in images], 1)
    assert expected.any((2, 3)).any(0).all(), "something is marked in every slice"
    uids = [pydicom.dcmread(path).SOPInstanceUID for path in volumes.read(tmp_path / "ct").instances]
    seg = segread(str(tmp_path / "out" / "masks.dcm"))
    pixels = seg.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    for k in range(3):
        assert np.array_equal(pixels[..., k], expected[k])
        assert np.array_equal(volumes.read(tmp_path / "out" / summary["masks"][k]).array, expected[k])
    wanted = torch.from_numpy(raters).transpose(0, 1)[None, :, None], expected[None, :, None]
    assert summary["raters"]["ged"] == pytest.approx(float(bf.metrics.generalized_energy_distance(*wanted)))
    assert (tmp_path / "out" / "report.html").stat().st_size > 50_000


@pytest.mark.parametrize("kind", [".png", ".npy", ".h5"])
def test_the_command_on_pictures_and_arrays(tmp_path, model_path, kind):
    """Without SimpleITK."""
    array = np.random.default_rng(3).integers(0, 255, (1 if kind == ".png" else 2, 16, 16), dtype=np.uint8)
    path = tmp_path / f"in{kind}"
    if kind == ".h5":
        with h5py.File(path, "w") as file:
            file["image"] = array
    else:
        volumes.write(path, array, Volume(array))
    assert command(path, *options(model_path, tmp_path / "out")) == 0
    expected = draw(bf.load(model_path), array).masks
    for k in range(3):
        file = next((tmp_path / "out").glob(f"mask_{k:03d}.*"))
        assert np.array_equal(volumes.read(file).array != 0, expected[k])


@needs_imaging
def test_overwriting_leaves_nothing_of_the_former(tmp_path, model_path):
    volume = scan()
    write_series(tmp_path / "ct", volume)
    out = tmp_path / "out"
    assert command(tmp_path / "ct", *options(model_path, out), "--report") == 0
    assert {"report.html", "masks.dcm", "mask_002.nii.gz"} <= set(os.listdir(out))
    (out / "notes.txt").write_text("mine")
    assert command(tmp_path / "ct", *options(model_path, out), "--n", 1, "--overwrite") == 0
    left = {p for p in os.listdir(out) if not p.endswith(".dcm")}
    assert left == {"mask_000.nii.gz", "mean.nii.gz", "entropy.nii.gz", "summary.json", "notes.txt"}


@needs_imaging
def test_raters(tmp_path, model_path, capsys):
    volume = scan()
    volumes.write(tmp_path / "scan.nii.gz", volume.array, volume)
    for k in range(2):
        volumes.write(tmp_path / f"rater{k}.nii.gz", np.roll(volume.array > 0, k, 2), volume)
    arguments = [tmp_path / "scan.nii.gz", *options(model_path, tmp_path / "out"), "--json"]
    raters = ["--raters", tmp_path / "rater0.nii.gz", tmp_path / "rater1.nii.gz"]
    assert command(*arguments, *raters) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["rater_files"] == [path.name for path in raters[1:]]
    found = summary["raters"]
    theirs = torch.stack([torch.from_numpy(np.roll(volume.array > 0, k, 2)) for k in range(2)])[None, :, None]
    ours = torch.from_numpy(draw(bf.load(model_path), volume).masks)[None, :, None]
    assert found["ged"] == pytest.approx(float(bf.metrics.generalized_energy_distance(theirs, ours)))
    assert found["hm_iou"] == pytest.approx(float(bf.metrics.hm_iou(theirs, ours)))


@needs_imaging
@pytest.mark.parametrize("plane", ["axial", "coronal"])
def test_reports(tmp_path, model_path, plane, capsys):
    """With the masks, and again for results that are there; the slices shown are those that were sampled."""
    volume = scan()
    volumes.write(tmp_path / "scan.nii.gz", volume.array, volume)
    volumes.write(tmp_path / "rater.nii.gz", volume.array > 0, volume)
    out = tmp_path / "out"
    assert command(tmp_path / "scan.nii.gz", *options(model_path, out), "--plane", plane, "--report") == 0
    page = (out / "report.html").read_text()
    slices, rest = ("5 slices", "17 × 23") if plane == "axial" else ("17 slices", "5 × 23")
    assert slices in page and rest in page and "scan.nii.gz" in page and "Generalised energy distance" not in page
    (out / "report.html").unlink()
    capsys.readouterr()
    assert cli.main(["report", str(out)]) == 0
    assert capsys.readouterr().out == f"{out / 'report.html'}\n" and (out / "report.html").read_text() == page
    (tmp_path / "scan.nii.gz").rename(tmp_path / "moved.nii.gz")
    assert cli.main(["report", str(out)]) == 1 and "there is no such file" in capsys.readouterr().err
    moved = ["--input", str(tmp_path / "moved.nii.gz"), "--raters", str(tmp_path / "rater.nii.gz")]
    assert cli.main(["report", str(out), *moved]) == 0
    page = (out / "report.html").read_text()
    assert "Generalised energy distance" in page and "rater.nii.gz" in page
    volumes.write(tmp_path / "other.nii.gz", volume.array + 1, volume)
    assert cli.main(["report", str(out), "--input", str(tmp_path / "other.nii.gz")]) == 1
    assert "is not what the results in" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path)]) == 1 and "holds no results" in capsys.readouterr().err


@needs_imaging
def test_raters_count_where_masks_were_drawn(tmp_path, model_path, capsys):
    """What they marked elsewhere is told of, not held against the model."""
    volume = scan()
    rater = volume.array > 0
    volumes.write(tmp_path / "scan.nii.gz", volume.array, volume)
    volumes.write(tmp_path / "rater.nii.gz", rater, volume)
    out, path = tmp_path / "out", tmp_path / "scan.nii.gz"
    with_rater = ["--raters", tmp_path / "rater.nii.gz", "--slices", 0, 2, "--json", "--report"]
    assert command(path, *options(model_path, out), *with_rater) == 0
    found = json.loads(capsys.readouterr().out)["raters"]
    ours = torch.from_numpy(draw(bf.load(model_path), volume, slices=(0, 2)).masks[:, :2])[None, :, None]
    theirs = torch.from_numpy(rater[:2])[None, None, None]
    assert found["ged"] == pytest.approx(float(bf.metrics.generalized_energy_distance(theirs, ours)))
    assert found["voxels_not_compared"] == int(rater[2:].sum())
    ged = f'id="ged" data-value="{found["ged"]!r}"'
    page = (out / "report.html").read_text()
    assert ged in page and "the 2 slices sampled of 5" in page
    assert cli.main(["report", str(out), "--raters", str(tmp_path / "rater.nii.gz")]) == 0
    assert ged in (out / "report.html").read_text()


def test_nothing_of_others_is_written_over(tmp_path, model_path, capsys):
    array = np.random.default_rng(3).integers(0, 255, (2, 16, 16), dtype=np.uint8)
    for name in ("mean.npy", "mask_000.npy"):
        np.save(tmp_path / name, array)
    arguments = [tmp_path / "mean.npy", *options(model_path, tmp_path)]
    assert command(*arguments) == 1
    assert "mean.npy is read, and would be written over" in capsys.readouterr().err
    (tmp_path / "mean.npy").rename(tmp_path / "in.npy")
    arguments[0] = tmp_path / "in.npy"
    assert command(*arguments) == 1
    assert "holds mask_000.npy, which `sample` did not write" in capsys.readouterr().err
    raters = ["--raters", tmp_path / "mask_000.npy", "--overwrite"]
    np.save(tmp_path / "mask_000.npy", array > 99)
    assert command(*arguments, *raters) == 1
    assert "mask_000.npy is read, and would be written over" in capsys.readouterr().err
    assert np.array_equal(np.load(tmp_path / "mask_000.npy"), array > 99)
    assert command(*arguments, "--overwrite") == 0
    assert not np.array_equal(np.load(tmp_path / "mask_000.npy"), array > 99)
    for text in ('{"weights": {}}', "[]", "{"):
        (tmp_path / "summary.json").write_text(text)
        assert command(*arguments, "--overwrite") == 1
        assert "summary.json is not of results of berdiff-fast sample" in capsys.readouterr().err
        assert (tmp_path / "summary.json").read_text() == text
        assert cli.main(["report", str(tmp_path)]) == 1
        assert "summary.json is not of results of berdiff-fast sample" in capsys.readouterr().err


@needs_imaging
def test_reports_of_one_series_of_several(tmp_path, model_path, capsys):
    import pydicom

    for uid in ("1", "2"):
        write_series(tmp_path / "ct", scan(), uid=uid)
    series = pydicom.dcmread(next((tmp_path / "ct").iterdir())).SeriesInstanceUID
    assert command(tmp_path / "ct", *options(model_path, tmp_path / "out"), "--series", series) == 0
    (tmp_path / "ct").rename(tmp_path / "moved")
    assert cli.main(["report", str(tmp_path / "out"), "--input", str(tmp_path / "moved")]) == 0
    np.save(tmp_path / "a.npy", np.zeros((16, 16)))
    assert command(tmp_path / "a.npy", *options(model_path, tmp_path / "o"), "--series", series) == 1
    assert "is not a DICOM folder" in capsys.readouterr().err


@needs_imaging
def test_a_series_that_no_segmentation_can_refer_to(tmp_path, model_path, capsys):
    """What de-identification takes away is left empty; without a frame of reference there is no segmentation."""
    import pydicom

    def without(*keywords):
        write_series(tmp_path / keywords[0], scan())
        for path in (tmp_path / keywords[0]).iterdir():
            d = pydicom.dcmread(path)
            for keyword in keywords:
                delattr(d, keyword)
            d.save_as(path)
        out = tmp_path / f"out of {keywords[0]}"
        assert command(tmp_path / keywords[0], *options(model_path, out)) == 0
        return json.loads((out / "summary.json").read_text())["segmentations"]

    empty = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID")
    assert without(*empty, "AccessionNumber", "ReferringPhysicianName", "SliceThickness") == ["masks.dcm", "mean.dcm"]
    assert without("FrameOfReferenceUID") == []


def test_interrupted_command(tmp_path, model_path, monkeypatch, capsys):
    """What is done stays, and is taken up; nothing else is there."""
    array = np.random.default_rng(3).integers(0, 255, (3, 16, 16), dtype=np.uint8)
    np.save(tmp_path / "in.npy", array)
    real, calls = Store.put, []

    def put(self, *arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        real(self, *arguments)

    monkeypatch.setattr(Store, "put", put)
    assert command(tmp_path / "in.npy", *options(model_path, tmp_path / "out")) == 130
    assert os.listdir(tmp_path / "out") == [results.WORK]
    monkeypatch.setattr(Store, "put", real)
    assert command(tmp_path / "in.npy", *options(model_path, tmp_path / "out")) == 0
    assert results.WORK not in os.listdir(tmp_path / "out")
    expected = draw(bf.load(model_path), array).masks
    assert np.array_equal(np.load(tmp_path / "out" / "mask_002.npy"), expected[2])
