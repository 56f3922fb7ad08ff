# SPDX-License-Identifier: Apache-2.0
"""How far a call has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from berdiff_fast.sampling.chunks import Masks
from berdiff_fast.sampling.plan import Plan


@contextmanager
def bar_of(masks: Masks, plan: Plan, show: bool | Callable[[float], object]) -> Iterator[Callable[[int], object]]:
    total = masks.rows * len(plan.timesteps)
    if callable(show):
        yield lambda mask_steps: show(mask_steps / total)
        return
    if not show:
        yield lambda mask_steps: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="sampling", unit="mask-step") as bar:
        yield bar.update
