# SPDX-License-Identifier: Apache-2.0
"""How a GPU multiplies while a model is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from berdiff_fast.training.config import TrainConfig


@contextmanager
def fast_arithmetic(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """On a GPU: convolutions by the algorithm that was fastest when tried, and, unless ``precision`` is fp32, what is
    left in float32 multiplied in TF32 (which torch's convolutions do by default). Torch's settings are put back after.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    torch.backends.cudnn.benchmark = True
    if config.optimiser.precision != "fp32":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before[0]
        torch.set_float32_matmul_precision(before[1])
