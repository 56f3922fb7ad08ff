# SPDX-License-Identifier: Apache-2.0
"""The HTML report: what it refuses, what its file holds, and what a browser makes of it."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import berdiff_fast as bf
from berdiff_fast.imaging import report, tables, write_report

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
        assert (decode(report._runs(mask), mask.shape) == mask).all()

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
        assert data["slices"] == list(range(28, 46)) and data["slices"][data["start"]] == 31
        assert len(data["images"]) == len(data["masks"]) == len(data["raters"]) == 18
        assert "Slices 28 to 45 of 100 are in this file" in path.read_text("utf-8")
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
        assert len({report._color(k) for k in range(18)}) == 18
        assert report._color(18) == report._color(0)


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


# ---------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"there is none of {', '.join(names)}")
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"] if root else [])
        yield chromium
        chromium.close()


Open = Callable[..., Any]


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Write a report and open it; whatever the page complains of or asks for fails the test at its end."""
    complaints: list[str] = []
    contexts = []

    def opened(image: Any = IMAGE, masks: Any = MASKS, *, context: dict[str, Any] | None = None, **options: Any) -> Any:
        path = write(tmp_path, image, masks, **options)
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **(context or {})}))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda r: r.url != path.as_uri() and complaints.append(f"request: {r.url[:100]}"))
        page.goto(path.as_uri())
        if (context or {}).get("java_script_enabled", True):
            page.wait_for_function("() => document.getElementById('canvas').dataset.shows")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


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


class TestPictures:
    def test_a_sample_is_filled_where_its_mask_is(self, show: Open) -> None:
        page = show()
        page.locator("#smooth").click()
        slide(page, "opacity", 100)
        slide(page, "slice", 2)
        slide(page, "sample", 3)
        layers(page, "sample")
        filled = colors(page)
        mask, color = MASKS[3, 2], rgb(report._color(3))
        assert (filled[mask] == color).all()
        shown = report._window(IMAGE, None)[2]
        assert (filled[~mask] == shown[~mask][:, None]).all()
        layers(page)
        assert (colors(page) == shown[..., None]).all()

    def test_contours_run_along_pixel_edges(self, show: Open) -> None:
        page = show(IMAGE[0], MASKS[:1, 0])
        page.locator("#smooth").click()
        layers(page, "contours")
        mask, color = MASKS[0, 0], np.array(rgb(report._color(0)))
        assert (colors(page) == report._window(IMAGE[:1], None)[0][..., None]).all()  # centres are free
        edge = mask[:, 1:] != mask[:, :-1]
        on_edge = (colors(page, right=1.0)[:, :-1] == color).all(-1)
        assert edge.any() and (on_edge == edge).all()
        edge = mask[1:] != mask[:-1]
        on_edge = (colors(page, down=1.0)[:-1] == color).all(-1)
        assert edge.any() and (on_edge == edge).all()

    def test_maps_have_the_colours_of_the_legend(self, show: Open) -> None:
        masks = np.zeros((4, HEIGHT, WIDTH), bool)
        for k in range(4):
            masks[k, :, : 4 * (k + 1)] = True  # 4, 3, 2, 1, 0 of 4 in columns of 4
        page = show(IMAGE[0], masks)
        page.locator("#smooth").click()
        slide(page, "opacity", 100)
        layers(page, "mean")
        shares = colors(page)
        stops = [rgb(color) for color in report._RAMPS["mean"]]
        for column, stop in zip((0, 4, 8, 12), (4, 3, 2, 1), strict=True):
            assert (shares[:, column] == stops[stop]).all()
        shown = report._window(IMAGE[:1], None)[0]
        assert (shares[:, 16:] == shown[:, 16:, None]).all()
        layers(page, "disagreement")
        bits = colors(page)
        stops = [rgb(color) for color in report._RAMPS["disagreement"]]
        at = 4 * (2 - 0.75 * np.log2(3))  # of 1/4, between the third and fourth stop
        quarter = np.array(stops[3]) + (at - 3) * (np.array(stops[4]) - stops[3])
        assert (bits[:, 8] == stops[4]).all() and (bits[:, 0] == shown[:, 0, None]).all()
        assert np.abs(bits[:, 4] - quarter).max() <= 1 and (bits[:, 4] == bits[0, 12]).all()

    def test_the_white_line_surrounds_what_more_than_half_mark(self, show: Open) -> None:
        masks = np.zeros((4, HEIGHT, WIDTH), bool)
        for k in range(4):
            masks[k, :, : 4 * (k + 1)] = True
        page = show(IMAGE[0], masks)
        layers(page, "contours")
        white = (colors(page, right=1.0)[1:-1] == 255).all((0, 2))
        assert np.flatnonzero(white).tolist() == [7]  # three of four on its left, two on its right

    def test_every_layer_changes_the_picture(self, show: Open) -> None:
        page = show(raters=RATERS)
        pictures = []
        for names in [(), *((name,) for name in LAYERS)]:
            layers(page, *names)
            pictures.append(page.evaluate("document.getElementById('canvas').toDataURL()"))
        assert len(set(pictures)) == 6

    def test_zoom_shows_what_is_marked(self, show: Open) -> None:
        masks = np.zeros((1, HEIGHT, WIDTH), bool)
        masks[0, 10:13, 8:11] = True
        page = show(IMAGE[0], masks)
        slide(page, "opacity", 100)
        layers(page, "sample")

        def share() -> float:
            return float((colors(page, height=200, width=200) == rgb(report._color(0))).all(-1).mean())

        assert share() == pytest.approx(9 / (HEIGHT * WIDTH), rel=0.1)
        press(page, "z")
        assert page.locator("#zoom").get_attribute("aria-pressed") == "true"
        assert 4 * 9 / (HEIGHT * WIDTH) < share() < 0.6
        press(page, "z")
        assert share() == pytest.approx(9 / (HEIGHT * WIDTH), rel=0.1)

    def test_pixels_keep_their_proportions(self, show: Open) -> None:
        box = show(spacing=(5, 1.2, 0.8)).locator("#canvas").bounding_box()
        assert box["width"] / box["height"] == pytest.approx(WIDTH * 0.8 / (HEIGHT * 1.2), rel=0.01)

    def test_areas_in_words(self, show: Open) -> None:
        page = show(spacing=(1.23, 3.21))
        pixels = MASKS[0, int(MASKS.sum((0, 2, 3)).argmax())].sum()
        assert f"sample 1 of 5: {pixels * 1.23 * 3.21:.1f} mm² here." in status(page)


