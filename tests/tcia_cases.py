# SPDX-License-Identifier: Apache-2.0
"""Small copies of what The Cancer Imaging Archive has of LIDC-IDRI: CT series and readings made for tests."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

REAL = Path(__file__).parents[2] / "shared" / "data" / "lidc_xml"
SERIES, OTHER = "1.2.826.1", "1.2.826.2"
SIZE = (64, 80)


def uid(k: int, series: str = SERIES) -> str:
    """The SOPInstanceUID of slice k."""
    return f"{series}.{k}"


def pixels(k: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Hounsfield units of slice k, from -1000 to 399: each pixel tells where it is."""
    row, column = np.ogrid[: size[0], : size[1]]
    return (-1000 + (row * 7 + column * 3 + k * 11) % 1400).astype(np.int16)


def write_slice(
    path: Path, instance: str, z: float, k: int = 0, series: str = SERIES, size: tuple[int, int] = SIZE, **changes: Any
) -> None:
    """A CT slice with the rescale that scanners write; ``changes`` are tags, and None takes one away."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, instance
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    d.SOPClassUID, d.SOPInstanceUID = CTImageStorage, instance
    d.StudyInstanceUID, d.SeriesInstanceUID, d.PatientID, d.Modality = "1.2.3", series, "LIDC-IDRI-0001", "CT"
    d.InstanceNumber, d.SliceThickness, d.PixelSpacing = k + 1, "2.5", ["0.75", "0.75"]
    d.ImageOrientationPatient, d.ImagePositionPatient = [1, 0, 0, 0, 1, 0], ["-170", "-160.5", f"{z:.6f}"]
    d.Rows, d.Columns = size
    d.SamplesPerPixel, d.PhotometricInterpretation = 1, "MONOCHROME2"
    d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 16, 15, 0
    d.RescaleSlope, d.RescaleIntercept = "1", "-1024"
    d.PixelData = (pixels(k, size).astype(np.int32) + 1024).astype(np.uint16).tobytes()
    for name, value in changes.items():
        if value is None:
            delattr(d, name)
        else:
            setattr(d, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, d, enforce_file_format=True)


def write_series(folder: Path, count: int = 8, series: str = SERIES, **changes: Any) -> Path:
    """Slices 0 to count - 1, 2.5 mm apart, named from the top down as scanners do."""
    for k in range(count):
        write_slice(folder / f"1-{count - k:03d}.dcm", uid(k, series), 2.5 * k - 100, k, series, **changes)
    return folder


# ---------------------------------------------------------------------- readings


def ring(top: int, left: int, height: int, width: int) -> list[tuple[int, int]]:
    """A closed path of pixels, (row, column), around height x width pixels, the first of which is (top, left)."""
    rows, columns = range(top - 1, top + height + 1), range(left - 1, left + width + 1)
    path = [(rows[0], c) for c in columns] + [(r, columns[-1]) for r in rows[1:]]
    path += [(rows[-1], c) for c in columns[-2::-1]] + [(r, columns[0]) for r in rows[-2:0:-1]]
    return [*path, path[0]]


def roi(k: int, path: Iterable[tuple[int, int]], inclusion: str = "TRUE", **texts: str) -> str:
    """A region in slice k; ``texts`` replace what elements hold."""
    told = {"z": f"{2.5 * k - 100:.6f} ", "uid": uid(k), "inclusion": inclusion} | texts
    edges = "".join(f"<edgeMap><xCoord>{column}</xCoord><yCoord>{row}</yCoord></edgeMap>" for row, column in path)
    return (
        f"<roi><imageZposition>{told['z']}</imageZposition><imageSOP_UID>{told['uid']}</imageSOP_UID>"
        f"<inclusion>{told['inclusion']}</inclusion>{edges}</roi>"
    )


def nodule(name: str, *rois: str) -> str:
    return f"<unblindedReadNodule><noduleID>{name}</noduleID>{''.join(rois)}</unblindedReadNodule>"


def box(name: str, slices: Iterable[int], top: int, left: int, height: int, width: int) -> str:
    """A nodule of height x width pixels in some slices."""
    return nodule(name, *(roi(k, ring(top, left, height, width)) for k in slices))


def non_nodule(k: int, series: str = SERIES) -> str:
    return (
        f"<nonNodule><nonNoduleID>n</nonNoduleID><imageZposition>{2.5 * k - 100}</imageZposition><imageSOP_UID>"
        f"{uid(k, series)}</imageSOP_UID><locus><xCoord>3</xCoord><yCoord>4</yCoord></locus></nonNodule>"
    )


def reading(*sessions: Sequence[str], series: str = SERIES, head: str = "") -> str:
    """A file of readings, each of which is a list of marks, in slices of the series."""
    told = "".join(
        f"<readingSession><servicingRadiologistID>anon</servicingRadiologistID>{''.join(one)}</readingSession>"
        for one in sessions
    ).replace(f"<imageSOP_UID>{SERIES}.", f"<imageSOP_UID>{series}.")
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>{head}<LidcReadMessage xmlns="http://www.nih.gov"><ResponseHeader>'
        f"<SeriesInstanceUid>{series}</SeriesInstanceUid></ResponseHeader>{told}</LidcReadMessage>"
    )


CHEST_XRAY = (
    '<IdriReadMessage xmlns="http://www.nih.gov/idri"><ResponseHeader><SeriesInstanceUID>1.9</SeriesInstanceUID>'
    "</ResponseHeader><CXRreadingSession/></IdriReadMessage>"
)

#: Four readers: a nodule that three outline, one that a single reader does; small ones; and what is none.
FOUR = (
    [box("a", (2, 3, 4), 20, 30, 6, 5), nodule("s", roi(6, [(9, 9)]))],
    [box("b", (3, 4), 21, 30, 6, 5), non_nodule(1), non_nodule(7)],
    [box("c", (3,), 20, 31, 5, 5), box("d", (5, 6), 50, 60, 3, 4)],
    [nodule("t", roi(6, [(9, 10)])), non_nodule(1)],
)


def write_xml(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def tree(root: Path, sessions: Sequence[Sequence[str]] = FOUR, **changes: Any) -> Path:
    """A patient with one scan: the folder of the series."""
    folder = write_series(root / "LIDC-IDRI-0001" / "1.2.3" / SERIES, **changes)
    write_xml(folder / "069.xml", reading(*sessions))
    return folder


# ---------------------------------------------------------------------- real readings


def named_slices(xml: Path) -> dict[str, float]:
    """The slices that a real reading names, and their z: by a pattern, and not by the package's reader."""
    pairs = re.findall(
        r"<imageZposition>\s*([-0-9.]+)\s*</imageZposition>\s*<imageSOP_UID>\s*([0-9.]+)\s*<", xml.read_text()
    )
    return {instance: float(z) for z, instance in pairs}


def series_for(root: Path, xml: Path, patient: str, spacing: str = "0.7") -> Mapping[str, float]:
    """A CT series of 512 x 512 with the slices that a real reading names, beside it."""
    (series,) = re.findall(r"<SeriesInstanceUid>([0-9.]+)<", xml.read_text())
    slices = named_slices(xml)
    folder = root / patient / "study" / series
    for k, (instance, z) in enumerate(sorted(slices.items(), key=lambda pair: -pair[1])):
        tags = dict(PatientID=patient, PixelSpacing=[spacing, spacing])
        write_slice(folder / f"1-{k + 1:03d}.dcm", instance, z, k, series, (512, 512), **tags)
    (folder / xml.name).write_bytes(xml.read_bytes())
    return slices
