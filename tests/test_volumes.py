# SPDX-License-Identifier: Apache-2.0
"""Scans in files: geometry survives, masks land on the voxels they came from, and broken files are told of."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest
from scans import GEOMETRIES, scan, write_series

from berdiff_fast.imaging import volumes

sitk = pytest.importorskip("SimpleITK", reason='SimpleITK is not installed: pip install "berdiff_fast[imaging]"')
pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed")
hd = pytest.importorskip("highdicom", reason="highdicom is not installed")

#: Where the box of ``scan`` is.
BOX = (slice(1, 4), slice(4, 9), slice(11, 18))


def assert_same_grid(a, b):
    np.testing.assert_allclose(a.spacing, b.spacing, rtol=0, atol=1e-6)
    np.testing.assert_allclose(a.origin, b.origin, rtol=0, atol=2e-5)  # NIfTI keeps float32, here of 300
    np.testing.assert_allclose(a.direction, b.direction, rtol=0, atol=1e-6)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_round_trip(tmp_path, geometry, ending):
    volume = scan(geometry)
    volumes.write(tmp_path / f"scan{ending}", volume.array, volume)
    back = volumes.read(tmp_path / f"scan{ending}")
    assert_same_grid(back, volume)
    assert back.array.dtype == np.int16 and np.array_equal(back.array, volume.array)
    # The mask of what is bright, written on the grid that was read, seen by another reader at the same places in space.
    volumes.write(tmp_path / f"mask{ending}", back.array > 0, back)
    mask, image = (sitk.ReadImage(str(tmp_path / f"{name}{ending}")) for name in ("mask", "scan"))
    ours = sitk.GetArrayFromImage(mask)
    assert ours.dtype == np.uint8 and ours.sum() == 3 * 5 * 7 and ours[BOX].all()
    for corner in ((11, 4, 1), (17, 8, 3), (0, 0, 0), (22, 16, 4)):
        where = volume.origin + volume.direction @ (np.array(corner) * volume.spacing)
        for file in (mask, image):
            np.testing.assert_allclose(file.TransformIndexToPhysicalPoint(corner), where, atol=1e-4)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("geometry", sorted(GEOMETRIES.keys() - {"left-handed"}))
def test_dicom_series(tmp_path, geometry):
    volume = scan(geometry)
    write_series(tmp_path / "ct", volume)
    back = volumes.read(tmp_path / "ct")
    assert_same_grid(back, volume)
    assert np.array_equal(back.array, volume.array), "Hounsfield units, slices in order of position"
    assert len(back.instances) == 5 and back.format == "dicom"
    one = volumes.read(back.instances[2])
    assert np.array_equal(one.array[0], volume.array[2])
    np.testing.assert_allclose(one.origin, volume.origin + volume.direction @ (0, 0, 2 * volume.spacing[2]), atol=1e-6)


def test_multi_frame(tmp_path):
    """The same slices as one file of many frames."""
    write_series(tmp_path / "ct", scan("oblique"))
    single = volumes.read(tmp_path / "ct")
    from highdicom.legacy import LegacyConvertedEnhancedCTImage

    datasets = [pydicom.dcmread(path) for path in single.instances]
    for d in datasets:
        d.FrameType = d.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        d.AcquisitionNumber, d.KVP, d.BodyPartExamined, d.PatientOrientation = 1, "120", "CHEST", ""
        d.ContentDate = d.AcquisitionDate = d.SeriesDate = "20200101"
        d.ContentTime = d.AcquisitionTime = d.SeriesTime = "000000"
    converted = LegacyConvertedEnhancedCTImage(
        datasets, hd.UID(), 2, hd.UID(), 1, transfer_syntax_uid="1.2.840.10008.1.2.1"
    )
    converted.save_as(tmp_path / "enhanced.dcm")
    back = volumes.read(tmp_path / "enhanced.dcm")
    # The converter puts the last slice first, and so the slow axis runs the other way: the same places in space.
    assert np.array_equal(back.array[::-1], single.array)
    np.testing.assert_allclose(back.direction * (1, 1, -1), single.direction, atol=1e-6)
    np.testing.assert_allclose(back.origin + back.direction @ (0, 0, 4 * back.spacing[2]), single.origin, atol=1e-6)
    volumes.write_segmentation(tmp_path / "masks.dcm", {"a": back.array > 0}, back)
    seg = hd.seg.segread(str(tmp_path / "masks.dcm"))
    uid = pydicom.dcmread(tmp_path / "enhanced.dcm").SOPInstanceUID
    pixels = seg.get_pixels_by_source_frame(uid, range(1, 6), assert_missing_frames_are_empty=True)[..., 0]
    assert np.array_equal(pixels, back.array > 0)


@pytest.mark.parametrize("geometry", ["anisotropic", "oblique"])
def test_segmentation(tmp_path, geometry):
    """Read by another library: each mask on the source's slices, at their places; probabilities to 1/255."""
    volume = scan(geometry)
    write_series(tmp_path / "ct", volume)
    source = volumes.read(tmp_path / "ct")
    box = source.array > 0
    shifted = np.roll(box, 2, axis=2)
    empty = np.zeros_like(box)
    volumes.write_segmentation(tmp_path / "masks.dcm", {"a": box, "none": empty, "b": shifted}, source)
    seg = hd.seg.segread(str(tmp_path / "masks.dcm"))
    assert seg.segmentation_type.value == "BINARY"
    assert [seg.get_segment_description(k).segment_label for k in seg.segment_numbers] == ["a", "b"]
    uids = [pydicom.dcmread(path).SOPInstanceUID for path in source.instances]
    assert {r[2] for r in seg.get_source_image_uids()} <= set(uids)
    pixels = seg.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    assert np.array_equal(pixels[..., 0], box) and np.array_equal(pixels[..., 1], shifted)
    plain = pydicom.dcmread(tmp_path / "masks.dcm")
    frames = plain.PerFrameFunctionalGroupsSequence
    of_a = [f for f in frames if f.SegmentIdentificationSequence[0].ReferencedSegmentNumber == 1]
    places = sorted([float(x) for x in f.PlanePositionSequence[0].ImagePositionPatient] for f in of_a)
    expected = sorted((source.origin + source.direction @ (0, 0, k * source.spacing[2])).tolist() for k in (1, 2, 3))
    np.testing.assert_allclose(places, expected, atol=1e-4)
    mean = np.where(box, np.float32(0.4), np.float32(0))
    volumes.write_segmentation(tmp_path / "mean.dcm", {"mean": mean}, source, fractional=True)
    seg = hd.seg.segread(str(tmp_path / "mean.dcm"))
    found = seg.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)[..., 0]
    assert seg.segmentation_type.value == "FRACTIONAL" and np.abs(found - mean).max() < 0.5 / 255 + 1e-6
    with pytest.raises(ValueError, match="must mark something"):
        volumes.write_segmentation(tmp_path / "empty.dcm", {"none": empty}, source)
    with pytest.raises(ValueError, match="read from DICOM, got one from numpy"):
        volumes.write_segmentation(tmp_path / "no.dcm", {"a": box}, volume)


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy is not installed: apt install dicom3tools")
def test_a_validator_finds_no_fault_with_segmentations(tmp_path):
    """David Clunie's dciodvfy, which shares no code with what wrote them."""

    def faults(path: Path) -> list[str]:
        done = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True)
        return [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("Error", "Warning"))]

    write_series(tmp_path / "ct", scan("oblique"))
    source = volumes.read(tmp_path / "ct")
    box = source.array > 0
    volumes.write_segmentation(tmp_path / "masks.dcm", {"a": box, "b": np.roll(box, 2, axis=2)}, source)
    volumes.write_segmentation(tmp_path / "mean.dcm", {"mean": 0.4 * box}, source, fractional=True)
    assert faults(tmp_path / "masks.dcm") == [] and faults(tmp_path / "mean.dcm") == []
    damaged = pydicom.dcmread(tmp_path / "masks.dcm")
    del damaged.SegmentSequence[0].SegmentAlgorithmType
    damaged.save_as(tmp_path / "damaged.dcm")
    assert any("SegmentAlgorithmType" in line for line in faults(tmp_path / "damaged.dcm"))


