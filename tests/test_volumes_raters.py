# SPDX-License-Identifier: Apache-2.0
"""Raters' masks on a scan's voxels: compared in space, reoriented where stored otherwise, DICOM's own kinds."""

from __future__ import annotations

import dataclasses
import itertools
import logging

import numpy as np
import pytest
from scans import bright, scan, write_enhanced, write_series

import berdiff_fast as bf
from berdiff_fast.imaging import volumes
from berdiff_fast.imaging.volumes import Volume
from berdiff_fast.io import raters
from berdiff_fast.scans import results, sample_volume

pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed")
hd = pytest.importorskip("highdicom", reason="highdicom is not installed")
pytest.importorskip("nibabel", reason="nibabel is not installed")

SCAN = scan("oblique", dtype=np.int32)
BOX = SCAN.array > 0


def moved(volume, by=(0.0, 0.0, 0.0), **changes):
    origin = tuple(float(o + b) for o, b in zip(volume.origin, by, strict=True))
    return dataclasses.replace(volume, origin=origin, **changes)


def stored(order, flips):
    """The same voxels in space, their axes in another order and some of them the other way round."""
    array = BOX.astype(np.uint8).transpose(order)
    axes = [2 - a for a in order][::-1]  # of x, y, z, which of the scan's they are
    direction, spacing = SCAN.direction[:, axes].copy(), np.array(SCAN.spacing)[axes]
    origin = np.array(SCAN.origin)
    for axis in range(3):
        if flips[axis]:
            origin = origin + direction[:, axis] * spacing[axis] * (array.shape[2 - axis] - 1)
            direction[:, axis] *= -1
            array = np.flip(array, 2 - axis)
    return Volume(np.ascontiguousarray(array), tuple(spacing.tolist()), tuple(origin.tolist()), direction)


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
@pytest.mark.parametrize("flips", itertools.product([False, True], repeat=3))
def test_the_same_space_stored_otherwise(tmp_path, order, flips):
    rater = stored(order, flips)
    volumes.write(tmp_path / "rater.nii.gz", rater.array, rater)
    (found,) = raters.read([tmp_path / "rater.nii.gz"], SCAN)
    assert np.array_equal(found.array != 0, BOX)
    # Without a spacing of its own, it has the scan's.
    bare = dataclasses.replace(rater, spacing=None, placed=True)
    assert np.array_equal(results.check_raters([bare], SCAN)[0], BOX)
    for by in (100.0, 0.3):
        for one in (rater, bare):
            with pytest.raises(ValueError, match="lies elsewhere than the scan"):
                results.check_raters([moved(one, (by, 0, 0))], SCAN)


def test_what_is_elsewhere_is_refused():
    mask = dataclasses.replace(SCAN, array=BOX.astype(np.uint8))
    untold = dataclasses.replace(SCAN, spacing=None)
    assert np.array_equal(results.check_raters([mask], SCAN)[0], BOX)
    for rater, of in (
        (moved(mask, (0, 100, 0)), SCAN),
        (moved(mask, (0, 0, 100), spacing=None), SCAN),
        (moved(mask, (0, 0, 100)), untold),
        (moved(mask, (0, 0, 100), spacing=None), untold),
        (moved(mask, spacing=(0.9, 0.6, 3.3)), SCAN),
        (moved(mask, direction=np.eye(3)), SCAN),
        (moved(mask, (0, 0, 1.0)), SCAN),
    ):
        with pytest.raises(ValueError, match="lies elsewhere than the scan"):
            results.check_raters([rater], of)
    zero = Volume(BOX.astype(np.uint8), None, (0.0, 0.0, 0.0), np.eye(3), "metaimage", placed=True)
    plain = dataclasses.replace(SCAN, origin=(0.0, 0.0, 100.0), direction=np.eye(3))
    with pytest.raises(ValueError, match="lies elsewhere than the scan"):
        results.check_raters([zero], plain)
    # What converters round is the same voxel.
    results.check_raters([moved(mask, (2e-3, 2e-3, 2e-3))], SCAN)
    results.check_raters([moved(mask, spacing=(0.9 * (1 + 1e-4), 0.6, 2.9985))], SCAN)


