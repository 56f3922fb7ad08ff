# SPDX-License-Identifier: Apache-2.0
"""The whole call: images in, masks out."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import berdiff_fast as bf
from berdiff_fast.bench import baselines, exported
from berdiff_fast.bench.baselines import PUBLISHED
from berdiff_fast.bench.runner import Case, Contender, Made, assert_close, same_masks

SIZE = 128
BASELINE = "PyTorch, one mask after another (published)"


def case(device: str, which: str, *, compile: bool = True, published: str | None = None) -> Case:
    """``sample`` of the "bundled model" or the "published U-Net", which is as large as the published one and untrained.

    Args:
        device: "cpu" or "cuda".
        which: see above.
        compile: with torch.compile among the contenders.
        published: a checkout of the published code, for the published U-Net.
    """
    bundled, gpu = which == "bundled model", device == "cuda"
    # 16 masks in 10 steps of the published U-Net take minutes on a CPU; 4 in 2 are the same work a mask and step.
    n, steps = (16, 10) if gpu or bundled else (4, 2)
    make = functools.partial(bf.load, "lidc-v1") if bundled else _published_unet

    def contenders() -> Made:
        model = make().to(device)
        images = bf.Preprocessing()(bf.data.phantom.generate(1, SIZE, field=SIZE).images)  # as lidc's
        yield from _contenders(model, images.to(device), n, steps, device, compile)
        if bundled:
            yield _version_2(images.to(device), n, steps)
        else:
            yield _monai(n, steps, device)
            yield _checkout(published, model, images.to(device), n, steps)

    name = f"sample(n={n}, steps={steps}), {SIZE} x {SIZE}, {which}{' lidc-v1' * bundled}"
    flops = _flops(bf.load("lidc-v1").network.config if bundled else PUBLISHED) * n * steps  # type: ignore[arg-type]
    return Case(name, "call", contenders, BASELINE, "masks", n, flops=flops)


def _contenders(model: bf.BerDiff, img: torch.Tensor, n: int, steps: int, device: str, compile: bool) -> Made:
    taus = model.schedule.subsequence(steps, model.spacing)
    few = n if device == "cuda" else min(n, 4)  # what gates draw; a compiler would compile twice

    @functools.cache
    def expected() -> torch.Tensor:
        return bf.sample(model, img, few, taus, seed=1, prepare=False, backend="reference")[0]

    def ours(name: str, share: float, net: bf.BerDiff = model, **options: Any) -> Contender:
        def run(count: int = n) -> torch.Tensor:
            return bf.sample(net, img.to(next(net.parameters()).dtype), count, taus, seed=1, **options)[0]

        return Contender(name, run, lambda: same_masks(run(few), expected(), share), ours=True)

    def plain(
        name: str, sampler: Callable[..., torch.Tensor], network: Any = model, dtype: torch.dtype = torch.float32
    ) -> Contender:
        def run(count: int = n, **draw: Any) -> torch.Tensor:
            predicts_y0 = model.prediction == "y_0"
            return sampler(network, img.to(dtype), count, taus, model.schedule, predicts_y0=predicts_y0, **draw)

        def gate() -> dict[str, Any]:
            masks = run(few, draw=baselines.as_contracted(1)).bool()
            return same_masks(masks, expected(), 1e-3 if dtype is torch.float32 else 0.05)

        return Contender(name, run, gate)

    last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    yield ours("ours", 1e-3)
    yield ours("ours, network as it is", 1e-3, prepare=False)
    if device == "cpu":
        yield ours("ours, Winograd", 1e-2, prepare="winograd")
    yield _sampler_alone(model, img, n, taus)
    yield plain(BASELINE, baselines.one_after_another)
    yield plain("PyTorch, batched", baselines.batched)
    yield plain("PyTorch, batched, channels last", baselines.batched, last)
    if device == "cpu":
        for name, make in (("ONNX Runtime", exported.onnx_runtime), ("OpenVINO", exported.openvino)):
            try:
                yield plain(f"{name}, batched", baselines.batched, make(model.network, img))
            except ImportError as error:
                yield f"{name}, batched", str(error)
    if device == "cpu" and compile:
        yield plain("torch.compile, batched, channels last", baselines.batched, baselines.compiled(last, device))
    if device == "cuda":
        half = copy.deepcopy(last).to(torch.bfloat16)
        yield ours("ours, bfloat16", 0.05, dtype=torch.bfloat16)
        yield plain("PyTorch, batched, channels last, bfloat16", baselines.batched, half, torch.bfloat16)
        if compile:  # compiling takes minutes, so only the faster of the two
            yield plain(
                "torch.compile, batched, channels last, bfloat16",
                baselines.batched,
                baselines.compiled(half, device),
                torch.bfloat16,
            )


def _version_2(img: torch.Tensor, n: int, steps: int) -> Contender:
    """The same call of ``lidc``: a window, and size classes that its prior draws, some of them empty. Plain PyTorch has
    no such sampler, so it is compared with itself, the network as it is."""
    model = bf.load("lidc").to(img.device)
    few = min(n, 4)

    def run(count: int = n, **options: Any) -> torch.Tensor:
        found = bf.sample(model, img, count, steps, seed=1, **options)
        assert isinstance(found, torch.Tensor)
        return found[0]

    def gate() -> dict[str, Any]:
        return same_masks(run(few), run(few, prepare=False, backend="reference"))

    return Contender("ours, lidc version 2 (another network)", run, gate, ours=True)


def _sampler_alone(model: bf.BerDiff, img: torch.Tensor, n: int, taus: Sequence[int]) -> Contender:
    """All of the call but the network, whose logits are at hand: what the draws cost."""
    logits = torch.randn(n, 1, *img.shape[2:], device=img.device)

    def run() -> Any:
        return bf.sample(
            lambda y_t, t, img: logits[: len(y_t)],
            img,
            n,
            taus,
            schedule=model.schedule,
            prediction=model.prediction,
            seed=1,
        )

    return Contender("ours, without the network", run, lambda: None, ours=True)


def _monai(n: int, steps: int, device: str) -> Contender | tuple[str, str]:
    """MONAI's network under our sampler: as deep and wide as the published one, but another function."""
    name = "MONAI's DiffusionModelUNet under our sampler (another network)"
    try:
        from monai.networks.nets import DiffusionModelUNet

        from berdiff_fast.integrations.monai import as_model
    except ImportError as error:
        return name, f"MONAI cannot be imported: {error}"
    torch.manual_seed(0)
    network = DiffusionModelUNet(
        spatial_dims=2,
        in_channels=2,
        out_channels=1,
        channels=(128, 128, 256, 384, 512),
        attention_levels=(False, False, False, True, False),
        num_res_blocks=2,
        num_head_channels=(128, 128, 256, 384, 512),
    )
    network = network.eval().to(device)
    img = torch.randn(1, 1, SIZE, SIZE, device=device)

    options = dict(spacing="trailing", schedule="cosine2", prediction="epsilon")
    sampler = bf.Sampler(as_model(network), n, steps, **options)  # type: ignore[arg-type]

    def run() -> Any:
        return sampler(img, seed=1)

    def gate() -> dict[str, Any]:
        assert run().shape == (1, n, 1, SIZE, SIZE)
        return {"parameters": sum(p.numel() for p in network.parameters())}

    return Contender(name, run, gate)


