# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels, for a GPU without the CUDA module; under ``TRITON_INTERPRET=1`` also for the CPU.

This module is the backend: a function per op, each in the file of its family, below its kernels. The fused network's
layers are in ``layers``, which is imported only where they are used.
"""

from berdiff_fast.backends.triton.draw import initial_noise, posterior, q_sample, sample_step
from berdiff_fast.backends.triton.group_norm import group_norm_silu
from berdiff_fast.backends.triton.loss import diffusion_loss
from berdiff_fast.backends.triton.overlap import overlap

__all__ = [
    "diffusion_loss",
    "group_norm_silu",
    "initial_noise",
    "overlap",
    "posterior",
    "q_sample",
    "sample_step",
]
