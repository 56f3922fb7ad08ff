# SPDX-License-Identifier: Apache-2.0
"""Scans in files: voxels with their place in the patient, read, checked, and written back on the same grid.

NIfTI, NRRD, MetaImage and DICOM are read and written by SimpleITK, DICOM segmentations are written by highdicom
(``pip install "berdiff_fast[imaging]"``). Pictures, NumPy and HDF5 files need neither.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import os
import struct
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from berdiff_fast.data import contained, pixels
from berdiff_fast.files import whole_file

#: Formats by the ends of file names.
FORMATS = {
    "nifti": (".nii", ".nii.gz"),
    "nrrd": (".nrrd", ".nhdr"),
    "metaimage": (".mha", ".mhd"),
    "dicom": (".dcm", ".ima"),
    "picture": (".png", ".tif", ".tiff", ".jpg", ".jpeg"),
    "numpy": (".npy",),
    "hdf5": (".h5", ".hdf5"),
}

#: Anatomical planes by the direction (L, P, S) that their slices are stacked in.
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}


@dataclass(frozen=True)
class Volume:
    """Voxels and where they lie.

    Attributes:
        array: (S, H, W) in the file's units (Hounsfield units for CT), as stored: the last axis runs fastest.
        spacing: mm between neighbours along (x, y, z), that is along W, H and S; None where the file does not say.
        origin: of voxel [0, 0, 0], and direction: 3 x 3, whose columns are the axes x, y and z, in mm in the patient's
            left, posterior and superior (DICOM's and ITK's convention).
        format: a key of ``FORMATS``.
        path: where it came from.
        instances: the DICOM files of the slices, in the order of ``array``; else empty.
    """

    array: np.ndarray
    spacing: tuple[float, float, float] | None = None
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    direction: np.ndarray = field(default_factory=lambda: np.eye(3))
    format: str = "numpy"
    path: Path = Path()
    instances: tuple[Path, ...] = ()

    @property
    def voxel_mm3(self) -> float | None:
        return None if self.spacing is None else float(np.prod(self.spacing))

    def axis(self, plane: str | int) -> int:
        """The axis of ``array`` along which slices of a plane are stacked: the one nearest to its direction.

        Raises:
            ValueError: neither a plane ("axial", "coronal", "sagittal") nor an axis (0, 1, 2).
        """
        if isinstance(plane, str) and plane in PLANES:
            # Axes of the array are z, y, x.
            return 2 - int(np.abs(self.direction[PLANES[plane]]).argmax())
        if plane in (0, 1, 2) and not isinstance(plane, (bool, str)):
            return int(plane)
        raise ValueError(f"plane must be one of {[*PLANES]} or an axis, 0 to 2, got {plane!r}")

    def fingerprint(self) -> str:
        """SHA-256 of voxels and geometry."""
        digest = hashlib.sha256(repr((self.array.shape, str(self.array.dtype), self.spacing, self.origin)).encode())
        digest.update(np.ascontiguousarray(self.direction).tobytes())
        digest.update(np.ascontiguousarray(self.array).data)
        return digest.hexdigest()


# ---------------------------------------------------------------------- reading


def read(path: str | os.PathLike[str], *, series: str | None = None) -> Volume:
    """Read a scan or a picture.

    Args:
        path: a file of one of ``FORMATS``, or a folder with a DICOM series. A picture, and a slice of (H, W), is a
            volume of one slice.
        series: the series' UID, where a folder holds several.

    Raises:
        FileNotFoundError, ValueError: it cannot be read, or is not one grey volume of finite numbers, or its slices are
            not evenly spaced; the message is one line and begins with the path.
        ImportError: the format needs a package that is not installed; it says which.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    kind = "dicom" if path.is_dir() else _format(path)
    try:
        volume = _READERS[kind](path, series)
    except ImportError:
        raise
    except ValueError as error:
        raise ValueError(f"{path}: {_line(error)}") from None
    except Exception as error:  # decoders raise what they like on broken files
        raise ValueError(f"{path}: cannot be read: {_line(error)}") from None
    return _checked(volume)


def _format(path: Path) -> str:
    name = path.name.lower()
    for kind, ends in FORMATS.items():
        if name.endswith(ends):
            return kind
    if _is_dicom(path):  # DICOM files often have no ending
        return "dicom"
    known = " ".join(end for ends in FORMATS.values() for end in ends)
    raise ValueError(f"{path}: must be a DICOM folder or a file that ends in one of {known}")