class TestControls:
    def test_keys(self, show: Open) -> None:
        page = show(raters=RATERS)
        start = data_of(Path(page.url.removeprefix("file://")))["slices"]
        first = int(MASKS.sum((0, 2, 3)).argmax())
        assert status(page).startswith(f"Slice {first + 1} of 3, sample 1 of 5: {MASKS[0, first].sum()} px here.")
        assert start == [1, 2, 3]
        slide(page, "slice", 0)
        for key, words in [
            ("ArrowUp", "Slice 2 of 3, sample 1"),
            ("PageUp", "Slice 3 of 3, sample 1"),
            ("ArrowUp", "Slice 3 of 3, sample 1"),
            ("ArrowRight", "Slice 3 of 3, sample 2"),
            ("PageDown", "Slice 2 of 3, sample 2"),
            ("ArrowDown", "Slice 1 of 3, sample 2"),
            ("ArrowLeft", "Slice 1 of 3, sample 1"),
            ("ArrowLeft", "Slice 1 of 3, sample 1"),
        ]:
            page.locator("#canvas").focus()
            press(page, key)
            assert status(page).startswith(words), key

    def test_layer_keys_and_one_map_at_a_time(self, show: Open) -> None:
        page = show(raters=RATERS)

        def on() -> str:
            return "".join(str(i + 1) for i, name in enumerate(LAYERS) if page.locator(f"#layer-{name}").is_checked())

        assert on() == "15"
        for key, wanted in [("2", "125"), ("3", "1235"), ("4", "1245"), ("1", "245"), ("5", "24"), ("3", "23")]:
            press(page, key)
            assert on() == wanted
        page.keyboard.press("Control+2")
        assert on() == "23"

    def test_sliders_announce_and_keep_their_own_arrows(self, show: Open) -> None:
        page = show()
        before = colors(page)
        slide(page, "sample", 3)
        mask = MASKS[3]
        index = int(MASKS.sum((0, 2, 3)).argmax())
        assert f"sample 4 of 5: {mask[index].sum()} px here. 4 of 5 samples mark" in status(page)
        assert (colors(page, right=1.0) != before).any()
        slide(page, "slice", 1)
        assert status(page).startswith(f"Slice 2 of 3, sample 4 of 5: {mask[1].sum()} px")
        assert page.locator("#slice").get_attribute("aria-valuetext") == "Slice 2 of 3"
        page.locator("#opacity").focus()
        page.keyboard.press("ArrowLeft")
        assert page.locator("#opacity-value").inner_text() == "65 %"
        assert "sample 4" in status(page)
        page.locator("#sizes [data-sample='1']").click()
        assert "sample 2 of 5" in status(page)
        assert page.locator("#sizes tr[aria-current] th").inner_text().strip() == "Sample 2"

    def test_help_and_names(self, show: Open) -> None:
        page = show(raters=RATERS)
        assert not page.locator("#help").is_visible()
        page.keyboard.press("?")
        assert page.locator("#help").is_visible()
        assert page.locator("#keys").get_attribute("aria-expanded") == "true"
        nameless = page.evaluate(
            """[...document.querySelectorAll("input, button, canvas#canvas, [tabindex]")].filter((e) =>
                !(e.labels?.length || e.textContent.trim() || e.getAttribute("aria-label"))).length"""
        )
        assert nameless == 0
        assert page.locator("#status").get_attribute("aria-live") == "polite"

    def test_tab_reaches_every_control_and_shows_where_it_is(self, show: Open) -> None:
        page = show(raters=RATERS)
        reached = set()
        for _ in range(14):
            page.keyboard.press("Tab")
            name, outline = page.evaluate(
                "[document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle]"
            )
            reached.add(name)
            assert outline not in ("none", "")
        assert {
            "canvas",
            "slice",
            "sample",
            "opacity",
            "zoom",
            "smooth",
            "keys",
            *(f"layer-{x}" for x in LAYERS),
        } <= reached

    def test_the_pointer_reads_votes(self, show: Open) -> None:
        page = show(raters=RATERS)
        slide(page, "slice", 0)
        box = page.locator("#canvas").bounding_box()
        page.mouse.move(box["x"] + box["width"] * 7.5 / WIDTH, box["y"] + box["height"] * 9.5 / HEIGHT)
        votes, rated = MASKS[:, 0, 9, 7].sum(), RATERS[:, 0, 9, 7].sum()
        p = votes / N
        bits = 0 if p in (0, 1) else -p * np.log2(p) - (1 - p) * np.log2(1 - p)
        wanted = f"Row 9, column 7: in {votes} of 5 samples, {bits:.2f} bits, in {rated} of 2 raters"
        assert page.locator("#readout").inner_text() == wanted

    def test_one_slice_one_sample_no_raters(self, show: Open) -> None:
        page = show(IMAGE[0], MASKS[:1, 0])
        assert not page.locator("#slice").is_visible() and not page.locator("#layer-raters").is_visible()
        press(page, "5", "ArrowUp", "ArrowRight")
        assert status(page).startswith(f"Slice 1 of 1, sample 1 of 1: {MASKS[0, 0].sum()} px here. 1 of 1 sample marks")

    def test_nothing_marked(self, show: Open) -> None:
        page = show(IMAGE, MASKS & False, raters=RATERS & False)
        press(page, "2", "3", "z", "ArrowUp")
        assert "0 px here. 0 of 5 samples mark" in status(page) and not page.locator("#zoom").is_enabled()
        assert "5 of 5 mark nothing" in page.locator("#summary").inner_text()

    def test_many(self, show: Open) -> None:
        page = show(np.zeros((100, HEIGHT, WIDTH)), np.tile(blobs(10, 3, 10), (10, 10, 1, 1)))
        slide(page, "slice", 99)
        slide(page, "sample", 99)
        assert status(page).startswith("Slice 100 of 100, sample 100 of 100")
        press(page, "3", "z")


