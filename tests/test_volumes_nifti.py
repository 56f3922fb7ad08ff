# SPDX-License-Identifier: Apache-2.0
"""NIfTI whose header says where it lies in several ways: masks lie on the scan for every reader, whichever it takes."""

from __future__ import annotations

import dataclasses
import gzip
import logging
import shutil

import numpy as np
import pytest
from scans import GEOMETRIES, scan

from berdiff_fast.imaging import volumes

nib = pytest.importorskip("nibabel", reason="nibabel is not installed")
sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")

ARRAY = scan().array
PLAIN = np.diag([-0.7, -0.8, 2.5, 1.0])
PLAIN[:3, 3] = [10, 20, 30]


def shifted(by=(12, -5, 3), turn=0.0):
    c, s = np.cos(np.radians(turn)), np.sin(np.radians(turn))
    matrix = PLAIN.copy()
    matrix[:3, 3] += by
    return np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ matrix


def save(path, sform=PLAIN, codes=(1, 1), qform=PLAIN, edit=None, array=ARRAY, kind=nib.Nifti1Image):
    image = kind(array.transpose(2, 1, 0), sform)
    image.set_qform(qform, codes[1])
    image.set_sform(sform, codes[0])
    if edit:
        edit(image.header)
    nib.save(image, path)
    return path


