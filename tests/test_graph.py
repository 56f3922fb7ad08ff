# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs on a CPU: torch.cuda in the hands of a stub that writes down what it is asked for."""

from __future__ import annotations

import gc
import threading
from contextlib import contextmanager

import pytest
import torch

import berdiff_fast as bf
from berdiff_fast.network import fused, graph, inference


class Log(list):
    """What was done, in order; allocations are counted by pool."""

    fails: str | None = None


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda as ``graph`` uses it."""
    log = Log()

    class CUDAGraph:
        def replay(self):
            log.append("replay")

        def reset(self):
            log.append("reset")

    class Event:
        def record(self, stream):
            log.append("record")

        def synchronize(self):
            log.append("wait for the last replay")

    class Stream:
        def __init__(self, device=None):
            log.append("new stream")

        def wait_stream(self, other):
            pass

        def wait_event(self, event):
            log.append("wait event")

        def synchronize(self):
            log.append("synchronize")

    @contextmanager
    def capture(graph_, pool, stream, capture_error_mode):
        log.append(("capture", pool))
        if log.fails:
            raise RuntimeError(log.fails)
        yield
        log.append("captured")

    @contextmanager
    def on(stream):
        yield

    current = Stream()
    log.clear()
    for name, value in dict(
        CUDAGraph=CUDAGraph,
        Event=Event,
        Stream=Stream,
        stream=on,
        graph=capture,
        current_stream=lambda device=None: current,
        current_device=lambda: 0,
        is_current_stream_capturing=lambda: False,
        graph_pool_handle=lambda: log.append("new pool") or f"pool {log.count('new pool')}",
    ).items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("_cuda_clearCublasWorkspaces", "_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *given, name=name: log.append((name, *given)), raising=False)
    for table in (graph._streams, graph._pools, graph._last):
        monkeypatch.setattr(graph, next(n for n, v in vars(graph).items() if v is table), {})
    yield log
    gc.collect()  # what is closed late is closed by the stub


def draw(img, seeds, flags):
    """Masks that tell what they were drawn from: image plus seed plus first sample."""
    return img + (seeds[:, 0] + seeds[:, 1]).view(-1, 1, 1, 1)


def ask(graphs, key=(), size=4, function=draw):
    img, seeds = torch.zeros(1, 1, size, size), torch.tensor([100])
    return graph.captured(graphs, key, function, img, seeds, 3, None, check=False)


CLEAR = ("_cuda_clearCublasWorkspaces",)


def test_workspaces_are_cleared_before_and_after_the_capture(cuda):
    graphs = {}
    ask(graphs)
    assert isinstance(ask(graphs), graph.Graph)
    start, end = cuda.index(("capture", "pool 1")), cuda.index("captured")
    assert cuda[start - 1] == CLEAR and CLEAR in cuda[end:]


def test_a_failed_capture_ends_and_releases_its_pool(cuda, caplog):
    graphs = {}
    ask(graphs)
    cuda.fails = "operation not permitted"
    assert ask(graphs) is None and "no CUDA graph" in caplog.text
    assert ("_cuda_endAllocateToPool", 0, "pool 1") in cuda and ("_cuda_releasePool", 0, "pool 1") in cuda
    assert cuda[-1] == "synchronize", "left with work under way"
    cuda.fails = None
    ask(graphs, ("other",))
    assert isinstance(ask(graphs, ("other",)), graph.Graph)
    assert ("capture", "pool 2") in cuda, "nobody knows what is in a pool whose capture failed"


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "CUDA kernel sample_step: out of memory",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_out_of_memory_in_all_words(cuda, words):
    graphs = {}
    ask(graphs)
    cuda.fails = words
    with pytest.raises(RuntimeError, match="ut of memory|ALLOC_FAILED"):
        ask(graphs)
    assert ("_cuda_endAllocateToPool", 0, "pool 1") in cuda
    assert list(graphs.values()) == [True], "it is tried again"
    assert graph.is_out_of_memory(RuntimeError(words))
    assert not graph.is_out_of_memory(RuntimeError("out of resource: shared memory, Required: 300000"))


def test_one_stream_and_one_pool_a_device(cuda):
    graphs = {}
    for key in ("a", "b", "c"):
        ask(graphs, (key,))
        ask(graphs, (key,))
    assert cuda.count("new stream") == cuda.count("new pool") == 1


def test_the_first_sample_is_data(cuda):
    graphs = {}
    ask(graphs)
    found = ask(graphs)
    seen = []
    found._graph.replay = lambda: seen.append(found._seeds.tolist())
    for first in (0, 16, 2**31 + 5):
        found.replay(torch.zeros(1, 1, 4, 4), torch.tensor([7]), first)
    assert seen == [[[7, 0]], [[7, 16]], [[7, 2**31 + 5]]]


def test_a_dropped_graph_waits_for_its_last_replay(cuda):
    graphs = {}
    ask(graphs)
    ask(graphs).replay(torch.zeros(1, 1, 4, 4), torch.tensor([7]))
    cuda.clear()
    graph.drop(graphs)
    assert not graphs and cuda[:2] == ["wait for the last replay", "reset"]


def test_a_graph_dropped_while_another_is_captured_is_closed_later(cuda, monkeypatch):
    graphs = {}
    ask(graphs)
    ask(graphs).replay(torch.zeros(1, 1, 4, 4), torch.tensor([7]))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    cuda.clear()
    graph.drop(graphs)
    assert not cuda and len(graph._late) == 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    ask(graphs, ("next",))
    ask(graphs, ("next",))
    graph.drop(graphs)
    assert not graph._late


@pytest.mark.parametrize("setting", ["benchmark", "deterministic", "allow_tf32"])
def test_settings_are_in_the_key(cuda, monkeypatch, setting):
    graphs = {}
    ask(graphs)
    assert isinstance(ask(graphs), graph.Graph)
    monkeypatch.setattr(torch.backends.cudnn, setting, not getattr(torch.backends.cudnn, setting))
    assert ask(graphs) is None, "a graph of other kernels was taken"


def test_chunks_of_a_call_are_one_graph(cuda, monkeypatch):
    """128 masks by 16: one key, so one graph from the second chunk on."""
    from berdiff_fast.sampling.chunks import Masks
    from berdiff_fast.sampling.denoisers import PreparedDenoiser
    from berdiff_fast.sampling.sampler import graph_key

    model = bf.load("phantom64")
    plan = bf.Sampler(model, 128, 4).plan
    masks = Masks(torch.zeros(1, 1, 64, 64), torch.zeros(1, dtype=torch.int64), 128, 1)
    prepared = PreparedDenoiser(inference.prepare(model.network, plan.timesteps), model.output_window, model.prediction)
    keys = {graph_key(plan, prepared, masks.chunk(first, first + 16)) for first in range(0, 128, 16)}
    assert len(keys) == 1


def test_a_prepared_form_is_made_once_and_whole(monkeypatch):
    """Eight threads ask at once: one makes it, and the others get it when it is done."""
    network, made, seen = bf.load("phantom64").network, [], []

    class Slow(inference.PreparedUNet):
        def __init__(self, *arguments, **options):
            made.append(threading.get_ident())
            super().__init__(*arguments, **options)
            threading.Event().wait(0.05)
            self.whole = True

    monkeypatch.setattr(inference, "PreparedUNet", Slow)
    threads = [threading.Thread(target=lambda: seen.append(inference.prepare(network, [5.0]).whole)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 8 and len(made) == 1


def test_a_prepared_form_is_waited_for(cuda, monkeypatch):
    network = bf.load("phantom64").network
    monkeypatch.setattr(fused, "why_not", lambda *_: "not here")
    monkeypatch.setattr(inference, "_device_of", lambda network: torch.device("cuda", 0))
    monkeypatch.setattr(inference, "PreparedUNet", lambda *_, **__: "made")
    cuda.clear()
    assert inference.prepare(network, [7.0]) == "made"
    assert cuda.count("synchronize") == 1
    assert inference.prepare(network, [7.0]) == "made" and cuda.count("synchronize") == 1, "once, not at every call"
