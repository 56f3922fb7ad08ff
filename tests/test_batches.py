# SPDX-License-Identifier: Apache-2.0
"""Batches made at once: the random numbers are NumPy's, the examples those that are made one by one."""

from __future__ import annotations

import pickle

import h5py
import numpy as np
import pytest
import torch
from support import data_path
from torch.utils.data import DataLoader, default_collate

from berdiff_fast.data import batches
from berdiff_fast.data.batches import Batches
from berdiff_fast.data.examples import Augmentation, TrainingExamples
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.data.streams import Streams
from berdiff_fast.preprocessing import Preprocessing

# ---------------------------------------------------------------------- random numbers


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 2**64 - 1, 2**200 + 17])
@pytest.mark.parametrize("bound", [1, 2, 3, 4, 7, 100, 3 * 2**30, 2**32 - 1])
def test_streams_are_numpys(seed, bound):
    """Bounds that are no power of two draw again now and then, the large ones often; 1 draws nothing."""
    positions = np.array([*range(40), 2**31, 2**32 - 1, 2**32, 2**33 + 5, 2**62])
    streams = Streams([seed, 1], positions)
    ours = [streams.integers(bound), streams.bits63(), streams.random(), streams.random(), streams.integers(4)]
    ours += [streams.uniform(-1, 1), streams.uniform(-1, 1), streams.integers(bound), streams.integers(bound)]
    for i, position in enumerate(positions.tolist()):
        random = np.random.default_rng([seed, 1, position])
        theirs = [random.integers(bound), random.integers(2**63), *random.random(2), random.integers(4)]
        theirs += [*random.uniform(-1, 1, 2), *random.integers(bound, size=1), random.integers(bound)]
        assert [x[i] for x in ours] == theirs


def test_every_stream_has_a_bound_of_its_own():
    bounds = np.array([1, 2, 3, 3 * 2**30, 1, 5, 2**32 - 1, 4] * 50)
    streams = Streams([5, 1], np.arange(len(bounds)))
    ours = np.stack([streams.integers(bounds), streams.integers(7), streams.bits63(), streams.integers(bounds)], 1)
    for i, bound in enumerate(bounds.tolist()):
        random = np.random.default_rng([5, 1, i])
        theirs = [random.integers(bound), random.integers(7), random.integers(2**63), random.integers(bound)]
        assert ours[i].tolist() == theirs


# ---------------------------------------------------------------------- examples


def rater_file(
    path, *, size=(24, 24), img_channels=1, mask_channels=1, raters=3, dtype=np.uint8, count=11, sparse=False
):
    random = np.random.default_rng(0)
    images = random.normal(100, 40, (count, img_channels, *size)).clip(0, 255).astype(dtype)
    images[3] = 7  # a constant image
    masks = random.random((count, raters, mask_channels, *size)) < (0.02 if sparse else 0.3)
    if sparse:
        masks[2] = masks[4, 1:] = 0
    with h5py.File(path, "w") as file:
        file["image"] = images if img_channels > 1 else images[:, 0]
        file["mask"] = masks.astype(np.uint8) if mask_channels > 1 else masks[:, :, 0].astype(np.uint8)
    return path


CASES = {
    "plain": {},
    "flip": dict(augmentation=Augmentation(flip=True)),
    "rotate90": dict(augmentation=Augmentation(rotate90=True)),
    "both": dict(augmentation=Augmentation(flip=True, rotate90=True)),
    "both, cropped": dict(augmentation=Augmentation(flip=True, rotate90=True), crop=8),
    # The middle is half a pixel off, so that turning it is not turning and cutting.
    "odd": dict(augmentation=Augmentation(flip=True, rotate90=True), crop=9),
    "rotate": dict(augmentation=Augmentation(rotate=30.0)),
    "scale": dict(augmentation=Augmentation(scale=0.3), crop=8),
    "all": dict(augmentation=Augmentation(True, True, 20.0, 0.2), crop=9),
    "rectangle": dict(augmentation=Augmentation(True, False, 20.0, 0.2), crop=8, size=(16, 40)),
    "channels": dict(augmentation=Augmentation(True, True), img_channels=3, mask_channels=2, crop=8),
    "channels, all": dict(augmentation=Augmentation(True, True, 20.0, 0.2), img_channels=3, mask_channels=2),
    "one rater": dict(augmentation=Augmentation(True, True), raters=1),
    # Some slices are marked by nobody, some by one rater; the classes of areas around 0, 3 and 12 pixels.
    "modes": dict(augmentation=Augmentation(True, True), mode_edges=(3, 12), sparse=True),
    "modes, window": dict(augmentation=Augmentation(True, True), mode_edges=(3, 12), mode_window=8, sparse=True),
    "modes, odd window": dict(augmentation=Augmentation(True, True), mode_edges=(3,), mode_window=9, sparse=True),
    "modes, all": dict(augmentation=Augmentation(True, True, 20.0, 0.2), mode_edges=(3,), mode_window=9, sparse=True),
    "modes, channels": dict(
        augmentation=Augmentation(True, True), mode_edges=(3, 12), mode_window=8, mask_channels=2, sparse=True
    ),
    "modes, cropped": dict(
        augmentation=Augmentation(True, True), crop=10, mode_edges=(3, 12), mode_window=7, sparse=True
    ),
    "modes, rectangle": dict(
        augmentation=Augmentation(True, False), mode_edges=(3,), mode_window=8, size=(16, 40), sparse=True
    ),
    "window": dict(window=(50.0, 120.0), augmentation=Augmentation(True, True), crop=8),
    "seed": dict(seed=2**40 + 1, augmentation=Augmentation(True, True, 20.0, 0.2)),
    **{str(dtype): dict(dtype=dtype, crop=8) for dtype in ("int16", "uint16", "float32", "float64", ">i2", ">f4")},
}