def patch(path, **fields):
    """Change a header behind the library's back."""
    data = bytearray(path.read_bytes())
    header = nib.Nifti1Header(bytes(data[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    data[:348] = header.binaryblock
    path.write_bytes(bytes(data))
    return path


def pixdim(*values):
    def edit(header):
        header["pixdim"][1 : 1 + len(values)] = values

    return edit


def unit(code):
    return lambda header: header.__setitem__("xyzt_units", code)


#: What it is: how it is made, and what is said of it (None: nothing).
CONTRADICTIONS = {
    "both forms elsewhere": (dict(sform=shifted()), "sform and qform differ"),
    "aligned and scanner": (dict(sform=shifted(), codes=(2, 1)), "sform code 2, qform code 1"),
    "turned": (dict(sform=shifted((0, 0, 0), 10), codes=(4, 1)), "sform and qform differ"),
    "mirrored": (dict(sform=np.diag([1, 1, 1, 1.0]) * 1 @ np.diag([-1, 1, 1, 1.0]) @ PLAIN), "sform and qform differ"),
    "sform alone": (dict(sform=shifted(turn=10), codes=(2, 0)), None),
    "qform alone": (dict(sform=shifted(), codes=(0, 1)), None),
    "neither": (dict(codes=(0, 0)), "does not say where it lies"),
    "pixdim of 1 beside an sform": (dict(codes=(1, 0), edit=pixdim(1, 1, 1)), "pixdim says 1 x 1 x 1"),
    "pixdim of 0 beside an sform": (dict(codes=(1, 0), edit=pixdim(0, 0, 0)), None),
    "negative pixdim": (dict(codes=(1, 1), edit=pixdim(-0.7, 0.8, 2.5)), "pixdim is negative"),
    "metres": (dict(sform=PLAIN / [[1000], [1000], [1000], [1]], qform=PLAIN / [[1000], [1000], [1000], [1]],
                    edit=unit(1)), None),
    "micrometres": (dict(sform=PLAIN * [[1000], [1000], [1000], [1]], qform=PLAIN * [[1000], [1000], [1000], [1]],
                         edit=unit(3)), None),
    "mm said to be metres": (dict(edit=unit(1)), "is its unit (m) right?"),
    "no unit": (dict(edit=unit(0)), None),
    "sheared a little": (dict(sform=PLAIN + np.eye(4, k=1) * [[8e-4], [0], [0], [0]], codes=(2, 0)), "to mend it"),
}  # fmt: skip


@pytest.mark.parametrize("what", CONTRADICTIONS)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_masks_repeat_forms_codes_and_units(tmp_path, what, ending, caplog):
    how, words = CONTRADICTIONS[what]
    path = save(tmp_path / "scan.nii", **how)
    with caplog.at_level(logging.WARNING, "berdiff_fast"):
        volume = volumes.read(path)
    assert np.array_equal(volume.array, ARRAY)
    assert len(caplog.messages) == (words is not None) and all(str(path) in line for line in caplog.messages)
    assert words is None or words in caplog.messages[0]
    mask = tmp_path / f"mask{ending}"
    volumes.write(mask, volume.array > 0, volume)
    theirs, ours = (nib.Nifti1Header.from_fileobj(f, check=False) for f in (path.open("rb"), _opened(mask)))
    for name in ("pixdim", "sform_code", "qform_code", "xyzt_units", "srow_x", "srow_y", "srow_z", "quatern_b",
                 "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "dim"):  # fmt: skip
        assert np.array_equal(theirs[name], ours[name]), name
    caplog.clear()
    back = volumes.read(mask)
    assert back.spacing == volume.spacing and back.origin == volume.origin
    assert not caplog.messages, "told once, with the scan, and not again with each mask"
    np.testing.assert_array_equal(nib.load(mask).affine, nib.load(path).affine)
    assert np.array_equal(np.asarray(nib.load(mask).dataobj).T, ARRAY > 0)
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError:
        return  # ITK takes neither
    read = sitk.ReadImage(str(mask))
    for corner in ((0, 0, 0), (22, 16, 4), (11, 4, 1)):
        where = [i.TransformIndexToPhysicalPoint(corner) for i in (image, read)]
        np.testing.assert_array_equal(*where)


def _opened(path):
    return gzip.open(path) if path.name.endswith(".gz") else path.open("rb")


def test_spacing_is_in_mm_and_is_the_forms(tmp_path):
    for what in ("metres", "micrometres", "no unit", "pixdim of 1 beside an sform", "pixdim of 0 beside an sform",
                 "negative pixdim", "sheared a little"):  # fmt: skip
        volume = volumes.read(save(tmp_path / "scan.nii", **CONTRADICTIONS[what][0]))
        np.testing.assert_allclose(volume.spacing, (0.7, 0.8, 2.5), rtol=1e-5, err_msg=what)
        np.testing.assert_allclose(volume.origin, (-10, -20, 30), rtol=1e-5, err_msg=what)
    # On another format's grid too, which has no forms to repeat.
    volumes.write(tmp_path / "mask.nrrd", volume.array > 0, volume)
    np.testing.assert_allclose(volumes.read(tmp_path / "mask.nrrd").spacing, (0.7, 0.8, 2.5), rtol=1e-5)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(srow_x=[0, 0, 0, 0], qform_code=0), "its sform is singular"),
        (dict(srow_x=[np.nan, 0, 0, 0], qform_code=0), "its sform is singular or not finite"),
        (dict(quatern_b=2.0, sform_code=0), "its qform is no rotation"),
        (dict(srow_x=[-0.7, 0.08, 0, 10], qform_code=0), "sform is sheared: axes are 0.1 (cosine) off right angles"),
        (dict(xyzt_units=5), "names the unit 5 of length"),
        (dict(bitpix=8), "its header says 8 bits"),
        (dict(vox_offset=-4), "begin at byte -4"),
        (dict(vox_offset=3e9), "is cut short"),
        (dict(dim=[3, 23, -17, 5, 1, 1, 1, 1]), "claims the dimensions"),
        (dict(dim=[99, 23, 17, 5, 1, 1, 1, 1]), "claims the dimensions"),
        (dict(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]), "is cut short"),
        (dict(datatype=128, bitpix=24), "one number for each voxel, got 3"),
        (dict(datatype=777), "voxels of the type 777"),
        (dict(magic=b"ni1"), "pair of files"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, fields, words):
    path = patch(save(tmp_path / "scan.nii", codes=(1, 1)), **fields)
    with pytest.raises(ValueError) as caught:
        volumes.read(path)
    assert words in str(caught.value) and str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_form_that_makes_no_sense_leaves_the_other(tmp_path, caplog):
    spoilt = [(dict(srow_x=[0, 0, 0, 0]), "sform is singular"), (dict(quatern_b=2.0), "qform is no rotation")]
    for fields, words in spoilt:
        volume = volumes.read(patch(save(tmp_path / "scan.nii"), **fields))
        np.testing.assert_allclose(volume.origin, (-10, -20, 30), rtol=1e-6)
        assert words in caplog.messages[-1]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_forms_of_other_formats_agree(tmp_path, geometry):
    """A grid from DICOM or ITK: both forms say the same, as nibabel and SimpleITK see it."""
    volume = scan(geometry)
    volumes.write(tmp_path / "mask.nii.gz", volume.array > 0, volume)
    image = nib.load(tmp_path / "mask.nii.gz")
    expected = np.diag([-1, -1, 1, 1.0]) @ np.block(
        [[volume.direction * volume.spacing, np.array(volume.origin)[:, None]], [np.zeros((1, 3)), np.ones((1, 1))]]
    )
    for matrix, code in (image.get_sform(coded=True), image.get_qform(coded=True)):
        np.testing.assert_allclose(matrix, expected, atol=5e-5)
        assert code == 1
    assert image.header.get_xyzt_units()[0] == "mm"
    itk = sitk.ReadImage(str(tmp_path / "mask.nii.gz"))
    np.testing.assert_allclose(itk.GetOrigin(), volume.origin, atol=5e-5)
    np.testing.assert_allclose(np.reshape(itk.GetDirection(), (3, 3)), volume.direction, atol=1e-6)


def test_a_changed_grid_is_not_the_headers(tmp_path):
    """What was read may be moved or cut before it is written; then the header's words are no longer true."""
    volume = volumes.read(save(tmp_path / "scan.nii"))
    moved = dataclasses.replace(volume, origin=(1.0, 2.0, 3.0))
    volumes.write(tmp_path / "moved.nii", moved.array, moved)
    assert volumes.read(tmp_path / "moved.nii").origin == (1.0, 2.0, 3.0)
    cut = dataclasses.replace(volume, array=volume.array[:2])
    volumes.write(tmp_path / "cut.nii", cut.array, cut)
    assert np.array_equal(volumes.read(tmp_path / "cut.nii").array, volume.array[:2])


def test_containers(tmp_path):
    """Gzipped or not by what is in it; NIfTI-2; dimensions of one; a slice that lies at z = 30."""
    plain, packed = save(tmp_path / "plain.nii"), save(tmp_path / "packed.nii.gz")
    shutil.copy(packed, tmp_path / "is_packed.nii")
    shutil.copy(plain, tmp_path / "is_plain.nii.gz")
    save(tmp_path / "two.nii", kind=nib.Nifti2Image)
    save(tmp_path / "two.nii.gz", kind=nib.Nifti2Image)
    for dims in (4, 5):
        image = nib.Nifti1Image(ARRAY.transpose(2, 1, 0).reshape(23, 17, 5, *[1] * (dims - 3)), PLAIN)
        nib.save(image, tmp_path / f"of_{dims}.nii.gz")
    nib.save(nib.Nifti1Image(ARRAY.transpose(2, 1, 0).astype(">i2"), PLAIN), tmp_path / "swapped.nii")
    for path in sorted(tmp_path.iterdir()):
        volume = volumes.read(path)
        assert np.array_equal(volume.array, ARRAY), path
        np.testing.assert_allclose(volume.origin, (-10, -20, 30), rtol=1e-6)
        volumes.write(tmp_path / "mask.nii.gz", volume.array > 0, volume)
        np.testing.assert_allclose(nib.load(tmp_path / "mask.nii.gz").affine, nib.load(plain).affine, atol=1e-6)
        origin = sitk.ReadImage(str(tmp_path / "mask.nii.gz")).GetOrigin()[:3]
        np.testing.assert_allclose(origin, (-10, -20, 30), rtol=1e-6)
        (tmp_path / "mask.nii.gz").unlink()
    nib.save(nib.Nifti1Image(ARRAY[2].T, PLAIN), tmp_path / "flat.nii")
    flat = volumes.read(tmp_path / "flat.nii")
    assert np.array_equal(flat.array, ARRAY[2:3]) and flat.origin[2] == 30 and flat.spacing[2] == 2.5
    volumes.write(tmp_path / "mask.nii", flat.array > 0, flat)
    mask = nib.load(tmp_path / "mask.nii")
    assert mask.shape == (23, 17) and np.array_equal(mask.affine, nib.load(tmp_path / "flat.nii").affine)


def test_scaling_and_equal_files(tmp_path):
    def scaled(header):
        header.set_slope_inter(2, -1000)

    path = save(tmp_path / "scan.nii", edit=scaled)
    np.testing.assert_allclose(volumes.read(path).array, nib.load(path).get_fdata().T)
    volume = volumes.read(save(tmp_path / "plain.nii"))
    for name in ("a.nii.gz", "b.nii.gz"):
        volumes.write(tmp_path / name, volume.array > 0, volume)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_unknown_spacing_stays_unknown(tmp_path):
    unknown = dataclasses.replace(scan(), spacing=None, origin=(0.0, 0.0, 0.0), direction=np.eye(3))
    volumes.write(tmp_path / "mask.nii", unknown.array, unknown)
    assert volumes.read(tmp_path / "mask.nii").spacing is None
