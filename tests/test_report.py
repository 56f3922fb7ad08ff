# SPDX-License-Identifier: Apache-2.0
"""The HTML report: what it refuses, and what its file holds."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pages import HEIGHT, IMAGE, MASKS, RATERS, SLICES, WIDTH, N, R, data_of, decode, png, write

import berdiff_fast as bf
from berdiff_fast.imaging import encoding, tables, write_report

# ---------------------------------------------------------------------- the file


class TestFile:
    def test_holds_the_masks_and_the_windowed_image(self, tmp_path: Path) -> None:
        data = data_of(write(tmp_path, raters=RATERS))
        for s in range(SLICES):
            assert (decode(data["masks"][s], MASKS[:, s].shape) == MASKS[:, s]).all()
            assert (decode(data["raters"][s], RATERS[:, s].shape) == RATERS[:, s]).all()
            low, high = np.percentile(IMAGE, (0.5, 99.5))
            wanted = (np.clip(IMAGE[s], low, high) - low) / (high - low) * 255
            assert np.abs(png(data["images"][s]) - wanted).max() < 0.51
        rows, columns = (np.flatnonzero((MASKS.any((0, 1)) | RATERS.any((0, 1))).any(axis)) for axis in (1, 0))
        assert data["box"] == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert [file.name for file in tmp_path.iterdir()] == ["report.html"]

    @pytest.mark.parametrize("bits", ["0", "1", "01", "10", "0" * 127 + "1" * 128, "1" * 20000 + "0" * 3])
    def test_runs(self, bits: str) -> None:
        mask = np.array([bit == "1" for bit in bits])
        assert (decode(encoding.runs(mask), mask.shape) == mask).all()

    def test_window(self, tmp_path: Path) -> None:
        image = np.array([[-2000.0, -1000, 0, 200, 400, 3000]])
        data = data_of(write(tmp_path, image, np.ones((1, 1, 6)), window=(-1000, 400)))
        assert png(data["images"][0]).tolist() == [[0, 0, 182, 219, 255, 255]]

    @pytest.mark.parametrize(
        "image", [np.zeros((4, 4)), np.full((4, 4), 7, np.uint8), np.pad([[1e38]], 9), np.eye(4) > 0]
    )
    def test_images_without_contrast_and_of_any_type(self, tmp_path: Path, image: np.ndarray) -> None:
        shown = png(data_of(write(tmp_path, image, np.zeros((1, *image.shape), bool)))["images"][0])
        assert shown.dtype == np.uint8
        if image.any() and not image.all():
            assert shown.min() == 0 and shown.max() == 255

    def test_one_slice_and_volume_are_the_same(self, tmp_path: Path) -> None:
        one = write(tmp_path, IMAGE[0], MASKS[:, 0], raters=RATERS[:, 0]).read_bytes()
        assert write(tmp_path, IMAGE[:1], torch.tensor(MASKS[:, :1]), raters=RATERS[:, 0]).read_bytes() == one
        assert write(tmp_path, IMAGE[0], MASKS[:, 0].astype(np.uint8), raters=RATERS[:, :1]).read_bytes() == one

    def test_slices_far_from_any_mark_are_left_out_and_the_page_says_so(self, tmp_path: Path) -> None:
        image, masks = np.zeros((100, 8, 8)), np.zeros((2, 100, 8, 8), bool)
        raters = masks.copy()
        masks[0, 30, 2, 2] = raters[1, 41, 3, 3] = True
        path = write(tmp_path, image, masks, raters=raters)
        data = data_of(path)
        assert data["slices"] == list(range(27, 45)) and data["slices"][data["start"]] == 30
        assert len(data["images"]) == len(data["masks"]) == len(data["raters"]) == 18
        assert "Slices 27 to 44 are in this file. In the others, of 0 to 99, nobody marks anything." in path.read_text(
            "utf-8"
        )
        assert "are in this file" not in write(tmp_path).read_text("utf-8")
        # And if there is none, the middle.
        assert 40 <= len(data_of(write(tmp_path, image, masks & False))["slices"]) < 100

    def test_loads_nothing(self, tmp_path: Path) -> None:
        text = write(tmp_path, raters=RATERS, title="A", provenance={"a": 1}).read_text("utf-8")
        for reference in re.findall(
            r"""(?:src|href)\s*=\s*["']?([^"'\s>]*)|url\(([^)]*)\)""", text.partition("<script>")[0]
        ):
            assert "".join(reference).startswith("data:"), reference
        assert not re.search(r"@import|https?:|fetch\(|XMLHttpRequest|import\(", text)

    def test_the_same_input_gives_the_same_file(self, tmp_path: Path) -> None:
        assert write(tmp_path, title="x").read_bytes() == write(tmp_path, title="x").read_bytes()

    def test_agreement_is_of_the_flattened_volume(self, tmp_path: Path) -> None:
        text = write(tmp_path, raters=RATERS).read_text("utf-8")
        for name, function in (("ged", bf.metrics.generalized_energy_distance), ("hm_iou", bf.metrics.hm_iou)):
            wanted = float(function(RATERS.reshape(1, R, -1), MASKS.reshape(1, N, -1)))
            found = re.search(rf'id="{name}" data-value="([^"]*)">([^<]*)<', text)
            assert found and float(found[1]) == pytest.approx(wanted, rel=1e-12)
            assert found[2] == f"{wanted:.3f}"
        assert "Agreement with" not in write(tmp_path).read_text("utf-8")

    @pytest.mark.parametrize(
        ("spacing", "factor", "unit"),
        [(None, 1, "px"), ((0.5, 0.7), 0.35, "mm²"), ((2.0, 0.5, 0.7), 0.7, "mm³"), ((3, 2, 2), 0.012, "mL")],
    )
    def test_sizes(self, tmp_path: Path, spacing: tuple[float, ...] | None, factor: float, unit: str) -> None:
        text = write(tmp_path, raters=RATERS, spacing=spacing).read_text("utf-8")
        wanted = np.concatenate([MASKS, RATERS]).sum((1, 2, 3)) * factor
        shown = re.findall(r'<td data-value="([^"]*)">([^<]*)</td>', text)
        assert [float(value) for value, _ in shown] == pytest.approx(wanted.tolist())
        assert [float(text.replace(",", "")) for _, text in shown] == pytest.approx(wanted.tolist(), rel=5e-4)
        summary = re.sub("<.*?>", "", re.search(r'<p id="summary">(.*?)</p>', text)[1])  # type: ignore[index]
        low, median, high = np.percentile(wanted[:N], (5, 50, 95))
        numbers = [float(x.replace(",", "")) for x in re.findall(r"\d[\d,]*\.?\d*", summary)]
        raters = wanted[N:].tolist()
        assert numbers == pytest.approx([median, 5, 95, low, high, 1, N, *raters], rel=5e-4)
        assert f" {unit}" in summary

    def test_a_name_for_pixels(self, tmp_path: Path) -> None:
        assert "Volume, voxels &lt;b&gt;" in write(tmp_path, unit="voxels <b>").read_text("utf-8")

    @pytest.mark.parametrize("sizes", [[3.0], [0.0, 0.0], [0.5] * 4, [1, 2, 2, 9], list(range(100)), [1e9, 2e9]])
    def test_histogram_counts_every_sample_once(self, sizes: list[float]) -> None:
        svg, (low, low_x, high, high_x) = tables.histogram(
            np.array(sizes, float), np.array([7.0]), tables.Measure("Volume", "px", 1)
        )
        assert sum(map(int, re.findall(r'data-count="(\d+)"', svg))) == len(sizes)
        assert low < min(sizes) and max(sizes) < high and 0 <= low_x < high_x <= 420
        assert svg.count('class="rater"') == 1
        assert 2 <= len(re.findall(r'y="170"', svg)) <= 7  # ticks

    def test_colors_are_distinct(self) -> None:
        assert len({encoding.color(k) for k in range(18)}) == 18
        assert encoding.color(18) == encoding.color(0)


