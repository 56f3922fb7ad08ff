# SPDX-License-Identifier: Apache-2.0
"""Networks exported for ONNX Runtime and OpenVINO say what they said before, in batches of any size."""

from __future__ import annotations

import importlib

import pytest
import torch

import berdiff_fast as bf
from berdiff_fast.bench import exported


@pytest.mark.parametrize(("make", "package"), [(exported.onnx_runtime, "onnxruntime"), (exported.openvino, "openvino")])
def test_logits_are_those_of_the_network(make, package):
    pytest.importorskip("onnxscript")
    pytest.importorskip(package)
    torch.manual_seed(0)
    network = bf.UNet(
        model_channels=16, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4, attention_resolutions=(2,)
    )
    torch.nn.init.normal_(network.out[-1].weight, std=0.1)
    img = torch.randn(1, 1, 32, 32)
    run = make(network, img)
    for count in (1, 3, 8):
        y_t, t = (torch.rand(count, 1, 32, 32) < 0.5).float(), torch.arange(count) * 100
        with torch.no_grad():
            expected = network.eval()(y_t, t, img.expand(count, -1, -1, -1))
        assert (run(y_t, t, img.expand(count, -1, -1, -1)) - expected).abs().max() < 1e-4


def test_what_is_missing_is_named(monkeypatch):
    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"onnxruntime is needed .*berdiff_fast\[bench\]"):
        exported.onnx_runtime(torch.nn.Identity(), torch.zeros(1, 1, 8, 8))