def _checked(volume: Volume) -> Volume:
    array, path = volume.array, volume.path
    if array.ndim != 3:
        raise ValueError(
            f"{path}: must be one volume of 3 dimensions (or a slice of 2), got {array.ndim}: {array.shape}"
        )
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path}: must hold real numbers, one for each voxel, got {array.dtype}")
    if array.size == 0:
        raise ValueError(f"{path}: must not be empty, got shape {array.shape}")
    if array.dtype.kind == "f":
        bad = int(array.size - np.isfinite(array).sum())
        if bad:
            raise ValueError(f"{path}: must be finite, got {bad} voxels that are NaN or infinite, of {array.size}")
    if volume.spacing is not None and not all(np.isfinite(s) and s > 0 for s in volume.spacing):
        raise ValueError(f"{path}: spacing must be positive, got {volume.spacing} mm")
    singular = abs(abs(np.linalg.det(volume.direction)) - 1) > 1e-3
    if not np.isfinite(volume.direction).all() or singular:
        raise ValueError(f"{path}: direction must be a rotation, got {volume.direction.round(4).tolist()}")
    return volume


def _read_picture(path: Path, series: str | None) -> Volume:
    array, _ = pixels.read(path)
    return Volume(array[None], format="picture", path=path)


def _read_numpy(path: Path, series: str | None) -> Volume:
    array = np.load(path, allow_pickle=False)
    return Volume(array[None] if array.ndim == 2 else array, format="numpy", path=path)


def _read_hdf5(path: Path, series: str | None) -> Volume:
    with h5py.File(path) as file:
        found = contained.dataset(file, "image")
        if found is None:
            raise ValueError(f"must have a dataset 'image', got {sorted(file)}")
        array = contained.whole(found)
    return Volume(array[None] if array.ndim == 2 else array, format="hdf5", path=path)


def _read_itk(path: Path, series: str | None) -> Volume:
    sitk = require("SimpleITK")
    kind = _format(path)
    known = _check_nifti(path) if kind == "nifti" else _tells_spacing(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    with _silence():
        reader.ReadImageInformation()
        _check_voxels(reader.GetDimension(), reader.GetSize(), reader.GetNumberOfComponents())
        volume = _from_itk(reader.Execute(), kind, path)
    return volume if known else replace(volume, spacing=None)


def _read_dicom(path: Path, series: str | None) -> Volume:
    sitk = require("SimpleITK")
    if path.is_file():
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        with _silence():
            reader.ReadImageInformation()
            _check_voxels(reader.GetDimension(), reader.GetSize(), reader.GetNumberOfComponents())
            volume = _from_itk(reader.Execute(), "dicom", path, (path,))
        # Of slice and pixel (0028|0030), or of a detector's, or of the frames of an enhanced file.
        tags = ("0028|0030", "0018|1164", "5200|9229", "5200|9230")
        known = volume.array.shape[0] > 1 or any(reader.HasMetaDataKey(tag) for tag in tags)
        thickness = reader.GetMetaData("0018|0050") if reader.HasMetaDataKey("0018|0050") else ""
        return _as_thick(volume, thickness) if known else replace(volume, spacing=None)
    with _silence():
        found = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(path))
    if not found:
        raise ValueError("holds no DICOM series")
    if series is None and len(found) > 1:
        raise ValueError(f"holds {len(found)} series; choose one with series: {', '.join(found)}")
    if series is not None and series not in found:
        raise ValueError(f"has no series {series}; it holds {', '.join(found)}")
    with _silence():
        names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path), series or found[0])
        headers = _check_series(names)
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(names)
        kinds = {
            (float(h.get("RescaleSlope", 1)), float(h.get("RescaleIntercept", 0)), h.get("PixelRepresentation", 0))
            for h in headers
        }
        if len(kinds) > 1:  # as in PET: the type of the first slice would round the others, or overflow
            reader.SetOutputPixelType(sitk.sitkFloat64)
        image = reader.Execute()
    _check_voxels(image.GetDimension(), image.GetSize(), image.GetNumberOfComponentsPerPixel())
    volume = _from_itk(image, "dicom", path, tuple(Path(name) for name in names))
    known = "PixelSpacing" in headers[0]
    return _as_thick(volume, headers[0].get("SliceThickness")) if known else replace(volume, spacing=None)


