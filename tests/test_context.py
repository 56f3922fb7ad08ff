# SPDX-License-Identifier: Apache-2.0
"""Slices with their neighbours as channels: equal bits in a file and in ``sample_volume``, named, recorded, refused."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from import_trees import pictures, slices_tree
from small_runs import command, network_inputs, trained
from support import data_path
from test_importers_volumes import ALL, MODALITIES, brats
from test_importers_volumes import save as save_volume

import berdiff_fast as bf
from berdiff_fast import channels
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.data.importers import import_volumes
from berdiff_fast.imaging import figures, volumes
from berdiff_fast.training import evaluate

ODD = (7, 27, 39)


def scan(root: Path, seed: int, shape=ODD, padding=False, **place) -> np.ndarray:
    """A case with one image and two raters, off every axis of symmetry; perhaps with padding beyond the bore."""
    random = np.random.default_rng(seed)
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    r = np.sqrt(((z - 3) * 2.0) ** 2 + (y - 12) ** 2 + (x - 15 - seed) ** 2)
    image = (random.integers(-1000, -900, shape) + 1000 * (r < 6)).astype(np.int16)
    if padding:
        image[np.broadcast_to((y - 13) ** 2 + (x - 19) ** 2 > 190, shape)] = -3024
    place = {"spacing": (0.703125, 0.8, 2.5), **place}
    save_volume(root / "image.nii.gz", image, **place)
    for k in range(2):
        save_volume(root / f"seg{k + 1:02d}.nii.gz", (r < 4 + k).astype(np.uint8), **place)
    return image


def shown_to_the_network(model: bf.BerDiff, given, **options) -> dict[int, torch.Tensor]:
    """What ``sample_volume`` hands the network of each slice."""
    seen, plan = network_inputs(model, given, **options)
    return dict(zip(range(*plan["slices"]), seen, strict=True))


def model_of(slices: RaterDataset, mode="z-score", **options) -> bf.BerDiff:
    """An untrained one, as a run on a file makes it."""
    torch.manual_seed(0)
    window = (-1000.0, 0.0) if mode == "window" else None
    preprocessing = bf.Preprocessing(
        mode,
        window=window,
        size=slices.image_size,
        pixel_spacing=slices.pixel_spacing,
        per_channel=True,
        by_volume=mode != "window",
        foreground=slices.foreground,
        context_slices=slices.context_slices,
    )
    network = bf.UNet(img_channels=slices.img_channels, model_channels=32, channel_mult=(1,), attention_resolutions=())
    return bf.BerDiff(network, preprocessing=preprocessing, channels=slices.channels, **options)


# ---------------------------------------------------------------------- names and neighbours


def test_names():
    assert channels.in_context(["ct"], 1) == ("ct[-1]", "ct[0]", "ct[+1]")
    assert channels.in_context(["a", "b"], 2)[5:] == ("b[-2]", "b[-1]", "b[0]", "b[+1]", "b[+2]")
    for context in (0, 1, 2):
        assert channels.of_scans(channels.in_context(["a", "b"], context), context) == ("a", "b")


def test_border_slices_are_repeated():
    assert channels.neighbours(0, 5, 1) == [0, 0, 1] and channels.neighbours(4, 5, 2) == [2, 3, 4, 4, 4]
    assert channels.neighbours(2, 5, 0) == [2]


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("context", [1, 2])
def test_channels_are_the_slices_above_and_below(tmp_path, context):
    image = scan(tmp_path / "t" / "a", 0)
    options = dict(context_slices=context, empty_share=1.0, **ALL)
    report = import_volumes(tmp_path / "t", tmp_path / "o", "qubiq", **options)
    slices = RaterDataset(tmp_path / "o" / "train.h5")
    assert slices.context_slices == context == report.parameters["context_slices"]
    assert slices.channels == channels.in_context(["image"], context) and len(slices) == 7
    images, _ = slices.whole()
    # 32 x 48 around 27 x 39: five rows and nine columns beyond, which are the slice's lowest value.
    for s in range(7):
        for c, at in enumerate(channels.neighbours(s, 7, context)):
            assert np.array_equal(images[s, c, 3:30, 5:44], image[at]) and (images[s, c, :3] == image[at].min()).all()
    statistics = slices.statistics
    assert statistics.shape == (7, 2 * context + 1, 4) and (statistics == statistics[:, :1]).all()


def test_slices_between_are_neighbours_whether_they_are_taken_or_not(tmp_path):
    """Slices without a mark are left out as rows, and are neighbours still."""
    image = scan(tmp_path / "t" / "a", 0)
    import_volumes(tmp_path / "t", tmp_path / "o", "qubiq", context_slices=1, empty_share=0.0, **ALL)
    slices = RaterDataset(tmp_path / "o" / "train.h5")
    first = int(slices.provenance["slice"][0])
    assert first > 0 and np.array_equal(slices[0][0][0, 3:30, 5:44], image[first - 1])


def test_channels_of_several_scans(tmp_path):
    import_volumes(brats(tmp_path / "t", 1), tmp_path / "o", "brats", context_slices=1, empty_share=1.0, **ALL)
    slices = RaterDataset(tmp_path / "o" / "train.h5")
    assert slices.channels == channels.in_context(list(MODALITIES), 1) and slices.img_channels == 12
    plain = tmp_path / "p"
    import_volumes(tmp_path / "t", plain, "brats", empty_share=1.0, **ALL)
    alone = RaterDataset(plain / "train.h5").whole()[0]
    together = slices.whole()[0].reshape(10, 4, 3, *slices.image_size)
    for k, off in enumerate((-1, 0, 1)):
        assert np.array_equal(together[:, :, k], alone[np.clip(np.arange(10) + off, 0, 9)])
    with h5py.File(plain / "train.h5") as file:
        assert "context_slices" not in file.attrs


# ---------------------------------------------------------------------- equal bits

CASES = {
    "axial": dict(),
    "padding": dict(padding=True),
    "coronal": dict(plane="coronal"),
    "sagittal": dict(plane="sagittal"),
    "window": dict(mode="window"),
    "min-max": dict(mode="min-max", padding=True),
    "cut around what is not 0": dict(foreground=True),
    "no context": dict(context=0, padding=True),
    "context of two": dict(context=2),
    "float32 spacing": dict(place=dict(spacing=(0.7031247615814209, 0.7031247615814209, 2.5))),
    "turned": dict(place=dict(direction=np.diag([-1.0, -1.0, 1.0]))),
    "16 bits": dict(depth=16),
}


@pytest.mark.parametrize("name", CASES)
def test_the_network_is_shown_the_bits_of_the_file(name, tmp_path):
    """The imported slice and the slice that ``sample_volume`` builds of the volume by itself."""
    given = dict(CASES[name])
    mode, padding, place = given.pop("mode", "z-score"), given.pop("padding", False), given.pop("place", {})
    context = given.pop("context", 1)
    scan(tmp_path / "t" / "a", 0, padding=padding, **place)
    options = dict(context_slices=context, empty_share=1.0, foreground=False, **ALL)
    import_volumes(tmp_path / "t", tmp_path / "o", "qubiq", **{**options, **given})
    slices = RaterDataset(tmp_path / "o" / "train.h5")
    model = model_of(slices, mode)
    volume = volumes.read(tmp_path / "t" / "a" / "image.nii.gz")
    shown = shown_to_the_network(model, volume, plane=given.get("plane", "axial"))
    assert len(shown) == len(slices)
    for i, s in enumerate(slices.provenance["slice"].tolist()):
        of_file = model.preprocess(slices.batch([i])[0], slices.statistics_for(model.preprocessing, [i]))
        assert torch.equal(shown[s], of_file[0]), s


def test_neighbours_are_of_the_volume_whatever_slices_are_drawn(tmp_path):
    scan(tmp_path / "t" / "a", 0)
    import_volumes(tmp_path / "t", tmp_path / "o", "qubiq", context_slices=1, **ALL)
    model = model_of(RaterDataset(tmp_path / "o" / "train.h5"))
    volume = volumes.read(tmp_path / "t" / "a" / "image.nii.gz")
    whole, part = shown_to_the_network(model, volume), shown_to_the_network(model, volume, slices=(2, 4))
    assert all(torch.equal(whole[s], part[s]) for s in (2, 3)) and not torch.equal(whole[2][0], whole[2][1])


def test_the_glioma_case(tmp_path):
    """Four modalities as they are published, five raters: all slices of the file, bit by bit."""
    case = data_path("brats/TCGA-DU-7294")
    import_volumes(case, tmp_path / "o", "brats", context_slices=1, regions="WT=1,2,4", empty_share=0.0, **ALL)
    slices = RaterDataset(tmp_path / "o" / "train.h5")
    model = model_of(slices)
    scans = [volumes.read(case / f"TCGA-DU-7294_{name}.nii.gz") for name in MODALITIES]
    first, last = (int(f(slices.provenance["slice"])) for f in (np.min, np.max))
    assert slices.img_channels == 12 and slices.raters == 5
    # Every fifth slice: the network, which costs the time, plays no part.
    for s in range(first, last + 1, 5):
        (shown,) = shown_to_the_network(model, scans, slices=(s, s + 1)).values()
        i = s - first
        of_file = model.preprocess(slices.batch([i])[0], slices.statistics_for(model.preprocessing, [i]))
        assert torch.equal(shown, of_file[0])


# ---------------------------------------------------------------------- a model of it


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on scans with neighbours: its folder and data."""
    folder = tmp_path_factory.mktemp("context")
    for i in range(6):
        scan(folder / "t" / f"case{i:02d}", i)
    import_volumes(folder / "t", folder / "o", "qubiq", context_slices=1, split=(60, 40, 0), empty_share=0.5)
    trained(folder / "run", folder / "o" / "train.h5", folder / "o" / "val.h5", rotate90=False)
    return folder


