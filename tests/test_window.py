# SPDX-License-Identifier: Apache-2.0
"""Masks that are denoised in the middle of the image: what the network is shown, and what is around it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import CPU_BACKENDS, METHODS, PREDICTIONS, Toy, threads, toy_image

import berdiff_fast as bf
from berdiff_fast import BerDiff, UNet
from berdiff_fast.network.window import Window, center_distance, middle, surroundings


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def unet(**options) -> UNet:
    torch.manual_seed(11)
    shape = dict(model_channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,), norm_groups=8)
    network = UNet(**{**shape, **options})
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(std=0.1)
    return network.eval()


def windowed(size: int = 16, prediction: str = "y_0", **options) -> BerDiff:
    channels = Window(size, **options).channels(1)
    return BerDiff(unet(img_channels=channels), "cosine2", prediction, output_crop=size, **options)


@pytest.fixture(scope="module")
def img() -> torch.Tensor:
    return toy_image(2, 1, 30, 24)


def test_the_middle_and_what_is_around_it():
    x = torch.arange(6.0 * 5).view(1, 1, 6, 5)
    assert middle(x, 2)[0, 0].tolist() == [[11, 12], [16, 17]]
    assert middle(x, 2, (9, -9))[0, 0].tolist() == [[20, 21], [25, 26]], "as far as the image goes"
    assert torch.equal(surroundings(x, 2), F.avg_pool2d(middle(x, 4), 2))
    wide = surroundings(x, 4)  # 8 x 8 of 6 x 5: the edge goes on
    assert (
        wide.shape == (1, 1, 4, 4) and wide[0, 0, 0, 0] == F.pad(x, (2, 1, 1, 1), mode="replicate")[0, 0, :2, :2].mean()
    )


def test_the_distance_is_symmetric_and_in_halves_of_the_shorter_side():
    r = center_distance(torch.zeros(3, 1, 8, 8))[0, 0]
    assert torch.equal(r, r.flip(0)) and torch.equal(r, r.t()) and r.min() == r[3, 3]
    assert r[0, 0] == pytest.approx((2 * 3.5**2) ** 0.5 / 4) and center_distance(torch.zeros(1, 4, 9)).shape[2:] == (
        4,
        9,
    )


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("distance", [False, True])
def test_what_the_network_is_shown(img, context, distance):
    window = Window(16, context, distance)
    shown = window.view(img)
    assert shown.shape == (2, window.channels(1), 16, 16) and window.img_channels(shown.shape[1]) == 1
    assert torch.equal(shown[:, :1], img[:, :, 7:23, 4:20])
    if context:
        assert torch.equal(shown[:, 1:2], surroundings(img, 16))
    if distance:
        assert torch.equal(shown[:, -1:], center_distance(torch.zeros(16, 16)).expand(2, 1, 16, 16))
    assert torch.equal(Window().view(img), img) and Window().plain and not window.plain


def test_distance_without_a_window(img):
    model = BerDiff(unet(img_channels=2), distance=True)
    assert model.img_channels == 1
    y, t = torch.zeros(2, 1, 30, 24), torch.tensor([3, 900])
    expected = model.network(y, t, torch.cat([img, center_distance(img).expand(2, 1, 30, 24)], 1))
    assert torch.equal(model(y, t, img), expected)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_around_the_window_is_a_certain_no(img, prediction):
    model, t = windowed(prediction=prediction), torch.tensor([3, 900])
    y = (toy_image(2, 1, 30, 24, seed=1) > 0).float()
    z = model(y, t, img)
    inside = torch.zeros(30, 24, dtype=torch.bool)
    inside[7:23, 4:20] = True
    assert torch.equal(z[..., inside].view(2, 1, 16, 16), model.network(y[..., 7:23, 4:20], t, img[..., 7:23, 4:20]))
    p = torch.sigmoid(z.double())
    p = p if prediction == "y_0" else (y - p).abs()
    assert p[..., ~inside].max() < 1e-27
    noise = torch.where(inside, y, 1 - y)
    assert torch.equal(model(noise, t, img)[..., inside], z[..., inside]), "what is outside is not looked at"


@pytest.mark.parametrize("final", ["threshold", "sample"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_nothing_is_marked_around_the_window(img, prediction, method, final):
    model = windowed(prediction=prediction)
    masks, p = bf.sample(model, img, 6, 4, seed=3, method=method, final=final, return_probability=True)
    assert masks.shape == (2, 6, 1, 30, 24) and masks.any()
    outside = masks.clone()
    outside[..., 7:23, 4:20] = False
    assert not outside.any()
    assert p[..., :7, :].max() < 1e-27


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_masks_depend_on_what_they_did(img, backend):
    model = BerDiff(Toy(), output_crop=16)
    masks = bf.sample(model, img, 6, 4, seed=3, backend="reference")
    assert torch.equal(bf.sample(model, img, 6, 4, seed=3, backend=backend, max_batch=4), masks)
    assert torch.equal(bf.sample(model, img, 2, 4, seed=3, backend=backend, first_sample=3), masks[:, 3:5])


@pytest.mark.parametrize("options", [{}, {"context": True}, {"distance": True}, {"context": True, "distance": True}])
def test_prepared_and_from_a_file(img, tmp_path, options):
    model = windowed(**options)
    masks = bf.sample(model, img, 6, 4, seed=3, prepare=False)
    assert (bf.sample(model, img, 6, 4, seed=3) != masks).double().mean() < 1e-3
    model.save(tmp_path / "m.safetensors")
    again = bf.load(tmp_path / "m.safetensors")
    assert again.output_window == model.output_window and again.img_channels == 1
    assert torch.equal(bf.sample(again, img, 6, 4, seed=3, prepare=False), masks)


def test_a_window_may_have_any_image_that_is_large_enough(img):
    model = windowed()
    assert model.size_multiple == 1 and BerDiff(unet()).size_multiple == 2
    assert bf.sample(model, toy_image(1, 1, 17, 31), 2, 2, seed=0).shape == (1, 2, 1, 17, 31)
    for call in (lambda x: bf.sample(model, x, 2, 2), lambda x: model(x, torch.zeros(1), x)):
        with pytest.raises(ValueError, match="img must be at least 16 x 16 pixels, the window .* got 15 x 31"):
            call(torch.zeros(1, 1, 15, 31))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"output_crop": 15}, "output_crop must have a height and width divisible by 2"),
        ({"output_crop": -1}, "output_crop must be at least 0"),
        ({"output_crop": 16.0}, "output_crop must be an int"),
        ({"context": True}, "context needs an output_crop"),
        ({"output_crop": 16, "context": True}, "network must have one image channel for each of the image's and its"),
        ({"distance": 1}, "distance must be True or False"),
    ],
)
def test_windows_that_make_no_sense(options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        BerDiff(unet(), **options)


def test_volumes_have_no_window():
    with pytest.raises(ValueError, match="are for images, got spatial_dims = 3"):
        BerDiff(UNet(model_channels=32, channel_mult=(1,), num_res_blocks=1, dims=3), output_crop=16)


# ---------------------------------------------------------------------- scans


@pytest.mark.parametrize("shape", [(20, 16), (37, 41), (7, 5)])
@pytest.mark.parametrize("size", [None, (16, 16), (15, 18)])
def test_windows_cover_a_slice(shape, size):
    """Of a model that marks all it can: each voxel is marked once by the tile whose window has it."""

    class Everything(torch.nn.Module):
        mask_channels, spatial_dims = 1, 2

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((), 60.0))

        def forward(self, y_t, t, img):
            return self.weight.expand_as(y_t)

    size = size if size is None or min(shape) > 8 else (16, 16)
    preprocessing = bf.Preprocessing(size=size)
    model = BerDiff(Everything(), prediction="y_0", output_crop=8, preprocessing=preprocessing)
    found = bf.sample_volume(model, toy_image(2, *shape).numpy(), 2, 2)
    assert found.masks.all()
    found = bf.sample_volume(model, toy_image(2, *shape).numpy(), 2, 2, overlap=0.0, roi=(1, 5, 2, 5))
    assert found.masks.sum() == 2 * 2 * 4 * 3
    if size is not None:
        found = bf.sample_volume(model, toy_image(2, *shape).numpy(), 2, 2, center=(3, 3))
        rows, columns = min(shape[0], 7), min(shape[1], 7)
        assert found.masks.sum() <= 2 * 2 * rows * columns + 2 * 2 * (rows + columns + 1)
