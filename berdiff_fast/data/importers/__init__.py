# SPDX-License-Identifier: Apache-2.0
"""Importers: from trees of files to HDF5 files for training, validation and test, split by patient.

A slice is read, checked and written before the next one, so memory does not grow with the pictures. Everything is
written into a folder beside the output that takes the output's name at the very end: whole or not at all. A layout is a
file of its own, which lists the slices of a tree that looks like it (``trees.Layout``).
"""

from berdiff_fast.data.importers.report import FORMAT, Report
from berdiff_fast.data.importers.splits import split_of
from berdiff_fast.data.importers.tcia_import import import_tcia
from berdiff_fast.data.importers.tree_import import import_tree
from berdiff_fast.data.importers.trees import Problem
from berdiff_fast.data.importers.volume_import import import_volumes
from berdiff_fast.data.importers.writing import SplitReport

__all__ = ["FORMAT", "Problem", "Report", "SplitReport", "import_tcia", "import_tree", "import_volumes", "split_of"]
