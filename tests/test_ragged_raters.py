# SPDX-License-Identifier: Apache-2.0
"""Raters who did not read every slice: in files, metrics, training and evaluation."""

import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import berdiff_fast as bf
from berdiff_fast import metrics
from berdiff_fast.data.batches import Batches
from berdiff_fast.data.examples import Augmentation, TrainingExamples
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.data.importers import import_tree
from berdiff_fast.metrics import torchmetrics as tm
from berdiff_fast.training import evaluate


def write(path, valid, *, images=None, masks=None, size=16, **others):
    """A file of slices whose rater r marks a square of side r + 2, and whose absent raters mark everything."""
    count, raters = valid.shape
    with h5py.File(path, "w") as file:
        file["image"] = (
            np.random.default_rng(0).integers(0, 255, (count, size, size), np.uint8) if images is None else images
        )
        if masks is None:
            masks = np.zeros((count, raters, size, size), np.uint8)
            for r in range(raters):
                masks[:, r, 4 : 6 + r, 4 : 6 + r] = 1
            masks[~valid] = 1
        file["mask"] = masks
        file["patient_id"] = np.arange(count)
        file["rater_valid"] = valid.astype(np.uint8)
        for name, value in others.items():
            file[name] = value
    return path


@pytest.fixture
def ragged():
    random = np.random.default_rng(3)
    valid = random.random((7, 4)) < 0.6
    valid[np.arange(7), random.integers(0, 4, 7)] = True
    raters = torch.from_numpy(random.random((7, 4, 1, 12, 12)) < 0.4)
    samples = torch.from_numpy(random.random((7, 6, 1, 12, 12)) < 0.4)
    return raters, samples, valid


def test_metrics_are_those_of_the_readers(ragged):
    raters, samples, valid = ragged
    found = metrics.evaluate(raters, samples, rater_valid=valid) | metrics.decompose_ged(
        raters, samples, rater_valid=valid
    )
    for i in range(len(valid)):
        one = raters[i : i + 1, torch.from_numpy(valid[i])], samples[i : i + 1]
        wanted = metrics.evaluate(*one) | metrics.decompose_ged(*one)
        for name, value in wanted.items():
            assert torch.allclose(found[name][i], value[0], rtol=0, atol=1e-12, equal_nan=True), name
    counted = metrics.evaluate_counts(raters, samples, [2, 6], ["ged"], rater_valid=valid)
    assert torch.equal(counted[6]["ged"], found["ged"])


def test_ged_by_a_plain_loop(ragged):
    raters, samples, valid = ragged

    def d(a, b):
        union = (a | b).sum().item()
        return 1 - (a & b).sum().item() / union if union else 0.0

    for i, value in enumerate(metrics.generalized_energy_distance(raters, samples, rater_valid=valid).tolist()):
        y, s = [m for m, v in zip(raters[i], valid[i], strict=True) if v], list(samples[i])
        mean = lambda a, b: np.mean([d(p, q) for p in a for q in b])  # noqa: E731
        assert value == pytest.approx(2 * mean(y, s) - mean(y, y) - mean(s, s), abs=1e-12)


def test_a_perfect_model_of_two_readers_has_no_distance():
    raters = torch.zeros(1, 4, 1, 32, 32, dtype=torch.bool)
    raters[:, :2, :, 8:20, 8:20] = True
    perfect = raters[:, :1].expand(-1, 8, -1, -1, -1)
    valid = [[True, True, False, False]]
    assert metrics.generalized_energy_distance(raters, perfect, rater_valid=valid).item() == 0
    assert metrics.generalized_energy_distance(raters, perfect).item() > 0.4
    assert metrics.hm_iou(raters, perfect, rater_valid=valid).item() == 1


def test_torchmetrics_over_batches(ragged):
    raters, samples, valid = ragged
    evaluation, error = tm.Evaluation(), tm.ExistenceError()
    for part in (slice(0, 3), slice(3, 7)):
        evaluation.update(raters[part], samples[part], valid[part])
        error.update(raters[part], samples[part], valid[part])
    wanted = metrics.evaluate(raters, samples, rater_valid=valid)
    assert all(float(v) == pytest.approx(float(wanted[k].mean()), abs=1e-12) for k, v in evaluation.compute().items())
    parts = metrics.decompose_ged(raters, samples, rater_valid=valid)
    calibration = metrics.existence_calibration(parts["empty_raters"], parts["empty_samples"], valid.sum(1), 6)
    assert float(error.compute()) == pytest.approx(calibration.rmse, abs=1e-12)


@pytest.mark.parametrize(
    ("valid", "error", "words"),
    [
        (np.ones((7, 3), bool), ValueError, "rater_valid must be (N, R) = (7, 4)"),
        (np.full((7, 4), 0.5), TypeError, "rater_valid must be bool"),
        (np.full((7, 4), 2), TypeError, "rater_valid must be bool"),
        (np.zeros((7, 4), bool), ValueError, "got none of image 0"),
    ],
)
def test_bad_validity(ragged, valid, error, words):
    raters, samples, _ = ragged
    with pytest.raises(error, match=words.replace("(", r"\(").replace(")", r"\)")):
        metrics.evaluate(raters, samples, rater_valid=valid)


VALID = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 0, 0], [1, 0, 1, 0]], bool)


