# SPDX-License-Identifier: Apache-2.0
"""NRRD and MetaImage: judged as text before ITK sees them; contradictions, bombs and files elsewhere are refused."""

from __future__ import annotations

import gzip
import logging
import re
import zlib

import h5py
import numpy as np
import pytest
from scans import GEOMETRIES, scan

from berdiff_fast.imaging import volumes

sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")

SCAN = scan("anisotropic")
RAW = SCAN.array.astype("<i2").tobytes()


def mha(path, data=RAW, **fields):
    """A header with fields of one's own; None leaves one out. What comes last is ElementDataFile."""
    usual = dict(ObjectType="Image", NDims=3, BinaryData=True, BinaryDataByteOrderMSB=False, CompressedData=False,
                 TransformMatrix="1 0 0 0 1 0 0 0 1", Offset="-171.3 12.25 -300.75", ElementSpacing="0.703125 0.8 2.5",
                 DimSize="23 17 5", ElementType="MET_SHORT")  # fmt: skip
    last = fields.pop("ElementDataFile", "LOCAL")
    lines = [f"{k} = {v}" for k, v in (usual | fields).items() if v is not None]
    path.write_bytes("\n".join([*lines, f"ElementDataFile = {last}", ""]).encode() + data)
    return path


def nrrd(path, data=RAW, **fields):
    usual = {"type": "short", "dimension": 3, "space": "left-posterior-superior", "sizes": "23 17 5",
             "space directions": "(0.703125,0,0) (0,0.8,0) (0,0,2.5)", "kinds": "domain domain domain",
             "endian": "little", "encoding": "raw", "space origin": "(-171.3,12.25,-300.75)"}  # fmt: skip
    fields = {k.replace("_", " "): v for k, v in fields.items()}
    lines = [f"{k}: {v}" for k, v in (usual | fields).items() if v is not None]
    path.write_bytes("\n".join(["NRRD0004", *lines, "", ""]).encode() + data)
    return path


def test_what_is_sound_is_read(tmp_path):
    (tmp_path / "sub").mkdir()
    for place in ("voxels.raw", "sub/voxels.raw"):
        (tmp_path / place).write_bytes(RAW)
    for k in range(5):
        (tmp_path / f"v{k:02d}.raw").write_bytes(SCAN.array[k].astype("<i2").tobytes())
    text = " ".join(map(str, SCAN.array.ravel())).encode()
    names = "\n".join(f"v{k:02d}.raw" for k in range(5)).encode()
    paths = [
        mha(tmp_path / "a.mha"),
        mha(tmp_path / "b.mha", zlib.compress(RAW), CompressedData=True, CompressedDataSize=len(zlib.compress(RAW))),
        mha(tmp_path / "d.mha", ElementSize="0.703125 0.8 2.5", Position="-171.3 12.25 -300.75", DistanceUnits="mm"),
        mha(tmp_path / "e.mhd", b"", ElementDataFile="voxels.raw"),
        mha(tmp_path / "f.mhd", b"", ElementDataFile="sub/voxels.raw"),
        mha(tmp_path / "g.mhd", b"", ElementDataFile="v%02d.raw 0 4 1"),
        mha(tmp_path / "h.mhd", names + b"\n", ElementDataFile="LIST"),
        mha(tmp_path / "i.mha", NDims=4, DimSize="23 17 5 1", ElementSpacing="0.703125 0.8 2.5 1",
            Offset="-171.3 12.25 -300.75 0", TransformMatrix="1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1"),
        nrrd(tmp_path / "a.nrrd"),
        nrrd(tmp_path / "b.nrrd", gzip.compress(RAW), encoding="gzip"),
        nrrd(tmp_path / "c.nrrd", text, encoding="ascii"),
        nrrd(tmp_path / "d.nhdr", b"", data_file="voxels.raw"),
        nrrd(tmp_path / "e.nhdr", b"", data_file="./sub/voxels.raw"),
        nrrd(tmp_path / "f.nhdr", b"", data_file="v%02d.raw 0 4 1"),
        nrrd(tmp_path / "g.nrrd", space="right-anterior-superior", space_origin="(171.3,-12.25,-300.75)",
             space_directions="(-0.703125,0,0) (0,-0.8,0) (0,0,2.5)"),
        nrrd(tmp_path / "h.nrrd", space_units='"mm" "mm" "mm"'),
    ]  # fmt: skip
    for path in paths:
        volume = volumes.read(path)
        assert np.array_equal(volume.array, SCAN.array), path.name
        np.testing.assert_allclose(volume.spacing, SCAN.spacing, err_msg=path.name)
        np.testing.assert_allclose(volume.origin, SCAN.origin, err_msg=path.name)
        np.testing.assert_allclose(volume.direction, SCAN.direction, err_msg=path.name)