def _as_thick(volume: Volume, thickness: Any) -> Volume:
    """A single slice as thick as it says, and as ITK has it, 1 mm, where it says nothing."""
    if len(volume.array) > 1 or volume.spacing is None or not str(thickness or "").strip() or float(thickness) <= 0:
        return volume
    return replace(volume, spacing=(*volume.spacing[:2], float(thickness)))


_READERS = {
    "nifti": _read_itk,
    "nrrd": _read_itk,
    "metaimage": _read_itk,
    "dicom": _read_dicom,
    "picture": _read_picture,
    "numpy": _read_numpy,
    "hdf5": _read_hdf5,
}


def _check_voxels(dimension: int, size: Sequence[int], components: int) -> None:
    if components != 1:
        raise ValueError(f"must hold one number for each voxel, got {components} (colour, or vectors)")
    if dimension > 3 and any(s > 1 for s in size[3:]):
        raise ValueError(f"must be one volume of 3 dimensions, got {dimension}: {tuple(size)}")


def _from_itk(image: Any, kind: str, path: Path, instances: tuple[Path, ...] = ()) -> Volume:
    sitk = require("SimpleITK")
    while image.GetDimension() > 3:
        image = image[..., 0]
    spacing, origin = image.GetSpacing(), image.GetOrigin()
    direction = np.array(image.GetDirection()).reshape(image.GetDimension(), -1)
    array = sitk.GetArrayFromImage(image)
    if image.GetDimension() == 2:
        array, spacing, origin = array[None], (*spacing, 1.0), (*origin, 0.0)
        direction = np.block([[direction, np.zeros((2, 1))], [np.zeros((1, 2)), np.ones((1, 1))]])
    return Volume(array, spacing, origin, direction, kind, path, instances)


def _check_nifti(path: Path) -> bool:
    """That all voxels are there, and finite: the library puts zeros for those that are not, and says nothing.

    Returns:
        Whether the file tells its spacing; the library puts 1 mm where it does not.
    """
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
        try:
            header = file.read(540)
            order = next((o for o in "<>" if struct.unpack_from(f"{o}i", header)[0] in (348, 540)), None)
            if order is None:
                raise ValueError("is not a NIfTI file")
            if struct.unpack_from(f"{order}i", header)[0] == 348:
                shape, start = (
                    struct.unpack_from(f"{order}8h", header, 40),
                    struct.unpack_from(f"{order}f", header, 108),
                )
                kind, bits = struct.unpack_from(f"{order}2h", header, 70)
                spacing = struct.unpack_from(f"{order}8f", header, 76)
            else:
                shape, start = (
                    struct.unpack_from(f"{order}8q", header, 16),
                    struct.unpack_from(f"{order}q", header, 168),
                )
                kind, bits = struct.unpack_from(f"{order}2h", header, 12)
                spacing = struct.unpack_from(f"{order}8d", header, 104)
        except struct.error:
            raise ValueError("is not a NIfTI file") from None
        expected = int(start[0]) + int(np.prod([max(1, s) for s in shape[1 : 1 + shape[0]]])) * bits // 8
        data = header + file.read()
    if len(data) < expected:
        raise ValueError(f"is cut short: it has {len(data)} of {expected} bytes")
    if kind in (16, 64):  # float32, float64
        values = np.frombuffer(data[int(start[0]) : expected], f"{order}f{bits // 8}")
        if bad := values.size - int(np.isfinite(values).sum()):
            raise ValueError(f"must be finite, got {bad} voxels that are NaN or infinite, of {values.size}")
    return all(s > 0 for s in spacing[1 : 1 + min(3, shape[0])])


def _tells_spacing(path: Path) -> bool:
    """Whether the header of an NRRD or a MetaImage, which is lines of text, does; the library puts 1 mm else."""
    with path.open("rb") as file:
        for line in iter(lambda: file.readline(4096), b""):
            key = line.replace(b"=", b":").split(b":")[0].strip().lower()
            if key in (b"spacings", b"space directions", b"elementspacing", b"elementsize"):
                return b"nan" not in line.lower()
            if line.strip() == b"" or key == b"elementdatafile":  # the last of the header
                return False
    return False


