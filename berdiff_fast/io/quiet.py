# SPDX-License-Identifier: Apache-2.0
"""What libraries say, in one line or not at all."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def line(error: BaseException) -> str:
    """What an error says, in one line; of SimpleITK's, what comes after the place in its sources."""
    words = str(error) or type(error).__name__
    for mark in ("ERROR: ", "Error: "):
        words = words.rsplit(mark, 1)[-1]
    return " ".join(words.split())[:300]


@contextmanager
def without_stderr() -> Iterator[None]:
    """Without what C libraries print to stderr: their errors come as exceptions too."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def without_chatter() -> Iterator[None]:
    """Without the warnings of libraries about what they are fed: our own say, in one line, what is odd with a file."""
    loggers = [logging.getLogger(name) for name in ("tifffile", "pydicom", "nibabel", "PIL")]
    before = [(one.disabled, one.propagate) for one in loggers]
    nowhere = logging.NullHandler()  # for loggers below them, such as PIL.TiffImagePlugin
    for one in loggers:
        one.disabled, one.propagate = True, False
        one.addHandler(nowhere)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, (disabled, propagate) in zip(loggers, before, strict=True):
            one.disabled, one.propagate = disabled, propagate
            one.removeHandler(nowhere)