@pytest.mark.parametrize("edges", [None, (8, 32)], ids=["plain", "modes"])
@pytest.mark.parametrize("resident", [True, False])
def test_training_draws_among_the_readers(tmp_path, edges, resident):
    slices = RaterDataset(write(tmp_path / "a.h5", VALID), in_memory=resident)
    examples = TrainingExamples(slices, bf.Preprocessing(), 1000, 1, Augmentation(True, True), mode_edges=edges)
    positions = range(300)
    batch = Batches(examples, resident=resident)(positions)
    seen = [set() for _ in VALID]
    for position in positions:
        item = examples[position]
        for name, value in item.items():
            assert torch.equal(batch[name][position], value), name
        side = int(item["y_0"].sum().sqrt())
        seen[examples.slice_index(position)].add(side - 2)
    assert [sorted(found) for found in seen] == [np.flatnonzero(row).tolist() for row in VALID]
    if edges:  # shares of the readers' masks, of areas 4, 9, 16 and 25: classes 1, 2, 2 and 2
        target = {examples.slice_index(p): batch["mode_target"][p].tolist() for p in positions}
        assert target[3] == [0, 0, 1, 0] and target[0] == [0, 0.5, 0.5, 0]


def test_where_everybody_read_examples_are_what_they_were(tmp_path):
    """A file of format 1, and one that says that everybody read everything."""
    everybody = np.ones((5, 4), bool)
    write(tmp_path / "new.h5", everybody)
    write(tmp_path / "old.h5", everybody)
    with h5py.File(tmp_path / "old.h5", "a") as file:
        del file["rater_valid"]
    for edges in (None, (8, 32)):
        one, other = (
            Batches(
                TrainingExamples(
                    RaterDataset(tmp_path / name, in_memory=True), bf.Preprocessing(), 1000, 1, mode_edges=edges
                ),
                resident=True,
            )(range(50))
            for name in ("new.h5", "old.h5")
        )
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_ignored_pixels_reach_the_batch(tmp_path):
    ignore = np.zeros((5, 16, 16), np.uint8)
    ignore[:, :, :5] = 1
    slices = RaterDataset(write(tmp_path / "a.h5", VALID, ignore=ignore), in_memory=True)
    for edges in (None, (8, 32)):
        examples = TrainingExamples(slices, bf.Preprocessing(), 1000, 1, Augmentation(True, True), mode_edges=edges)
        batch = Batches(examples, resident=True)(range(20))
        for position in range(20):
            item = examples[position]
            assert torch.equal(item["ignore"], batch["ignore"][position]) and item["ignore"].sum() == 80


def test_evaluation_by_the_readers(tmp_path):
    model = bf.BerDiff(bf.UNet(model_channels=32, channel_mult=(1,)), preprocessing=bf.Preprocessing())
    slices = RaterDataset(write(tmp_path / "a.h5", VALID))
    summary = evaluate.evaluate(model, slices, tmp_path / "out", n=4, steps=2, progress=False)
    assert summary["perfect"]["ged"] < summary["empty"]["ged"]
    assert summary["data"]["readers_per_slice"] == [1, 4]
    assert "1 to 4 raters" in evaluate.as_text(summary)
    _, raters = slices.batch([3])
    one = evaluate.yardstick("majority", raters, 1, [0], VALID[3:4])
    assert torch.equal(one[0, 0], raters[0, 1])


def test_import_of_absent_masks(tmp_path):
    """Of ten slices, two have masks of three and two raters only: these others did not read, or marked nothing."""
    tree, random = tmp_path / "tree", np.random.default_rng(0)

    def put(array, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)

    for i, count in enumerate([4, 3, 2, 4, 4, 4, 4, 4, 4, 4]):
        put(random.integers(0, 255, (32, 32), dtype=np.uint8), tree / f"images/p{i}_0.png")
        for r in range(count):
            mask = np.zeros((32, 32), np.uint8)
            mask[8:20, 8:20] = 255
            put(mask, tree / f"masks_{r}/p{i}_0.png")
    command = [
        sys.executable,
        "-m",
        "berdiff_fast.cli",
        "import",
        tree,
        tmp_path / "out",
        "--split",
        "100/0/0",
        "--quiet",
    ]
    subprocess.run([*command, "--missing-mask", "absent"], check=True)
    slices = RaterDataset(tmp_path / "out" / "train.h5")
    assert slices.rater_valid.sum(1).tolist() == [4, 3, 2, 4, 4, 4, 4, 4, 4, 4]
    report = import_tree(tree, tmp_path / "empty", split=(100, 0, 0), missing_mask="empty")
    assert report.splits["train"].empty_masks == (0, 0, 1, 2)
    assert RaterDataset(tmp_path / "empty" / "train.h5").rater_valid.all()
    for r in range(4):
        (tree / f"masks_{r}/p5_0.png").unlink()
    with pytest.raises(ValueError, match="nobody read it"):
        import_tree(tree, tmp_path / "none", split=(100, 0, 0), missing_mask="absent")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(rater_valid=np.ones((5, 3), np.uint8)), r"rater_valid must be \(N, R\) = \(5, 4\)"),
        (dict(rater_valid=np.full((5, 4), 2, np.uint8)), "rater_valid must be 0 and 1"),
        (dict(rater_valid=np.zeros((5, 4), np.uint8)), "nobody read slice 0"),
        (dict(statistics=np.ones((5, 1, 3))), r"statistics must be \(N, C, 4\)"),
        (dict(statistics=np.zeros((5, 1, 4))), "deviations above 0"),
    ],
)
def test_bad_files(tmp_path, change, words):
    path = write(tmp_path / "a.h5", VALID)
    with h5py.File(path, "a") as file:
        for name, value in change.items():
            if name in file:
                del file[name]
            file[name] = value
    with pytest.raises(ValueError, match=words):
        RaterDataset(path)
