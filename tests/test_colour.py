# SPDX-License-Identifier: Apache-2.0
"""Colour pictures: read with all their levels, imported in every layout, trained on, sampled, shown as luminance."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from import_trees import ALL_IN_TRAIN, TREES, R, by_path, out, pictures, save, slices_tree, tree  # noqa: F401
from PIL import Image
from small_runs import command, trained
from test_volumes_pictures import png

import berdiff_fast as bf
from berdiff_fast.data import pixels
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.data.importers import import_tree, import_volumes
from berdiff_fast.imaging import shown, volumes
from berdiff_fast.io import colours

#: 40 x 56, off every axis of symmetry; 8 and 16 bits.
RGB = np.random.default_rng(0).integers(0, 250, (40, 56, 3)).astype(np.uint8)
DEEP = RGB.astype(np.uint16) * 257 + np.arange(3, dtype=np.uint16)
TOP8, TOP16 = np.full((40, 56, 1), 255, np.uint8), np.full((40, 56, 1), 65535, np.uint16)


def tif(path: Path, array: np.ndarray, **options: object) -> None:
    pytest.importorskip("tifffile").imwrite(path, array, **options)


def palette(path: Path) -> None:
    """Few colours, which a palette holds exactly."""
    Image.fromarray(RGB // 128 * 200).quantize(16).save(path)


READ = {
    "rgb.png": (lambda p: Image.fromarray(RGB).save(p), RGB),
    "rgba.png": (lambda p: Image.fromarray(np.dstack([RGB, TOP8])).save(p), RGB),
    "palette.png": (palette, RGB // 128 * 200),
    "rgb.tif": (lambda p: Image.fromarray(RGB).save(p), RGB),
    "turned.tif": (lambda p: tif(p, RGB[::-1, ::-1], photometric="rgb", extratags=[(274, 3, 1, 3, True)]), RGB),
    "planar.tif": (lambda p: tif(p, np.moveaxis(RGB, -1, 0), photometric="rgb", planarconfig="separate"), RGB),
    "rgb16.png": (lambda p: png(p, DEEP), DEEP),
    "rgba16.png": (lambda p: png(p, np.dstack([DEEP, TOP16])), DEEP),
    "turned16.png": (lambda p: png(p, np.rot90(DEEP, 1), 6), DEEP),
    "rgb16.tif": (lambda p: tif(p, DEEP, photometric="rgb"), DEEP),
    "f32.tif": (lambda p: tif(p, DEEP.astype(np.float32), photometric="rgb"), DEEP.astype(np.float32)),
    "rgb.npy": (lambda p: np.save(p, DEEP), DEEP),
    "white.png": (lambda p: Image.fromarray(RGB * 0 + 255).save(p), RGB * 0 + 255),
}


@pytest.mark.parametrize("name", READ)
def test_all_levels_are_kept(tmp_path, name):
    make, wanted = READ[name]
    make(tmp_path / name)
    found, lossy = pixels.read(tmp_path / name, colour=True)
    assert np.array_equal(found, wanted) and found.dtype == wanted.dtype and not lossy
    volume = volumes.read(tmp_path / name, colour=True)
    assert np.array_equal(volume.colour[:, 0], np.moveaxis(wanted, -1, 0))
    if wanted is RGB:
        assert np.abs(volume.array[0] - np.asarray(Image.fromarray(RGB).convert("L")).astype(int)).max() <= 1


def test_a_jpeg_is_near_and_known_to_be_lossy(tmp_path):
    smooth = np.asarray(Image.fromarray(RGB[:5, :7]).resize((56, 40), Image.Resampling.BICUBIC))
    Image.fromarray(smooth).save(tmp_path / "x.jpg", quality=98, subsampling=0)
    found, lossy = pixels.read(tmp_path / "x.jpg", colour=True)
    assert lossy and np.abs(found.astype(int) - smooth).max() < 12


REFUSED = {
    "grey.png": (lambda p: Image.fromarray(RGB[..., 0]).save(p), "is a grey picture"),
    "grey16.png": (lambda p: Image.fromarray(DEEP[..., 0]).save(p), "is a grey picture"),
    "grey.jpg": (lambda p: Image.fromarray(RGB[..., 0]).save(p), "is a grey picture"),
    "bits.png": (lambda p: Image.fromarray(RGB[..., 0] > 99).save(p), "is a grey picture"),
    "grey.npy": (lambda p: np.save(p, RGB[..., 0]), "is a grey picture"),
    "first.npy": (lambda p: np.save(p, np.moveaxis(RGB, -1, 0)), "expected a colour one, (H, W, 3)"),
    "alpha.png": (lambda p: png(p, np.dstack([DEEP[..., 0], TOP16])), "is a grey picture"),
    "greys.png": (lambda p: Image.fromarray(RGB[..., 0]).convert("P").save(p), "is a grey picture"),
    "grey.tif": (lambda p: tif(p, DEEP[..., 0].astype(np.float16)), "is a grey picture"),
    "clear.png": (lambda p: Image.fromarray(np.dstack([RGB, TOP8 - 1])).save(p), "has transparent pixels"),
    "clear16.png": (lambda p: png(p, np.dstack([DEEP, TOP16 - 1])), "has transparent pixels"),
    "key.png": (lambda p: Image.fromarray(RGB).save(p, transparency=tuple(RGB[0, 0].tolist())), "transparent pixels"),
    "ink.jpg": (lambda p: Image.new("CMYK", (16, 16)).save(p), "mode CMYK, expected one of red, green and blue"),
    "nan.npy": (lambda p: np.save(p, np.where(RGB > 200, np.nan, RGB)), "has NaN or infinite values"),
    "two.tif": (lambda p: tif(p, np.stack([RGB, RGB]), photometric="rgb"), "holds 2 pictures"),
    "torn.png": (lambda p: (Image.fromarray(RGB).save(p), p.write_bytes(p.read_bytes()[:300])), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_colour_picture_is_refused(tmp_path, name):
    make, words = REFUSED[name]
    make(tmp_path / name)
    with pytest.raises(ValueError) as caught:
        pixels.read(tmp_path / name, colour=True)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_only_pictures_are_in_colour(tmp_path):
    volumes.write(tmp_path / "x.nii.gz", np.zeros((2, 8, 8), np.int16), volumes.Volume(np.zeros((2, 8, 8))))
    with pytest.raises(ValueError, match="x.nii.gz: is no picture"):
        volumes.read(tmp_path / "x.nii.gz", colour=True)


# ---------------------------------------------------------------------- import


def in_colour(made):
    """The same pictures with three channels, each another."""
    return {key: (np.stack([image, image[::-1], 255 - image], axis=-1), masks) for key, (image, masks) in made.items()}


@pytest.mark.parametrize("layout", TREES)
def test_every_layout_of_pictures(layout, tree, out):  # noqa: F811
    made = in_colour(pictures(slices=2))
    TREES[layout](tree, made)
    report = import_tree(tree, out, colour=True, **({} if layout == "berdiff" else ALL_IN_TRAIN))
    found = [pair for _, pair in sorted(by_path(out).items())]
    assert report.layout == layout and report.parameters["colour"] is True and len(found) == len(made)
    images = {image.tobytes() for image, _ in found}
    if layout != "cimd":  # whose pictures are JPEG
        assert images == {np.moveaxis(image, -1, 0).tobytes() for image, _ in made.values()}
    assert all(image.shape == (3, 12, 10) and masks.shape == (R, 12, 10) for image, masks in found)
    name = next(name for name in ("train", "test", "val") if (out / f"{name}.h5").is_file())
    slices = RaterDataset(out / f"{name}.h5")
    assert slices.channels == ("R", "G", "B") and slices.img_channels == 3 and (out / "preview.png").is_file()


@pytest.mark.parametrize("fit", ["resize", "crop"])
def test_another_size_is_that_of_each_channel(fit, tree, out):  # noqa: F811
    made = in_colour(pictures(1, 1))
    slices_tree(tree, made)
    import_tree(tree, out, colour=True, size=(8, 6), fit=fit, **ALL_IN_TRAIN)
    ((image, _),) = by_path(out).values()
    ((source, _),) = made.values()
    how = (lambda x: pixels.resize(x, (8, 6))) if fit == "resize" else (lambda x: pixels.crop(x, (8, 6)))
    assert np.array_equal(image, np.stack([how(source[..., c]) for c in range(3)]))


def test_without_colour_a_colour_picture_is_what_it_was(tree, out):  # noqa: F811
    slices_tree(tree, in_colour(pictures()))
    with pytest.raises(ValueError, match="slice-0.png: is a colour picture, expected a grey one"):
        import_tree(tree, out)
    assert not out.exists()


def test_a_colour_tree_with_a_grey_picture_inside(tree, out):  # noqa: F811
    slices_tree(tree, in_colour(pictures()))
    save(tree / "P-02" / "nodule-1" / "images" / "slice-0.png", RGB[:12, :10, 0])
    words = "P-02/nodule-1/images/slice-0.png: is a grey picture"
    with pytest.raises(ValueError, match=words):
        import_tree(tree, out, colour=True, **ALL_IN_TRAIN)
    assert not out.exists()
    report = import_tree(tree, out, colour=True, on_error="skip", **ALL_IN_TRAIN)
    assert [f"{one.path}: {one.reason}"[: len(words)] for one in report.problems] == [words]
    assert report.splits["train"].slices == 3


def test_a_mask_in_colour(tree, out):  # noqa: F811
    slices_tree(tree, in_colour(pictures()))
    save(tree / "P-01" / "nodule-0" / "mask-1" / "slice-0.png", RGB[:12, :10])
    with pytest.raises(ValueError, match="mask-1/slice-0.png: is a colour picture, expected a grey one"):
        import_tree(tree, out, colour=True)


def cases(root: Path, masks: str = "seg{:02d}.png", image: str = "image.png", count: int = 3) -> Path:
    """Folders with a picture and three raters' masks."""
    for i in range(count):
        y, x = np.ogrid[:32, :40]
        r = np.hypot(y - 15 - i, x - 18)
        folder = root / f"case{i:02d}"
        noise = np.random.default_rng(i).integers(0, 20, (32, 40, 3))
        save(folder / image, (noise + np.array([200, 90, 60]) * (r < 8)[..., None]).astype(np.uint8))
        for k in range(3):
            save(folder / masks.format(k + 1), (255 * (r < 6 + k)).astype(np.uint8))
    return root


