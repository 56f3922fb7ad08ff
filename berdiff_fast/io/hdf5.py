# SPDX-License-Identifier: Apache-2.0
"""Data sets of an HDF5 file that are in that file: not in another one, wherever it may be.

HDF5 can keep the bytes of a data set in any file (external storage), link to a data set of another file, or compose one
of parts of others. A file from a stranger would then read what its reader may read, and nobody else.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from berdiff_fast.io import limits
from berdiff_fast.io.volume import Format, Volume

_SMALL = 64 * 2**20


def own_dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """A data set of the file itself, and of a size that the file can hold.

    Raises:
        KeyError: there is none of the name.
        ValueError: it lies in another file, or claims far more than is there.
    """
    _check_links(file, name)
    found = file[name]
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"cannot be read: {name!r} is a group, not a data set")
    elsewhere = "parts of other files" if found.is_virtual else "another file" if found.external else None
    if elsewhere:
        raise ValueError(f"its data set {name!r} is kept in {elsewhere}, which is not read; copy it into this one")
    size = int(np.prod(found.shape, dtype=object)) * found.dtype.itemsize if found.shape else 0
    if size > max(_SMALL, 1.1 * limits.DEFLATE * found.id.get_storage_size()):
        raise ValueError(
            f"its data set {name!r} claims {size >> 20} MB, of which {found.id.get_storage_size()} bytes are there"
        )
    return found


def _check_links(file: h5py.File, name: str, depth: int = 0) -> None:
    """Follow links as HDF5 does, and stop where one leaves the file."""
    if depth > 16:
        raise ValueError(f"cannot be read: the links of {name!r} go in circles")
    where = ""
    for part in [part for part in name.split("/") if part not in ("", ".")]:
        where = f"{where}/{part}"
        link = file.get(where, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            raise ValueError(f"its data set {name!r} is a link to another file, which is not followed")
        if isinstance(link, h5py.SoftLink):
            target = link.path if link.path.startswith("/") else f"{where.rpartition('/')[0]}/{link.path}"
            _check_links(file, target, depth + 1)


def _read(path: Path, series: str | None) -> Volume:
    with h5py.File(path, "r") as file:
        if "image" not in file.keys():  # noqa: SIM118 - `in file` would follow the link
            raise ValueError(f"must have a dataset 'image', got {sorted(file)}")
        dataset = own_dataset(file, "image")
        limits.check_voxels(dataset.shape, dataset.dtype.itemsize)
        array = dataset[()]
    return Volume(array[None] if array.ndim == 2 else array, format="hdf5", path=path, placed=False)


FORMAT = Format("hdf5", (".h5", ".hdf5"), _read)
