# SPDX-License-Identifier: Apache-2.0
"""The machine in every JSON, and plain medians of many rounds."""

from __future__ import annotations

import torch

import berdiff_fast
from berdiff_fast.info import collect


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(collect())
    machine_info["berdiff_fast"] = berdiff_fast.__version__
    machine_info["torch_threads"] = torch.get_num_threads()


def pytest_benchmark_update_json(config, benchmarks, output_json):
    # Statistics are enough; the rounds one by one would be most of the file.
    for case in output_json["benchmarks"]:
        case["stats"].pop("data", None)
    output_json["machine_info"].pop("node", None)
