# SPDX-License-Identifier: Apache-2.0
"""Scans in files: voxels with their place in the patient, read, checked, and written back on the same grid.

``berdiff_fast.io`` does it, a module per format. Pictures, NumPy and HDF5 files need no extra; NIfTI, NRRD, MetaImage
and DICOM want ``pip install "berdiff_fast[imaging]"``.
"""

from berdiff_fast._optional import require
from berdiff_fast.io.formats import FORMATS, read, write
from berdiff_fast.io.segmentation import write_segmentation
from berdiff_fast.io.volume import PLANES, Volume

__all__ = ["FORMATS", "PLANES", "Volume", "read", "require", "write", "write_segmentation"]
