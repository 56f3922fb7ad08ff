# SPDX-License-Identifier: Apache-2.0
"""HDF5 files of slices written anew, so that reading one slice unpacks no other."""

from __future__ import annotations

import math
import os
from pathlib import Path

import h5py

from berdiff_fast import limits
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.files import whole_file
from berdiff_fast.io import contained

#: Data sets that are read slice by slice.
_BY_SLICE = ("image", "mask")


def rechunk(path: str | os.PathLike[str], output: str | os.PathLike[str]) -> Path:
    """Write an HDF5 file of slices anew, with a chunk a slice and compressed by gzip, as ``berdiff-fast import`` does.

    All else in the file is copied as it is. Memory is bounded by the file's own chunks.

    Args:
        path: a file that ``RaterDataset`` reads.
        output: the new file.

    Returns:
        ``output``.

    Raises:
        FileNotFoundError: there is no such file.
        FileExistsError: ``output`` is there already; nothing is replaced.
        ValueError: the file is not HDF5, or no file of slices; ``output`` is not there then.
    """
    path, output = Path(path), Path(output)
    RaterDataset(path)  # which judges it
    if output.exists():
        raise FileExistsError(f"output: {output} is there already; give another name, or remove it")
    with h5py.File(path, "r") as source, whole_file(output) as new, h5py.File(new, "w") as target:
        target.attrs.update(source.attrs)
        for name in source:
            with contained.reading(path, name):
                found = contained.dataset(source, name) if name in _BY_SLICE else None
                if found is None:
                    source.copy(name, target)
                    continue
                step = found.chunks[0] if found.chunks else 1
                limits.room(f"slices of {name!r} at a time", step * math.prod(found.shape[1:]) * found.dtype.itemsize)
                shape = (1, *found.shape[1:])
                made = target.create_dataset(name, found.shape, found.dtype, chunks=shape, compression="gzip")
                made.attrs.update(found.attrs)
                for first in range(0, len(found), step):
                    made[first : first + step] = found[first : first + step]
    return output
