# SPDX-License-Identifier: Apache-2.0
"""Contact sheets: written whole or not at all."""

from __future__ import annotations

import os
import struct
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from berdiff_fast.imaging.figures import contact_sheet, disagreement

IMAGE = torch.linspace(-1, 1, 24 * 20).view(24, 20)
SAMPLES = torch.zeros(3, 24, 20, dtype=torch.bool)
SAMPLES[:2, 8:16, 6:14] = True
SAMPLES[1, 4:8, 6:10] = True  # the third one stays empty, which has no contour
RATERS = SAMPLES[:2]


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


class TestDisagreement:
    def test_values(self) -> None:
        bits = disagreement(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64))
        quarter = 2 - 0.75 * np.log2(3)
        torch.testing.assert_close(bits, torch.tensor([0, quarter, 1, quarter, 0], dtype=torch.float64))

    def test_keeps_the_shape_and_takes_arrays(self) -> None:
        assert disagreement(np.full((2, 3), 0.5, dtype=np.float32)).tolist() == [[1.0] * 3] * 2
        assert disagreement(torch.tensor([True, False])).tolist() == [0, 0]

    @pytest.mark.parametrize("value", [-0.01, 1.01, float("nan")])
    def test_refuses_what_is_no_probability(self, value: float) -> None:
        with pytest.raises(ValueError, match="mean must hold probabilities"):
            disagreement(torch.tensor([0.5, value]))


class TestContactSheet:
    def test_one_slice(self, tmp_path: Path) -> None:
        path = tmp_path / "sheet.png"
        assert contact_sheet(path, IMAGE, SAMPLES, raters=RATERS, title="A nodule") is None
        width, height = png_size(path)
        assert width > 800
        assert height > 400
        assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]

    def test_several_slices_are_stacked(self, tmp_path: Path) -> None:
        one, three = tmp_path / "one.png", tmp_path / "three.png"
        contact_sheet(one, IMAGE[None], SAMPLES[None], raters=RATERS[None])
        contact_sheet(
            str(three),
            IMAGE.expand(3, -1, -1).double().numpy(),
            SAMPLES.expand(3, -1, -1, -1).to(torch.uint8).numpy(),
            raters=RATERS.expand(3, -1, -1, -1).float(),
            labels=["first", "second", "third"],
        )
        (width, height), (stacked_width, stacked_height) = png_size(one), png_size(three)
        assert stacked_width == width
        assert 2.8 * height < stacked_height < 3 * height

    def test_more_masks_take_more_rows_up_to_the_limit(self, tmp_path: Path) -> None:
        heights = []
        for limit in (8, 9, 16):
            path = tmp_path / f"{limit}.png"
            contact_sheet(path, IMAGE[:8, :8], SAMPLES[:1, :8, :8].expand(10, -1, -1), max_samples=limit)
            heights.append(png_size(path)[1])
        assert heights[0] < heights[1] == heights[2]

    def test_full_masks_and_flat_images(self, tmp_path: Path) -> None:
        path = tmp_path / "flat.png"
        contact_sheet(path, torch.zeros(8, 8), torch.ones(1, 8, 8, dtype=torch.bool))
        contact_sheet(path, torch.zeros(1, 9), torch.eye(9)[None, :1])
        assert png_size(path)[0] > 0

    def test_an_older_sheet_is_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "sheet.png"
        path.write_bytes(b"old")
        contact_sheet(path, IMAGE, SAMPLES)
        assert png_size(path)[0] > 0

    def test_the_same_input_gives_the_same_file(self, tmp_path: Path) -> None:
        for name in ("a.png", "b.png"):
            contact_sheet(tmp_path / name, IMAGE, SAMPLES)
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"image": IMAGE[0]}, ValueError, r"image must be \(H, W\) or \(B, H, W\)"),
            ({"image": torch.zeros(0, 4)}, ValueError, "image must be"),
            ({"image": IMAGE * float("inf")}, ValueError, "image must be finite"),
            ({"image": IMAGE + 0j}, ValueError, "image must hold real numbers"),
            ({"samples": SAMPLES[0]}, ValueError, r"samples must be \(1 or more, 24, 20\).*got \(24, 20\)"),
            ({"samples": SAMPLES[:0]}, ValueError, "samples must be"),
            ({"samples": SAMPLES.mT}, ValueError, r"samples must be .*got \(3, 20, 24\)"),
            ({"samples": SAMPLES * 0.5}, ValueError, "samples must be masks"),
            ({"image": IMAGE[None]}, ValueError, r"samples must be \(1, 1 or more, 24, 20\)"),
            ({"raters": RATERS[:, :4]}, ValueError, "raters must be"),
            ({"raters": RATERS * 2}, ValueError, "raters must be masks"),
            ({"labels": "x"}, ValueError, "labels must be a sequence of 1"),
            ({"labels": ["x", "y"]}, ValueError, "labels must be a sequence of 1"),
            ({"max_samples": 0}, ValueError, "max_samples must be at least 1, got 0"),
            ({"max_samples": 2.0}, TypeError, "max_samples must be an int, got float"),
        ],
    )
    def test_refuses_and_leaves_nothing(
        self, tmp_path: Path, change: dict, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            contact_sheet(tmp_path / "sheet.png", **{"image": IMAGE, "samples": SAMPLES, **change})
        assert list(tmp_path.iterdir()) == []

    def test_refuses_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="path must lie in an existing folder"):
            contact_sheet(tmp_path / "missing" / "sheet.png", IMAGE, SAMPLES)

    def test_failed_write_keeps_the_old_sheet(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "sheet.png"
        path.write_bytes(b"old")

        def fail(*_: object) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            contact_sheet(path, IMAGE, SAMPLES)
        assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]
        assert path.read_bytes() == b"old"

    def test_says_how_to_get_matplotlib(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match=r'pip install "berdiff_fast\[figures\]"'):
            contact_sheet(tmp_path / "sheet.png", IMAGE, SAMPLES)
        assert list(tmp_path.iterdir()) == []

    def test_pyplot_is_left_alone(self, tmp_path: Path) -> None:
        before = "matplotlib.pyplot" in sys.modules
        contact_sheet(tmp_path / "sheet.png", IMAGE, SAMPLES)
        assert ("matplotlib.pyplot" in sys.modules) == before