def _check_series(names: Sequence[str]) -> list[Any]:
    """Headers of slices of one size and spacing that lie parallel and are evenly stacked, as the library assumes."""
    pydicom = require("pydicom")
    tags = ["Rows", "Columns", "PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient"]
    tags += ["RescaleSlope", "RescaleIntercept", "PixelRepresentation", "SliceThickness"]
    headers = [pydicom.dcmread(name, stop_before_pixels=True, specific_tags=tags, force=True) for name in names]
    sizes = {(h.Rows, h.Columns) for h in headers}
    if len(sizes) > 1:
        raise ValueError(f"has slices of different sizes: {sorted(sizes)}")
    spacings = {tuple(float(x) for x in h.get("PixelSpacing", ())) for h in headers}
    if len(spacings) > 1:
        raise ValueError(f"has slices of different pixel spacing: {sorted(spacings)}")
    if len(headers) == 1:
        return headers
    missing = [Path(n).name for n, h in zip(names, headers, strict=True) if not _placed(h)]
    if missing:
        raise ValueError(f"has slices without a position: {missing[0]} and {len(missing) - 1} more")
    orientations = np.array([h.ImageOrientationPatient for h in headers], dtype=float)
    if np.abs(orientations - orientations[0]).max() > 1e-3:
        raise ValueError("has slices that are not parallel")
    normal = np.cross(orientations[0, :3], orientations[0, 3:])
    steps = np.diff(np.array([h.ImagePositionPatient for h in headers], dtype=float), axis=0)
    gaps = steps @ normal
    if np.abs(steps - gaps[:, None] * normal).max() > 0.01 * np.abs(gaps).max():
        raise ValueError("has slices that are not stacked at right angles (a tilted gantry); resample it first")
    usual = float(np.median(gaps))
    if abs(usual) < 1e-6 or np.abs(gaps).min() < 1e-6:
        at = int(np.abs(gaps).argmin())
        raise ValueError(f"has two slices at one position: {Path(names[at]).name} and {Path(names[at + 1]).name}")
    uneven = np.flatnonzero(np.abs(gaps - usual) > max(0.01 * abs(usual), 0.01))
    if len(uneven):
        at = int(uneven[0])
        between = f"{Path(names[at]).name} and {Path(names[at + 1]).name}"
        gap, usual = abs(gaps[at]), abs(usual)
        raise ValueError(f"misses slices, or is not evenly spaced: {gap:.3f} mm between {between}, else {usual:.3f}")
    return headers


def _placed(header: Any) -> bool:
    return "ImagePositionPatient" in header and "ImageOrientationPatient" in header


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


# ---------------------------------------------------------------------- writing


def write(path: str | os.PathLike[str], array: np.ndarray, like: Volume) -> None:
    """Write voxels on the grid of another volume, in the format of the path's ending.

    Args:
        path: ends in .nii, .nii.gz, .nrrd, .mha, .npy, or as a picture, which holds one slice.
        array: (S, H, W) as ``like``; bool becomes 0 and 1 (0 and 255 in a picture).
        like: whose geometry it has.

    Raises:
        ValueError: an array of another shape, or an ending that is not known.
        OSError: it cannot be written; what was there is as it was.
    """
    path = Path(path)
    if array.shape != like.array.shape:
        raise ValueError(f"array must have the shape of its grid, {like.array.shape}, got {array.shape}")
    kind = next((k for k, ends in FORMATS.items() if path.name.lower().endswith(ends)), None)
    headers_alone = path.name.lower().endswith((".nhdr", ".mhd"))
    with whole_file(path) as new:
        if kind == "numpy":
            with new.open("wb") as file:  # np.save would add an ending to .NPY
                np.save(file, array)
        elif kind == "picture" and len(array) == 1:
            _write_picture(new, array[0])
        elif kind in ("nifti", "nrrd", "metaimage") and not headers_alone:
            _write_itk(new, array, like)
        else:
            raise ValueError(f"path must end as a format that {len(array)} slices can be written in, got {path.name}")


def _write_picture(path: Path, array: np.ndarray) -> None:
    from PIL import Image

    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype.kind == "f":  # of probabilities and bits, in [0, 1]
        array = np.rint(array * 255).clip(0, 255).astype(np.uint8)
    Image.fromarray(array).save(path)


