# SPDX-License-Identifier: Apache-2.0
"""Philox4x32-10 and SplitMix64: published values, on the reference and on every compiled instruction set."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from berdiff_fast import image_seeds, rng

#: Counter, key, output: the known answers that come with Random123 (Salmon et al.).
KNOWN = {
    "zeros": ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}
ISAS = ("portable", "avx2", "avx512")
needs_cpp = pytest.mark.skipif(
    importlib.util.find_spec("berdiff_fast._cpu") is None, reason="berdiff_fast._cpu not built"
)


@pytest.fixture(params=[pytest.param(isa, marks=needs_cpp) for isa in ISAS])
def isa(request) -> Iterator[str]:
    from berdiff_fast.backends import cpp

    if request.param not in cpp.available_isas():
        pytest.skip(f"this build or this CPU has no {request.param}")
    with cpp.use_isa(request.param):
        yield request.param


def compiled_words(seed: int, sample: int, tag: int, stream: int, first_block: int, blocks: int) -> list[int]:
    """Words of consecutive blocks from the compiled module; checks that it writes these and no others."""
    from berdiff_fast import _cpu

    guard = 64
    out = torch.full((4 * blocks + guard,), 0x5A5A5A5A, dtype=torch.int32)
    _cpu.words(out.data_ptr(), seed, sample, tag, stream, first_block, blocks)
    assert bool((out[4 * blocks :] == 0x5A5A5A5A).all()), "it wrote beyond its last block"
    return [word & 0xFFFFFFFF for word in out[: 4 * blocks].tolist()]


# ---------------------------------------------------------------------- Philox


@pytest.mark.parametrize("name", KNOWN)
def test_known_answers_of_the_reference(name):
    counter, key, expected = KNOWN[name]
    assert tuple(int(word) for word in rng.philox4x32(counter, key)) == expected


@pytest.mark.parametrize("name", KNOWN)
def test_known_answers_of_the_compiled_module(name, isa):
    (block, sample, tag, stream), (low, high), expected = KNOWN[name]
    assert tuple(compiled_words(high << 32 | low, sample, tag, stream, block, 1)) == expected


@pytest.mark.parametrize(
    "first_block",
    [0, 1, 2**29 - 3, 2**29 + 7, 2**30 - 5, 2**31 - 9, 2**31 + 2, 2**32 - 37],
    ids=lambda block: f"{block:#x}",
)
@pytest.mark.parametrize("blocks", [1, 5, 37])
def test_compiled_blocks_are_those_of_the_reference(first_block, blocks, isa):
    """Beyond block 2^29 a pixel's index leaves int32; the last block of all is number 2^32 - 1."""
    sample, tag, stream, seed = 0xFFFFFFF0, 999, 1, 0xFEDCBA9876543210
    numbers = torch.arange(first_block, first_block + blocks)
    four = rng.philox4x32((numbers, sample, tag, stream), (seed & 0xFFFFFFFF, seed >> 32))
    expected = torch.stack(four, dim=1).flatten().tolist()
    assert compiled_words(seed, sample, tag, stream, first_block, blocks) == expected


def test_philox_broadcasts():
    blocks, keys = torch.arange(5), torch.arange(3).reshape(3, 1)
    out = rng.philox4x32((blocks, 1, 2, 3), (keys, 7))
    assert all(word.shape == (3, 5) and word.dtype == torch.int64 for word in out)
    for k in range(3):
        for b in range(5):
            one = rng.philox4x32((b, 1, 2, 3), (k, 7))
            assert [int(word[k, b]) for word in out] == [int(word) for word in one]


