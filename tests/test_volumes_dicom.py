# SPDX-License-Identifier: Apache-2.0
"""DICOM as scanners and archives leave it: frames anywhere, rescales, padding, odd files in a folder, any alphabet."""

from __future__ import annotations

import dataclasses
import io
import logging
import resource

import numpy as np
import pytest
from PIL import Image
from scans import scan, write_enhanced, write_series

from berdiff_fast.imaging import volumes

sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")
pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed")
hd = pytest.importorskip("highdicom", reason="highdicom is not installed")

SCAN = scan("oblique", dtype=np.int32)


def same_place(a, b):
    np.testing.assert_allclose(a.spacing, b.spacing, atol=1e-6)
    np.testing.assert_allclose(a.origin, b.origin, atol=1e-6)
    np.testing.assert_allclose(a.direction, b.direction, atol=1e-6)


def edit(folder, change):
    """Change the headers of a folder's files, by their slice number."""
    for path in folder.iterdir():
        d = pydicom.dcmread(path)
        change(d, int(d.InstanceNumber) - 1)
        d.save_as(path)


# ---------------------------------------------------------------------- many frames


@pytest.mark.parametrize("where", ["one.dcm", "folder/one.dcm"])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [0, 2, 4, 1, 3], [4, 1, 0, 3, 2]])
def test_frames_in_any_order(tmp_path, where, order):
    """As the series would be read; a mask goes back to the frames that it was made from."""
    write_enhanced(tmp_path / where, SCAN, order)
    volume = volumes.read(tmp_path / where.split("/")[0])
    assert np.array_equal(volume.array, SCAN.array)
    same_place(volume, SCAN)
    box = volume.array > 0
    volumes.write_segmentation(tmp_path / "masks.dcm", {"a": box}, volume)
    seg = hd.seg.segread(str(tmp_path / "masks.dcm"))
    uid = pydicom.dcmread(tmp_path / where).SOPInstanceUID
    found = seg.get_pixels_by_source_frame(uid, range(1, 6), assert_missing_frames_are_empty=True)[..., 0]
    assert np.array_equal(found, box[order])
    plain = pydicom.dcmread(tmp_path / "masks.dcm")
    for frame in plain.PerFrameFunctionalGroupsSequence:  # at the place of a slice that has the box
        at = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float) - SCAN.origin
        assert round(float(at @ SCAN.direction[:, 2]) / SCAN.spacing[2], 3) in (1, 2, 3)


def test_frames_stored_backwards_stay_so(tmp_path):
    write_enhanced(tmp_path / "back.dcm", SCAN, [4, 3, 2, 1, 0])
    volume = volumes.read(tmp_path / "back.dcm")
    assert np.array_equal(volume.array, SCAN.array[::-1])
    last = SCAN.origin + SCAN.direction @ (0, 0, 4 * SCAN.spacing[2])
    np.testing.assert_allclose(volume.origin, last, atol=1e-6)
    np.testing.assert_allclose(volume.direction, SCAN.direction * (1, 1, -1), atol=1e-6)


def test_each_frame_by_its_own_rescale(tmp_path):
    rescale = [(1, -1024), (0.5, -1024), (2, -1100), (0.25, -1024), (1, -1024)]
    even = dataclasses.replace(SCAN, array=SCAN.array // 4 * 4)
    write_enhanced(tmp_path / "ct.dcm", even, [0, 2, 4, 1, 3], rescale)
    np.testing.assert_allclose(volumes.read(tmp_path / "ct.dcm").array, even.array, atol=1e-9)
    write_enhanced(tmp_path / "same.dcm", even, rescale=[(0.5, -1100)] * 5)
    np.testing.assert_allclose(volumes.read(tmp_path / "same.dcm").array, even.array, atol=1e-9)


def slanted(d):
    frame = d.PerFrameFunctionalGroupsSequence[2]
    frame.PlaneOrientationSequence = pydicom.Sequence([pydicom.Dataset()])
    frame.PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, 0, -1]


def groupless(d):
    del d.PerFrameFunctionalGroupsSequence


def nowhere(d):
    del d.PerFrameFunctionalGroupsSequence[3].PlanePositionSequence


