# SPDX-License-Identifier: Apache-2.0
"""Without a GPU the Triton kernels run under Triton's interpreter, which has to be chosen before Triton is imported."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

pytest_plugins = ["pytester", "browsing", "import_trees"]

HAS_GPU = torch.cuda.is_available()

if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


# tests/test_avx512_emulated.py runs tests on a module that it built itself.
if "BERDIFF_FAST_TEST_CPU_MODULE" in os.environ:
    import berdiff_fast

    spec = importlib.util.spec_from_file_location("berdiff_fast._cpu", os.environ["BERDIFF_FAST_TEST_CPU_MODULE"])
    assert spec is not None
    assert spec.loader is not None
    berdiff_fast._cpu = sys.modules["berdiff_fast._cpu"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(berdiff_fast._cpu)

# And tests/test_cuda_emulated.py on the CUDA kernels.
if "BERDIFF_FAST_TEST_CUDA_MODULE" in os.environ:
    import emulated_cuda

    emulated_cuda.install(Path(os.environ["BERDIFF_FAST_TEST_CUDA_MODULE"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="no NVIDIA GPU on this machine")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
