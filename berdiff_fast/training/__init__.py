# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation: ``config``, ``loop``, ``checkpoints``, ``records``, ``evaluate``; the extra ``[train]``."""

from __future__ import annotations


def require() -> None:
    """Raise an ImportError that tells how to install what training needs, where it is missing."""
    try:
        import accelerate  # noqa: F401
        import yaml  # noqa: F401
    except ImportError as error:
        raise ImportError(f'training and evaluation need {error.name}: pip install "berdiff_fast[train]"') from error
