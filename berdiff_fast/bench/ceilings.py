# SPDX-License-Identifier: Apache-2.0
"""What the machine can do at best, measured in the same run: rates are told as shares of these."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F


def measure(device: str) -> dict[str, float]:
    """Bytes per second of a large copy (read and written) and FLOP per second of convolutions and matrix products."""
    gpu = device == "cuda"
    dtypes = [torch.float32, torch.bfloat16] if gpu else [torch.float32]
    found = {"copy_bytes_per_second": _copy(device, (1 << 30) if gpu else (1 << 28))}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        found[f"{name}_convolution_flop_per_second"] = max(_convolution(device, dtype, *s) for s in _SHAPES[gpu])
        found[f"{name}_matmul_flop_per_second"] = _matmul(device, dtype, 8192 if gpu else 2048)
    return found


#: Channels, side and batch: the levels of the published U-Net.
_SHAPES = {
    True: ((128, 128, 16), (256, 64, 32), (512, 16, 128)),
    False: ((128, 128, 1), (256, 32, 4), (512, 16, 4)),
}


def _best(function: Callable[[], object], device: str, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[2:])


def _copy(device: str, size: int) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device)


def _convolution(device: str, dtype: torch.dtype, channels: int, side: int, batch: int) -> float:
    x = torch.randn(batch, channels, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    flop = 2 * 9 * channels**2 * side**2 * batch
    with torch.no_grad():
        return flop / _best(lambda: F.conv2d(x, weight, padding=1), device)


def _matmul(device: str, dtype: torch.dtype, size: int) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: a @ b, device)