def test_the_model_file_knows_its_neighbours(run, tmp_path):
    made = bf.load(run / "run" / "model.safetensors")
    assert made.context_slices == made.preprocessing.context_slices == 1 and made.img_channels == 3
    assert made.channels == ("image[-1]", "image[0]", "image[+1]")
    assert list((run / "run" / "previews").glob("*.png"))
    made.save(tmp_path / "again.safetensors")
    assert bf.load(tmp_path / "again.safetensors").to_config() == made.to_config()
    assert "context_slices" not in bf.load("lidc").to_config()["preprocessing"]


def test_the_commands(run, tmp_path):
    made, scan_file = run / "run" / "model.safetensors", run / "t" / "case00" / "image.nii.gz"
    words = ["--model", made, "--n", 2, "--steps", 2, "--seed", 3, "--quiet", "--output", tmp_path / "s", "--report"]
    assert command("sample", scan_file, *words, "--raters", scan_file.with_name("seg01.nii.gz")) == (0, "")
    drawn = bf.sample_volume(bf.load(made), volumes.read(scan_file), n=2, steps=2, seed=3)
    assert np.array_equal(volumes.read(tmp_path / "s" / "mask_001.nii.gz").array > 0, drawn.mask(1))
    options = ["--steps", 2, "-n", 2, "--output", tmp_path / "e"]
    assert command("evaluate", "--model", made, "--data", run / "o" / "val.h5", *options)[0] == 0
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert summary["data"]["channels"] == ["image[-1]", "image[0]", "image[+1]"]


