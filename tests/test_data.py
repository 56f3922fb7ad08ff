# SPDX-License-Identifier: Apache-2.0
"""HDF5 files of slices and raters, and the sequence of training examples made of them."""

from __future__ import annotations

import pickle

import h5py
import numpy as np
import pytest
import torch
from support import shared
from torch.utils.data import DataLoader

from berdiff_fast import Preprocessing
from berdiff_fast.data.examples import Augmentation, TrainingExamples
from berdiff_fast.data.hdf5 import RaterDataset, check_disjoint


def write(path, image=None, mask=None, **more):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (6, 16, 16), dtype=np.uint8) if image is None else image
    mask = (rng.random((6, 4, 16, 16)) < 0.3).astype(np.uint8) if mask is None else mask
    with h5py.File(path, "w") as file:
        for name, values in {"image": image, "mask": mask, **more}.items():
            if values is not False:
                file[name] = values
    return path


@pytest.mark.parametrize("in_memory", [False, True])
def test_reads_what_was_written(tmp_path, in_memory):
    image = np.arange(6 * 16 * 16, dtype=np.uint16).reshape(6, 16, 16)
    path = write(tmp_path / "a.h5", image, patient_id=np.arange(6))
    data = RaterDataset(path, in_memory=in_memory)
    assert (len(data), data.raters, data.img_channels, data.mask_channels, data.image_size) == (6, 4, 1, 1, (16, 16))
    with h5py.File(path) as file:
        for i in range(6):
            img, masks = data[i]
            assert np.array_equal(img[0], file["image"][i]) and np.array_equal(masks[:, 0], file["mask"][i] == 1)
            assert masks.dtype is torch.bool and img.dtype is torch.uint16
            for r in range(4):
                assert all(torch.equal(a, b) for a, b in zip(data.one_rater(i, r), (img, masks[r]), strict=True))
    assert data.describe(3) == {"index": 3, "patient_id": 3}
    assert torch.equal(data[-1][0], data[5][0])
    with pytest.raises(IndexError, match="index"):
        data[6]
    with pytest.raises(IndexError, match="rater must be in"):
        data.one_rater(0, 4)


def test_channels(tmp_path):
    image = np.random.default_rng(0).random((3, 2, 8, 8), dtype=np.float32)
    mask = np.ones((3, 5, 2, 8, 8), bool)
    data = RaterDataset(write(tmp_path / "a.h5", image, mask))
    assert (data.img_channels, data.raters, data.mask_channels) == (2, 5, 2)
    assert data[1][0].shape == (2, 8, 8) and data[1][1].shape == (5, 2, 8, 8)


def test_real_slices():
    lazy = RaterDataset(shared("data/lidc/val.h5"))
    assert len(lazy) == 1746 and lazy.raters == 4 and lazy.image_size == (128, 128)
    images, masks = lazy.batch([0, 700, 1745])
    assert images.dtype is torch.uint8 and masks.any()
    assert set(lazy.describe(5)) == {"index", "patient_id", "nodule", "slice"}
    check_disjoint(RaterDataset(shared("data/lidc/train.h5")), lazy)


@pytest.mark.parametrize("in_memory", [False, True])
def test_workers_read_the_same(tmp_path, in_memory):
    data = RaterDataset(write(tmp_path / "a.h5"), in_memory=in_memory)
    data[0]  # opens the file here: the workers must not use this handle
    alone = [data[i][0] for i in range(6)]
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert all(torch.equal(a, b) for a, (b, _) in zip(alone, loader, strict=True))
    # As a spawned worker would get it.
    assert torch.equal(pickle.loads(pickle.dumps(data))[2][0], alone[2])


BAD_FILES = {
    "has no dataset 'mask'": dict(mask=False),
    "has no dataset 'image'": dict(image=False),
    "image must be": dict(image=np.zeros((6, 16), np.uint8)),
    "mask must be": dict(mask=np.zeros((6, 16, 16), np.uint8)),
    "does not fit": dict(mask=np.zeros((5, 4, 16, 16), np.uint8)),
    "does not fit image": dict(mask=np.zeros((6, 4, 16, 17), np.uint8)),
    "is empty": dict(image=np.zeros((0, 16, 16), np.uint8), mask=np.zeros((0, 4, 16, 16), np.uint8)),
    "patient_id must have shape": dict(patient_id=np.arange(5)),
    "patient_id must hold integers": dict(patient_id=np.array([b"LIDC-1"] * 6)),
    "real numbers": dict(image=np.zeros((6, 16, 16), complex)),
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_bad_layouts(tmp_path, message):
    path = write(tmp_path / "bad.h5", **BAD_FILES[message])
    with pytest.raises(ValueError, match=message) as error:
        RaterDataset(path)
    assert "bad.h5" in str(error.value)


@pytest.mark.parametrize("in_memory", [False, True])
def test_bad_values_are_found_where_they_are(tmp_path, in_memory):
    mask = np.zeros((6, 4, 16, 16), np.uint8)
    mask[3, 1, 2, 2] = 255
    path = write(tmp_path / "a.h5", mask=mask)
    with pytest.raises(ValueError, match=r"a\.h5: mask of slice 3 must be 0 and 1, got values \[0, 255\]"):
        RaterDataset(path, in_memory=in_memory)[3]
    image = np.zeros((6, 16, 16), np.float32)
    image[4, 0, 0] = np.nan
    path = write(tmp_path / "b.h5", image=image)
    with pytest.raises(ValueError, match=r"b\.h5: image of slice 4 has NaN"):
        RaterDataset(path, in_memory=in_memory)[4]


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.h5"):
        RaterDataset(tmp_path / "none.h5")
    path = write(tmp_path / "a.h5")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"a\.h5 cannot be read as HDF5"):
        RaterDataset(path)


