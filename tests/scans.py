# SPDX-License-Identifier: Apache-2.0
"""Scans made for tests: volumes with a known object, DICOM series, and a small model that looks at intensities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import berdiff_fast as bf
from berdiff_fast.imaging.volumes import Volume

#: Turned about two axes, as oblique acquisitions are.
OBLIQUE = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]]) @ np.array(
    [[1.0, 0.0, 0.0], [0.0, 0.8, -0.6], [0.0, 0.6, 0.8]]
)

GEOMETRIES = {
    "plain": dict(spacing=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0), direction=np.eye(3)),
    "anisotropic": dict(spacing=(0.703125, 0.8, 2.5), origin=(-171.3, 12.25, -300.75), direction=np.eye(3)),
    "flipped": dict(spacing=(0.7, 0.7, 1.25), origin=(170.0, 160.5, 20.0), direction=np.diag([-1.0, -1.0, 1.0])),
    "oblique": dict(spacing=(0.9, 0.6, 3.0), origin=(5.5, -7.25, 100.125), direction=OBLIQUE),
    "left-handed": dict(spacing=(0.7, 0.8, 2.0), origin=(1.0, 2.0, 3.0), direction=np.diag([1.0, 1.0, -1.0])),
    "sagittal": dict(
        spacing=(0.5, 0.5, 4.0),
        origin=(1.0, 2.0, 3.0),
        direction=np.array([[0.0, 0.0, -1.0], [1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]),
    ),
}


def scan(geometry: str = "anisotropic", shape: tuple[int, int, int] = (5, 17, 23), dtype: type = np.int16) -> Volume:
    """Air at -1000 with noise, and a bright box, [1:4, 4:9, 11:18], off every axis of symmetry."""
    array = np.random.default_rng(0).integers(-1000, -900, shape)
    array[1:4, 4:9, 11:18] = 100
    return Volume(array.astype(dtype), **GEOMETRIES[geometry])  # type: ignore[arg-type]


def stored_as(volume: Volume, order: tuple[int, ...], flips: tuple[int, ...]) -> Volume:
    """The same voxels in the same places, stored with the axes of the array in another order, some of them reversed."""
    assert volume.spacing is not None
    array, origin = volume.array.transpose(order), np.array(volume.origin)
    along = [volume.direction[:, 2 - a] for a in order]
    spacing = [volume.spacing[2 - a] for a in order]
    for axis in (0, 1, 2):
        if flips[axis]:
            origin = origin + along[axis] * spacing[axis] * (array.shape[axis] - 1)
            along[axis] = -along[axis]
            array = np.flip(array, axis)
    return Volume(
        np.ascontiguousarray(array), tuple(spacing[::-1]), tuple(origin.tolist()), np.stack(along[::-1], axis=1)
    )


def write_series(folder: Path, volume: Volume, *, drop: int | None = None, uid: str | None = None, **changes) -> None:
    """As a scanner would: a file per slice, named in no order, in Hounsfield units by slope and intercept."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    folder.mkdir(parents=True, exist_ok=True)
    study, series, frame = (generate_uid(entropy_srcs=[x, uid or ""]) for x in ("study", "series", "frame"))
    assert volume.spacing is not None
    for k, pixels in enumerate(volume.array):
        if k == drop:
            continue
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(k), uid or ""])
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        d = FileDataset(str(folder), {}, file_meta=meta, preamble=b"\0" * 128)
        d.SOPClassUID, d.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        d.StudyInstanceUID, d.SeriesInstanceUID, d.FrameOfReferenceUID = study, series, frame
        d.PatientName, d.PatientID, d.PatientBirthDate, d.PatientSex = "Doe^Jane", "1", "", ""
        d.StudyDate, d.StudyTime, d.StudyID, d.AccessionNumber = "20200101", "000000", "1", ""
        d.ReferringPhysicianName, d.Modality, d.Manufacturer = "", "CT", "test"
        d.PositionReferenceIndicator, d.SeriesNumber, d.InstanceNumber = "", 1, k + 1
        d.Rows, d.Columns = pixels.shape
        d.PixelSpacing = [repr(volume.spacing[1]), repr(volume.spacing[0])]
        d.SliceThickness = repr(volume.spacing[2])
        d.ImageOrientationPatient = [f"{x:.12g}" for x in volume.direction[:, :2].T.flatten()]
        position = np.array(volume.origin) + k * volume.spacing[2] * volume.direction[:, 2]
        d.ImagePositionPatient = [f"{x:.12g}" for x in position]
        d.SamplesPerPixel, d.PhotometricInterpretation = 1, "MONOCHROME2"
        d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 16, 15, 0
        d.RescaleSlope, d.RescaleIntercept, d.RescaleType = "1", "-1024", "HU"
        d.PixelData = (pixels.astype(np.int32) + 1024).astype(np.uint16).tobytes()
        for name, value in changes.items():
            setattr(d, name, value(k) if callable(value) else value)
        pydicom.dcmwrite(folder / f"{(k * 7) % 13:02d}-{k}{(uid or '')[-3:]}.dcm", d, enforce_file_format=True)


