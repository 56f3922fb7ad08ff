# SPDX-License-Identifier: Apache-2.0
"""Masks as DICOM segmentations that refer to the series they were made from, by highdicom."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

import berdiff_fast
from berdiff_fast._optional import require
from berdiff_fast.files import whole_file
from berdiff_fast.io import minimal
from berdiff_fast.io.volume import Volume


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
        _in_utf8(source)
        for keyword in _TYPE_2:  # may be empty, but not absent; de-identified series lack some
            if keyword not in source:
                setattr(source, keyword, None)
    # Frames of one file go in the file's own order, whichever order they have in space.
    order = np.argsort(like.frames) if like.frames else slice(None)
    pixels_ = np.stack([*marked.values()], axis=-1)[order].astype(np.float32 if fractional else np.uint8)
    content = hashlib.sha256(pixels_.tobytes()).hexdigest()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values in the source that a standard discourages
        file = seg.Segmentation(
            source_images=[minimal.needed(source) for source in sources],
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
        minimal.settle(file, sources[0])
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


def _in_utf8(source: Any) -> None:
    """Text in UTF-8: names in several character sets at once, as in Japan, are more than the writer takes."""
    try:
        source.decode()
    except Exception:  # of a damaged name nothing more is known; the writer may still take it as it is
        return
    source.SpecificCharacterSet = "ISO_IR 192"


def _uid(like: Volume, *names: str) -> str:
    """The same for the same segments of the same scan, and another for others."""
    from pydicom.uid import generate_uid

    return generate_uid(entropy_srcs=[like.fingerprint(), *names])