BAD_FRAMES = {
    "uneven": (dict(order=[0, 1, 3, 4]), None, "is not evenly spaced: 6.000 mm between bad.dcm frame 2"),
    "twice": (dict(positions=[0, 1, 1, 2, 3]), None, "two slices at one position: bad.dcm frame 2 and bad.dcm frame 3"),
    "each twice": (dict(order=[0, 0, 1, 1]), None, "two slices at one position"),
    "not parallel": ({}, slanted, "not parallel: bad.dcm frame 3 lies across the others"),
    "without a place": ({}, nowhere, "slices without a position: bad.dcm frame 4"),
    "no groups": ({}, groupless, "it lacks the functional groups"),
    "too few groups": ({}, lambda d: d.PerFrameFunctionalGroupsSequence.pop(), "tells of 4 frames"),
    "more than there are": (dict(NumberOfFrames=9), None, "tells of 5 frames in its functional groups, and holds 9"),
    "cut short": ({}, lambda d: setattr(d, "PixelData", d.PixelData[:-200]), "is cut short"),
    "colour": (dict(SamplesPerPixel=3, PhotometricInterpretation="RGB"), None, "one number for each voxel, got 3"),
}


@pytest.mark.parametrize("what", BAD_FRAMES)
@pytest.mark.parametrize("folder", [False, True])
def test_frames_are_checked_as_a_series_is(tmp_path, what, folder):
    changes, spoil, words = BAD_FRAMES[what]
    path = tmp_path / "in" / "bad.dcm"
    write_enhanced(path, SCAN, **changes)
    if spoil:
        d = pydicom.dcmread(path)
        spoil(d)
        d.save_as(path)
    with pytest.raises(ValueError) as caught:
        volumes.read(path.parent if folder else path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_types_are_what_itk_makes_of_them(tmp_path):
    """So that results drawn from what ITK read are those of what is read now."""
    cases = [(16, 0, "1", "-1024"), (12, 0, "1", "-1024"), (12, 0, "1", "0"), (16, 1, "1", "0"), (12, 1, "2", "-100"),
             (16, 0, "0.5", "-1000"), (16, 0, "3", "7"), (8, 0, "1", "-5"), (12, 0, "1", "10")]  # fmt: skip
    for n, (bits, signed, slope, intercept) in enumerate(cases):
        write_series(tmp_path / str(n), scan(), BitsStored=bits, HighBit=bits - 1, PixelRepresentation=signed,
                     RescaleSlope=slope, RescaleIntercept=intercept,
                     PixelData=np.arange(17 * 23, dtype=np.uint16).clip(0, 120).tobytes())  # fmt: skip
        names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / str(n)))
        expected = sitk.GetArrayFromImage(sitk.ReadImage(names))
        found = volumes.read(tmp_path / str(n)).array
        assert found.dtype == expected.dtype and np.array_equal(found, expected), cases[n]


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.90"])
def test_compressed(tmp_path, syntax):
    """RLE by pydicom, JPEG-LS and JPEG 2000 by GDCM, which sees nothing but the description of the pixels."""
    write_series(tmp_path / "ct", SCAN)

    def compress(d, k):
        if not syntax.endswith(".90"):
            d.compress(syntax, generate_instance_uid=False)
            return
        stream = io.BytesIO()
        pixels = np.frombuffer(d.PixelData, "<u2").reshape(17, 23)
        Image.fromarray(pixels).save(stream, "JPEG2000", no_jp2=True, irreversible=False)
        d.PixelData = pydicom.encaps.encapsulate([stream.getvalue()])
        d["PixelData"].is_undefined_length = True
        d.file_meta.TransferSyntaxUID = syntax

    edit(tmp_path / "ct", compress)
    assert np.array_equal(volumes.read(tmp_path / "ct").array, SCAN.array)


# ---------------------------------------------------------------------- what values mean


@pytest.mark.parametrize("modality, kept", [("CT", True), ("MR", True), ("PT", True), ("DX", False), ("MG", False)])
def test_monochrome1(tmp_path, modality, kept):
    """Measured units stay; projections are turned so that bright is dense."""
    write_series(tmp_path / "in", SCAN, PhotometricInterpretation="MONOCHROME1", Modality=modality, BitsStored=12,
                 HighBit=11)  # fmt: skip
    expected = SCAN.array if kept else 4095 - (SCAN.array + 1024) - 1024
    assert np.array_equal(volumes.read(tmp_path / "in").array, expected)


