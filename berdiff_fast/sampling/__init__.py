# SPDX-License-Identifier: Apache-2.0
"""Sampling: from images, a model and a seed to masks.

``loop.py`` is the algorithm. ``sampler.py`` takes the arguments, ``plan.py`` says what masks depend on, ``chunks.py``
shares the masks out over calls of the network, and ``denoisers.py`` are the forms in which a network is asked.
"""

from berdiff_fast.sampling.plan import FINALS, Plan
from berdiff_fast.sampling.sampler import Sampler, sample

__all__ = ["FINALS", "Plan", "Sampler", "sample"]