@pytest.mark.parametrize("layout", ["qubiq", "pattern"])
def test_cases_that_are_pictures(tmp_path, layout):
    root = cases(tmp_path / "t")
    pattern = [
        "--layout",
        "pattern",
        "--image-pattern",
        "{case}/image{ext}",
        "--mask-pattern",
        "{case}/seg{rater}{ext}",
    ]
    words = pattern if layout == "pattern" else []  # qubiq is told by its names
    done = command("import", root, tmp_path / "o", "--colour", "--depth", 8, "--split", "100/0/0", "--quiet", *words)
    assert done == (0, "")
    slices = RaterDataset(tmp_path / "o" / "train.h5")
    image, masks = slices[1]
    picture = np.asarray(Image.open(root / "case01" / "image.png"))
    assert slices.channels == ("R", "G", "B") and image.dtype == torch.uint8 and len(slices) == 3
    # 32 x 48, the least multiples of 16, around the middle.
    assert torch.equal(image[:, :, 4:44], torch.from_numpy(np.moveaxis(picture, -1, 0).copy()))
    marked = np.asarray(Image.open(root / "case01" / "seg02.png")) > 0
    assert np.array_equal(masks[1, 0, :, 4:44].numpy(), marked) and not masks[..., :4].any()


def test_nnunet_pictures(tmp_path):
    """As nnU-Net keeps them: one file of three channels, which dataset.json names."""
    for i in range(2):
        save(tmp_path / "t" / "imagesTr" / f"skin_{i:03d}_0000.png", RGB)
        save(tmp_path / "t" / "labelsTr" / f"skin_{i:03d}.png", (RGB[..., 0] > 128).astype(np.uint8))
    told = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": {"background": 0, "lesion": 1}}
    (tmp_path / "t" / "dataset.json").write_text(json.dumps(told))
    import_volumes(tmp_path / "t", tmp_path / "o", "nnunet", colour=True, **ALL_IN_TRAIN)
    slices = RaterDataset(tmp_path / "o" / "train.h5")
    assert slices.channels == ("R", "G", "B") and str(slices.regions) == "lesion=1"