def make(tmp_path, *, in_memory=True, window=None, seed=3, **options):
    kinds = ("augmentation", "crop", "crop_before", "mode_edges", "mode_window")
    kept = {name: options.pop(name) for name in kinds if name in options}
    file = tmp_path / f"{len(list(tmp_path.iterdir()))}.h5"
    slices = RaterDataset(rater_file(file, **options), in_memory=in_memory)
    preprocessing = Preprocessing("window", window) if window else Preprocessing()
    return TrainingExamples(slices, preprocessing, 1000, seed, **kept)


def assert_equal(batch, examples, positions):
    expected = default_collate([examples[p] for p in positions])
    assert batch.keys() == expected.keys()
    for name, tensor in expected.items():
        assert batch[name].dtype == tensor.dtype and batch[name].is_contiguous() and torch.equal(batch[name], tensor)


@pytest.mark.parametrize("kind", ["resident", "in memory", "from the file"])
@pytest.mark.parametrize("case", CASES)
def test_a_batch_is_its_examples(tmp_path, case, kind):
    """Bit for bit, over several passes of eleven slices."""
    examples = make(tmp_path, in_memory=kind != "from the file", **CASES[case])
    made = Batches(examples, resident=kind == "resident")
    for positions in (range(0, 5), range(5, 69), [1000]):
        assert_equal(made(positions), examples, positions)


def test_a_file_that_is_not_in_memory_can_be_kept_too(tmp_path):
    examples = make(tmp_path, in_memory=False, **CASES["both, cropped"])
    assert_equal(Batches(examples, resident=True)(range(20)), examples, range(20))
    assert not batches.fits(examples.slices, torch.device("cpu"))  # unless it is asked for
    assert batches.fits(make(tmp_path).slices, torch.device("cpu"))


@pytest.mark.parametrize("together", [1, 10, 10**6])
def test_a_stream_is_one_batch_after_another(tmp_path, monkeypatch, together):
    monkeypatch.setattr(batches, "_TOGETHER", together)
    examples = make(tmp_path, crop=8, crop_before=24, augmentation=Augmentation(True, True, 20.0, 0.2))
    spans = [range(i, i + 4) for i in range(8, 40, 4)]
    for span, batch in zip(spans, Batches(examples, resident=True).stream(spans), strict=True):
        assert batch["img"].shape[-1] == (8 if span.start < 24 else 24)
        assert_equal(batch, examples, span)


def test_a_batch_has_one_size(tmp_path):
    examples = make(tmp_path, crop=8, crop_before=24)
    with pytest.raises(ValueError, match="positions must be before crop_before, 24, or from it on, got both"):
        Batches(examples, resident=True)(range(20, 28))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_takes_whole_batches(tmp_path, workers):
    examples = make(tmp_path, in_memory=False, **CASES["all"])
    made = pickle.loads(pickle.dumps(Batches(examples, resident=False)))
    spans = [list(range(i, i + 6)) for i in range(0, 24, 6)]
    loader = DataLoader(made, batch_sampler=spans, num_workers=workers, collate_fn=lambda batch: batch)
    for span, batch in zip(spans, loader, strict=True):
        assert_equal(batch, examples, span)


def test_the_one_mask_that_is_shown_is_read(tmp_path, monkeypatch):
    """Of a file that is not in memory."""
    examples = make(tmp_path, in_memory=False)
    read, one_rater = [], examples.slices.one_rater
    monkeypatch.setattr(examples.slices, "one_rater", lambda *a: read.append(a) or one_rater(*a))
    monkeypatch.setattr(RaterDataset, "__getitem__", None)
    Batches(examples, resident=False)(range(6))
    assert len(read) == 6


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("options", [{}, dict(img_channels=3, mask_channels=2, dtype=">i2")])
def test_several_slices_at_once(tmp_path, in_memory, options):
    slices = RaterDataset(rater_file(tmp_path / "slices.h5", **options), in_memory=in_memory)
    for indices in (range(2, 7), [10, 0, 3, 3], np.array([5])):
        images, masks = slices.batch(indices)
        each = [slices[int(i)] for i in indices]
        assert torch.equal(images, torch.stack([image for image, _ in each])) and images.dtype == each[0][0].dtype
        assert torch.equal(masks, torch.stack([mask for _, mask in each])) and masks.dtype == torch.bool
        images.zero_()  # a copy
        assert slices[int(indices[0])][0].any()


def test_real_slices():
    slices = RaterDataset(data_path("lidc/val.h5"), in_memory=True)
    examples = TrainingExamples(slices, Preprocessing(), 1000, 0, Augmentation(True, True, 10.0, 0.1), 64, 10**6)
    assert_equal(Batches(examples, resident=True)(range(64)), examples, range(64))


def test_limits_of_the_whole_image():
    preprocessing = Preprocessing()
    raw = torch.randint(0, 255, (5, 2, 9, 7), dtype=torch.uint8)
    raw[2] = 4
    part = preprocessing(raw[..., 3:5], preprocessing.statistics(raw))
    assert torch.equal(part, preprocessing(raw)[..., 3:5])
