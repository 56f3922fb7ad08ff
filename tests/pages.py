# SPDX-License-Identifier: Apache-2.0
"""Reports made for tests, and what is read of their files and in a browser."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from berdiff_fast.imaging import write_report

#: Opens a report in a browser: the fixture ``show``.
Open = Callable[..., Any]

SLICES, HEIGHT, WIDTH, N, R = 3, 24, 20, 5, 2
LAYERS = ("contours", "sample", "mean", "disagreement", "raters")


def blobs(count: int, seed: int, slices: int = SLICES) -> np.ndarray:
    """(count, slices, H, W) masks with ragged borders, holes, and pixels that touch at a corner."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, slices, HEIGHT, WIDTH), bool)
    masks[:, :, 6:16, 5:14] = True
    masks[:, :, 4:18, 3:16] ^= rng.random((count, slices, 14, 13)) < 0.25
    return masks


IMAGE = np.random.default_rng(0).normal(-500, 200, (SLICES, HEIGHT, WIDTH)).astype(np.float32)
MASKS, RATERS = blobs(N, 1), blobs(R, 2)
MASKS[-1] = False  # one that marks nothing


def data_of(path: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"))
    assert found
    return json.loads(found[1])


def decode(text: str, shape: tuple[int, ...]) -> np.ndarray:
    """Masks from runs, written from the docstring of ``_runs``."""
    lengths, value, shift = [], 0, 0
    for byte in base64.b64decode(text):
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            lengths.append(value)
            value, shift = 0, 0
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(shape)


def png(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def write(folder: Path, image: Any = IMAGE, masks: Any = MASKS, **options: Any) -> Path:
    path = folder / "report.html"
    assert write_report(path, image, masks, **options) is None
    return path


def settled(page: Any) -> None:
    """Wait for the picture to be of the slice, sample and layers that the controls say."""
    page.wait_for_function(
        """(names) => {
            const at = (id) => document.getElementById(id);
            const layers = names.filter((name) => at(`layer-${name}`).checked);
            const [slice, sample] = ["slice", "sample"].map((name) => at(`${name}-value`).textContent.split(" ")[0]);
            return at("canvas").dataset.shows === [slice, sample, ...layers].join(" ");
        }""",
        arg=LAYERS,
    )
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def press(page: Any, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)
    settled(page)


def layers(page: Any, *names: str) -> None:
    for name in LAYERS:
        box = page.locator(f"#layer-{name}")
        if box.is_visible():  # there may be no raters
            box.set_checked(name in names)
    settled(page)


def slide(page: Any, name: str, value: int) -> None:
    page.locator(f"#{name}").fill(str(value))
    settled(page)


def colors(page: Any, down: float = 0.5, right: float = 0.5, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """(H, W, 3): of the canvas, at this place within every pixel of the whole slice."""
    uri = page.evaluate("document.getElementById('canvas').toDataURL()")
    drawn = png(uri)[..., :3]
    rows = ((np.arange(height) + down) / height * drawn.shape[0]).astype(int)
    columns = ((np.arange(width) + right) / width * drawn.shape[1]).astype(int)
    return drawn[rows.clip(max=len(drawn) - 1)][:, columns.clip(max=drawn.shape[1] - 1)]


def rgb(color: str) -> list[int]:
    return list(bytes.fromhex(color[1:]))


def status(page: Any) -> str:
    return page.locator("#status").inner_text()