def test_what_says_no_place_is_told(tmp_path, caplog):
    np.save(tmp_path / "mask.npy", BOX)
    with caplog.at_level(logging.WARNING, "berdiff_fast"):
        found = raters.read([tmp_path / "mask.npy"], SCAN)
        assert np.array_equal(results.check_raters(found, SCAN)[0], BOX)
        assert len(caplog.messages) == 1 and "mask.npy does not say where it lies" in caplog.messages[0]
        raters.read([tmp_path / "mask.npy"], Volume(SCAN.array))
    assert len(caplog.messages) == 1


# ---------------------------------------------------------------------- DICOM segmentations


def segments(*names):
    from pydicom.sr.codedict import codes

    return [
        hd.seg.SegmentDescription(n, name, codes.SCT.Tissue, codes.SCT.Lung, "MANUAL")
        for n, name in enumerate(names, start=1)
    ]


def segmentation(path, source, masks, kind="BINARY", **options):
    sources = [pydicom.dcmread(p) for p in source.instances]
    array = np.stack([*masks.values()], -1)
    array = array.astype(np.float32 if kind == "FRACTIONAL" else np.uint8)
    hd.seg.Segmentation(sources, array, kind, segments(*masks), hd.UID(), 2, hd.UID(), 1, "none", "x", "1", "1",
                        **options).save_as(path)  # fmt: skip
    return path


@pytest.fixture
def source(tmp_path):
    write_series(tmp_path / "ct", SCAN)
    return volumes.read(tmp_path / "ct")


def nifti_of(source, path):
    volumes.write(path, source.array, source)
    return volumes.read(path)


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
@pytest.mark.parametrize("omit", [True, False])
def test_segmentations(tmp_path, source, kind, omit):
    two = BOX & (np.arange(5) != 2)[:, None, None]  # with a slice left out in the middle
    path = segmentation(tmp_path / "seg.dcm", source, {"nodule": two}, kind, omit_empty_frames=omit)
    for on in (source, nifti_of(source, tmp_path / "scan.nii.gz"), dataclasses.replace(source, array=source.array[:])):
        (found,) = raters.read([path], on)
        assert np.array_equal(results.check_raters([found], on)[0], two)
    # A scan stored the other way round gets the same voxels in space.
    last = tuple((SCAN.origin + SCAN.direction[:, 1] * 0.6 * 16).tolist())
    back = Volume(SCAN.array[:, ::-1], SCAN.spacing, last, SCAN.direction * (1, -1, 1))
    assert np.array_equal(raters.read([path], back)[0].array, two[:, ::-1])
    for wrong in (moved(SCAN, (100, 0, 0)), moved(SCAN, (0.3, 0, 0)), moved(SCAN, spacing=(1.0, 1.0, 3.0))):
        with pytest.raises(ValueError, match="lies elsewhere than the scan"):
            raters.read([path], wrong)
    with pytest.raises(ValueError, match="the scan does not say where its voxels lie"):
        raters.read([path], Volume(SCAN.array))


def test_one_of_several_segments(tmp_path, source):
    other = np.roll(BOX, 2, 2)
    path = segmentation(tmp_path / "seg.dcm", source, {"nodule": BOX, "vessel": other})
    with pytest.raises(ValueError, match=r"has 2 segments; name one as FILE#NAME: 'nodule' \(1\), 'vessel' \(2\)"):
        raters.read([path], source)
    assert np.array_equal(raters.read([f"{path}#vessel"], source)[0].array, other)
    assert np.array_equal(raters.read([f"{path}#1"], source)[0].array, BOX)
    with pytest.raises(ValueError, match="has no segments of the name 'liver'; there are 'nodule'"):
        raters.read([f"{path}#liver"], source)
    nifti_of(source, tmp_path / "scan.nii")
    with pytest.raises(ValueError, match="no DICOM segmentation or RTSTRUCT"):
        raters.read([f"{tmp_path / 'scan.nii'}#x"], source)
    with pytest.raises(ValueError, match="a DICOM segmentation, not a scan; give it as a rater"):
        volumes.read(path)


def test_segmentations_of_frames_and_of_ourselves(tmp_path):
    write_enhanced(tmp_path / "ct.dcm", SCAN, [0, 2, 4, 1, 3])
    volume = volumes.read(tmp_path / "ct.dcm")
    volumes.write_segmentation(tmp_path / "masks.dcm", {"a": BOX, "b": np.roll(BOX, 1, 1)}, volume)
    assert np.array_equal(raters.read([f"{tmp_path / 'masks.dcm'}#b"], volume)[0].array, np.roll(BOX, 1, 1))


