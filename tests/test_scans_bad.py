# SPDX-License-Identifier: Apache-2.0
"""Scans and arguments that are refused: one line each, and nothing left behind."""

from __future__ import annotations

import os
import struct

import h5py
import numpy as np
import pytest
from PIL import Image
from scans import scan, small_model, write_series
from support import threads

from berdiff_fast import cli
from berdiff_fast.imaging import volumes
from berdiff_fast.imaging.volumes import Volume
from berdiff_fast.io import pictures
from berdiff_fast.scans import results

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


def command(*arguments):
    return cli.main(["sample", *map(str, arguments)])


def options(model_path, output):
    return ["--model", model_path, "-n", 3, "--steps", 4, "--spacing", "trailing", "--output", output, "--quiet"]


# ---------------------------------------------------------------------- bad input


def nifti(folder, array=None, **changes):
    volume = scan()
    if array is not None:
        volume = Volume(array, **{k: getattr(volume, k) for k in ("spacing", "origin", "direction")})
    path = folder / "scan.nii"
    volumes.write(path, volume.array, volume)
    data = bytearray(path.read_bytes())
    for offset, (form, value) in changes.get("header", {}).items():
        struct.pack_into(form, data, offset, value)
    data = data[: changes.get("length", len(data))]
    path.write_bytes(bytes(data))
    return path


def truncated(folder, ending):
    volume = scan()
    path = folder / f"scan{ending}"
    volumes.write(path, volume.array, volume)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return path


def damaged(folder):
    path = truncated(folder, ".nii.gz")
    data = bytearray(path.read_bytes())
    data[60:90] = bytes(30)
    path.write_bytes(bytes(data))
    return path


def itk(folder, array, ending=".nii.gz", vector=False):
    import SimpleITK as sitk

    path = folder / f"scan{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=vector), str(path))
    return path


def series(folder, *scans_, **changes):
    for number, volume in enumerate(scans_ or (scan(),)):
        write_series(folder / "ct", volume, uid=f"series-{number}" if number else None, **changes)
    return folder / "ct"


def saved(folder, name, content):
    path = folder / name
    if isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(content)
    return path


def empty_folder(folder):
    (folder / "nothing").mkdir()
    return folder / "nothing"


def hdf5(folder, **datasets):
    with h5py.File(folder / "in.h5", "w") as file:
        for name, data in datasets.items():
            file[name] = data
    return folder / "in.h5"


def picture(folder, mode):
    Image.new(mode, (16, 16), (10, 200, 30)[: len(mode)] if len(mode) > 1 else 3).save(folder / "in.png")
    return folder / "in.png"


def with_nan():
    array = scan().array.astype(np.float32)
    array[2, 3, 4] = np.nan
    return array


def position(k):
    return ["0", "0", str((0, 2.5, 5.0, 9.0, 11.5)[k])]


def slanted(k):
    return ["1", "0", "0", "0", "1", "0"] if k else ["1", "0", "0", "0", "0.9848", "0.1736"]


