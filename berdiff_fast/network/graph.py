# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of the sampler's work: all steps of some masks, recorded once and launched by one call of the host."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

logger = logging.getLogger("berdiff_fast")

#: Draws masks of images from seeds, and raises flags: ``draw(img, seeds, flags) -> masks``. Seeds are (B, 2), a seed
#: and the index of the first sample: data of the graph, so that one graph draws any samples of any images.
Draw = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

#: Graphs that are kept of a network. Those of a device share the memory of their activations.
KEPT = 4

# One graph is captured at a time in a process, on one stream a device. Replays of a device take turns, since its graphs
# share memory and a library's workspace; each waits for the event that the one before recorded.
_lock = threading.RLock()
_last: dict[torch.device, torch.cuda.Event] = {}
_streams: dict[torch.device, torch.cuda.Stream] = {}
_pools: dict[torch.device, Any] = {}
_late: list[Any] = []  # of graphs that were dropped while another one was captured


def captured(
    graphs: dict[Any, Graph | bool],
    key: tuple[Any, ...],
    draw: Draw,
    img: torch.Tensor,
    seeds: torch.Tensor,
    flags: int,
    keep_alive: Any,
    *,
    check: bool,
) -> Graph | None:
    """The graph of ``draw`` for images like these: one that is kept in ``graphs``, or captured now.

    Args:
        graphs: of one network. True stands for work that was asked for once, and False for what cannot be captured.
        key: what ``draw`` does, beside shape and dtype of the images and torch's settings.
        flags, keep_alive, check: see ``Graph``.

    Returns:
        None at the first call, since capturing takes longer than a call; where it cannot be captured, about which the
        log says why, once; and under autocast, whose copies of weights do not outlive it.

    Raises:
        RuntimeError: out of memory (``is_out_of_memory``).
    """
    if torch.is_autocast_enabled(img.device.type):
        return None
    key = (tuple(img.shape), img.dtype, img.device, settings(), *key)
    with _lock:
        if key not in graphs:
            while len(graphs) >= KEPT:
                drop(graphs, next(iter(graphs)))
            graphs[key] = True
            return None
        if graphs[key] is True:
            try:
                graphs[key] = Graph(draw, img, seeds, flags, keep_alive, check)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                logger.warning("no CUDA graph, so every kernel is launched by itself: %s", error)
                graphs[key] = False
        found = graphs[key]
        return found if isinstance(found, Graph) else None


def settings() -> tuple[Any, ...]:
    """What of torch's settings chooses kernels: a graph repeats the choice that was made when it was captured."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return (
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        cudnn.allow_tf32,
        matmul.allow_tf32,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
    )


def drop(graphs: dict[Any, Graph | bool], key: Any = None) -> None:
    """Forget a graph, or all of them, once their last replays are done."""
    with _lock:
        for each in list(graphs) if key is None else [key]:
            found = graphs.pop(each, None)
            if isinstance(found, Graph):
                found.close()


class Graph:
    """``draw`` as one CUDA graph, whose inputs are images, seeds and the index of the first sample.

    Args:
        draw: the same work at every call.
        img, seeds: examples; seeds (B,).
        flags: how many ``draw`` is given.
        keep_alive: what its kernels read beside these, unless it outlives the graph anyway.
        check: for modules that a user wrote: refuse what makes the host wait, which a graph cannot, and a replay whose
            masks differ from the module's.

    Raises:
        RuntimeError: it cannot be captured, or not faithfully.
    """

    def __init__(
        self, draw: Draw, img: torch.Tensor, seeds: torch.Tensor, flags: int, keep_alive: Any, check: bool
    ) -> None:
        self._keep_alive = keep_alive
        self._device = device = img.device
        before = torch.cuda.current_stream(device)
        if device not in _streams:
            _streams[device] = torch.cuda.Stream(device)
        aside = _streams[device]
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._img = img.clone()
            self._seeds = torch.stack([seeds, torch.zeros_like(seeds)], dim=1)
            self._flags = torch.zeros(flags, dtype=torch.int32, device=device)
            inputs = self._img, self._seeds, self._flags
            aside.wait_stream(before)
            try:
                # This context is left in order even where leaving that of the capture fails.
                with torch.cuda.stream(aside):
                    draw(*inputs)  # libraries choose their algorithms and Triton compiles before anything is recorded
                    if check:
                        with _host_must_not_wait():
                            expected = draw(*inputs)
                    with _capturing(device, aside) as self._graph:
                        self._flags.zero_()
                        self._masks = draw(*inputs)
                    self._open = True
                    if check:
                        self._graph.replay()
                        if not torch.equal(self._masks, expected):
                            raise RuntimeError("its replay draws other masks than the network itself")
            finally:
                aside.synchronize()  # what it reads and writes may be freed now, or used on another stream

    def replay(
        self, img: torch.Tensor, seeds: torch.Tensor, first_sample: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks and flags of these images, from sample ``first_sample`` on. Threads and streams take turns."""
        with _lock:
            stream = torch.cuda.current_stream(img.device)
            done = _last.setdefault(img.device, torch.cuda.Event())
            stream.wait_event(done)
            self._img.copy_(img)
            self._seeds[:, 0].copy_(seeds)
            self._seeds[:, 1].fill_(first_sample)
            self._graph.replay()
            found = self._masks.clone(), self._flags.clone()
            done.record(stream)
        return found

    def close(self) -> None:
        """Give its memory back, when nothing of it runs any more. It cannot be replayed after that."""
        with _lock:
            if self.__dict__.pop("_open", None) is None:
                return
            if torch.cuda.is_current_stream_capturing():
                _late.append((self._graph, self._masks))  # waiting now would spoil the capture
                return
            if self._device in _last:
                _last[self._device].synchronize()
            _late.clear()
            self._graph.reset()

    def __del__(self) -> None:
        self.close()