class TestPage:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_a_phone_needs_no_sideways_scrolling(self, show: Open, scheme: str) -> None:
        provenance = {"weights": "sha256:" + "0123456789abcdef" * 8, "a-very-long-name-" * 5: 1}
        phone = {
            "viewport": {"width": 360, "height": 740},
            "is_mobile": True,
            "has_touch": True,
            "color_scheme": scheme,
        }
        page = show(raters=RATERS, spacing=(2, 1, 1), title="Title" * 30, provenance=provenance, context=phone)
        page.locator("#keys").click()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.locator("#canvas").bounding_box()["width"] > 300
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background))) > 382) == (scheme == "light")

    def test_print_shows_pictures_and_tables_instead_of_controls(self, show: Open) -> None:
        page = show(raters=RATERS, provenance={"seed": 7})
        press(page, "ArrowRight")
        assert not page.locator("#contact").is_visible()
        page.emulate_media(media="print")
        page.wait_for_function("() => [...document.querySelectorAll('#contact canvas')].every((c) => c.dataset.shows)")
        for hidden in ("input", "#zoom", "#canvas", "#status"):
            assert not page.locator(hidden).first.is_visible()
        for shown in ("#sizes", "#provenance", "#ged", "#summary", ".notice"):
            assert page.locator(shown).is_visible()
        pictures = page.evaluate("[...document.querySelectorAll('#contact canvas')].map((c) => c.toDataURL())")
        assert len(set(pictures)) == 4 and all(png(uri).std() > 10 for uri in pictures)
        assert page.locator("[data-caption]").inner_text() == status_slice(page)
        page.emulate_media(media="screen")
        assert page.locator("#canvas").is_visible() and not page.locator("#contact").is_visible()

    def test_without_scripts_there_are_pictures_and_numbers(self, show: Open) -> None:
        page = show(raters=RATERS, context={"java_script_enabled": False})
        pictures = [png(uri) for uri in page.locator(".stills img").evaluate_all("all => all.map((i) => i.src)")]
        s = int(MASKS.sum((0, 2, 3)).argmax())
        votes = MASKS[:, s].sum(0)
        assert (pictures[0] == report._window(IMAGE, None)[s]).all()
        coloured = pictures[1].max(-1) != pictures[1].min(-1)
        assert (coloured == (votes > 0)).all()
        assert ((pictures[2].max(-1) != pictures[2].min(-1)) == ((votes > 0) & (votes < N))).all()
        assert not page.locator("#viewer").is_visible() and page.locator(".stills img").first.is_visible()
        assert page.locator("#sizes tbody tr").count() == N + R

    def test_what_it_is_given_is_text_and_never_runs(self, show: Open) -> None:
        evil = "</title></script><script>alert(1)</script><img src=x onerror=alert(2)>{{data}}&amp;"
        page = show(title=evil, unit=evil, provenance={evil: evil, "nested": {"x": [evil]}})
        assert page.locator("h1").inner_text() == evil and page.title() == evil
        assert page.locator("#provenance th").first.inner_text() == evil
        assert page.locator("#provenance td").first.inner_text() == evil
        assert evil in status(page)
        assert page.locator("script").count() == 2 and page.locator("img").count() == 0

    def test_the_policy_stops_scripts_that_are_not_its_own(self, show: Open, tmp_path: Path) -> None:
        page = show()
        text = (tmp_path / "report.html").read_text("utf-8")
        other = tmp_path / "other.html"
        other.write_text(text.replace("</body>", "<script>document.title = 'ran'</script></body>"), "utf-8")
        stray = page.context.new_page()
        stray.goto(other.as_uri())
        assert stray.title() == "Plausible masks"

    def test_says_that_it_is_no_medical_device(self, show: Open) -> None:
        notice = show().locator(".notice")
        assert notice.is_visible() and notice.inner_text() == "Not a medical device"


def status_slice(page: Any) -> str:
    return page.evaluate("document.getElementById('status').textContent.split(',')[0]")
