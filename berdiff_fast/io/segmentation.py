# SPDX-License-Identifier: Apache-2.0
"""Masks as DICOM segmentations that refer to the series they were made from, by highdicom."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from berdiff_fast import limits
from berdiff_fast._optional import require
from berdiff_fast._version import __version__
from berdiff_fast.files import whole_file
from berdiff_fast.io import minimal
from berdiff_fast.io.slices import Slices
from berdiff_fast.io.volume import Volume


def write_segmentation(
    path: str | os.PathLike[str],
    masks: Mapping[str, np.ndarray | Slices],
    like: Volume,
    *,
    fractional: bool = False,
    description: str = "",
) -> None:
    """A DICOM segmentation that refers to the series it was made from, by highdicom.

    Args:
        path: the file.
        masks: a segment for each name: bool (S, H, W), or with ``fractional`` probabilities in [0, 1], kept in steps of
            1 / 255; or its slices, made one by one. Slices where a segment is empty are left out.
        like: a volume that was read from DICOM.
        description: what the series is called.

    Raises:
        ValueError: ``like`` is not from DICOM, or nothing is marked at all: the standard has no empty segmentation; or
            the slices that are marked would take more memory than is free.
    """
    require("highdicom")
    pydicom = require("pydicom")
    from highdicom import AlgorithmIdentificationSequence, seg
    from pydicom.sr.codedict import codes

    if not like.instances:
        raise ValueError(f"like must be a volume that was read from DICOM, got one from {like.format}")
    # Frames of one file go in the file's own order, whichever order they have in space.
    order = np.argsort(like.frames).tolist() if like.frames else [*range(len(like.array))]
    where = {name: [bool(mask[s].any()) for s in order] for name, mask in masks.items()}
    marked = {name: mask for name, mask in masks.items() if any(where[name])}
    if not marked:
        raise ValueError("masks must mark something: there is no empty DICOM segmentation")
    # Slices that no segment marks are no frames, and take no memory.
    kept = [place for place in range(len(order)) if any(where[name][place] for name in marked)]
    kind = np.dtype(np.float32 if fractional else np.uint8)
    # The writer adds a sum of 8 bytes for each voxel.
    wanted = len(kept) * math.prod(like.array.shape[1:]) * (len(marked) * kind.itemsize + 8)
    limits.room("a DICOM segmentation", wanted, "sample fewer slices or masks")
    algorithm = AlgorithmIdentificationSequence(
        name="berdiff_fast", family=codes.cid7162.ArtificialIntelligence, version=__version__
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
    sources = [pydicom.dcmread(name, stop_before_pixels=True) for name in like.instances]
    for source in sources:
        _in_utf8(source)
        for keyword in _TYPE_2:  # may be empty, but not absent; de-identified series lack some
            if keyword not in source:
                setattr(source, keyword, None)
    pixels = np.empty((len(kept), *like.array.shape[1:], len(marked)), kind)
    content = hashlib.sha256()  # of all slices
    empty = bytes(pixels[0].nbytes)
    for place, s in enumerate(order):
        if place in kept:
            frame = pixels[kept.index(place)]
            for segment, mask in enumerate(marked.values()):
                frame[..., segment] = mask[s]
            content.update(frame.data)
        else:
            content.update(empty)
    identity = (like.fingerprint(), *marked, content.hexdigest())
    images = [minimal.needed(source) for source in sources]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values in the source that a standard discourages
        file = seg.Segmentation(
            source_images=images,
            pixel_array=pixels,
            plane_positions=None if len(kept) == len(order) else _positions(images, kept),
            segmentation_type="FRACTIONAL" if fractional else "BINARY",
            segment_descriptions=segments,
            series_instance_uid=_uid(*identity, "series"),
            series_number=900,
            sop_instance_uid=_uid(*identity, "instance"),
            instance_number=1,
            manufacturer="berdiff_fast",
            manufacturer_model_name="berdiff_fast",
            software_versions=__version__,
            device_serial_number="0",
            content_description=description[:64] or None,
        )
        minimal.settle(file, sources[0])
        file.SeriesDescription = description[:64]
        with whole_file(path) as new:
            file.save_as(new)


def _positions(images: list[Any], kept: list[int]) -> list[Any]:
    """Where the slices lie that are kept. The images are told their distance, which their positions say together."""
    from highdicom import utils
    from highdicom.spatial import get_volume_positions
    from pydicom.valuerep import format_number_as_ds

    groups = images[0].get("SharedFunctionalGroupsSequence")
    positions = utils.get_plane_positions_of_image(images[0]) if groups else utils.get_plane_positions_of_series(images)
    measures = groups[0].PixelMeasuresSequence[0] if groups else images[0]
    along = groups[0].PlaneOrientationSequence[0] if groups else images[0]
    if measures.get("SpacingBetweenSlices") is None:
        places = [position[0].ImagePositionPatient for position in positions]
        spacing, _ = get_volume_positions(image_positions=places, image_orientation=along.ImageOrientationPatient)
        if spacing is not None:
            measures.SpacingBetweenSlices = format_number_as_ds(spacing)
    return [positions[place] for place in kept]


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


def _in_utf8(source: Any) -> None:
    """Text in UTF-8: names in several character sets at once, as in Japan, are more than the writer takes."""
    try:
        source.decode()
    except Exception:  # of a damaged name nothing more is known; the writer may still take it as it is
        return
    source.SpecificCharacterSet = "ISO_IR 192"


def _uid(*names: str) -> str:
    """The same for the same segments of the same scan, and another for others."""
    from pydicom.uid import generate_uid

    return generate_uid(entropy_srcs=[*names])