@pytest.mark.parametrize(
    "tags, stored, signed",
    [
        (dict(PixelPaddingValue=-2000), -2000, 1),
        (dict(PixelPaddingValue=63536), -2000, 1),  # the same bits, without the sign
        (dict(PixelPaddingValue=0), 0, 0),
        (dict(PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1990), -1995, 1),
        (dict(PixelPaddingValue=-1990, PixelPaddingRangeLimit=-2000), -1995, 1),
    ],
)
@pytest.mark.parametrize("slopes", ["1", ["1", "1", "0.5", "1", "1"]])
def test_padding_that_the_header_names(tmp_path, tags, stored, signed, slopes):
    write_series(tmp_path / "ct", SCAN, RescaleSlope=lambda k: slopes if slopes == "1" else slopes[k])

    def pad(d, k):
        pixels = np.frombuffer(d.PixelData, "<u2").reshape(17, 23).astype("<i2" if signed else "<u2")
        pixels[:5, :6] = stored
        d.PixelData, d.PixelRepresentation = pixels.tobytes(), signed
        for name, value in tags.items():
            d[name] = pydicom.DataElement(name, "SS" if value < 0 else "US", value)

    edit(tmp_path / "ct", pad)
    volume = volumes.read(tmp_path / "ct")
    for part in volume.array:
        outside = np.zeros((17, 23), bool)
        outside[:5, :6] = True
        assert np.array_equal(volume.outside(part), outside)
    other = dataclasses.replace(volume, padding=())
    assert other.fingerprint() != volume.fingerprint()


# ---------------------------------------------------------------------- folders


def test_a_localizer_is_named(tmp_path):
    loc = dataclasses.replace(scan("sagittal"), array=scan().array[:1])
    for name, changes, words in (
        ("across", dict(PixelSpacing=["0.8", "0.703125"]), "not parallel: LOC.dcm lies across the others"),
        ("size", dict(Rows=16), "different sizes: [(16, 23), (17, 23)]; LOC.dcm is unlike most"),
        ("spacing", dict(PixelSpacing=["2", "2"]), "different pixel spacing"),
        ("far", dict(ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=["0.8", "0.703125"],
                     ImagePositionPatient=["-171.3", "12.25", "300"]), "LOC.dcm"),
    ):  # fmt: skip
        folder = tmp_path / name
        write_series(folder, scan())
        write_series(tmp_path / "loc", loc, **changes)
        lost = next((tmp_path / "loc").iterdir())
        d = pydicom.dcmread(lost)
        d.SOPInstanceUID = d.file_meta.MediaStorageSOPInstanceUID = hd.UID()
        d.save_as(folder / "LOC.dcm")
        lost.unlink()
        with pytest.raises(ValueError) as caught:
            volumes.read(folder)
        assert words in str(caught.value) and "LOC.dcm" in str(caught.value), name


def test_folders_of_folders_and_tables_of_contents(tmp_path):
    write_series(tmp_path / "disc" / "ST0" / "SE0", scan())
    (tmp_path / "disc" / "readme.txt").write_text("x" * 200)
    with pytest.raises(ValueError, match=r"no DICOM series itself; give one of the folders below it: ST0/SE0 \(5 f"):
        volumes.read(tmp_path / "disc")
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = "1.2.840.10008.1.3.10", "1.2.840.10008.1.2.1"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    table = pydicom.dataset.FileDataset("x", {}, file_meta=meta, preamble=bytes(128))
    table.SOPClassUID, table.SOPInstanceUID = "1.2.840.10008.1.3.10", "1.2.3"
    table.save_as(tmp_path / "disc" / "DICOMDIR", enforce_file_format=True)
    with pytest.raises(ValueError, match="is a DICOMDIR, a table of contents; give the folder of one series"):
        volumes.read(tmp_path / "disc" / "DICOMDIR")
    # Beside a series it is no slice of it.
    for name in ("DICOMDIR", "Thumbs.db", "._IM1.dcm"):
        content = (tmp_path / "disc" / "DICOMDIR").read_bytes() if name == "DICOMDIR" else b"\0\5\x16\7" + b"x" * 99
        (tmp_path / "disc" / "ST0" / "SE0" / name).write_bytes(content)
    assert np.array_equal(volumes.read(tmp_path / "disc" / "ST0" / "SE0").array, scan().array)


def test_files_without_a_preamble(tmp_path):
    write_series(tmp_path / "ct", scan())
    for path in (tmp_path / "ct").iterdir():
        path.write_bytes(path.read_bytes()[132:])
    assert np.array_equal(volumes.read(tmp_path / "ct").array, scan().array)


