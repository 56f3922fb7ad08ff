# SPDX-License-Identifier: Apache-2.0
"""Scans in HDF5 files: the data set ``image``, where it lies in the file itself."""

from __future__ import annotations

from pathlib import Path

from berdiff_fast.io import claims
from berdiff_fast.io.volume import Format, Volume


def _read(path: Path, series: str | None) -> Volume:
    # Here, since every import of the package comes by this file.
    import h5py

    from berdiff_fast.io import contained

    with h5py.File(path, "r") as file:
        found = contained.dataset(file, "image")
        if found is None:
            if "image" in file.keys():  # noqa: SIM118 - `in file` would follow a link
                raise ValueError("cannot be read: 'image' is no data set")
            raise ValueError(f"must have a dataset 'image', got {sorted(file)}")
        claims.check_voxels(found.shape, found.dtype.itemsize)
        array = contained.whole(found)
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return Volume(array[None] if array.ndim == 2 else array, format="hdf5", path=path, placed=False)


FORMAT = Format("hdf5", (".h5", ".hdf5"), _read)