def test_another_frame_of_reference(tmp_path, source):
    path = segmentation(tmp_path / "seg.dcm", source, {"nodule": BOX})
    for file in source.instances:
        d = pydicom.dcmread(file)
        d.FrameOfReferenceUID = "1.2.3.4"
        d.save_as(file)
    with pytest.raises(ValueError, match="is of another frame of reference than the scan"):
        raters.read([path], source)


# ---------------------------------------------------------------------- contours


def struct(path, regions, frame="", kind="CLOSED_PLANAR"):
    """An RTSTRUCT of regions: name to contours of (slice, [(row, column), ...]) in the scan's voxels."""
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = "1.2.840.10008.5.1.4.1.1.481.3", "1.2.840.10008.1.2.1"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    d = pydicom.dataset.FileDataset("x", {}, file_meta=meta, preamble=bytes(128))
    d.SOPClassUID, d.SOPInstanceUID, d.Modality = meta.MediaStorageSOPClassUID, "1.2.3", "RTSTRUCT"
    d.FrameOfReferenceUID = frame
    d.StructureSetROISequence, d.ROIContourSequence = pydicom.Sequence(), pydicom.Sequence()
    for number, (name, contours) in enumerate(regions.items(), start=1):
        roi, drawn = pydicom.Dataset(), pydicom.Dataset()
        roi.ROINumber, roi.ROIName = number, name
        drawn.ReferencedROINumber, drawn.ContourSequence = number, pydicom.Sequence()
        for k, corners in contours:
            contour = pydicom.Dataset()
            points = [SCAN.origin + SCAN.direction @ (np.array((c, r, k)) * SCAN.spacing) for r, c in corners]
            contour.ContourGeometricType, contour.NumberOfContourPoints = kind, len(points)
            contour.ContourData = [f"{x:.9g}" for x in np.ravel(points)]
            drawn.ContourSequence.append(contour)
        d.StructureSetROISequence.append(roi)
        d.ROIContourSequence.append(drawn)
    d.save_as(path, enforce_file_format=True)
    return path


OUTER = [(3.5, 10.5), (3.5, 17.5), (8.5, 17.5), (8.5, 10.5)]
HOLE = [(4.5, 12.5), (4.5, 15.5), (6.5, 15.5), (6.5, 12.5)]


def test_contours(tmp_path, source):
    path = struct(tmp_path / "rt.dcm", {"GTV": [(k, OUTER) for k in (1, 2, 3)]})
    for on in (source, nifti_of(source, tmp_path / "scan.nii.gz")):
        assert np.array_equal(raters.read([path], on)[0].array, BOX)
    ring = BOX.copy()
    ring[2, 5:7, 13:16] = False
    path = struct(tmp_path / "hole.dcm", {"GTV": [(1, OUTER), (2, OUTER), (2, HOLE), (3, OUTER)]})
    assert np.array_equal(raters.read([path], source)[0].array, ring)
    keyhole = [*OUTER, OUTER[0], *HOLE, HOLE[0], OUTER[0]]
    path = struct(tmp_path / "key.dcm", {"GTV": [(1, OUTER), (2, keyhole), (3, OUTER)]})
    assert np.array_equal(raters.read([path], source)[0].array, ring)
    both = struct(tmp_path / "both.dcm", {"BODY": [(0, OUTER)], "GTV": [(1, OUTER)]})
    with pytest.raises(ValueError, match=r"has 2 regions; name one as FILE#NAME: 'BODY' \(1\), 'GTV' \(2\)"):
        raters.read([both], source)
    assert raters.read([f"{both}#GTV"], source)[0].array.sum() == 35
    for contours, words in (
        ({"GTV": [(1.4, OUTER)]}, "a contour is not in one of its slices"),
        ({"GTV": [(9, OUTER)]}, "a contour is outside it"),
        ({"GTV": [(1, OUTER[:2])]}, "no three points or more"),
    ):
        with pytest.raises(ValueError, match=words):
            raters.read([struct(tmp_path / "bad.dcm", contours)], source)
    with pytest.raises(ValueError, match="has no closed contours"):
        raters.read([struct(tmp_path / "open.dcm", {"GTV": [(1, OUTER)]}, kind="OPEN_PLANAR")], source)
    with pytest.raises(ValueError, match="another frame of reference"):
        raters.read([struct(tmp_path / "far.dcm", {"GTV": [(1, OUTER)]}, frame="1.9.9")], source)
    with pytest.raises(ValueError, match="an RTSTRUCT, not a scan"):
        volumes.read(path)