BAD_FILES = {
    # what it is: (how it is made, what is said)
    "missing": (lambda d: d / "no.nii", "there is no such file or folder"),
    "an ending that nobody knows": (lambda d: saved(d, "a.xyz", b"1"), "must be a DICOM folder or a file that ends in"),
    "an empty folder": (empty_folder, "holds no DICOM series"),
    "nifti, cut short": (lambda d: truncated(d, ".nii"), "is cut short: it has"),
    "nifti.gz, cut short": (lambda d: truncated(d, ".nii.gz"), "cannot be read: Compressed file ended"),
    "nifti, its header alone": (lambda d: nifti(d, length=300), "is cut short: it has 300 of"),
    "nifti of text": (lambda d: saved(d, "a.nii", b"hello" * 200), "is not a NIfTI file"),
    "nifti.gz of text": (lambda d: saved(d, "a.nii.gz", b"hello" * 200), "cannot be read: Not a gzipped file"),
    "an empty nifti": (lambda d: saved(d, "a.nii", b""), "is not a NIfTI file"),
    "nrrd, cut short": (lambda d: truncated(d, ".nrrd"), "cannot be read"),
    "nrrd of text": (lambda d: saved(d, "a.nrrd", b"hello"), "cannot be read"),
    "mha, cut short": (lambda d: truncated(d, ".mha"), "cannot be read"),
    "mhd without its data": (lambda d: saved(d, "a.mhd", b"ObjectType = Image\nNDims = 3\n"), "cannot be read"),
    "4-D": (lambda d: itk(d, np.zeros((2, 3, 8, 8), np.int16)), "must be one volume of 3 dimensions, got 4"),
    "colour": (lambda d: itk(d, np.zeros((3, 8, 8, 3), np.uint8), vector=True), "one number for each voxel, got 3"),
    "complex": (lambda d: itk(d, np.zeros((3, 8, 8), np.complex64), ".nii"), "one number for each voxel, got 2"),
    "NaN": (lambda d: nifti(d, with_nan()), "must be finite, got 1 voxels"),
    "infinite": (lambda d: nifti(d, np.where(np.isnan(with_nan()), np.inf, 0)), "must be finite, got 1 voxels"),
    "dicom of text": (lambda d: saved(d, "a.dcm", b"hello" * 50), "cannot be read"),
    "dicom, cut short": (
        lambda d: saved(d, "a.dcm", next(series(d).iterdir()).read_bytes()[:1200]),
        "cannot be read",
    ),
    "mixed series": (lambda d: series(d, scan(), scan("plain")), "holds 2 series; choose one with series: "),
    "a missing slice": (lambda d: series(d, drop=2), "misses slices, or is not evenly spaced: 5.000 mm between"),
    "uneven slices": (
        lambda d: series(d, ImagePositionPatient=position),
        "misses slices, or is not evenly spaced: 4.000",
    ),
    "slices at one place": (
        lambda d: series(d, ImagePositionPatient=["0", "0", "0"]),
        "has two slices at one position",
    ),
    "slices of several sizes": (lambda d: series(d, Rows=lambda k: 17 - (k == 2)), "has slices of different sizes"),
    "a tilted gantry": (
        lambda d: series(d, ImagePositionPatient=lambda k: ["0", str(0.91 * k), str(2.5 * k)]),
        "tilted gantry",
    ),
    "slices of several spacings": (
        lambda d: series(d, PixelSpacing=lambda k: ["0.8", "0.4" if k == 2 else "0.703125"]),
        "different pixel spacing",
    ),
    "hdf5 with a group": (lambda d: hdf5(d, **{"image/x": np.zeros(3)}), "cannot be read"),
    "nifti.gz, damaged": (damaged, "cannot be read"),
    "slices that are not parallel": (lambda d: series(d, ImageOrientationPatient=slanted), "not parallel"),
    "a picture in colour": (lambda d: picture(d, "RGB"), "must be one grey picture|channels|colour"),
    "a picture of text": (lambda d: saved(d, "a.png", b"hello"), "cannot be read: not a PNG, JPEG or TIFF"),
    "npy of text": (lambda d: saved(d, "a.npy", b"hello"), "a.npy: "),
    "npy of objects": (lambda d: saved(d, "a.npy", np.array([[None]])), "a.npy: "),
    "npy of strings": (lambda d: saved(d, "a.npy", np.array([["x"]])), "must hold real numbers"),
    "npy of one dimension": (lambda d: saved(d, "a.npy", np.zeros(5)), "must be one volume of 3 dimensions"),
    "npy of four": (lambda d: saved(d, "a.npy", np.zeros((1, 2, 3, 4))), "must be one volume of 3 dimensions"),
    "an empty npy": (lambda d: saved(d, "a.npy", np.zeros((0, 4, 4))), "must not be empty"),
    "hdf5 of text": (lambda d: saved(d, "a.h5", b"hello"), "cannot be read"),
    "hdf5 without images": (lambda d: hdf5(d, other=np.zeros(3)), "must have a dataset 'image', got ['other']"),
}