@pytest.mark.parametrize("ending", [".png", ".tif", ".npy", ".h5"])
def test_pictures_and_arrays(tmp_path, ending):
    array = np.random.default_rng(1).integers(0, 255, (9, 13), dtype=np.uint8)
    path = tmp_path / f"slice{ending}"
    if ending == ".h5":
        with h5py.File(path, "w") as file:
            file["image"] = array[None]
    else:
        volumes.write(path, array[None], volumes.Volume(array[None]))
    volume = volumes.read(path)
    assert volume.array.shape[0] == 1 and volume.spacing is None and volume.voxel_mm3 is None
    assert np.array_equal(volume.array.reshape(9, 13), array)


def test_planes():
    assert [scan("anisotropic").axis(p) for p in ("axial", "coronal", "sagittal", 1)] == [0, 1, 2, 1]
    # Stored as a sagittal stack: the slow axis runs to the right, columns to the back, rows down.
    assert [scan("sagittal").axis(p) for p in ("axial", "coronal", "sagittal")] == [1, 2, 0]
    for wrong in ("frontal", 3, True, 1.5):
        with pytest.raises(ValueError, match="plane must be one of"):
            scan().axis(wrong)


def test_fingerprints_tell_volumes_apart():
    volume = scan()
    changed = volume.array.copy()
    changed[0, 0, 0] += 1
    others = [
        dataclasses.replace(volume, array=changed),
        dataclasses.replace(volume, origin=(0.0, 0.0, 0.0)),
        dataclasses.replace(volume, direction=np.diag([-1.0, -1.0, 1.0])),
        dataclasses.replace(volume, spacing=(1.0, 1.0, 1.0)),
    ]
    assert len({volume.fingerprint(), *(o.fingerprint() for o in others)}) == 5
    assert scan().fingerprint() == volume.fingerprint()


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    volume = scan()
    path = tmp_path / "mask.mha"
    volumes.write(path, volume.array, volume)
    before = path.read_bytes()

    def full(*_, **__):
        raise RuntimeError("Exception thrown in SimpleITK:\nITK ERROR: No space left on device")

    monkeypatch.setattr(sitk, "WriteImage", full)
    with pytest.raises(OSError, match=r"^mask.mha cannot be written: No space left on device$"):
        volumes.write(path, volume.array + 1, volume)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="array must have the shape of its grid"):
        volumes.write(path, volume.array[1:], volume)
    for name in ("mask.png", "mask.xyz", "mask.mhd", "mask.dcm"):
        with pytest.raises(ValueError, match="path must end as a format"):
            volumes.write(tmp_path / name, volume.array, volume)


