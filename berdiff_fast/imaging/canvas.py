# SPDX-License-Identifier: Apache-2.0
"""What all pictures share: colours, figures without a global state, files that are written whole."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from berdiff_fast._optional import require
from berdiff_fast.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's orange and sky blue: told apart with every common colour vision deficiency.
RATER, SAMPLE = "#E69F00", "#56B4E9"
INK = "#222222"


def require_matplotlib() -> None:
    """Raise an ImportError that tells how to install matplotlib where it is missing."""
    require("matplotlib.figure", "figures")


def target(path: str | os.PathLike[str] | None) -> Path | None:
    """Where to write; also says what is missing, before any work."""
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(f"path must lie in an existing folder, got {path}")
    require_matplotlib()
    return None if path is None else Path(path)


def figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")


def done(figure: Figure, target: Path | None) -> Figure:
    if target is not None:
        write(figure, target, target.suffix[1:] or "png")
    return figure


def write(figure: Figure, path: Path, form: str) -> None:
    file = io.BytesIO()
    figure.savefig(file, format=form)
    write_bytes(path, file.getvalue())


def quiet(axes: Axes) -> None:
    axes.tick_params(labelsize=7, length=2, colors=INK)
