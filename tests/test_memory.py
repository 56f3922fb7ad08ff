# SPDX-License-Identifier: Apache-2.0
"""Memory follows what is asked for: a cut of a large scan takes the scan and little more, measured in a child."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from scans import bright, scan, write_series
from support import ENVIRONMENT, threads

import berdiff_fast as bf
from berdiff_fast import scans
from berdiff_fast.imaging import volumes
from berdiff_fast.imaging.volumes import Volume
from berdiff_fast.io.slices import Slices, deflate
from berdiff_fast.scans.store import Store

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")

SHAPE = (300, 512, 512)
MB = 10**6

#: Runs ``work`` after imports and the model, and says by how many bytes memory rose above what these take.
PROGRAM = """
import json, sys
import berdiff_fast as bf
from berdiff_fast import cli, scans
from berdiff_fast.scans import results
from berdiff_fast.imaging import volumes
for name in ("nibabel", "SimpleITK", "pydicom", "highdicom"):
    try:
        __import__(name)
    except ImportError:
        pass

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024

path, model_path, output = sys.argv[1:]
model = bf.load(model_path)
base = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
{work}
print(json.dumps(status("VmHWM") - base))
"""


@pytest.fixture(scope="module")
def model_path():
    return "lidc"  # whose network is that of users, and has its share in the bound


@pytest.fixture(scope="module")
def large():
    """157 MB of Hounsfield units, which compress quickly."""
    array = np.zeros(SHAPE, np.int16)
    array[:, 100:400, 100:400] = 40
    return Volume(array, (0.7, 0.7, 1.25), (-180.0, -180.0, -300.0))


def peak(path, model_path, output, work: str) -> int:
    """Bytes above what imports and the model take, at most, during ``work``."""
    words = [sys.executable, "-c", PROGRAM.replace("{work}", work), str(path), str(model_path), str(output)]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


COMMAND = """
assert cli.main(["sample", path, "--model", model_path, "--output", output, "--steps", "2", "--center", "214", "130",
                 "--slices", "150", "151", "--quiet"{more}]) == 0
"""


@pytest.mark.parametrize(
    "kind",
    [
        "scan.nii.gz",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("scan.npy", "scan.nii", "scan.mha", "scan.nrrd", "series")),
    ],
)
def test_a_cut_takes_the_scan_and_300_mb(tmp_path, model_path, large, kind):
    """The bound is on the array that is read, in the type of its units, plus 300 MB."""
    if kind != "scan.npy":
        pytest.importorskip("highdicom")
    path = tmp_path / kind
    if kind == "series":
        write_series(path, large)
    else:
        volumes.write(path, large.array, large)
    size = volumes.read(path).array.nbytes
    more = ""
    if kind == "scan.npy":  # a report and raters look at the slices that were sampled alone
        np.save(tmp_path / "rater.npy", large.array > 0)
        more = f', "--report", "--raters", "{tmp_path / "rater.npy"}"'
        size += 2 * large.array.size  # the rater's file, and the bits of it that are compared
    assert peak(path, model_path, tmp_path / "out", COMMAND.replace("{more}", more)) < size + 300 * MB


def test_masks_of_three_slices_take_no_more_than_these(tmp_path, model_path, large):
    np.save(tmp_path / "scan.npy", large.array)
    work = """