OUTSIDE = "points to data outside its folder"

REFUSED = {
    # of a grid that is told twice
    "two spacings": (lambda d: nrrd(d / "a.nrrd", spacings="1 1 1"), "says spacings and space directions"),
    "two origins": (lambda d: nrrd(d / "a.nrrd", axis_mins="0 0 0"), "says axis mins and space origin"),
    "a field twice": (lambda d: nrrd(d / "a.nrrd", Sizes="23 17 4"), "says sizes twice: '23 17 5' and '23 17 4'"),
    "offset and position": (lambda d: mha(d / "a.mha", Position="0 0 0"), "says the same twice: offset"),
    "matrix and rotation": (lambda d: mha(d / "a.mha", Rotation="1 0 0 0 -1 0 0 0 1"), "says the same twice"),
    "spacing twice": (lambda d: mha(d / "a.mha", elementspacing="1 1 1"), "says elementspacing twice"),
    "order of bytes": (lambda d: mha(d / "a.mha", ElementByteOrderMSB=True), "the order of bytes twice"),
    "metres": (lambda d: nrrd(d / "a.nrrd", space_units='"m" "m" "m"'), "space units are 'm'; convert it to mm"),
    "um": (lambda d: mha(d / "a.mha", DistanceUnits="um"), "DistanceUnits are 'um'; convert it to mm"),
    "sheared": (
        lambda d: nrrd(d / "a.nrrd", space_directions="(0.7,0.07,0) (0,0.8,0) (0,0,2.5)"),
        "space directions are sheared: axes are 0.1 (cosine) off",
    ),
    "a matrix that shears": (lambda d: mha(d / "a.mha", TransformMatrix="1 0 0 .1 1 0 0 0 1"), "rotation|orthonormal"),
    # of sizes
    "dimensions": (lambda d: mha(d / "a.mha", NDims=100), "ndims must be a whole number from 1 to 4, got '100'"),
    "negative dimensions": (lambda d: mha(d / "a.mha", NDims=-3), "ndims must be a whole number"),
    "no dimensions": (lambda d: mha(d / "a.mha", NDims=None), "ndims must be a whole number"),
    "too few sizes": (lambda d: mha(d / "a.mha", DimSize="23 17"), "dimsize must be 3 numbers"),
    "negative sizes": (lambda d: mha(d / "a.mha", DimSize="23 -17 5"), "dimsize must be 3 positive numbers"),
    "too large": (lambda d: mha(d / "a.mha", DimSize="99999 99999 9"), "more than the"),
    "larger than it is": (lambda d: mha(d / "a.mha", DimSize="23 17 500"), "it is cut short"),
    "larger, compressed": (
        lambda d: mha(d / "a.mha", zlib.compress(RAW), CompressedData=True, CompressedDataSize=99, DimSize="23 17 500"),
        "it is cut short",
    ),
    "a bomb": (
        lambda d: mha(d / "a.mha", zlib.compress(bytes(100 * 2**20), 9), CompressedData=True, CompressedDataSize=99),
        "has more than 64 MB behind its voxels",
    ),
    "damaged": (
        lambda d: mha(d / "a.mha", zlib.compress(RAW)[:-9] + bytes(9), CompressedData=True, CompressedDataSize=99),
        "its voxels are damaged",
    ),
    "compressed to no size": (
        lambda d: mha(d / "a.mha", zlib.compress(RAW), CompressedData=True),
        "compresseddatasize must be a whole number",
    ),
    "a type": (lambda d: mha(d / "a.mha", ElementType="MET_STRING"), "elementtype 'MET_STRING' is not known"),
    "channels": (lambda d: mha(d / "a.mha", ElementNumberOfChannels=3), "one number for each voxel, got 3"),
    "a short matrix": (lambda d: mha(d / "a.mha", TransformMatrix="1 0 0"), "transformmatrix must be 9 numbers"),
    "no end": (lambda d: (mha(d / "a.mha").write_bytes(b"NDims = 3\n"), d / "a.mha")[1], "it has no ElementDataFile"),
    "a skip": (lambda d: mha(d / "a.mha", HeaderSize=10**12), "headersize must be a whole number"),
    "nrrd's dimensions": (lambda d: nrrd(d / "a.nrrd", dimension=200), "dimension must be a whole number from 1 to 16"),
    "nrrd's sizes": (lambda d: nrrd(d / "a.nrrd", sizes="23 17 500"), "it is cut short"),
    "nrrd, too large": (lambda d: nrrd(d / "a.nrrd", sizes="99999 99999 9"), "more than the"),
    "nrrd's type": (lambda d: nrrd(d / "a.nrrd", type="block"), "type 'block' is not known"),
    "nrrd's encoding": (lambda d: nrrd(d / "a.nrrd", encoding="bzip2"), "the encoding 'bzip2' is not known"),
    # of data elsewhere
    "a file above": (lambda d: mha(d / "a.mhd", ElementDataFile="../secret.raw"), OUTSIDE),
    "any file": (lambda d: mha(d / "a.mhd", ElementDataFile="/etc/passwd"), OUTSIDE),
    "a list": (lambda d: mha(d / "a.mhd", b"/etc/passwd\n" * 5, ElementDataFile="LIST"), OUTSIDE),
    "a pattern": (lambda d: mha(d / "a.mhd", ElementDataFile="/etc/%03d 1 5 1"), OUTSIDE),
    "a pattern for printf": (lambda d: mha(d / "a.mhd", ElementDataFile="%s%n 1 5 1"), "is no pattern of names"),
    "a link": (lambda d: mha(d / "a.mhd", ElementDataFile="link.raw"), OUTSIDE),
    "a list without an end": (
        lambda d: mha(d / "a.mhd", b"a.raw\n" * 4 + b"a.raw", ElementDataFile="LIST"),
        "does not end with a line's end",
    ),
    "a short list": (lambda d: mha(d / "a.mhd", b"a.raw\n" * 4, ElementDataFile="LIST"), "4 files for 5 slices"),
    "itself missing": (lambda d: mha(d / "a.mhd", ElementDataFile="none.raw"), "its data are missing"),
    "nrrd's file above": (lambda d: nrrd(d / "a.nhdr", data_file="../secret.raw"), OUTSIDE),
    "nrrd's any file": (lambda d: nrrd(d / "a.nhdr", datafile="/etc/passwd"), OUTSIDE),
    "nrrd's list": (lambda d: nrrd(d / "a.nhdr", b"", data_file="LIST\n/etc/passwd"), OUTSIDE),
    "nrrd's pattern": (lambda d: nrrd(d / "a.nhdr", data_file="../%d.raw 1 5 1"), OUTSIDE),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_line(tmp_path, what):
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "secret.raw").write_bytes(RAW)
    (folder / "link.raw").symlink_to(tmp_path / "secret.raw")
    make, words = REFUSED[what]
    path = make(folder)
    with pytest.raises(ValueError) as caught:
        volumes.read(path)
    assert re.search("|".join(map(re.escape, words.split("|"))), str(caught.value)), str(caught.value)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_what_is_only_odd_is_told(tmp_path, caplog):
    cases = [
        (mha(tmp_path / "a.mha", AnatomicalOrientation="LPS"), "AnatomicalOrientation is LPS, its TransformMatrix RAI"),
        (mha(tmp_path / "b.mha", ElementSize="0.7 0.8 3"), "the spacing is taken"),
        (nrrd(tmp_path / "c.nrrd", space="scanner-xyz"), "names no anatomy"),
    ]
    for path, words in cases:
        with caplog.at_level(logging.WARNING, "berdiff_fast"):
            volume = volumes.read(path)
        assert np.array_equal(volume.array, SCAN.array) and volume.spacing == SCAN.spacing
        assert words in caplog.messages[-1] and str(path) in caplog.messages[-1]
    caplog.clear()
    for geometry in GEOMETRIES:  # what ITK itself writes is not odd
        for ending in (".mha", ".nrrd"):
            volume = scan(geometry)
            volumes.write(tmp_path / f"x{ending}", volume.array, volume)
            assert np.array_equal(volumes.read(tmp_path / f"x{ending}").array, volume.array)
    assert not caplog.messages