def test_spacing_that_the_file_does_not_tell_is_not_invented(tmp_path):
    """The library puts 1 mm, which would make up volumes."""
    write_series(tmp_path / "ct", scan())
    for path in (tmp_path / "ct").iterdir():
        d = pydicom.dcmread(path)
        del d.PixelSpacing
        d.save_as(path)
    assert volumes.read(tmp_path / "ct").spacing is None
    volume = scan("plain")
    volumes.write(tmp_path / "scan.nii", volume.array, volume)
    data = bytearray((tmp_path / "scan.nii").read_bytes())
    data[80:92], data[252:256] = bytes(12), bytes(4)  # pixdim, and the codes of both forms
    (tmp_path / "scan.nii").write_bytes(bytes(data))
    assert volumes.read(tmp_path / "scan.nii").spacing is None
    for name, key in (("scan.nrrd", b"space directions"), ("scan.mha", b"ElementSpacing")):
        volumes.write(tmp_path / name, volume.array, volume)
        assert volumes.read(tmp_path / name).spacing == volume.spacing
        lines = (tmp_path / name).read_bytes().splitlines(keepends=True)
        (tmp_path / name).write_bytes(b"".join(line for line in lines if not line.startswith(key)))
        untold = volumes.read(tmp_path / name)
        assert untold.spacing is None and np.array_equal(untold.array, volume.array)
    lines = (tmp_path / "scan.nrrd").read_bytes().splitlines(keepends=True)
    plain = b"".join(line for line in lines if not line.startswith(b"space"))
    (tmp_path / "nan.nrrd").write_bytes(plain.replace(b"endian:", b"spacings: 0.7 0.8 nan\nendian:", 1))
    assert volumes.read(tmp_path / "nan.nrrd").spacing is None


def test_slopes_that_differ_from_slice_to_slice(tmp_path):
    """As in PET: the type of the first slice, an integer, does not round the others."""
    volume = scan()
    write_series(tmp_path / "pet", volume, RescaleSlope=lambda k: "1" if k == 0 else "0.5")
    back = volumes.read(tmp_path / "pet").array
    expected = (volume.array.astype(float) + 1024) * np.array([1, 0.5, 0.5, 0.5, 0.5])[:, None, None] - 1024
    np.testing.assert_allclose(back, expected, rtol=0, atol=1e-6)


def test_intercepts_that_differ_from_slice_to_slice(tmp_path):
    """In the type of the first slice, unsigned, the others would overflow."""
    volume = scan()
    write_series(tmp_path / "ct", volume, RescaleIntercept=lambda k: "0" if k == 0 else "-1024.5")
    expected = volume.array.astype(float) + np.array([1024, -0.5, -0.5, -0.5, -0.5])[:, None, None]
    np.testing.assert_allclose(volumes.read(tmp_path / "ct").array, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("thickness", ["2.5", ""])
def test_a_single_slice_is_as_thick_as_it_says(tmp_path, thickness):
    volume = scan()
    one = dataclasses.replace(volume, array=volume.array[:1])
    write_series(tmp_path / "ct", one, SliceThickness=thickness)
    for path in (tmp_path / "ct", next((tmp_path / "ct").iterdir())):
        assert volumes.read(path).spacing == (*volume.spacing[:2], float(thickness or 1))


def test_segmentations_of_other_masks_have_other_names(tmp_path):
    write_series(tmp_path / "ct", scan())
    source = volumes.read(tmp_path / "ct")
    box, uids = source.array > 0, []
    for name, mask in (("a", box), ("b", np.roll(box, 1, 2)), ("c", box)):
        volumes.write_segmentation(tmp_path / f"{name}.dcm", {"mask": mask}, source)
        d = pydicom.dcmread(tmp_path / f"{name}.dcm")
        uids.append((d.SOPInstanceUID, d.SeriesInstanceUID))
    assert uids[0] == uids[2] and uids[0][0] != uids[1][0] and uids[0][1] != uids[1][1]
