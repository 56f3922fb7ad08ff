# SPDX-License-Identifier: Apache-2.0
"""A training run is told to stop by a signal, and all its processes agree on the step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set, so that the step at hand is finished and saved.

    A second Ctrl-C interrupts at once.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals are the main thread's
        return
    previous: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, _: Any) -> None:
        stop.set()
        if number == signal.SIGINT:
            signal.signal(number, previous[number])

    for number in previous:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def agreed(stop: threading.Event, accelerator: Accelerator, step: int) -> bool:
    """Whether any process was told to stop; several of them ask each other every tenth step."""
    if accelerator.num_processes == 1:
        return stop.is_set()
    if step % 10:
        return False
    if stop.is_set():
        accelerator.set_trigger()
    return accelerator.check_trigger()
