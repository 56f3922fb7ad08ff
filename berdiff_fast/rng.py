# SPDX-License-Identifier: Apache-2.0
"""The random numbers of the draw contract (``docs/draw.md``) in plain PyTorch.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is a pure
function of a key and a counter, so every pixel of every mask has its own number whatever is drawn
beside it. The kernels compute the same function; this file is what they are compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from berdiff_fast import checks

#: Version of the draw contract. Any change of a rule in ``docs/draw.md`` is a new version.
DRAW_CONTRACT = 1

#: Stream tags: the fourth counter word keeps draws made for different purposes apart.
STREAM_INITIAL_NOISE = 0
STREAM_SAMPLING_STEP = 1
STREAM_TRAINING_NOISE = 2
STREAM_MODES = 3
#: Procedural test images; not part of the draw contract.
STREAM_PHANTOM = 0x7068616E

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _multiply_high_low(multiplier: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # The 64-bit product wraps in int64; its bits are still those of the unsigned product.
    product = word * multiplier
    return (product >> 32) & _MASK32, product & _MASK32


def philox4x32(
    counter: Sequence[torch.Tensor | int], key: Sequence[torch.Tensor | int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-10: four 32-bit words for each counter.

    Args:
        counter: four integers or broadcastable int64 tensors, each in [0, 2^32).
        key: two integers or broadcastable int64 tensors, each in [0, 2^32).

    Returns:
        Four int64 tensors of the broadcast shape, each in [0, 2^32).
    """
    given = (*counter, *key)
    device = next((word.device for word in given if isinstance(word, torch.Tensor)), torch.device("cpu"))
    c0, c1, c2, c3, k0, k1 = torch.broadcast_tensors(
        *(
            word if isinstance(word, torch.Tensor) else torch.full((), word, dtype=torch.int64, device=device)
            for word in given
        )
    )
    for _ in range(_ROUNDS):
        high0, low0 = _multiply_high_low(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_high_low(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def words(
    seeds: torch.Tensor,
    count: int,
    *,
    sample: torch.Tensor | int = 0,
    tag: torch.Tensor | int = 0,
    stream: int = 0,
) -> torch.Tensor:
    """The first ``count`` words of each seed's sequence: pixel i takes word ``i & 3`` of block ``i >> 2``.

    Args:
        seeds: (N,) int64, read as unsigned 64-bit keys.
        count: numbers per seed.
        sample: (N,) int64 or int, the second counter word (the index of the mask).
        tag: (N,) int64 or int, the third counter word (the timestep).
        stream: the fourth counter word.

    Returns:
        (N, count) int64 in [0, 2^32).
    """
    column = seeds.reshape(-1, 1)
    device = column.device

    def as_column(value: torch.Tensor | int) -> torch.Tensor:
        if not isinstance(value, torch.Tensor):
            # Filled on the device: a copy from the host would make it wait.
            return torch.full((1, 1), value & _MASK32, dtype=torch.int64, device=device)
        return value.reshape(-1, 1) & _MASK32

    blocks = torch.arange((count + 3) // 4, device=device)
    four = philox4x32(
        (blocks, as_column(sample), as_column(tag), stream),
        (column & _MASK32, (column >> 32) & _MASK32),
    )
    return torch.stack(four, dim=-1).flatten(1)[:, :count]


def uniform(words: torch.Tensor) -> torch.Tensor:
    """float32 uniforms in [0, 1): the upper 24 bits of each word times 2^-24, which is exact."""
    return (words >> 8).to(torch.float32) * 2.0**-24


def splitmix64(seed: int, index: int) -> int:
    """Output number ``index`` of the SplitMix64 generator started at ``seed`` (Steele et al., OOPSLA 2014)."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def signed64(value: int) -> int:
    """The int64 with the same 64 bits as ``value`` modulo 2^64."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def image_seeds(seed: int, count: int) -> torch.Tensor:
    """The seeds that ``sample(..., seed=seed)`` gives to the ``count`` images of a batch.

    Passing ``int(image_seeds(s, B)[b])`` in a list draws image ``b`` of that batch again, alone.

    Args:
        seed: any Python int; it is taken modulo 2^64.
        count: number of images.

    Returns:
        (count,) int64 on the CPU; the bits are unsigned 64-bit keys.
    """
    seed, count = checks.integer("seed", seed), checks.integer("count", count, 0)
    values = [signed64(splitmix64(seed, index)) for index in range(count)]
    return torch.tensor(values, dtype=torch.int64, device="cpu")
