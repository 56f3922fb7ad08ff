# SPDX-License-Identifier: Apache-2.0
"""The same kernels several times over: ``reference``, ``cpp``, ``cuda``, ``triton``, and ``select`` between them."""
