# SPDX-License-Identifier: Apache-2.0
"""Damage to DICOM and HDF5 by the libraries that write them: sound files that say what nobody expects."""

from __future__ import annotations

import io
import random
import warnings
from typing import Any

import numpy as np

from fuzzing.mutate import NUMBERS, WORDS, any_bytes


def dicom_elements(data: bytes, rng: random.Random) -> bytes:
    """Elements, of nested items too: taken away, emptied, given other values, items doubled or gone, other syntaxes."""
    import pydicom

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            file = pydicom.dcmread(io.BytesIO(data))
            for _ in range(rng.choice([1, 1, 1, 2, 3])):
                _change(file, rng)
            memory = io.BytesIO()
            file.save_as(memory)
            return memory.getvalue()
        except Exception:  # the writer refuses some of what is asked of it
            return any_bytes(data, rng, 1000)


def _change(file: Any, rng: random.Random) -> None:
    from pydicom.uid import (
        JPEG2000,
        DeflatedExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        JPEGBaseline8Bit,
        JPEGLSLossless,
        RLELossless,
    )

    places: list[Any] = []

    def collect(dataset: Any) -> None:
        for element in dataset:
            places.append((dataset, element))
            if element.VR == "SQ":
                for item in element.value:
                    collect(item)

    collect(file)
    dataset, element = rng.choice(places)
    kind = rng.random()
    if kind < 0.12:
        del dataset[element.tag]
    elif kind < 0.18:
        syntaxes = (DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000, JPEGBaseline8Bit, JPEGLSLossless)
        file.file_meta.TransferSyntaxUID = rng.choice([*syntaxes, RLELossless, "1.2.3", ""])
    elif kind < 0.24:
        file.SOPClassUID = rng.choice([f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("2", "2.1", "66.4", "481.3", "7")])
    elif kind < 0.3:
        name, values = rng.choice(
            [
                ("PhotometricInterpretation", ["MONOCHROME1", "RGB", "PALETTE COLOR", ""]),
                ("PixelPaddingValue", [0, 65535, 24]),
                ("NumberOfFrames", [0, 2, 4, 10**6, -1]),
                ("RescaleSlope", ["0", "-1", "1e30", "1e-30", ""]),
                ("BitsAllocated", [1, 8, 16, 32, 64, 0, 12]),
                ("SamplesPerPixel", [0, 3, 4]),
                ("PixelRepresentation", [1, 2]),
                ("SpecificCharacterSet", ["ISO_IR 192", "ISO 2022 IR 87", "nonsense"]),
                ("SegmentationType", ["BINARY", "FRACTIONAL", "LABELMAP", ""]),
            ]
        )
        setattr(dataset if rng.random() < 0.3 else file, name, rng.choice(values))
    elif element.VR == "SQ":
        items = list(element.value)
        which = rng.choice(["none", "double", "drop"])
        element.value = [] if which == "none" else items + items[-1:] if which == "double" else items[1:]
    elif element.VR in ("OB", "OW", "OB or OW"):
        element.value = any_bytes(bytes(element.value), rng)
    elif element.VR in ("US", "SS", "UL", "SL"):
        bits = 16 if element.VR in ("US", "SS") else 32
        value = rng.choice([*NUMBERS, rng.randrange(20)])
        element.value = value % (1 << bits) - (1 << bits - 1 if element.VR[0] == "S" else 0)
    elif element.VR in ("DS", "IS", "FD", "FL"):
        values = list(element.value) if element.VM > 1 else [element.value]
        new = rng.choice([0, -1, 1e-30, 1e30, 2, 1000, 0.5])
        if element.VR == "IS":
            new = int(new)
        if rng.random() < 0.3:
            values = values[:-1] if rng.random() < 0.5 else [*values, new]
        elif values:
            values[rng.randrange(len(values))] = new
        element.value = values[0] if len(values) == 1 else values
    else:
        element.value = rng.choice([*WORDS, "1.2.3", "CT", None])


def hdf5_objects(data: bytes, rng: random.Random) -> bytes:
    """Data sets of other kinds, shapes and places under the names that are looked for."""
    import h5py

    memory = io.BytesIO(data)
    try:
        with h5py.File(memory, "r+") as file:
            for _ in range(rng.choice([1, 1, 2])):
                _exchange(file, rng.choice(["image", "mask", "patient_id", "nodule", "slice"]), rng)
    except Exception:  # the library refuses some of what is asked of it
        return any_bytes(data, rng, 4000)
    return memory.getvalue()


def _exchange(file: Any, name: str, rng: random.Random) -> None:
    import h5py

    old = file.get(name)
    shape = old.shape if isinstance(old, h5py.Dataset) else (3, 12, 12)
    if name in file:
        del file[name]
    kind = rng.choice(
        ["type", "type", "shape", "shape", "huge", "link", "group", "outside", "values", "scalar", "attribute"]
    )
    if kind == "type":
        types = [
            "f4",
            "f8",
            "i1",
            ">u2",
            ">f8",
            "c8",
            "S5",
            "bool",
            "f2",
            "u8",
            np.dtype([("a", "i4")]),
            h5py.string_dtype(),
        ]
        types += [h5py.vlen_dtype(np.int32), h5py.enum_dtype({"a": 0, "b": 1}, "i1"), h5py.ref_dtype, "V7"]
        file.create_dataset(name, shape, rng.choice(types))
    elif kind == "shape":
        shape = rng.choice(
            [(), (0,), (3,), (3, 0, 12), (3, 12), (3, 1, 12, 12), (3, 2, 1, 12, 12), (4, 12, 12), (1,) * 9]
        )
        file.create_dataset(name, shape, "u1")
    elif kind == "huge":
        shape = rng.choice([(2**40,), (3, 2**20, 2**20), (2**31, 12, 12), (3, 2, 2**16, 2**16), (3, 2**31, 1)])
        chunks = rng.choice([None, tuple(min(n, 64) for n in shape), tuple(min(n, 2**10) for n in shape)])
        packed = rng.choice([None, "gzip"]) if chunks else None
        file.create_dataset(name, shape, rng.choice(["u1", "f8"]), chunks=chunks, compression=packed)
    elif kind == "link":
        links = [h5py.SoftLink("/nowhere"), h5py.SoftLink(f"/{name}"), h5py.SoftLink("/slice"), h5py.SoftLink("/")]
        file[name] = rng.choice(
            [*links, h5py.ExternalLink("other.h5", "/image"), h5py.ExternalLink("/etc/passwd", "/")]
        )
    elif kind == "group":
        file.create_group(name)
    elif kind == "outside":
        if rng.random() < 0.5:
            file.create_dataset(name, shape, "u1", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])
        else:
            layout = h5py.VirtualLayout(shape, "u1")
            layout[...] = h5py.VirtualSource("other.h5", "image", shape)
            file.create_virtual_dataset(name, layout)
    elif kind == "values":
        values = [np.nan, np.inf, 2, -1, 1e30]
        file[name] = np.full(shape, rng.choice(values), rng.choice(["f4", "f8"]))
    elif kind == "scalar":
        file[name] = rng.choice([h5py.Empty("f4"), "text", 3])
    else:
        file.create_dataset(name, shape, "u1")
        file.attrs["source"] = rng.choice(["cimd", 3, [1, 2], h5py.Empty("f4"), "x" * 10000])
