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

#: Draws masks of images from seeds, and raises flags: ``draw(img, seeds, flags) -> masks``.
Draw = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

#: Graphs that are kept of a network, each with the memory of its activations.
KEPT = 4

# One graph is captured at a time in a process. Those of a device take turns, too: they may share a library's workspace.
_lock = threading.RLock()
_last: dict[torch.device, torch.cuda.Event] = {}


def captured(
    graphs: dict[Any, Graph | bool],
    key: tuple[Any, ...],
    draw: Draw,
    img: torch.Tensor,
    seeds: torch.Tensor,
    flags: int,
    keep: Any,
    *,
    check: bool,
) -> Graph | None:
    """The graph of ``draw`` for images like these: one that is kept in ``graphs``, or captured now.

    Args:
        graphs: of one network. True stands for work that was asked for once, and False for what cannot be captured.
        key: what ``draw`` does, beside shape and dtype of the images.
        flags, keep, check: see ``Graph``.

    Returns:
        None at the first call, since capturing takes longer than a call; where it cannot be captured, about which the
        log says why, once; and under autocast, whose copies of weights do not outlive it.
    """
    if torch.is_autocast_enabled(img.device.type):
        return None
    key = (tuple(img.shape), img.dtype, img.device, *key)
    with _lock:
        if key not in graphs:
            while len(graphs) >= KEPT:
                graphs.pop(next(iter(graphs)))
            graphs[key] = True
            return None
        if graphs[key] is True:
            try:
                graphs[key] = Graph(draw, img, seeds, flags, keep, check)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                logger.warning("no CUDA graph, so every kernel is launched by itself: %s", error)
                graphs[key] = False
        found = graphs[key]
        return found if isinstance(found, Graph) else None


class Graph:
    """``draw`` as one CUDA graph, whose inputs are images and seeds.

    Args:
        draw: the same work at every call.
        img, seeds: examples.
        flags: how many ``draw`` is given.
        keep: what its kernels read beside these, unless it outlives the graph anyway.
        check: for work that nobody here knows: refuse what makes the host wait, which a graph cannot, and what the
            replay does not repeat, bit for bit.

    Raises:
        RuntimeError: it cannot be captured, or not faithfully.
    """

    def __init__(self, draw: Draw, img: torch.Tensor, seeds: torch.Tensor, flags: int, keep: Any, check: bool) -> None:
        self._keep = keep
        self._graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(img.device)
        aside = torch.cuda.Stream(img.device)
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._img, self._seeds = img.clone(), seeds.clone()
            self._flags = torch.zeros(flags, dtype=torch.int32, device=img.device)
            inputs = self._img, self._seeds, self._flags
            aside.wait_stream(before)
            try:
                # This context is left in order even where leaving that of the capture fails.
                with torch.cuda.stream(aside):
                    draw(*inputs)  # libraries choose their algorithms and Triton compiles before anything is recorded
                    if check:
                        with _host_must_not_wait():
                            expected = draw(*inputs)
                    with torch.cuda.graph(self._graph, stream=aside, capture_error_mode="thread_local"):
                        self._flags.zero_()
                        self._masks = draw(*inputs)
                    if check:
                        self._graph.replay()
                        if not torch.equal(self._masks, expected):
                            raise RuntimeError("its replay draws other masks than the network itself")
            finally:
                aside.synchronize()  # what it reads and writes may be freed now, or used on another stream

    def replay(self, img: torch.Tensor, seeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks and flags of these images. Threads and streams take turns."""
        with _lock:
            stream = torch.cuda.current_stream(img.device)
            done = _last.setdefault(img.device, torch.cuda.Event())
            stream.wait_event(done)
            self._img.copy_(img)
            self._seeds.copy_(seeds)
            self._graph.replay()
            found = self._masks.clone(), self._flags.clone()
            done.record(stream)
        return found


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
    words = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "CUDNN_STATUS_ALLOC_FAILED" in words
        or "CUBLAS_STATUS_ALLOC_FAILED" in words
    )
