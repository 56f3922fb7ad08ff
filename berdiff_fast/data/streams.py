# SPDX-License-Identifier: Apache-2.0
"""``numpy.random.default_rng([*key, p])`` for many p at once: the same numbers, without a generator for each.

A generator costs some ten microseconds to make, a stream of thousands half of one. The algorithms are published, and
NumPy keeps them: the hash of ``SeedSequence`` (O'Neill, "Developing a seed_seq alternative", 2015), PCG XSL-RR 128/64
(O'Neill, "PCG: a family of simple fast space-efficient statistically good algorithms", 2014), integers below a bound
after Lemire (arXiv 1805.10941). The tests compare with NumPy.
"""

from __future__ import annotations

import numpy as np

_POOL = 4
_MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645  # PCG's, of 128 bits
_32 = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)


class Streams:
    """One stream of random numbers for each position.

    Args:
        key: integers of at least 0, the same for all streams.
        positions: (N,) int64 of at least 0, which end the key.
    """

    def __init__(self, key: list[int], positions: np.ndarray) -> None:
        positions = np.asarray(positions, np.uint64)
        words = [np.full(len(positions), word, np.uint32) for number in key for word in _words(number)]
        state = _generate(_mix([*words, (positions & _LOW).astype(np.uint32)], (positions >> _32).astype(np.uint32)))
        # The generator's first state, of two 64-bit words here: inc + seed, one step on.
        increment = state[2] << np.uint64(1) | state[3] >> np.uint64(63), state[3] << np.uint64(1) | np.uint64(1)
        self._increment = increment
        self._state = _step(_add(increment, (state[0], state[1])), increment)
        # Of 64 bits, 32 are used at a time; the upper half waits for the next call.
        self._half = np.zeros(len(positions), np.uint64)
        self._waits = np.zeros(len(positions), bool)

    def _next64(self, where: np.ndarray | None = None) -> np.ndarray:
        state = _step(self._state, self._increment)
        if where is not None:
            state = np.where(where, state[0], self._state[0]), np.where(where, state[1], self._state[1])
        self._state = high, low = state
        value, turn = high ^ low, high >> np.uint64(58)
        return value >> turn | value << (np.uint64(64) - turn & np.uint64(63))

    def _next32(self, where: np.ndarray) -> np.ndarray:
        fresh = where & ~self._waits
        value = self._next64(fresh)
        result = np.where(self._waits, self._half, value & _LOW)
        self._half = np.where(fresh, value >> _32, self._half)
        self._waits = self._waits ^ where
        return result

    def random(self) -> np.ndarray:
        """(N,) float64, uniform in [0, 1): ``Generator.random()``."""
        return (self._next64() >> np.uint64(11)) * 2.0**-53

    def uniform(self, low: float, high: float) -> np.ndarray:
        """(N,) float64: ``Generator.uniform(low, high)``."""
        return low + (high - low) * self.random()

    def bits63(self) -> np.ndarray:
        """(N,) int64 in [0, 2^63): ``Generator.integers(2**63)``."""
        return (self._next64() >> np.uint64(1)).astype(np.int64)

    def integers(self, high: int | np.ndarray) -> np.ndarray:
        """(N,) int64 in [0, high): ``Generator.integers(high)``, for bounds in [1, 2^32), one for all or one each."""
        bound = np.broadcast_to(np.asarray(high, np.uint64), self._half.shape)
        # Where there is one choice nothing is drawn.
        missing = bound > 1
        threshold = (np.uint64(2**32) - bound) % bound
        result = np.zeros(bound.shape, np.uint64)
        while missing.any():
            product = self._next32(missing) * bound
            taken = missing & ((product & _LOW) >= threshold)
            result = np.where(taken, product >> _32, result)
            missing = missing & ~taken
        return result.astype(np.int64)


def _words(number: int) -> list[int]:
    """The 32-bit words of a number, lowest first, as ``SeedSequence`` takes them."""
    words = [number & 0xFFFFFFFF]
    while number := number >> 32:
        words.append(number & 0xFFFFFFFF)
    return words


def _mix(entropy: list[np.ndarray], last: np.ndarray) -> list[np.ndarray]:
    """The pool of ``SeedSequence``: four uint32 for each stream. The last word counts only where it is not 0."""
    constant = 0x43B0D7E5

    def hashed(value: np.ndarray) -> np.ndarray:
        nonlocal constant
        value = value ^ np.uint32(constant)
        constant = constant * 0x931E8875 & 0xFFFFFFFF
        value = value * np.uint32(constant)
        return value ^ value >> np.uint32(16)

    def mixed(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        value = x * np.uint32(0xCA01F9DD) - y * np.uint32(0x4973F715)
        return value ^ value >> np.uint32(16)

    # What is missing of four words is 0.
    words = [*entropy, last, *[np.zeros_like(last)] * _POOL][:_POOL]
    pool = [hashed(word) for word in words]
    for source in range(_POOL):
        for target in range(_POOL):
            if source != target:
                pool[target] = mixed(pool[target], hashed(pool[source]))
    for more in entropy[_POOL:]:
        for target in range(_POOL):
            pool[target] = mixed(pool[target], hashed(more))
    if len(entropy) >= _POOL:
        pool = [np.where(last > 0, mixed(word, hashed(last)), word) for word in pool]
    return pool


def _generate(pool: list[np.ndarray]) -> list[np.ndarray]:
    """Four uint64 for each stream: ``SeedSequence.generate_state(4, np.uint64)``."""
    constant, words = 0x8B51F9DD, []
    for i in range(8):
        value = pool[i % _POOL] ^ np.uint32(constant)
        constant = constant * 0x58F38DED & 0xFFFFFFFF
        value = value * np.uint32(constant)
        words.append((value ^ value >> np.uint32(16)).astype(np.uint64))
    return [words[i] | words[i + 1] << _32 for i in range(0, 8, 2)]


_Wide = tuple[np.ndarray, np.ndarray]  # upper and lower 64 bits


def _add(a: _Wide, b: _Wide) -> _Wide:
    low = a[1] + b[1]
    return a[0] + b[0] + (low < a[1]), low


def _step(state: _Wide, increment: _Wide) -> _Wide:
    """state * multiplier + increment, modulo 2^128."""
    high, low = state
    m_high, m_low = np.uint64(_MULTIPLIER >> 64), np.uint64(_MULTIPLIER & 0xFFFFFFFFFFFFFFFF)
    # low * m_low has 128 bits, put together from products of 32 by 32.
    a, b, c, d = low >> _32, low & _LOW, m_low >> _32, m_low & _LOW
    bd, ad, bc = b * d, a * d, b * c
    middle = (bd >> _32) + (ad & _LOW) + (bc & _LOW)
    upper = a * c + (ad >> _32) + (bc >> _32) + (middle >> _32)
    return _add((upper + high * m_low + low * m_high, low * m_low), increment)