def test_pictures_beside_volumes_are_not_cases(tmp_path):
    """A preview beside a volume is no second image."""
    volume = volumes.Volume(np.ones((1, 32, 32), np.int16), spacing=(1.0, 1.0, 1.0))
    for name in ("image", "seg01"):
        (tmp_path / "t" / "a").mkdir(parents=True, exist_ok=True)
        volumes.write(tmp_path / "t" / "a" / f"{name}.nii.gz", volume.array, volume)
    save(tmp_path / "t" / "a" / "image.png", RGB)
    report = import_volumes(tmp_path / "t", tmp_path / "o", "qubiq", **ALL_IN_TRAIN)
    assert report.ignored == ("a/image.png",)


def _grey_case(root: Path) -> None:
    save(root / "case01" / "image.png", RGB[:32, :40, 0])


def _jpeg_mask(root: Path) -> None:
    (root / "case01" / "seg02.png").rename(root / "case01" / "seg02.jpg")


def _colour_mask(root: Path) -> None:
    save(root / "case01" / "seg02.png", RGB[:32, :40])


def _other_size(root: Path) -> None:
    save(root / "case01" / "seg02.png", np.zeros((32, 41), np.uint8))


def _second(root: Path) -> None:
    for i in range(3):
        save(root / f"case{i:02d}" / "other.png", RGB[:32, :40])


