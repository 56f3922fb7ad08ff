# SPDX-License-Identifier: Apache-2.0
"""What a DICOM object made of others may repeat of them: what the standard asks for, and nothing else.

The library that writes segmentations copies all that the source says of patient and study (comments, diagnoses, ages,
other numbers, institutions) and stamps them with the time. Here it gets sources that say only what it needs, and what
it adds of its own accord is taken out again, so that equal segmentations are equal files.
"""

from __future__ import annotations

from typing import Any

#: Of patient and study: present in every object, perhaps empty (type 2), or asked for under conditions (animals).
PATIENT_AND_STUDY = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "StudyInstanceUID",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
    "PatientSpeciesDescription",
    "PatientSpeciesCodeSequence",
    "PatientBreedDescription",
    "PatientBreedCodeSequence",
    "BreedRegistrationSequence",
)

#: What a reference to a slice is made of, and where the slice lies.
_IMAGE = (
    "SpecificCharacterSet",
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "PositionReferenceIndicator",
    "Modality",
    "ImageType",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "PixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
    "ImageOrientationPatient",
    "ImagePositionPatient",
)

#: Of the frames of an enhanced file, the same.
_FRAMES = ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence", "FrameContentSequence")

#: What the library adds that the standard does not ask for: times, and the source's scanner and hospital.
_ADDED = ("InstanceCreationDate", "InstanceCreationTime", "InstanceCreatorUID", "ContributingEquipmentSequence")


def needed(source: Any) -> Any:
    """A pydicom data set with only what a segmentation of it refers to or repeats."""
    from pydicom.dataset import Dataset

    kept = Dataset()
    for keyword in (*PATIENT_AND_STUDY, *_IMAGE):
        if keyword in source:
            kept[keyword] = source[keyword]
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        if keyword in source:
            items = [Dataset() for _ in source[keyword].value]
            for item, full in zip(items, source[keyword].value, strict=True):
                for name in _FRAMES:
                    if name in full:
                        item[name] = full[name]
            setattr(kept, keyword, items)
    for name in ("preamble", "file_meta"):
        if hasattr(source, name):
            setattr(kept, name, getattr(source, name))
    if "PatientSpeciesDescription" in kept or "PatientSpeciesCodeSequence" in kept:
        kept.ResponsiblePerson = None  # asked for in animals, and may be empty
    return kept


def settle(file: Any, source: Any) -> None:
    """Take out of a new object what nobody asked for, and put what the library drew or looked at a clock for in order.

    Args:
        file: the object, which is changed.
        source: an image that it was made from, as it was read: content date and time become its own, since the object
            shows what was there then.
    """
    from pydicom.uid import generate_uid

    for keyword in _ADDED:
        if keyword in file:
            del file[keyword]
    for date, time in (("ContentDate", "ContentTime"), ("SeriesDate", "SeriesTime"), ("StudyDate", "StudyTime")):
        if source.get(date):
            file.ContentDate, file.ContentTime = source[date].value, source.get(time) or "000000"
            break
    else:
        file.ContentDate, file.ContentTime = "19700101", "000000"
    dimensions = generate_uid(entropy_srcs=[str(file.SOPInstanceUID), "dimensions"])
    for item in (*file.get("DimensionOrganizationSequence", ()), *file.get("DimensionIndexSequence", ())):
        if "DimensionOrganizationUID" in item:
            item.DimensionOrganizationUID = dimensions