def test_positions_rounded_to_a_tenth(tmp_path, caplog):
    volume = dataclasses.replace(scan("plain", (9, 17, 23)), spacing=(0.7, 0.8, 0.625))

    def rounded(k):
        return ["-10", "-20", f"{30 + 0.625 * k:.1f}"]

    write_series(tmp_path / "ct", volume, ImagePositionPatient=rounded)
    with caplog.at_level(logging.WARNING, "berdiff_fast"):
        found = volumes.read(tmp_path / "ct")
    assert np.array_equal(found.array, volume.array) and abs(found.spacing[2] - 0.625) < 0.015
    assert len(caplog.messages) == 1 and "rounded to 0.1 mm" in caplog.messages[0]
    # A slice that is missing is not a matter of rounding; nor are gaps that are not rounded.
    next(p for p in (tmp_path / "ct").iterdir() if pydicom.dcmread(p).InstanceNumber == 5).unlink()
    with pytest.raises(ValueError, match="misses slices"):
        volumes.read(tmp_path / "ct")

    def uneven(k):
        return ["0", "0", f"{0.625 * k + 0.04 * (k % 2):.3f}"]

    write_series(tmp_path / "odd", volume, ImagePositionPatient=uneven)
    with pytest.raises(ValueError, match="misses slices"):
        volumes.read(tmp_path / "odd")


@pytest.mark.parametrize(
    "charset, name",
    [
        ("ISO_IR 100", "Müller^Zoë"),
        ("ISO_IR 144", "Иванов^Пётр"),
        ("ISO_IR 192", "山田^太郎"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
        (["ISO 2022 IR 6", "ISO 2022 IR 100"], "Buc^Jérôme"),
        ("GB18030", "Wang^XiaoDong=王^小东"),
    ],
)
def test_segmentations_of_any_alphabet(tmp_path, charset, name):
    write_series(tmp_path / "ct", scan(), SpecificCharacterSet=charset, PatientName=name)
    volume = volumes.read(tmp_path / "ct")
    volumes.write_segmentation(tmp_path / "masks.dcm", {"a": volume.array > 0}, volume)
    written = pydicom.dcmread(tmp_path / "masks.dcm")
    assert str(written.PatientName) == name and written.SpecificCharacterSet == "ISO_IR 192"


# ---------------------------------------------------------------------- hostile files


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(Rows=65535, Columns=65535), "more than the"),
        (dict(Rows=30000, Columns=30000), "cut short"),
        (dict(NumberOfFrames=2**31 - 1), "more than the"),
        (dict(NumberOfFrames=60000), "cut short"),
        (dict(BitsAllocated=48), "BitsAllocated must be"),
        (dict(BitsStored=40), "BitsStored must be from 1 to 16"),
        (dict(PixelRepresentation=7), "PixelRepresentation must be from 0 to 1"),
        (dict(Rows=0), "Rows must be from 1"),
        (dict(RescaleSlope="nan"), "RescaleSlope must be a number"),
        (dict(PixelSpacing=["0", "0"]), "spacing must be positive"),
        (dict(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "two unit vectors at right angles"),
        (dict(ImageOrientationPatient=[2, 0, 0, 0, 2, 0]), "two unit vectors at right angles"),
        (dict(PhotometricInterpretation="PALETTE COLOR"), "one number for each voxel"),
    ],
)
def test_headers_are_judged_before_pixels_are_touched(tmp_path, changes, words):
    write_series(tmp_path / "ct", dataclasses.replace(scan(), array=scan().array[:1]))
    path = next((tmp_path / "ct").iterdir())
    d = pydicom.dcmread(path)
    with pydicom.config.disable_value_validation():
        for name, value in changes.items():
            setattr(d, name, value)
        d.save_as(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError) as caught:
        volumes.read(path)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024, "over 100 MB for a small file"


def test_a_stream_of_another_size_than_its_header(tmp_path):
    """GDCM takes what the stream says, however large."""
    write_series(tmp_path / "ct", dataclasses.replace(SCAN, array=SCAN.array[:1]))
    path = next((tmp_path / "ct").iterdir())
    d = pydicom.dcmread(path)
    d.compress("1.2.840.10008.1.2.4.80", generate_instance_uid=False)
    data = bytearray(d.PixelData)
    at = data.index(b"\xff\xf7")
    data[at + 5 : at + 9] = b"\x40\x00\x40\x00"
    d.PixelData = bytes(data)
    d.save_as(path)
    with pytest.raises(ValueError, match="a compressed frame is 16384 x 16384, not 17 x 23"):
        volumes.read(path)
