# SPDX-License-Identifier: Apache-2.0
"""Regions of label maps, channels scaled each by itself, and models that know the names of both."""

import json

import numpy as np
import pytest
import torch

import berdiff_fast as bf
from berdiff_fast.model import fingerprint
from berdiff_fast.regions import nest

BRATS = "WT=1,2,4 TC=1,4 ET=4"


def test_labels_to_regions_and_back():
    regions = bf.Regions.parse(BRATS)
    labels = np.random.default_rng(0).choice([0, 1, 2, 4], (5, 6, 7)).astype(np.uint8)
    masks = regions.masks_of(labels)
    assert masks.shape == (3, 5, 6, 7) and str(regions) == BRATS
    assert np.array_equal(masks[1], (labels == 1) | (labels == 4))
    assert np.array_equal(regions.labels_of(masks), labels)
    assert regions.inside == ((1, 0), (2, 0), (2, 1)) and regions.own_labels == (2, 1, 4)


@pytest.mark.parametrize(
    ("text", "labels", "back"),
    [
        ("WT=1,2,4", [0, 1, 2, 4], [0, 1, 1, 1]),  # a mask cannot tell its labels apart
        ("LV=1 RV=2", [0, 1, 2], [0, 1, 2]),
        ("ET=3 TC=1,3 WT=1,2,3", [0, 1, 2, 3], [0, 1, 2, 3]),  # the smallest first
        ("A=300", [0, 300], [0, 300]),
    ],
)
def test_other_tables(text, labels, back):
    regions = bf.Regions.parse(text)
    assert regions.labels_of(regions.masks_of(np.array(labels))).tolist() == back


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("WT", "NAME=LABEL"),
        ("WT=", "NAME=LABEL"),
        ("WT=a", "NAME=LABEL"),
        ("WT=0", "at least 1"),
        ("WT=1 wt=2", "different names"),
        ("a/b=1", "names of letters"),
        ("", "different names"),
        ("WT=99999", "at most 65535"),
    ],
)
def test_bad_tables(text, words):
    with pytest.raises(ValueError, match=words):
        bf.Regions.parse(text)


def test_nested_masks_contain_their_parts():
    masks = torch.rand(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.3
    before = masks.clone()
    nest(masks, bf.Regions.parse(BRATS).inside, 2)
    wt, tc, et = masks.unbind(2)
    assert bool((et <= tc).all() and (tc <= wt).all())
    assert (
        torch.equal(et, before[:, :, 2]) and torch.equal(tc, before[:, :, 1:].any(2)) and torch.equal(wt, before.any(2))
    )


def model(**options):
    torch.manual_seed(0)
    network = bf.UNet(in_channels=3, img_channels=4, model_channels=32, channel_mult=(1,))
    return bf.BerDiff(
        network,
        preprocessing=bf.Preprocessing("z-score", per_channel=True, by_volume=True),
        channels=["flair", "t1", "t1ce", "t2"],
        regions=bf.Regions.parse(BRATS),
        **options,
    )


def test_samples_are_nested_whatever_the_chunks():
    made, img = model(), torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    masks, p = bf.sample(made, img, n=5, steps=3, seed=1, return_probability=True)
    wt, tc, et = masks.unbind(2)
    assert bool((et <= tc).all() and (tc <= wt).all()) and bool((p[:, :, 2] <= p[:, :, 0]).all())
    assert torch.equal(masks, bf.sample(made, img, n=5, steps=3, seed=1, max_batch=3))


def test_a_model_file_knows_names(tmp_path):
    made = model()
    made.save(tmp_path / "m.safetensors")
    loaded = bf.load(tmp_path / "m.safetensors")
    assert loaded.channels == ("flair", "t1", "t1ce", "t2") and loaded.regions == made.regions
    assert loaded.preprocessing == made.preprocessing and fingerprint(loaded) == fingerprint(made)
    plain = bf.BerDiff(made.network, preprocessing=made.preprocessing)
    assert fingerprint(plain) != fingerprint(made)
    assert {"channels", "regions"}.isdisjoint(plain.to_config())


def test_former_models_are_called_what_they_were():
    assert repr(bf.Preprocessing()) == (
        "Preprocessing(mode='min-max', window=None, output_range=(-1.0, 1.0), size=None, pixel_spacing=None)"
    )
    assert list(json.loads(json.dumps(bf.Preprocessing().to_config()))) == [
        "mode", "window", "output_range", "size", "pixel_spacing"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(channels=["a", "b"]), "4 channels"),
        (dict(channels=["a", "a", "b", "c"]), "different names"),
        (dict(regions={"WT": [1]}), "3 channels of a mask"),
    ],
)
def test_names_that_do_not_fit(options, words):
    network = bf.UNet(in_channels=3, img_channels=4, model_channels=32, channel_mult=(1,))
    with pytest.raises(ValueError, match=words):
        bf.BerDiff(network, **options)


def test_each_channel_by_itself():
    raw = torch.stack([torch.linspace(0, 10, 16), torch.linspace(0, 1000, 16)]).view(1, 2, 4, 4)
    together, apart = bf.Preprocessing()(raw), bf.Preprocessing(per_channel=True)(raw)
    assert together[0, 0].max() < -0.9 and torch.allclose(apart[0, 0], apart[0, 1], atol=1e-6)
    windows = bf.Preprocessing("window", ((0, 10), (0, 1000)))
    assert torch.allclose(windows(raw), apart)
    with pytest.raises(ValueError, match="each of the 1 channels"):
        windows(raw[:, :1])


def test_a_slice_alone_has_what_it_has_in_its_volume():
    volume = torch.randn(1, 4, 6, 8, 8, generator=torch.Generator().manual_seed(0)) * 50 + 200
    volume[:, :, :, :3] = 0
    scaling = bf.Preprocessing("z-score", per_channel=True, by_volume=True)
    whole = scaling(volume, scaling.statistics(volume))
    inside = whole[:, :, :, 3:]
    assert torch.allclose(inside.mean((0, 2, 3, 4)), torch.zeros(4), atol=1e-5)
    assert torch.allclose(inside.std((0, 2, 3, 4), correction=0), torch.ones(4), atol=1e-5)
    assert torch.equal(scaling(volume[:, :, 2], scaling.statistics(volume)), whole[:, :, 2])
    with pytest.raises(ValueError, match="statistics must be given"):
        scaling(volume[:, :, 2])
    assert torch.equal(scaling(volume * 0, scaling.statistics(volume * 0)), volume * 0)