def _checkout(
    folder: str | None, model: bf.BerDiff, img: torch.Tensor, n: int, steps: int
) -> Contender | tuple[str, str]:
    """The published code itself, with the weights of ``model``."""
    name = "the published code, one mask after another"
    if folder is None:
        return name, "not asked for: --published CHECKOUT"
    network, diffusion = baselines.checkout(folder, model.network.state_dict(), steps)
    network.to(img.device)

    def run() -> torch.Tensor:
        given = {"img": img}
        return torch.cat([diffusion.ddim_sample_loop(network, img.shape, model_kwargs=given) for _ in range(n)])

    @torch.no_grad()
    def gate() -> None:
        # Its draws follow no contract; its network is what takes the time.
        y_t, t = (torch.rand_like(img) < 0.5).float(), torch.full((1,), 500, device=img.device)
        assert_close(network(y_t, t, img), torch.sigmoid(model(y_t, t, img)), 1e-4)

    return Contender(name, run, gate)


def _published_unet() -> bf.BerDiff:
    torch.manual_seed(0)
    network = bf.UNet(**PUBLISHED)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in network.parameters():  # untrained branches end in zeros, which nobody should time
            p.add_(torch.randn_like(p) * 0.02)
    # "trailing" exists for any number of steps.
    return bf.BerDiff(network, prediction="epsilon", spacing="trailing").eval()


def _flops(config: dict[str, Any]) -> int:
    """Of one forward pass of one mask."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        x = torch.empty(1, 1, SIZE, SIZE)
        bf.UNet(**config)(x, torch.zeros(1), x)
    return counter.get_total_flops()
