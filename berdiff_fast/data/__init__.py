# SPDX-License-Identifier: Apache-2.0
"""Images with several raters each: six real ones (``lidc``), made up (``phantom``), in files (``hdf5``), and as
training sees them (``examples``)."""

from berdiff_fast.data import importers, lidc, phantom

__all__ = ["importers", "lidc", "phantom"]