SECOND = ["--layout", "pattern", "--image-pattern", "{case}/{channel}{ext}", "--mask-pattern", "{case}/seg{rater}{ext}"]
BAD = {
    "grey": (_grey_case, [], "case01/image.png: is a grey picture"),
    "jpeg": (_jpeg_mask, [], "case01/seg02.jpg: is a JPEG, which does not keep labels apart"),
    "colours": (_colour_mask, [], "case01/seg02.png: is a colour picture, expected a grey one"),
    "size": (_other_size, [], "case01/seg02.png: has the shape (1, 32, 41)"),
    "several": (_second, SECOND, "colour: a case must have one colour picture, and the files are image, other"),
    "channels": (None, ["--channels", "a", "--layout", "qubiq"], "channels must not be given with colour"),
    "context": (None, ["--context", "1"], "context_slices is for slices of volumes, got 1 with colour"),
    "volumes": (None, ["--volumes"], "whole_volumes is for volumes, and colour for pictures"),
    "brats": (None, ["--layout", "brats"], "no case of layout 'brats' in"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_cases_of_pictures(tmp_path, name):
    change, words, message = BAD[name]
    root = cases(tmp_path / "t")
    if change is not None:
        change(root)
    options = ["--split", "100/0/0", "--missing-mask", "absent", "--quiet"]
    status, said = command("import", root, tmp_path / "o", "--colour", *options, *words)
    assert status == 1 and message in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


# ---------------------------------------------------------------------- training and sampling


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A run on skin: its folder and data."""
    folder = tmp_path_factory.mktemp("colour")
    cases(folder / "t", count=6)
    import_volumes(folder / "t", folder / "o", "qubiq", colour=True, depth=8, split=(50, 50, 0))
    trained(folder / "run", folder / "o" / "train.h5", folder / "o" / "val.h5", rotate90=False)
    return folder


def test_a_model_of_it_knows_its_channels_and_is_evaluated(model, tmp_path):
    made = bf.load(model / "run" / "model.safetensors")
    assert made.channels == ("R", "G", "B") and made.img_channels == 3
    assert list((model / "run" / "previews").glob("*.png"))
    options = ["--steps", 2, "-n", 2, "--output", tmp_path / "e"]
    status, _ = command(
        "evaluate", "--model", model / "run" / "model.safetensors", "--data", model / "o/val.h5", *options
    )
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert status == 0 and summary["data"]["channels"] == ["R", "G", "B"]


@pytest.mark.parametrize("mode", ["auto", "false", "true"])
def test_colours_are_scaled_together_unless_told_otherwise(tree, out, tmp_path, mode):  # noqa: F811
    slices_tree(tree, in_colour(pictures(2, 2)))
    import_tree(tree, out, colour=True, **ALL_IN_TRAIN)
    settings = dict(channel_mult=(1,), rotate90=False, per_channel=mode)
    made = trained(tmp_path / "run", out / "train.h5", **settings)
    assert made.preprocessing.per_channel == (mode == "true")


def test_sample_takes_one_picture_of_three_channels(model, tmp_path):
    made, picture = model / "run" / "model.safetensors", model / "t" / "case04" / "image.png"
    rater = picture.with_name("seg01.png")
    words = ["--model", made, "--n", 3, "--steps", 2, "--seed", 5, "--quiet"]
    done = command("sample", picture, "--output", tmp_path / "s", "--raters", rater, "--report", *words)
    assert done == (0, "")
    names = {path.name for path in (tmp_path / "s").iterdir()}
    assert names == {*(f"mask_00{k}.png" for k in range(3)), "mean.png", "entropy.png", "summary.json", "report.html"}
    loaded = bf.load(made)
    drawn = bf.sample_volume(loaded, volumes.read(picture, colour=True), n=3, steps=2, seed=5)
    rgb = np.moveaxis(np.asarray(Image.open(picture)), -1, 0)[:, None]
    assert np.array_equal(drawn.masks, bf.sample_volume(loaded, rgb, n=3, steps=2, seed=5).masks)
    for k in range(3):
        mask = np.asarray(Image.open(tmp_path / "s" / f"mask_00{k}.png"))
        assert mask.shape == (32, 40) and np.array_equal(mask > 0, drawn.mask(k)[0])
    assert json.loads((tmp_path / "s" / "summary.json").read_text())["raters"]["count"] == 1
    (tmp_path / "s" / "report.html").unlink()
    assert command("report", tmp_path / "s", "--input", picture)[0] == 0 and (tmp_path / "s" / "report.html").is_file()
    other = model / "t" / "case05" / "image.png"
    status, said = command("report", tmp_path / "s", "--input", other)
    assert status == 1 and "is not what the results" in said


def test_names_are_not_needed(model, tmp_path):
    loaded = bf.load(model / "run" / "model.safetensors")
    config = {**loaded.to_config(), "channels": None}
    unnamed = bf.BerDiff.from_config(config)
    unnamed.network.load_state_dict(loaded.network.state_dict())
    unnamed.save(tmp_path / "m.safetensors")
    picture = model / "t" / "case00" / "image.png"
    words = ["--n", 2, "--steps", 2, "--quiet", "--output"]
    for name, of in (("a", model / "run" / "model.safetensors"), ("b", tmp_path / "m.safetensors")):
        assert command("sample", picture, "--model", of, *words, tmp_path / name) == (0, "")
    assert (tmp_path / "a" / "mean.png").read_bytes() == (tmp_path / "b" / "mean.png").read_bytes()


def _grey_input(folder: Path) -> Path:
    save(folder / "grey.png", RGB[:32, :40, 0])
    return folder / "grey.png"


def _volume_input(folder: Path) -> Path:
    volumes.write(folder / "v.nii.gz", np.zeros((3, 32, 32), np.int16), volumes.Volume(np.zeros((3, 32, 32))))
    return folder / "v.nii.gz"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_grey_input, "grey.png: is a grey picture"),
        (_volume_input, "v.nii.gz: is no picture, and the model"),
    ],
)
def test_a_model_of_colours_is_given_something_else(model, tmp_path, make, words):
    status, said = command(
        "sample", make(tmp_path), "--model", model / "run" / "model.safetensors", "--output", tmp_path / "s"
    )
    assert status == 1 and words in said and said.count("\n") == 1 and not (tmp_path / "s").exists()


def test_a_model_of_one_channel_is_given_colours(model, tmp_path):
    picture = model / "t" / "case00" / "image.png"
    status, said = command("sample", picture, "--model", "phantom64", "--output", tmp_path / "s")
    assert status == 1 and "image.png: is a colour picture, expected a grey one" in said
    assert not (tmp_path / "s").exists()
    with pytest.raises(ValueError, match="volume must have the model's 1 channels, got a colour picture"):
        bf.sample_volume(bf.load("phantom64"), volumes.read(picture, colour=True), n=1, steps=1)
    grey, made = volumes.Volume(np.zeros((1, 32, 40))), bf.load(model / "run" / "model.safetensors")
    with pytest.raises(ValueError, match=r"must have the model's 3 channels \(R, G, B\), got 1"):
        bf.sample_volume(made, grey, n=1, steps=1)


# ---------------------------------------------------------------------- what is shown


def test_what_pictures_show():
    images = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).to(torch.uint16)
    grey = shown.of_images(images, ("R", "G", "B"))
    assert torch.allclose(
        grey, 0.299 * images[:, 0].float() + 0.587 * images[:, 1].float() + 0.114 * images[:, 2].float()
    )
    assert torch.equal(shown.of_images(images, ("a", "b", "c")), images[:, 0].float())
    assert torch.equal(shown.of_images(images, ("a[-1]", "a[0]", "a[+1]"), 1), images[:, 1].float())
    assert colours.luminance(np.full((3, 2, 2), 65535, np.uint16)).tolist() == [[65535, 65535]] * 2


def test_a_fingerprint_is_of_the_colours():
    """Also of pictures that are equally bright."""
    grey, rgb = np.zeros((1, 4, 4), np.uint8), np.zeros((3, 1, 4, 4), np.uint8)
    plain = volumes.Volume(grey).fingerprint()
    assert len({plain, *(volumes.Volume(grey, colour=rgb + k).fingerprint() for k in (0, 1))}) == 3


def test_the_file_says_what_it_holds(tree, out):  # noqa: F811
    slices_tree(tree, in_colour(pictures(1, 1)))
    import_tree(tree, out, colour=True, **ALL_IN_TRAIN)
    with h5py.File(out / "train.h5") as file:
        assert json.loads(file.attrs["channels"]) == ["R", "G", "B"] and file.attrs["format"] == 2
