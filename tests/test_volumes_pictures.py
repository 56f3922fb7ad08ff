# SPDX-License-Identifier: Apache-2.0
"""Pictures keep all their levels, are turned as a viewer turns them, or are refused in one line."""

from __future__ import annotations

import json
import struct
import zlib

import h5py
import numpy as np
import pytest
from PIL import Image

from berdiff_fast.data import importers, pixels
from berdiff_fast.imaging import volumes

tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed")
pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")

#: 1200 levels, off every axis of symmetry and not square.
GREY = (np.random.default_rng(0).integers(0, 200, (40, 56)) + 24).astype(np.uint16)
GREY[5:12, 20:31] += 1000
TOP = np.full_like(GREY, 65535)

NAMES = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
         7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}  # fmt: skip


def turned(array, orientation):
    """As the EXIF standard has it, by Pillow's words for it."""
    how = NAMES[orientation]
    return array if how is None else np.asarray(Image.fromarray(array).transpose(how))


def png(path, array, orientation=None):
    """16 bits a channel, which Pillow does not write."""
    height, width, channels = array.shape
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    kind = {2: 4, 3: 2, 4: 6}[channels]
    exif = b""
    if orientation:
        entry = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
        exif = chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01" + entry + bytes(4))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + exif + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))
    return path


def tiff(path, array, **options):
    tifffile.imwrite(path, array, **options)
    return path


