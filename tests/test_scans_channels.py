# SPDX-License-Identifier: Apache-2.0
"""Volumes of several channels and regions: on one grid, scaled by the whole, cut around the head, nested masks."""

import mmap

import numpy as np
import pytest
import torch

import berdiff_fast as bf
from berdiff_fast.imaging import volumes
from berdiff_fast.io.volume import Volume
from berdiff_fast.scans import sampled

SHAPE = (5, 40, 36)


def model(**preprocessing):
    torch.manual_seed(1)
    network = bf.UNet(in_channels=2, img_channels=2, model_channels=32, channel_mult=(1,))
    with torch.no_grad():
        network.out[-1].weight.normal_(0, 0.2)
    return bf.BerDiff(
        network,
        prediction="y_0",
        preprocessing=bf.Preprocessing(
            "z-score", size=(32, 32), per_channel=True, by_volume=True, foreground=True, **preprocessing
        ),
        channels=["flair", "t1"],
        regions={"WT": [1, 2], "TC": [1]},
    )


def study(**place):
    random = np.random.default_rng(0)
    head = np.zeros(SHAPE, bool)
    head[:, 6:34, 3:29] = True
    arrays = [(random.normal(level, level / 5, SHAPE) * head).astype(np.float32) for level in (100, 5000)]
    options = {"spacing": (1.0, 1.0, 2.0), "origin": (-10.0, 20.0, 4.0), "format": "nifti", "placed": True, **place}
    return [Volume(x, **options) for x in arrays], arrays


def test_masks_are_those_of_the_slices_by_themselves():
    """Cut by hand around the middle of the head, scaled by the volume's numbers."""
    made, (given, arrays) = model(), study()
    found = bf.sample_volume(made, given, n=3, steps=3, seed=7)
    whole = torch.from_numpy(np.stack(arrays))[None]
    statistics = made.preprocessing.statistics(whole)
    for s in (0, 3):
        img = made.preprocess(whole[:, :, s, 4:36, 0:32], statistics)
        masks = bf.sample(made, img, n=3, steps=3, seed=7)[0].numpy()
        for k, name in enumerate(("WT", "TC")):
            of_slice = found[name].masks[:, s]
            assert np.array_equal(of_slice[:, 4:36, 0:32], masks[:, k]) and masks[:, k].any()
            assert of_slice.sum() == masks[:, k].sum()
    assert bool((found["TC"].masks <= found["WT"].masks).all())
    arrayed = bf.sample_volume(made, np.stack(arrays), n=3, steps=3, seed=7)
    assert np.array_equal(arrayed["TC"].masks, found["TC"].masks)


def test_labels_on_the_grid(tmp_path):
    made, (given, _) = model(), study()
    found = bf.sample_volume(made, given, n=2, steps=2, seed=1)
    labels = found.label_map_slices(1)
    volumes.write(tmp_path / "labels.nii.gz", labels, given[0])
    read = volumes.read(tmp_path / "labels.nii.gz")
    assert read.origin == given[0].origin and read.spacing == given[0].spacing
    wanted = np.where(found["TC"].mask(1), 1, np.where(found["WT"].mask(1), 2, 0))
    assert np.array_equal(read.array, wanted) and set(np.unique(wanted)) == {0, 1, 2}


def test_it_goes_on_where_it_stopped(tmp_path):
    made, (given, _) = model(), study()
    whole = bf.sample_volume(made, given, n=9, steps=2)
    bf.sample_volume(made, given, n=9, steps=2, work=tmp_path / "w")
    again = bf.sample_volume(made, given, n=9, steps=2, work=tmp_path / "w")
    assert all(np.array_equal(whole[name].masks, again[name].masks) for name in ("WT", "TC"))


def test_a_channel_that_is_stored_the_other_way_round():
    made, (given, _) = model(), study()
    plain = bf.sample_volume(made, given, n=2, steps=2)
    x = given[1]
    turned = Volume(
        np.ascontiguousarray(x.array[:, :, ::-1]),
        spacing=x.spacing,
        origin=(x.origin[0] + 35.0, *x.origin[1:]),
        direction=np.diag([-1.0, 1.0, 1.0]),
        format="nifti",
        placed=True,
    )
    assert np.array_equal(bf.sample_volume(made, [given[0], turned], n=2, steps=2)["WT"].masks, plain["WT"].masks)


def test_a_head_larger_than_a_tile_is_covered():
    made, (_, arrays) = model(), study()
    wide = [Volume(np.tile(x, (1, 2, 2)), spacing=(1.0, 1.0, 2.0)) for x in arrays]
    found = bf.sample_volume(made, wide, n=1, steps=1, slices=(0, 1))
    assert len(found.plan["tiles"]) > 1 and found.plan["inside"] == [6, 74, 3, 65]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda v, a: v[:1], r"2 channels \(flair, t1\), got 1"),
        (lambda v, a: v[0], r"2 channels \(flair, t1\), got 1"),
        (lambda v, a: a[0], r"must be \(2, S, H, W\)"),
        (lambda v, a: [v[0], study(origin=(90.0, 0.0, 0.0))[0][1]], "one grid: .* lies elsewhere"),
        (lambda v, a: [v[0], Volume(a[1][:, :30], spacing=(1.0, 1.0, 2.0))], "one grid"),
        (lambda v, a: [Volume(x * 0) for x in a], "0 everywhere"),
    ],
    ids=["few", "one", "array", "elsewhere", "shape", "nothing"],
)
def test_bad_channels(given, words):
    with pytest.raises(ValueError, match=words):
        bf.sample_volume(model(), given(*study()), n=1, steps=1)


def test_beyond_the_scan_is_what_was_beyond_it_in_training():
    """0, also where the scan has values below."""
    made, random = model(), np.random.default_rng(2)
    arrays = random.normal(-50, 20, (2, 2, 24, 20)).astype(np.float32)
    found = bf.sample_volume(made, arrays, n=2, steps=2, seed=3)
    padded = torch.from_numpy(np.pad(arrays, ((0, 0), (0, 0), (4, 4), (6, 6))))[None]
    img = made.preprocess(padded[:, :, 1], made.preprocessing.statistics(torch.from_numpy(arrays)[None]))
    masks = bf.sample(made, img, n=2, steps=2, seed=3)[0].numpy()
    assert np.array_equal(found["WT"].masks[:, 1], masks[:, 0, 4:28, 6:26]) and masks.any()


@pytest.mark.skipif(not hasattr(mmap.mmap, "madvise"), reason="memory is given back where the system has madvise")
def test_the_bits_of_each_region_give_their_memory_back(tmp_path):
    """They are parts of one file, which has to be found behind each of them."""
    made, (given, _) = model(), study()
    found = bf.sample_volume(made, given, n=2, steps=2, work=tmp_path / "work")
    behind = {id(sampled.file_behind(part.bits)) for part in found.of_region.values()}
    assert len(behind) == 1 and isinstance(sampled.file_behind(found["TC"].bits), mmap.mmap)
    assert sampled.file_behind(np.zeros(3)) is None
