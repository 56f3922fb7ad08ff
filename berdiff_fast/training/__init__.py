# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation: ``config``, ``loop``, ``checkpoints``, ``records``, ``evaluate``; the extra ``[train]``."""

from __future__ import annotations

from berdiff_fast import _optional


def require() -> None:
    """Raise an ImportError that tells how to install what training needs, where it is missing."""
    for package in ("accelerate", "yaml"):
        _optional.require(package, "train")


def on_cpu(device: str) -> bool:
    """Whether "auto" or "cpu" means the CPU. Accelerate has to be told: left to itself on a machine without a GPU, it
    takes every process that torchrun started for the only one."""
    import torch

    return device == "cpu" or not torch.cuda.is_available()


def leave() -> None:
    """Part from the other processes, if there are any, once each has finished. Threads of gloo that outlive the
    interpreter abort it now and then, and torchrun ends every process for one that aborts, whatever it is writing
    (pytorch/pytorch#179291)."""
    from accelerate import PartialState

    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()