READ = {
    "rgb16.png": lambda p: png(p, np.dstack([GREY] * 3)),
    "la16.png": lambda p: png(p, np.dstack([GREY, TOP])),
    "rgba16.png": lambda p: png(p, np.dstack([GREY] * 3 + [TOP])),
    "rgb16.tif": lambda p: tiff(p, np.dstack([GREY] * 3), photometric="rgb"),
    "planar16.tif": lambda p: tiff(p, np.stack([GREY] * 3), photometric="rgb", planarconfig="separate"),
    "la16.tif": lambda p: tiff(p, np.dstack([GREY, TOP]), photometric="minisblack", extrasamples=["unassalpha"],
                               planarconfig="contig"),
    "white16.tif": lambda p: tiff(p, 65535 - GREY, photometric="miniswhite"),
    "big_endian.tif": lambda p: tiff(p, GREY, byteorder=">"),
    "big.tif": lambda p: tiff(p, GREY, bigtiff=True),
    "f16.tif": lambda p: tiff(p, GREY.astype(np.float16)),
    "f32.tif": lambda p: tiff(p, GREY.astype(np.float32)),
    "f64.tif": lambda p: tiff(p, GREY.astype(np.float64)),
    "f32rgb.tif": lambda p: tiff(p, np.dstack([GREY.astype(np.float32)] * 3), photometric="rgb"),
    "i16.tif": lambda p: tiff(p, GREY.astype(np.int16)),
    "u32.tif": lambda p: tiff(p, GREY.astype(np.uint32)),
    "i32.tif": lambda p: tiff(p, GREY.astype(np.int32)),
    "packed.tif": lambda p: tiff(p, GREY, compression="zlib", predictor=2),
    "hwc.npy": lambda p: np.save(p, np.dstack([GREY] * 3)),
    "hw1.npy": lambda p: np.save(p, GREY[..., None]),
    "f16.npy": lambda p: np.save(p, GREY.astype(np.float16)),
    "fortran.npy": lambda p: np.save(p, np.asfortranarray(GREY)),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_all_levels_are_kept(tmp_path, name):
    path = tmp_path / name
    READ[name](path)
    for found in (volumes.read(path).array[0], pixels.read(path)[0]):
        assert np.array_equal(found, GREY.astype(np.float16) if "f16" in name else GREY), name
        assert found.dtype.isnative


def test_signed_and_large_numbers(tmp_path):
    for kind, value in ((np.int8, -100), (np.int16, -1024), (np.int32, -70000), (np.uint32, 2**32 - 5)):
        array = np.full((9, 13), value, kind)
        array[3, 4] = 7
        tiff(tmp_path / "x.tif", array)
        assert np.array_equal(pixels.read(tmp_path / "x.tif")[0].astype(np.int64), array.astype(np.int64)), kind


REFUSED = {
    "colour16.png": (lambda p: png(p, np.dstack([GREY, GREY, GREY + 1])), "is a colour picture"),
    "transparent.png": (lambda p: png(p, np.dstack([GREY, TOP - 1])), "has transparent pixels"),
    "colour.tif": (lambda p: tiff(p, np.dstack([GREY, GREY, GREY + 1]), photometric="rgb"), "is a colour picture"),
    "colour.npy": (lambda p: np.save(p, np.dstack([GREY, GREY, GREY + 1])), "is a colour picture"),
    "two.tif": (lambda p: tiff(p, np.stack([GREY, GREY]), photometric="minisblack"), "holds 2 pictures"),
    "short.npy": (lambda p: (np.save(p, GREY), p.write_bytes(p.read_bytes()[:-9])), "cannot be read"),
    "palette.tif": (lambda p: Image.new("CMYK", (16, 16)).save(p), "mode CMYK"),
    "see.png": (lambda p: Image.new("L", (16, 16), 3).save(p, transparency=3), "has transparent pixels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_grey_is_refused(tmp_path, name):
    make, words = REFUSED[name]
    make(tmp_path / name)
    for read in (volumes.read, pixels.read):
        with pytest.raises(ValueError) as caught:
            read(tmp_path / name)
        assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_as_a_viewer_does(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    small = (GREY >> 3).astype(np.uint8)
    for name in ("a.png", "a.jpg", "a.tif"):
        Image.fromarray(small).save(tmp_path / name, exif=exif, **({"quality": 100} if name == "a.jpg" else {}))
        found = pixels.read(tmp_path / name)[0]
        expected = turned(small, orientation)
        assert found.shape == expected.shape and np.abs(found.astype(int) - expected).max() <= 2, name
    Image.fromarray(GREY).save(tmp_path / "deep.png", exif=exif)
    png(tmp_path / "rgb16.png", np.dstack([GREY] * 3), orientation)
    png(tmp_path / "la16.png", np.dstack([GREY, TOP]), orientation)
    tiff(tmp_path / "f64.tif", GREY.astype(np.float64), extratags=[(274, "H", 1, orientation, True)])
    tiff(tmp_path / "u16.tif", GREY, extratags=[(274, "H", 1, orientation, True)])
    for name in ("deep.png", "rgb16.png", "la16.png", "f64.tif", "u16.tif"):
        assert np.array_equal(pixels.read(tmp_path / name)[0], turned(GREY, orientation)), name


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_import_turns_image_and_mask_alike(tmp_path, orientation):
    """A picture that says it lies on its side, masks drawn in a viewer that turned it, and masks that say so too."""
    small = (GREY[:40, :40] >> 3).astype(np.uint8)
    inside = (small > 100).astype(np.uint8) * 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    for folder in ("images", "masks_0", "masks_1"):
        (tmp_path / "tree" / folder).mkdir(parents=True)
    for p in range(4):
        Image.fromarray(small).save(tmp_path / f"tree/images/P{p}_1.png", exif=exif)
        Image.fromarray(turned(inside, orientation)).save(tmp_path / f"tree/masks_0/P{p}_1.png")
        Image.fromarray(inside).save(tmp_path / f"tree/masks_1/P{p}_1.png", exif=exif)
    importers.import_tree(tmp_path / "tree", tmp_path / "out", split=(100, 0, 0), preview=False)
    with h5py.File(tmp_path / "out/train.h5") as file:
        image, mask = file["image"][()], file["mask"][()]
    assert np.array_equal(mask[:, 0], mask[:, 1])
    assert np.array_equal(image > 100, mask[:, 0] == 1)
    assert json.loads((tmp_path / "out/import.json").read_text())["problems"] == []


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_huge_pictures_are_refused_before_they_are_decoded(tmp_path, name, monkeypatch):
    path = tmp_path / name
    Image.new("1", (14000, 12000)).save(path, **({"compression": "tiff_lzw"} if name == "a.tif" else {}))
    assert path.stat().st_size < 10**6
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("pixels were decoded"))
    with pytest.raises(ValueError, match="has 12000 x 14000 pixels, more than the 100000000 that are read"):
        volumes.read(path)


def test_padding_has_no_part_in_the_range_of_an_import():
    x = np.full((40, 40), -850, np.int16)
    x[10:20, 10:20] = np.arange(-900, -800).reshape(10, 10)
    x[0, 0] = 40
    plain = pixels.to_image(x, None)
    for low in (-2000, -3024):
        padded = x.copy()
        padded[30:, 30:] = low
        found = pixels.to_image(padded, None)
        assert (found[30:, 30:] == 0).all()
        found[30:, 30:] = plain[30:, 30:]
        assert np.array_equal(found, plain)