sampled = bf.sample_volume(model, volumes.read(path), 16, 2, center=(214, 130), slices=(100, 103), work=output)
masks, mean = sampled.masks, sampled.mean
assert masks.shape == (16, 300, 512, 512) and mean.shape == masks.shape[1:] and mean.any() == masks[:, 101].any()
"""
    assert peak(tmp_path / "scan.npy", model_path, tmp_path / "work", work) < large.array.nbytes + 300 * MB


# ---------------------------------------------------------------------- slice by slice


@pytest.mark.parametrize("plane", [0, 1, 2])
def test_slices_are_those_of_the_whole(tmp_path, plane):
    """Masks, mean and entropy, in memory and in a file, of some slices along any axis."""
    volume = scan()
    first = (1, 4, 11)[plane]  # where its box begins
    with threads(1):
        for work in (None, tmp_path / "work"):
            model = bright(mode="window", window=(-500, -400), size=(8, 8))
            sampled = scans.sample_volume(model, volume, 9, 3, slices=(first, first + 3), plane=plane, work=work)
            masks = sampled.masks
            assert masks.any() and masks.shape == (9, *volume.array.shape)
            for k in range(9):
                assert np.array_equal(np.stack([*sampled.mask_slices(k)]), masks[k])
                assert np.array_equal(sampled.mask(k), masks[k])
            assert np.array_equal(sampled.mean, (masks.sum(0) / 9).astype(np.float32))
            assert np.array_equal(np.stack([*sampled.mean_slices()]), sampled.mean)
            p = torch.from_numpy(sampled.mean)
            assert np.array_equal(np.stack([*sampled.entropy_slices()]), bf.imaging.summary.disagreement(p).numpy())
            assert np.array_equal(sampled.drawn(), np.moveaxis(masks, plane + 1, 1)[:, first : first + 3])


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha", ".npy"])
@pytest.mark.parametrize("dtype", [bool, np.float32, np.int16])
def test_slices_are_written_as_arrays_are(tmp_path, ending, dtype):
    """To the byte, and read back equal, by other readers too."""
    if ending != ".npy":
        sitk = pytest.importorskip("SimpleITK")
    volume = scan("oblique")
    array = np.zeros((5, 80, 70), dtype)
    array[1:3, 20:40, 30:50] = 1
    like = Volume(array, volume.spacing, volume.origin, volume.direction)
    volumes.write(tmp_path / f"whole{ending}", array, like)
    volumes.write(tmp_path / f"slices{ending}", Slices(array.shape, array.dtype, lambda s: array[s]), like)
    assert (tmp_path / f"whole{ending}").read_bytes() == (tmp_path / f"slices{ending}").read_bytes()
    assert np.array_equal(volumes.read(tmp_path / f"slices{ending}").array, array)
    if ending == ".npy":
        assert np.array_equal(np.load(tmp_path / "slices.npy"), array)
    else:
        image = sitk.ReadImage(str(tmp_path / f"slices{ending}"))
        assert np.array_equal(sitk.GetArrayFromImage(image), array)
        assert np.allclose(image.GetOrigin(), like.origin) and np.allclose(image.GetSpacing(), like.spacing)
        assert np.allclose(np.reshape(image.GetDirection(), (3, 3)), like.direction)


@pytest.mark.parametrize("packed", [True, False])
def test_streams_with_zeros_are_what_went_in(packed):
    rng = np.random.default_rng(0)
    zeros, noise = bytes(70_000), rng.integers(0, 9, 70_000, np.uint8).tobytes()
    for parts in (
        [],
        [zeros],
        [zeros, zeros, noise],
        [noise, zeros, noise, zeros],
        [b"", bytes(9), noise, bytes(5000)],
    ):
        file = io.BytesIO()
        assert deflate(file, parts, gzip=packed) == len(file.getvalue())
        assert (gzip.decompress if packed else zlib.decompress)(file.getvalue()) == b"".join(parts)


def test_a_cut_short_scan_says_how_much_is_there(tmp_path):
    pytest.importorskip("nibabel")
    volume = Volume(np.ones((40, 300, 200), np.int16), (1.0, 1.0, 1.0))
    volumes.write(tmp_path / "a.nii", volume.array, volume)
    data = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(data[:-1001]))
    with pytest.raises(ValueError, match=rf"is cut short: it has {len(data) - 1001} of {len(data)} bytes"):
        volumes.read(tmp_path / "b.nii.gz")


def test_voxels_outlive_the_library_s_image(tmp_path):
    pytest.importorskip("SimpleITK")
    volume = scan()
    volumes.write(tmp_path / "a.mha", volume.array, volume)
    kept = [volumes.read(tmp_path / "a.mha").array for _ in range(20)]
    for array in kept:
        array += 1  # it is ours
    assert all(np.array_equal(array, volume.array + 1) for array in kept)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_bits_of_slices_that_are_not_done_are_cleared(tmp_path, axis):
    shape = (2, 4, 5, 6)
    store = Store(tmp_path, "plan", shape, axis)
    part = np.full(tuple(np.delete(shape, axis + 1)), 255, np.uint8)
    for index in (1, 3):
        store.put(index, part)
    (tmp_path / "done").write_text((tmp_path / "done").read_text().splitlines(keepends=True)[0])
    again = Store(tmp_path, "plan", shape, axis)
    marked = np.moveaxis(again.bits, axis + 1, 0).any(axis=(1, 2, 3))
    assert again.done == {1} and np.flatnonzero(marked).tolist() == [1]


def test_the_bar_moves_within_a_slice(monkeypatch):
    """By the network's calls: of one slice in 5 steps, 5 times; in all one slice, and no more."""
    import tqdm.auto

    moves = []

    class Bar:
        def __init__(self, **options):
            assert options["total"] == 2

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, count):
            moves.append(count)

        def set_postfix_str(self, words, refresh):
            assert words in ("slice 0", "slice 1")

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    array = np.random.default_rng(3).integers(0, 255, (2, 512, 512), dtype=np.uint8)
    scans.sample_volume(bright(), array, 2, 5, progress=True)
    assert len(moves) >= 10 and max(moves) <= 0.2 + 1e-9 and sum(moves) == pytest.approx(2)
