# SPDX-License-Identifier: Apache-2.0
"""Images with several raters each."""

from berdiff_fast.data import importers, phantom

__all__ = ["importers", "phantom"]
