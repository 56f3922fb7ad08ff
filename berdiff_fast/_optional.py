# SPDX-License-Identifier: Apache-2.0
"""Packages that only some parts need."""

from __future__ import annotations

import importlib
import warnings
from typing import Any


def require(package: str, extra: str = "imaging") -> Any:
    """An optional package, imported.

    Args:
        package: its name in an import.
        extra: what of this package's extras brings it.

    Raises:
        ImportError: it is not installed; the message says how it is.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f'{package} is needed for this, and missing: pip install "berdiff_fast[{extra}]"') from error