def test_pictures_show_the_slice_between_its_neighbours(run, tmp_path, monkeypatch):
    """Of an evaluation and of a validation."""
    drawn = {}
    monkeypatch.setattr(
        figures, "contact_sheet", lambda path, image, *_, **more: drawn.update({path.name: (image, more)})
    )
    made, data = bf.load(run / "run" / "model.safetensors"), RaterDataset(run / "o" / "val.h5")
    between = torch.from_numpy(data.whole()[0])[:, 1]
    evaluate.evaluate(made, data, tmp_path / "e", n=1, steps=1, progress=False)
    images, more = drawn["cases.png"]
    indices = [int(label.partition("slice ")[2].partition(",")[0]) for label in more["labels"]]
    assert torch.equal(images, between[indices])
    trained(tmp_path / "run", run / "o" / "train.h5", run / "o" / "val.h5", rotate90=False)
    assert torch.equal(drawn["step-00000002.png"][0], between[evaluate.spread(len(data), 2)])


def test_a_slice_by_itself_is_its_neighbours_in_order(run):
    """In Python: channels put together by hand are what the volume's slice is."""
    made = bf.load(run / "run" / "model.safetensors")
    volume = volumes.read(run / "t" / "case00" / "image.nii.gz")
    statistics = made.preprocessing.statistics(torch.from_numpy(volume.array.astype(np.float32))[None, None])
    for s in (0, 3):
        parts = volume.array[channels.neighbours(s, 7, 1)]
        raw = np.stack([np.pad(x, ((3, 2), (5, 4)), constant_values=x.min()) for x in parts])
        img = made.preprocess(raw, tuple(one.expand(1, 3, 1, 1, 1) for one in statistics))
        assert torch.equal(img[0], shown_to_the_network(made, volume, slices=(s, s + 1))[s])