def _write_itk(path: Path, array: np.ndarray, like: Volume) -> None:
    sitk = require("SimpleITK")
    image = sitk.GetImageFromArray(array.astype(np.uint8) if array.dtype == bool else array)
    image.SetSpacing(like.spacing or (1.0, 1.0, 1.0))
    image.SetOrigin(like.origin)
    image.SetDirection(like.direction.flatten().tolist())
    try:
        with _silence():
            sitk.WriteImage(image, str(path), useCompression=path.name.endswith((".gz", ".nrrd", ".mha")))
    except RuntimeError as error:
        raise OSError(f"{path.name} cannot be written: {_line(error)}") from None


def write_segmentation(
    path: str | os.PathLike[str],
    masks: Mapping[str, np.ndarray],
    like: Volume,
    *,
    fractional: bool = False,
    description: str = "",
) -> None:
    """A DICOM segmentation that refers to the series it was made from, by highdicom.

    Args:
        path: the file.
        masks: a segment for each name: bool (S, H, W), or with ``fractional`` probabilities in [0, 1], kept in steps of
            1 / 255. Slices where a segment is empty are left out.
        like: a volume that was read from DICOM.
        description: of the series.

    Raises:
        ValueError: ``like`` is not from DICOM, or nothing is marked at all: the standard has no empty segmentation.
    """
    require("highdicom")
    pydicom = require("pydicom")
    from highdicom import AlgorithmIdentificationSequence, seg
    from pydicom.sr.codedict import codes

    import berdiff_fast

    if not like.instances:
        raise ValueError(f"like must be a volume that was read from DICOM, got one from {like.format}")
    if not any(mask.any() for mask in masks.values()):
        raise ValueError("masks must mark something: there is no empty DICOM segmentation")
    marked = {name: mask for name, mask in masks.items() if mask.any()}
    algorithm = AlgorithmIdentificationSequence(
        name="berdiff_fast", family=codes.cid7162.ArtificialIntelligence, version=berdiff_fast.__version__
    )
    segments = [
        seg.SegmentDescription(
            number,
            name,
            codes.SCT.MorphologicallyAbnormalStructure,
            codes.SCT.Lesion,
            seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm,
        )
        for number, name in enumerate(marked, start=1)
    ]
    sources = [pydicom.dcmread(name) for name in like.instances]
    for source in sources:
        for keyword in _TYPE_2:  # may be empty, but not absent; de-identified series lack some
            if keyword not in source:
                setattr(source, keyword, None)
    pixels_ = np.stack([*marked.values()], axis=-1).astype(np.float32 if fractional else np.uint8)
    content = hashlib.sha256(pixels_.tobytes()).hexdigest()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values in the source that a standard discourages
        file = seg.Segmentation(
            source_images=sources,
            pixel_array=pixels_,
            segmentation_type="FRACTIONAL" if fractional else "BINARY",
            segment_descriptions=segments,
            series_instance_uid=_uid(like, *marked, content, "series"),
            series_number=900,
            sop_instance_uid=_uid(like, *marked, content, "instance"),
            instance_number=1,
            manufacturer="berdiff_fast",
            manufacturer_model_name="berdiff_fast",
            software_versions=berdiff_fast.__version__,
            device_serial_number="0",
            content_description=description[:64] or None,
        )
        file.SeriesDescription = description[:64]
        with whole_file(path) as new:
            file.save_as(new)


#: Of patient and study, which a segmentation repeats.
_TYPE_2 = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
    "PositionReferenceIndicator",
    "SliceThickness",
)


def _uid(like: Volume, *names: str) -> str:
    """The same for the same segments of the same scan, and another for others."""
    from pydicom.uid import generate_uid

    return generate_uid(entropy_srcs=[like.fingerprint(), *names])


# ---------------------------------------------------------------------- packages and words


def require(package: str) -> Any:
    """An optional package.

    Raises:
        ImportError: it is not installed; the message says how it is.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f'{package} is needed for this, and missing: pip install "berdiff_fast[imaging]"') from error


def _line(error: BaseException) -> str:
    """What an error says, in one line; of SimpleITK's, what comes after the place in its sources."""
    words = str(error) or type(error).__name__
    for mark in ("ERROR: ", "Error: "):
        words = words.rsplit(mark, 1)[-1]
    return " ".join(words.split())[:300]


@contextmanager
def _silence() -> Iterator[None]:
    """Without what C libraries print to stderr: their errors come as exceptions too."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