def test_names_that_are_not_utf8(tmp_path):
    """ITK ends the process for them."""
    name = b"\xff\xfe".decode("utf-8", "surrogateescape")
    path = mha(tmp_path / f"{name}.mha")
    with pytest.raises(ValueError, match="has a name that is not UTF-8; rename it"):
        volumes.read(path)
    for ending in (".nii.gz", ".mha", ".nrrd", ".npy"):
        volumes.write(tmp_path / f"{name}{ending}", SCAN.array > 0, SCAN)
        (tmp_path / f"{name}{ending}").rename(tmp_path / f"plain{ending}")
        assert np.array_equal(volumes.read(tmp_path / f"plain{ending}").array, SCAN.array > 0)
    volumes.write(tmp_path / f"{name}.nii", SCAN.array, SCAN)
    assert np.array_equal(volumes.read(tmp_path / f"{name}.nii").array, SCAN.array)


def hdf5(path, make):
    with h5py.File(path, "w") as file:
        make(file)
        file["mask"] = np.zeros((1, 2, 16, 16), np.uint8)
    return path


def test_hdf5_keeps_to_itself(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(256))
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["d"] = np.zeros((1, 16, 16), np.uint8)
    layout = h5py.VirtualLayout((1, 16, 16), np.uint8)
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "d", (1, 16, 16))
    link = h5py.ExternalLink(str(tmp_path / "other.h5"), "/")

    def soft(file):
        file["far"] = link
        file["image"] = h5py.SoftLink("/far/d")

    def circle(file):
        file["image"], file["back"] = h5py.SoftLink("/back"), h5py.SoftLink("/image")

    def hollow(file):
        file.create_dataset("image", (1, 20000, 20000), np.uint8, chunks=(1, 100, 100))

    makers = {
        "raw": (
            lambda f: f.create_dataset("image", (1, 16, 16), np.uint8, external=[(str(secret), 0, 256)]),
            "another file",
        ),
        "virtual": (lambda f: f.create_virtual_dataset("image", layout), "other files"),
        "link": (lambda f: f.__setitem__("image", h5py.ExternalLink(str(tmp_path / "other.h5"), "d")), "is a link"),
        "soft": (soft, "is a link into another file"),
        "circle": (circle, "is behind more than 16 links"),
        "hollow": (hollow, "declares 400 MB, and only 0 bytes of it are there"),
    }  # fmt: skip
    for name, (make, words) in makers.items():
        path = hdf5(tmp_path / f"{name}.h5", make)
        with pytest.raises(ValueError) as caught:
            volumes.read(path)
        assert words in str(caught.value) and str(path) in str(caught.value), name

    def inside(file):
        file["deep/image"] = np.ones((1, 16, 16), np.uint8)
        file["image"] = h5py.SoftLink("/deep/image")

    assert volumes.read(hdf5(tmp_path / "inside.h5", inside)).array.sum() == 256


def test_a_gigabyte_behind_the_voxels(tmp_path):
    """Of a file of a megabyte; what is small and behind is passed over."""
    pytest.importorskip("nibabel", reason="nibabel is not installed")
    volumes.write(tmp_path / "a.nii", SCAN.array, SCAN)
    plain = (tmp_path / "a.nii").read_bytes()
    with gzip.open(tmp_path / "a.nii.gz", "wb", 9) as file:
        file.write(plain + bytes(1000))
    assert np.array_equal(volumes.read(tmp_path / "a.nii.gz").array, SCAN.array)
    with gzip.open(tmp_path / "b.nii.gz", "wb", 9) as file:
        file.write(plain)
        for _ in range(80):
            file.write(bytes(2**20))
    with pytest.raises(ValueError, match="has more than 64 MB behind its voxels"):
        volumes.read(tmp_path / "b.nii.gz")
    damaged = bytearray((tmp_path / "a.nii.gz").read_bytes())
    damaged[-8] ^= 1  # the checksum at the end
    (tmp_path / "a.nii.gz").write_bytes(damaged)
    with pytest.raises(ValueError, match="cannot be read: CRC check failed"):
        volumes.read(tmp_path / "a.nii.gz")
