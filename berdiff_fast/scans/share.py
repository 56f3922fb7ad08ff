# SPDX-License-Identifier: Apache-2.0
"""Which of several processes this one is: under ``accelerate launch``, ``torchrun``, or in a SLURM array."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """One process of several.

    Attributes:
        rank: which, from 0.
        count: of how many.
        local: which of those on this machine: the number of its GPU.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Share:
        """By what launchers say in environment variables; what is no number counts as not said.

        A SLURM array of jobs, each of several processes, has the product of both.
        """

        def number(name: str, otherwise: int) -> int:
            text = environment.get(name, "")
            return int(text) if text.isdecimal() else otherwise

        if number("WORLD_SIZE", 1) > 1:
            rank, count, local = number("RANK", 0), number("WORLD_SIZE", 1), number("LOCAL_RANK", 0)
        elif "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
            rank, count = number("SLURM_PROCID", 0), number("SLURM_STEP_NUM_TASKS", 1)
            local = number("SLURM_LOCALID", 0)
        else:
            rank, count, local = 0, 1, 0
        if "SLURM_ARRAY_TASK_ID" in environment:
            first, step = number("SLURM_ARRAY_TASK_MIN", 0), max(1, number("SLURM_ARRAY_TASK_STEP", 1))
            jobs = max(1, number("SLURM_ARRAY_TASK_COUNT", 1))
            job = (number("SLURM_ARRAY_TASK_ID", first) - first) // step % jobs
            rank, count = job * count + rank, jobs * count
        return cls(rank % max(1, count), max(1, count), local)

    def own(self, things: Sequence[T]) -> list[T]:
        """Those that are this process's: every ``count``-th."""
        return [*things[self.rank :: self.count]]

    def others(self, things: Sequence[T]) -> list[T]:
        """Those of the other processes, beginning with the next one's, which takes turns with the rest."""
        shift = (self.rank + 1) % self.count
        rest = [thing for k, thing in enumerate(things) if k % self.count != self.rank]
        start = shift * len(rest) // self.count
        return rest[start:] + rest[:start]
