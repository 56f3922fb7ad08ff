# SPDX-License-Identifier: Apache-2.0
"""The version of the package as installed."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("berdiff_fast")
except PackageNotFoundError:  # the sources are imported without having been installed
    __version__ = "0+unknown"