def test_a_window_is_that_of_a_scan(tmp_path):
    """One for each scan, not for each of its neighbours."""
    import_volumes(brats(tmp_path / "t", 2), tmp_path / "o", "brats", context_slices=1, channels=["t1", "t2"], **ALL)
    settings = dict(rotate90=False, window=(0.0, 60.0, 0.0, 900.0))
    made = trained(tmp_path / "run", tmp_path / "o" / "train.h5", **settings)
    assert made.preprocessing.window == ((0.0, 60.0),) * 3 + ((0.0, 900.0),) * 3
    with pytest.raises(ValueError, match=r"data.window must be one window, or one for each of 2 channels"):
        trained(tmp_path / "no", tmp_path / "o" / "train.h5", rotate90=False, window=(0.0, 60.0) * 3)
    assert not (tmp_path / "no" / "model.safetensors").exists()


# ---------------------------------------------------------------------- what is refused


def _one_slice(root: Path) -> None:
    scan(root / "b", 0, shape=(1, 27, 39))


def _few(root: Path) -> None:
    scan(root / "b", 0, shape=(4, 27, 39))


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (_one_slice, ["--context", "1"], "b/image.nii.gz: has 1 slice, too few for a context of 1 on either side"),
        (_few, ["--context", "4"], "b/image.nii.gz: has 4 slices, too few for a context of 4 on either side"),
        (None, ["--context", "-1"], "context_slices must be at least 0, got -1"),
        (None, ["--context", "1", "--volumes"], "context_slices is for slices of volumes, got 1 with whole_volumes"),
    ],
    ids=["one slice", "few slices", "negative", "volumes"],
)
def test_bad_options(tmp_path, change, words, message):
    scan(tmp_path / "t" / "a", 0)
    if change is not None:
        change(tmp_path / "t")
    status, said = command("import", tmp_path / "t", tmp_path / "o", "--split", "100/0/0", "--quiet", *words)
    assert status == 1 and message in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_pictures_have_no_neighbours(tmp_path):
    slices_tree(tmp_path / "t", pictures())
    status, said = command("import", tmp_path / "t", tmp_path / "o", "--context", "1")
    assert status == 1 and "context is for trees of volumes, and this is one of pictures" in said
    assert not (tmp_path / "o").exists()


def test_what_is_not_of_one_kind_is_refused(run, tmp_path):
    made, scan_file = bf.load(run / "run" / "model.safetensors"), run / "t" / "case00" / "image.nii.gz"
    volume = volumes.read(scan_file)
    with pytest.raises(ValueError, match=r"volume must have the model's 1 channels \(image\), got 3"):
        bf.sample_volume(made, [volume] * 3, n=1, steps=1)
    import_volumes(run / "t", tmp_path / "plain", "qubiq", split=(60, 40, 0))
    words = ["--data", tmp_path / "plain" / "val.h5", "--output", tmp_path / "e", "-n", 1]
    status, said = command("evaluate", "--model", run / "run" / "model.safetensors", *words)
    assert status == 1 and "the model works on 3 img_channels, and the file has 1" in said
    assert not (tmp_path / "e").exists()
    with pytest.raises(ValueError, match="data.validation must have the img_channels of data.train"):
        trained(tmp_path / "r", run / "o" / "train.h5", tmp_path / "plain" / "val.h5", rotate90=False)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (2, "with 2 context_slices on either side, slices must have a multiple of 5 channels, got 3"),
        (-1, "context_slices must be a number of slices, got"),
        (1.0, "context_slices must be a number of slices, got"),
        ("one", "context_slices must be a number of slices, got 'one'"),
    ],
)
def test_a_file_that_lies(run, tmp_path, told, words):
    path = tmp_path / "x.h5"
    path.write_bytes((run / "o" / "train.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        file.attrs["context_slices"] = told
    with pytest.raises(ValueError, match=words) as caught:
        RaterDataset(path)
    assert str(caught.value).startswith(str(path))


def test_a_model_whose_channels_are_no_multiple():
    with pytest.raises(ValueError, match="img_channels must be a multiple of 3, slices in context, got 4"):
        bf.BerDiff(bf.UNet(img_channels=4), preprocessing=bf.Preprocessing(context_slices=1))
    with pytest.raises(ValueError, match="context_slices must be at least 0"):
        bf.Preprocessing(context_slices=-1)
    with pytest.raises(ValueError, match="channels must be names of letters"):
        bf.BerDiff(bf.UNet(img_channels=1), channels=["ct[1]"])
