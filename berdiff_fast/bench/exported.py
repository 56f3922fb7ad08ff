# SPDX-License-Identifier: Apache-2.0
"""What somebody might pick instead on a CPU: the network exported, and run by ONNX Runtime or OpenVINO."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from berdiff_fast import words
from berdiff_fast._optional import require

#: Names of the exported network's arguments.
_INPUTS = ("y_t", "t", "img")

Exported = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def to_onnx(network: nn.Module, img: torch.Tensor, path: Path) -> Path:
    """Export a network (y_t, t, img) -> logits for batches of any size."""
    require("onnxscript", "bench")
    batch = torch.export.Dim("batch", min=1, max=4096)
    given = (torch.zeros(2, 1, *img.shape[2:]), torch.zeros(2, dtype=torch.int64), img[:1].expand(2, -1, -1, -1))
    # The exporter tells the screen what it does.
    quiet = words.muted("torch.onnx._internal.exporter._registration")
    with warnings.catch_warnings(), quiet, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(),
            given,
            str(path),
            input_names=list(_INPUTS),
            output_names=["logits"],
            dynamic_shapes=tuple({0: batch} for _ in _INPUTS),
            dynamo=True,
            verbose=False,
        )
    return path


def onnx_runtime(network: nn.Module, img: torch.Tensor) -> Exported:
    """The network by ONNX Runtime, in as many threads as torch has."""
    runtime = require("onnxruntime", "bench")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    with tempfile.TemporaryDirectory() as folder:
        path = to_onnx(network, img, Path(folder) / "network.onnx")
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return _callable(lambda given: session.run(None, given)[0])


def openvino(network: nn.Module, img: torch.Tensor) -> Exported:
    """The network by OpenVINO, in float32 and in as many threads as torch has."""
    runtime = require("openvino", "bench")
    core = runtime.Core()
    with tempfile.TemporaryDirectory() as folder:
        model = core.read_model(str(to_onnx(network, img, Path(folder) / "network.onnx")))
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = core.compile_model(model, "CPU", settings)
    return _callable(lambda given: compiled(given)[0])


def _callable(run: Callable[[Mapping[str, Any]], Any]) -> Exported:
    def network(y_t: torch.Tensor, t: torch.Tensor, img: torch.Tensor) -> torch.Tensor:
        given = {n: x.contiguous().numpy() for n, x in zip(_INPUTS, (y_t, t, img), strict=True)}
        return torch.from_numpy(run(given).copy())

    return network
