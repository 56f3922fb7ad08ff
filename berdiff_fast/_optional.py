# SPDX-License-Identifier: Apache-2.0
"""Packages that only some parts need."""

from __future__ import annotations

import importlib
import warnings
from typing import Any


def require(package: str, extra: str | None = "imaging") -> Any:
    """An optional package, imported.

    Args:
        package: its name in an import.
        extra: what of this package's extras brings it; None: none does, and it is installed by its name.

    Raises:
        ImportError: it is not installed; the message says how it is.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(package)
    except ImportError as error:
        wanted = package if extra is None else f'"berdiff_fast[{extra}]"'
        raise ImportError(f"{package} is needed for this, and missing: pip install {wanted}") from error