def test_polygons_are_filled_as_another_library_does():
    """matplotlib's test of points, on corners that lie on no pixel; neighbours that share an edge share no pixel."""
    path = pytest.importorskip("matplotlib.path", reason="matplotlib is not installed")
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(np.arange(31), np.arange(23), indexing="xy"), -1).reshape(-1, 2)
    for corners in (3, 4, 7, 12):
        for _ in range(40):
            angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
            radius = rng.uniform(2, 14, corners)
            rows, columns = 11.3 + radius * np.sin(angle), 15.2 + radius * np.cos(angle)
            expected = path.Path(np.stack([columns, rows], 1)).contains_points(grid).reshape(23, 31)
            assert np.array_equal(raters.even_odd(rows, columns, (23, 31)), expected)
    left = raters.even_odd(np.array([2, 2, 9, 9]), np.array([3, 8, 8, 3]), (12, 20))
    right = raters.even_odd(np.array([2, 2, 9, 9]), np.array([8, 15, 15, 8]), (12, 20))
    assert left.sum() == 7 * 5 and right.sum() == 7 * 7 and not (left & right).any()


# ---------------------------------------------------------------------- padding


@pytest.mark.parametrize("low", [-2000, -3024])
@pytest.mark.parametrize("spacing", [None, (1.0, 1.0)])
def test_masks_do_not_depend_on_padding(tmp_path, low, spacing):
    """Outside the scanner's circle is no tissue: masks are those of a scan without the corner."""
    array = np.random.default_rng(0).integers(-900, -850, (3, 48, 48)).astype(np.int16)
    array[:, 20:28, 20:28] = 30
    array[:, 40:, 40:] = array[:, :40].min(axis=(1, 2))[:, None, None]
    padded = array.copy()
    padded[:, 40:, 40:] = low
    np.save(tmp_path / "scan.npy", padded)
    kept = dict(spacing=(0.8, 0.8, 2.0), placed=True) if spacing else {}
    volume = dataclasses.replace(volumes.read(tmp_path / "scan.npy"), **kept)
    assert volume.padding and np.array_equal(volume.outside(padded), padded == low)
    model = bright(pixel_spacing=spacing, size=(32, 32)) if spacing else bright()
    drawn = [
        sample_volume(model, v, 4, 3, seed=1).masks
        for v in (volume, dataclasses.replace(volume, array=array, padding=()), dataclasses.replace(volume, padding=()))
    ]
    inside = np.s_[:, :, :38, :38]
    assert np.array_equal(drawn[0][inside], drawn[1][inside])
    assert not np.array_equal(drawn[0], drawn[2]), "the test would not see it"


def test_values_of_other_kinds_are_not_taken_for_padding(tmp_path):
    rng = np.random.default_rng(0)
    phase = rng.integers(-4096, 4096, (4, 32, 32)).astype(np.int16)  # of MR, with a background of -4096
    phase[:, :8] = -4096
    noise = rng.normal(-1000, 200, (4, 32, 32)).astype(np.int16)
    for name, array in {"phase": phase, "noise": noise, "constant": np.full((4, 8, 8), -3024, np.int16),
                        "large": np.where(phase > 0, 1e30, -1e30)}.items():  # fmt: skip
        np.save(tmp_path / f"{name}.npy", array)
        assert volumes.read(tmp_path / f"{name}.npy").padding == (), name
    smeared = np.full((4, 32, 32), -1000.0, np.float32)
    smeared[:, :10], smeared[:, 10] = -3024, -2011.5  # a border that resampling made
    np.save(tmp_path / "smeared.npy", smeared)
    assert np.array_equal(volumes.read(tmp_path / "smeared.npy").outside(smeared), smeared < -1024)
    assert bf.imaging.volumes.read is volumes.read