class Bright(torch.nn.Module):
    """Marks what is bright, all but surely; where it is neither, it cannot tell."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(6.0))

    def forward(self, y_t: torch.Tensor, t: torch.Tensor, img: torch.Tensor) -> torch.Tensor:
        return self.weight * img + 0 * y_t


def bright(**preprocessing) -> bf.BerDiff:
    """It, as a model."""
    return bf.BerDiff(Bright(), prediction="y_0", preprocessing=bf.Preprocessing(**preprocessing))


def small_model(path: Path, **preprocessing) -> Path:
    """A network that looks at images and noise, untrained but not blind, in a file."""
    torch.manual_seed(0)
    network = bf.UNet(model_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=())
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    bf.BerDiff(network, prediction="y_0", preprocessing=bf.Preprocessing(**preprocessing)).save(path)
    return path


def write_enhanced(path: Path, volume: Volume, order=None, rescale=None, positions=None, **changes) -> None:
    """One file of many frames: frame f holds slice ``order[f]``, with its (slope, intercept) in ``rescale``."""
    import pydicom
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    assert volume.spacing is not None
    order = [*range(len(volume.array))] if order is None else [*order]
    folder = path.parent / f"{path.stem}-slices"
    write_series(folder, Volume(volume.array[:1], volume.spacing, volume.origin, volume.direction))
    d = pydicom.dcmread(next(folder.iterdir()))
    next(folder.iterdir()).unlink()
    folder.rmdir()
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "RescaleSlope",
                 "RescaleIntercept", "RescaleType"):  # fmt: skip
        delattr(d, name)
    d.SOPClassUID = d.file_meta.MediaStorageSOPClassUID = pydicom.uid.EnhancedCTImageStorage
    d.NumberOfFrames, d.ImageType = len(order), ["ORIGINAL", "PRIMARY"]
    d.ContentDate, d.ContentTime = "20200101", "000000"

    def item(**values):
        found = Dataset()
        for name, value in values.items():
            setattr(found, name, value)
        return Sequence([found])

    shared, frames, data = Dataset(), [], []
    shared.PlaneOrientationSequence = item(ImageOrientationPatient=volume.direction[:, :2].T.flatten().tolist())
    shared.PixelMeasuresSequence = item(
        PixelSpacing=[volume.spacing[1], volume.spacing[0]], SliceThickness=volume.spacing[2]
    )
    for f, k in enumerate(order):
        slope, intercept = rescale[f] if rescale else (1, -1024)
        at = k if positions is None else positions[f]
        where = np.array(volume.origin) + at * volume.spacing[2] * volume.direction[:, 2]
        frame = Dataset()
        frame.PlanePositionSequence = item(ImagePositionPatient=[float(f"{x:.12g}") for x in where])
        frame.PixelValueTransformationSequence = item(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="HU")
        frame.FrameContentSequence = item(StackID="1", InStackPositionNumber=k + 1, DimensionIndexValues=[1, k + 1])
        frames.append(frame)
        data.append(np.rint((volume.array[k] - float(intercept)) / slope).astype("<u2"))
    d.SharedFunctionalGroupsSequence = Sequence([shared])
    d.PerFrameFunctionalGroupsSequence = Sequence(frames)
    d.PixelData = np.stack(data).tobytes()
    for name, value in changes.items():
        setattr(d, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    d.save_as(path, enforce_file_format=True)
