# SPDX-License-Identifier: Apache-2.0
"""Masks for three slices of a scan, on the scan's own grid, with a report to look at. Needs the extra `imaging`.

    python examples/scan.py [SCAN] [FOLDER]

Without a scan it makes a small one, as NIfTI. The command line does the same:

    berdiff-fast sample scan.nii.gz --model lidc --center 64 64 --slices 1 4 --n 8 --seed 7 --report --output FOLDER
"""

import sys
from pathlib import Path

import nibabel as nib
import numpy as np

import berdiff_fast as bf
from berdiff_fast.cli import main

scan = Path(sys.argv[1] if len(sys.argv) > 1 else "scan.nii.gz")
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "masks")
if not scan.exists():
    slices = bf.data.phantom.generate(5, 128, field=128).images[:, 0].numpy()
    # NIfTI's first axis runs to the patient's left or right, a picture's rows run to the back: hence the transpose.
    voxels = (slices.transpose(2, 1, 0) * 700 - 300).astype(np.int16)  # roughly Hounsfield units
    nib.save(nib.Nifti1Image(voxels, np.diag([-0.7, -0.7, 2.5, 1.0])), scan)

options = "--model lidc --center 64 64 --slices 1 4 --n 8 --seed 7 --report"
status = main(["sample", str(scan), *options.split(), "--output", str(folder)])
if status == 0:
    print("\n".join(sorted(path.name for path in folder.iterdir())))
sys.exit(status)