BAD_ARGUMENTS = {
    "n": (["--n", "0"], "n must be at least 1, got 0"),
    "steps": (["--steps", "5000"], "steps"),
    "slices": (["--slices", "3", "9"], "slices must be (first, last + 1) within 0 to 5, got (3, 9)"),
    "slices the wrong way": (["--slices", "3", "2"], "slices must be (first, last + 1)"),
    "roi": (["--roi", "0", "40", "0", "5"], "roi must be (first, last + 1) within 0 to 17"),
    "center": (["--center", "99", "3"], "center must be (row, column) within (17, 23), got (99.0, 3.0)"),
    "overlap": (["--overlap", "1"], "overlap must be at least 0 and below 1, got 1.0"),
    "device": (["--device", "gpu"], "device must be auto, or one that torch can use here, got 'gpu'"),
    "device that is not there": (["--device", "cuda:99"], "device must be auto, or one that torch can use here"),
    "max-batch": (["--max-batch", "0"], "max_batch must be at least 1, got 0"),
    "model": (["--model", "no-such-model"], "no file or directory 'no-such-model'"),
    "raters": (["--raters", "missing.nii"], "missing.nii: there is no such file"),
    "output in a file": (["--output", "scan.npy"], "output must be a folder"),
    "output that cannot be made": (["--output", "/proc/out"], "/proc/out"),
}


def one_line(capfd, status):
    err = capfd.readouterr().err
    assert status == 1 and err.startswith("berdiff-fast sample: ") and err.count("\n") == 1, err
    return err


@needs_imaging
@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_files(tmp_path, model_path, what, capfd):
    make, message = BAD_FILES[what]
    path = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    err = one_line(capfd, command(path, *options(model_path, tmp_path / "deep" / "out")))
    assert str(path) in err and any(words in err for words in message.split("|")), err
    assert sorted(tmp_path.rglob("*")) == before, "something was left behind"


@pytest.mark.parametrize("what", BAD_ARGUMENTS)
def test_bad_arguments(tmp_path, model_path, what, capfd, monkeypatch):
    arguments, message = BAD_ARGUMENTS[what]
    monkeypatch.chdir(tmp_path)
    np.save("scan.npy", scan().array)
    err = one_line(capfd, command("scan.npy", *options(model_path, "out"), *arguments))
    assert message in err, err
    assert os.listdir() == ["scan.npy"], "something was left behind"


@needs_imaging
def test_raters_of_another_grid(tmp_path, model_path, capfd):
    volume, other = scan("anisotropic"), scan("flipped")
    volumes.write(tmp_path / "scan.nii", volume.array, volume)
    volumes.write(tmp_path / "small.nii", volume.array[:2], Volume(volume.array[:2]))
    volumes.write(tmp_path / "elsewhere.nii", other.array > 0, other)
    volumes.write(tmp_path / "ones.nii", (volume.array > 0) + np.int16(1), volume)
    for name, message in (
        ("small.nii", "has the shape (2, 17, 23), and the scan (5, 17, 23)"),
        ("elsewhere.nii", "lies elsewhere than the scan"),
        ("scan.nii", "must hold a mask, of 0 and one other value"),
        ("ones.nii", "must hold a mask, of 0 and one other value"),
    ):
        arguments = [tmp_path / "scan.nii", *options(model_path, tmp_path / "out"), "--raters", tmp_path / name]
        assert message in one_line(capfd, command(*arguments))


def test_no_space(tmp_path, model_path, capfd, monkeypatch):
    """Full when masks are written: told in a line; the slices that are done are kept, and then it works."""
    np.save(tmp_path / "in.npy", np.zeros((2, 16, 16), np.uint8))

    def full(*_):
        raise OSError(28, "No space left on device", "mask_000.npy")

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "contiguous", full)
        err = one_line(capfd, command(tmp_path / "in.npy", *options(model_path, tmp_path / "out")))
    assert "No space left on device" in err and os.listdir(tmp_path / "out") == [results.WORK]
    assert command(tmp_path / "in.npy", *options(model_path, tmp_path / "out")) == 0
    assert results.WORK not in os.listdir(tmp_path / "out")


def test_without_simpleitk(tmp_path, model_path, capfd, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "SimpleITK", None)
    saved(tmp_path, "a.mha", b"1" * 600)
    err = one_line(capfd, command(tmp_path / "a.mha", *options(model_path, tmp_path / "out")))
    assert 'pip install "berdiff_fast[imaging]"' in err