BAD = [
    ({"image": IMAGE[0, 0]}, ValueError, r"image must be \(S, H, W\) or \(H, W\).*got shape \(20,\)"),
    ({"image": IMAGE[:0]}, ValueError, "image must be"),
    ({"image": np.where(IMAGE > 0, np.nan, 1e39)}, ValueError, "image must be finite"),
    ({"image": torch.zeros(SLICES, HEIGHT, WIDTH, dtype=torch.complex64)}, TypeError, "image must hold real numbers"),
    ({"image": "scan.nii"}, TypeError, "image must be a torch.Tensor or a numpy.ndarray, got str"),
    ({"masks": MASKS[0]}, ValueError, r"masks must be \(1 or more, 3, 24, 20\) to fit image, got shape \(3, 24, 20\)"),
    ({"masks": MASKS[:0]}, ValueError, "masks must be"),
    ({"masks": MASKS.swapaxes(2, 3)}, ValueError, r"masks must be .*got shape \(5, 3, 20, 24\)"),
    ({"masks": MASKS * 0.5}, ValueError, "masks must be masks, bool or 0 and 1"),
    ({"masks": MASKS.tolist()}, TypeError, "masks must be a torch.Tensor"),
    ({"raters": RATERS[:, :2]}, ValueError, "raters must be"),
    ({"raters": RATERS * 2}, ValueError, "raters must be masks"),
    ({"title": 7}, TypeError, "title must be a str, got int"),
    ({"unit": None}, TypeError, "unit must be a str"),
    ({"spacing": 1.0}, ValueError, r"spacing must be \(slice, row, column\) or \(row, column\).*got 1.0"),
    ({"spacing": (1, 0)}, ValueError, "spacing must be"),
    ({"spacing": (1, 1, 1, 1)}, ValueError, "spacing must be"),
    ({"spacing": (1, float("nan"))}, ValueError, "spacing must be"),
    ({"window": (3, 3)}, ValueError, r"window must be \(low, high\)"),
    ({"provenance": [1]}, TypeError, "provenance must be a dict"),
    ({"provenance": {1: 2}}, TypeError, "provenance must be a dict"),
    ({"provenance": {"a": np.float32(1)}}, TypeError, "provenance must hold values that JSON can"),
    ({"max_bytes": 0}, ValueError, "max_bytes must be at least 1"),
    ({"max_bytes": 1e6}, TypeError, "max_bytes must be an int"),
    ({"max_bytes": 9999}, ValueError, r"max_bytes is 9999, and the report .* would take \d{5}"),
]


class TestRefusals:
    @pytest.mark.parametrize(("change", "error", "message"), BAD)
    def test_names_the_argument_and_leaves_nothing(
        self, tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            write_report(tmp_path / "report.html", **{"image": IMAGE, "masks": MASKS, **change})
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="path must lie in an existing folder"):
            write_report(tmp_path / "missing" / "report.html", IMAGE, MASKS)

    def test_a_failed_write_keeps_the_old_report(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "report.html"
        path.write_text("old")

        def fail(*_: object) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write_report(path, IMAGE, MASKS)
        assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
        assert path.read_text() == "old"