@contextmanager
def _capturing(device: torch.device, stream: torch.cuda.Stream) -> Iterator[torch.cuda.CUDAGraph]:
    """What is launched on ``stream`` goes into the graph that this yields; its memory comes from the device's pool.

    cuBLAS keeps a workspace for each stream. One made before would be freed by ``empty_cache`` while the graph still
    has its address, and one made in the pool must not be used by others (pytorch #192061): both are cleared.
    """
    if device not in _pools:
        _pools[device] = torch.cuda.graph_pool_handle()
    graph = torch.cuda.CUDAGraph()
    _clear_cublas_workspaces()
    try:
        with torch.cuda.graph(graph, pool=_pools[device], stream=stream, capture_error_mode="thread_local"):
            yield graph
    except BaseException:
        # torch 2.11 leaves its allocator capturing where a capture fails (pytorch #180395): everything that is
        # allocated later would go into the pool. The pool itself is given up, since nobody knows what is in it.
        _end_allocation_to_pool(device, _pools.pop(device))
        raise
    finally:
        _clear_cublas_workspaces()


def _clear_cublas_workspaces() -> None:
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()


def _end_allocation_to_pool(device: torch.device, pool: Any) -> None:
    index = torch.cuda.current_device() if device.index is None else device.index
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        end = getattr(torch._C, name, None)
        try:
            if end is not None:
                end(index, pool)
        except RuntimeError as error:  # newer versions have ended it themselves
            logger.debug("%s: %s", name, error)


@contextmanager
def _host_must_not_wait() -> Iterator[None]:
    """Raises a RuntimeError if this thread waited for the device.

    By warnings: the mode holds for all threads, and as an error it would break what others do.
    """
    waited: list[str] = []
    before, thread = torch.cuda.get_sync_debug_mode(), threading.get_ident()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if threading.get_ident() == thread and "called a synchronizing" in str(message):
            waited.append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    if waited:
        raise RuntimeError(waited[0])


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU's memory did not suffice: in the words of torch, its libraries, Triton or our own module.

    "CUDA out of memory", "CUDA error: out of memory", "Triton Error [CUDA]: out of memory", "CUDA kernel sample_step:
    out of memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED". ("out of resource" is no lack of memory.)
    """
    words = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "out of memory" in words
        or "CUDNN_STATUS_ALLOC_FAILED" in words
        or "CUBLAS_STATUS_ALLOC_FAILED" in words
    )
