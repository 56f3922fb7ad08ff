# SPDX-License-Identifier: Apache-2.0
"""Images with several raters each: made up (``phantom``), in files (``hdf5``), as training sees them (``examples``)."""

from berdiff_fast.data import importers, phantom

__all__ = ["importers", "phantom"]