def test_a_patient_in_two_splits(tmp_path):
    a = RaterDataset(write(tmp_path / "a.h5", patient_id=np.array([1, 1, 2, 2, 3, 3])))
    b = RaterDataset(write(tmp_path / "b.h5", patient_id=np.array([4, 5, 6, 7, 3, 8])))
    with pytest.raises(ValueError, match="1 patients are in both .* the first is 3"):
        check_disjoint(a, b)


# ---------------------------------------------------------------------- examples


def examples(tmp_path, **options):
    data = RaterDataset(write(tmp_path / "a.h5"), in_memory=True)
    return TrainingExamples(data, Preprocessing(), 1000, **{"seed": 3, **options})


def test_an_example_is_a_function_of_seed_and_position(tmp_path):
    one, other = examples(tmp_path), examples(tmp_path)
    order = [17, 3, 40, 3, 0]
    for p in order:
        a, b = one[p], other[p]
        assert all(torch.equal(a[k], b[k]) for k in a)
    again = examples(tmp_path, seed=4)
    assert any(not torch.equal(one[p]["noise_seed"], again[p]["noise_seed"]) for p in order)


def test_every_pass_visits_every_slice_in_its_own_order(tmp_path):
    e = examples(tmp_path)
    passes = [[e.slice_index(p) for p in range(6 * k, 6 * k + 6)] for k in range(5)]
    assert all(sorted(order) == list(range(6)) for order in passes)
    assert len({tuple(order) for order in passes}) > 1


def test_raters_and_timesteps_are_drawn_evenly(tmp_path):
    # Masks that tell which rater they are of: rater r marks r + 1 pixels.
    mask = np.zeros((6, 4, 16, 16), np.uint8)
    for r in range(4):
        mask[:, r, 0, : r + 1] = 1
    data = RaterDataset(write(tmp_path / "r.h5", mask=mask), in_memory=True)
    e = TrainingExamples(data, Preprocessing(), 1000, seed=0)
    items = [e[p] for p in range(2000)]
    counts = np.bincount([int(i["y_0"].sum()) for i in items], minlength=5)[1:]
    assert counts.sum() == 2000 and abs(counts - 500).max() < 100  # five standard deviations
    t = np.array([int(i["t"]) for i in items])
    assert t.min() >= 0 and t.max() < 1000
    # The low-discrepancy sequence: any 200 neighbours cover the tenths of [0, T) evenly.
    for start in range(0, 2000, 200):
        assert np.bincount(t[start : start + 200] // 100, minlength=10).tolist() == pytest.approx([20] * 10, abs=3)


def test_crops_are_the_middle_until_they_end(tmp_path):
    whole = examples(tmp_path, augmentation=Augmentation(flip=True, rotate90=True))
    cut = examples(tmp_path, augmentation=Augmentation(flip=True, rotate90=True), crop=8, crop_before=5)
    always = examples(tmp_path, augmentation=Augmentation(flip=True, rotate90=True), crop=8)
    for p in range(10):
        a, b, c = whole[p], cut[p], always[p]
        middle = {k: v[..., 4:12, 4:12] if v.ndim else v for k, v in a.items()}
        assert all(torch.equal(b[k], (middle if p < 5 else a)[k]) and torch.equal(c[k], middle[k]) for k in a)


@pytest.mark.parametrize(
    "options",
    [{}, {"flip": True}, {"rotate90": True}, {"rotate": 25.0}, {"scale": 0.3}, {"flip": True, "rotate": 180.0}],
)
def test_augmentation_moves_image_and_mask_alike(options):
    # The mask is the bright disc of the image, off the centre, so it can be found again.
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    disc = ((x - 40) ** 2 + (y - 25) ** 2 < 100).float()[None]
    changed = 0
    for seed in range(20):
        img, mask = Augmentation(**options)(disc * 2 - 1, disc, np.random.default_rng(seed))
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        seen = (img > 0).float()
        assert ((seen - mask).abs().sum() / mask.sum()) < 0.08
        changed += not torch.equal(mask, disc)
        if "scale" in options:
            assert 1 / 1.8 < mask.sum() / disc.sum() < 1.8
    assert (changed > 0) == bool(options)


def test_rotation_keeps_shapes_on_wide_images():
    wide = torch.zeros(1, 32, 96)
    wide[:, 12:20, 44:52] = 1
    turned = Augmentation._affine(wide, wide, 90.0, 1.0)[1]
    assert torch.equal(turned, wide)


def test_options_do_not_change_each_others_draws():
    img = torch.rand(1, 16, 16)
    plain = Augmentation(flip=True)(img, img, np.random.default_rng(5))[0]
    with_turns = Augmentation(flip=True, rotate90=True)(img, img, np.random.default_rng(5))[0]
    assert any(torch.equal(plain.rot90(k, (-2, -1)), with_turns) for k in range(4))