def test_every_bit_of_counter_and_key_matters():
    """About half of the output's 128 bits turn when any one of the 192 input bits does."""
    counter, key, _ = KNOWN["pi"]
    start = [*counter, *key]
    inputs = [start]
    for word in range(6):
        for bit in range(32):
            inputs.append([value ^ (1 << bit if i == word else 0) for i, value in enumerate(start)])
    columns = torch.tensor(inputs).unbind(1)
    out = torch.stack(rng.philox4x32(columns[:4], columns[4:]), dim=1)
    turned = out[1:] ^ out[:1]
    counts = ((turned[..., None] >> torch.arange(32)) & 1).sum((1, 2))
    # Binomial(128, 1/2) has deviation 5.7; 36 is 6.4 of them, a chance of 3e-8 over the 192 bits.
    assert counts.shape == (192,) and counts.min() >= 64 - 36 and counts.max() <= 64 + 36


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 13])
def test_pixel_i_takes_word_i_and_3_of_block_i_shift_2(count):
    seeds = torch.tensor([0, -1, 0x1234_5678_9ABC_DEF0])
    samples, tags = torch.tensor([0, 7, 2**32 - 1]), torch.tensor([999, 0, 5])
    found = rng.words(seeds, count, sample=samples, tag=tags, stream=2)
    assert found.shape == (3, count)
    for row, seed in enumerate(seeds.tolist()):
        key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
        for i in range(count):
            block = rng.philox4x32((i >> 2, int(samples[row]), int(tags[row]), 2), key)
            assert found[row, i] == block[i & 3]


def test_a_sequence_does_not_depend_on_what_is_drawn_beside_it():
    seeds = torch.tensor([3, 5])
    both = rng.words(seeds, 40)
    assert torch.equal(rng.words(seeds[1:], 40), both[1:])
    assert torch.equal(rng.words(seeds, 11), both[:, :11])


def test_uniforms_are_the_upper_24_bits():
    words = torch.tensor([0, 0xFF, 0x100, 0x80000000, 0x7FFFFFFF, 0xFFFFFFFF])
    uniform = rng.uniform(words)
    assert uniform.dtype == torch.float32
    assert uniform.tolist() == [0.0, 0.0, 2.0**-24, 0.5, 0.5 - 2.0**-24, 1 - 2.0**-24]


def test_streams_are_apart():
    tags = [rng.STREAM_INITIAL_NOISE, rng.STREAM_SAMPLING_STEP, rng.STREAM_TRAINING_NOISE, rng.STREAM_MODES]
    tags.append(rng.STREAM_PHANTOM)
    assert tags[:4] == [0, 1, 2, 3], "part of the draw contract"
    seeds = torch.tensor([11])
    drawn = {tuple(rng.words(seeds, 4, stream=tag)[0].tolist()) for tag in tags}
    assert len(drawn) == len(tags)
    assert rng.DRAW_CONTRACT == 1


# ---------------------------------------------------------------------- SplitMix64 and the seeds of images


def test_splitmix64_known_answers():
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [rng.splitmix64(1234567, i) for i in range(5)] == expected
    assert rng.splitmix64(0, 0) == 0xE220A8397B1DCDAF


def test_signed64():
    assert rng.signed64(0) == 0
    assert rng.signed64(2**63 - 1) == 2**63 - 1
    assert rng.signed64(2**63) == -(2**63)
    assert rng.signed64(2**64 - 1) == rng.signed64(-1) == -1
    assert rng.signed64(2**64 + 5) == 5


def test_image_seeds():
    seeds = image_seeds(1234567, 3)
    assert seeds.dtype == torch.int64 and seeds.device.type == "cpu"
    assert seeds[:2].tolist() == [6457827717110365317, 3203168211198807973]
    # A longer batch begins like a shorter one, and the seed counts modulo 2^64.
    assert torch.equal(image_seeds(1234567, 2), seeds[:2])
    assert torch.equal(image_seeds(1234567 + 2**64, 3), seeds)
    assert torch.equal(image_seeds(-1, 3), image_seeds(2**64 - 1, 3))
    assert image_seeds(0, 0).shape == (0,)


def test_image_seeds_are_distinct():
    """SplitMix64 runs through all 2^64 states and its output is a bijection of them, so no seed comes twice; and the
    sequences of neighbouring ints do not overlap, as those of s and s + the step of the state would."""
    seeds = torch.cat([image_seeds(s, 1000) for s in (0, 1, 2, 3, -1, 2**32, 2**63)])
    assert len(seeds.unique()) == len(seeds)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((1.0, 2), TypeError, "seed must be an int, got float"),
        ((True, 2), TypeError, "seed must be an int, got bool"),
        ((None, 2), TypeError, "seed must be an int, got NoneType"),
        ((0, 2.0), TypeError, "count must be an int, got float"),
        ((0, False), TypeError, "count must be an int, got bool"),
        ((0, -1), ValueError, "count must be at least 0, got -1"),
    ],
)
def test_image_seeds_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        image_seeds(*arguments)
