# SPDX-License-Identifier: Apache-2.0
"""Pictures for papers: what they refuse and show; files are written whole or not at all."""

from __future__ import annotations

import io
import os
import struct
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import berdiff_fast as bf
from berdiff_fast.imaging.figures import (
    StepRecorder,
    contact_sheet,
    denoising_strip,
    overlay,
    reliability_diagram,
)
from berdiff_fast.imaging.summary import disagreement

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


def pixels(figure) -> np.ndarray:
    """(height, width, 3) as drawn."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


class TestOverlay:
    def test_shows_slice_map_contours_and_raters(self) -> None:
        figure = overlay(IMAGE, SAMPLES, raters=RATERS, title="A nodule")
        axes = figure.axes[0]
        slice_, shades = axes.images
        np.testing.assert_array_equal(slice_.get_array(), IMAGE.numpy())
        np.testing.assert_allclose(shades.get_array(), SAMPLES.float().mean(0).numpy())
        assert (np.asarray(shades.get_alpha()) > 0).tolist() == SAMPLES.any(0).tolist()
        # Two samples that are not empty, their majority, and two raters.
        assert len(axes.collections) == 5
        assert axes.get_title("left") == "A nodule"
        assert len(overlay(IMAGE, SAMPLES).axes[0].collections) == 3

    @pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
    def test_writes_what_the_suffix_says(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"overlay{suffix}"
        overlay(IMAGE, SAMPLES, path=path)
        start = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}[suffix]
        assert path.read_bytes().startswith(start)
        assert len(list(tmp_path.iterdir())) == 1

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"image": IMAGE[None]}, r"image must be \(H, W\), got \(1, 24, 20\)"),
            ({"masks": SAMPLES[0]}, r"masks must be \(1 or more, 24, 20\)"),
            ({"raters": RATERS * 2}, "raters must be masks"),
        ],
    )
    def test_refuses(self, tmp_path: Path, change: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            overlay(**{"image": IMAGE, "masks": SAMPLES, "path": tmp_path / "x.png", **change})
        assert list(tmp_path.iterdir()) == []

    def test_refuses_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="path must lie in an existing folder"):
            overlay(IMAGE, SAMPLES, path=tmp_path / "missing" / "x.png")


class TestDenoisingStrip:
    def test_shows_every_step_in_order(self) -> None:
        steps = [SAMPLES[k % 3] for k in range(9)]
        figure = denoising_strip(steps, image=IMAGE, labels=[f"t = {9 - k}" for k in range(9)], title="Steps")
        shown = [axes for axes in figure.axes if axes.images]
        assert [axes.get_title("left") for axes in shown] == ["Slice", *(f"t = {9 - k}" for k in range(9))]
        np.testing.assert_array_equal(shown[0].images[0].get_array(), IMAGE.numpy())
        for axes, step in zip(shown[1:], steps, strict=True):
            np.testing.assert_array_equal(axes.images[0].get_array(), step.float().numpy())
            assert axes.images[0].get_clim() == (0, 1)  # an empty mask is black, a full one white

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"steps": []}, "steps must be one or more"),
            ({"steps": [SAMPLES[0], SAMPLES[0].T]}, r"steps must be one or more \(H, W\) of one size"),
            ({"steps": [IMAGE]}, r"steps must hold values in \[0, 1\]"),
            ({"labels": "abc"}, "labels must be a sequence of 3 strings"),
            ({"labels": ["a"]}, "labels must be a sequence of 3 strings"),
            ({"image": IMAGE.T}, r"image must be \(24, 20\) like steps"),
        ],
    )
    def test_refuses(self, change: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            denoising_strip(**{"steps": list(SAMPLES), **change})

    def test_recorder_sees_what_the_model_sees_and_changes_nothing(self) -> None:
        def model(y: torch.Tensor, t: torch.Tensor, img: torch.Tensor) -> torch.Tensor:
            return 2 * (img - y) + t.view(-1, 1, 1, 1) / 1000

        img = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
        options = dict(n=2, steps=5, schedule="cosine2", prediction="epsilon", seed=3)
        recorder = StepRecorder(model)
        assert torch.equal(bf.sample(recorder, img, **options), bf.sample(model, img, **options))
        sampler = bf.Sampler(model, 2, 5, schedule="cosine2", prediction="epsilon")
        assert recorder.timesteps == sampler.timesteps and len(recorder.states) == 5
        assert all(y.shape == (2, 1, 8, 8) and ((y == 0) | (y == 1)).all() for y in recorder.states)
        noise = bf.ops.initial_noise(bf.image_seeds(3, 1), (1, 8, 8), samples_per_image=2)
        assert torch.equal(recorder.states[0], noise.float().view(2, 1, 8, 8))
        assert denoising_strip([y[0, 0] for y in recorder.states]).axes

    def test_recorder_speaks_for_a_model_with_a_schedule(self) -> None:
        model = bf.load("phantom64")
        img = model.preprocess(bf.data.phantom.generate(1, 32).images)
        recorder = StepRecorder(model)
        masks = bf.sample(recorder, img, n=1, steps=2, seed=1)
        assert torch.equal(masks, bf.sample(model, img, n=1, steps=2, seed=1, prepare=False))
        assert len(recorder.timesteps) == 2
        with pytest.raises(TypeError, match="model must be callable"):
            StepRecorder(3)  # type: ignore[arg-type]


class TestReliabilityDiagram:
    SAMPLES = torch.rand(8, 40, 30, generator=torch.Generator().manual_seed(0)) < 0.4
    RATERS = torch.rand(3, 40, 30, generator=torch.Generator().manual_seed(1)) < 0.6

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_bins_are_those_of_the_calibration_error(self, dtype: torch.dtype) -> None:
        for bins in (4, 8, 10):
            table = bf.metrics.calibration_bins(self.RATERS[None], self.SAMPLES[None], bins)[0].numpy()
            table_of = table[table[:, 0] > 0]
            above, below = reliability_diagram(self.SAMPLES.to(dtype).mean(0), self.RATERS, bins).axes
            _, curve = above.lines
            np.testing.assert_allclose(curve.get_xdata(), table_of[:, 1] / table_of[:, 0], rtol=1e-6)
            np.testing.assert_allclose(curve.get_ydata(), table_of[:, 2] / table_of[:, 0], rtol=1e-6)
            assert [bar.get_height() for bar in below.patches] == table[:, 0].tolist()
        error = float(bf.metrics.expected_calibration_error(self.RATERS[None], self.SAMPLES[None]))
        assert above.texts[0].get_text() == f"Calibration error {error:.4f}"

    def test_takes_arrays_of_any_shape_and_writes(self, tmp_path: Path) -> None:
        path = tmp_path / "r.png"
        figure = reliability_diagram(np.array([0.0, 0.5, 1.0]), np.array([[0, 1, 1]]), 2, title="x", path=path)
        assert png_size(path)[0] > 400
        assert len(np.unique(pixels(figure).reshape(-1, 3), axis=0)) > 10

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"probability": torch.tensor([2.0])}, ValueError, r"probability must hold probabilities in \[0, 1\]"),
            ({"probability": torch.tensor([float("nan")])}, ValueError, "probability must"),
            ({"raters": torch.zeros(0, 1)}, ValueError, "raters must be"),
            ({"raters": torch.zeros(2, 2)}, ValueError, r"raters must be .* got \(2, 2\)"),
            ({"raters": torch.full((1, 1), 0.5)}, ValueError, "raters must be masks"),
            ({"bins": 0}, ValueError, "bins must be at least 1"),
            ({"bins": 1.5}, TypeError, "bins must be an int"),
        ],
    )
    def test_refuses(self, change: dict, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            reliability_diagram(**{"probability": torch.tensor([0.5]), "raters": torch.ones(1, 1), **change})


def test_figures_have_a_short_name() -> None:
    assert bf.figures is bf.imaging.figures
