# SPDX-License-Identifier: Apache-2.0
"""That the bits drawn follow the probabilities, as exact tests of hypotheses.

Every test function is one family: Bonferroni keeps the chance that it fails although all is well at 1e-6, whatever
the number of its cells. Bits are drawn by the fastest backend; that the others draw the same ones is shown elsewhere.
"""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from support import (
    ALPHA,
    FASTEST,
    METHODS,
    PREDICTIONS,
    assert_binomial,
    assert_uncorrelated,
    full_table,
    theta,
    uniform_logits,
)

import berdiff_fast as bf
from berdiff_fast import NoiseSchedule, image_seeds, ops, rng

LOGITS = torch.linspace(-20, 20, 41, dtype=torch.float64)
PIXELS = 2**16


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    return NoiseSchedule()


# ---------------------------------------------------------------------- one step


def count_flips(row: torch.Tensor, timestep: int, prediction: str) -> torch.Tensor:
    """(2, 41): of PIXELS bits that are y_t, how many turn, by y_t and epsilon's logit."""
    y_t = torch.tensor([False, True]).reshape(2, 1, 1).expand(2, len(LOGITS), PIXELS).flatten(0, 1)
    z = LOGITS.float().reshape(1, -1, 1).expand(2, -1, PIXELS).flatten(0, 1)
    if prediction == "y_0":
        z = torch.where(y_t, -z, z)
    out = ops.sample_step(
        y_t, z, image_seeds(timestep, len(y_t)), row.float(), timestep, prediction=prediction, backend=FASTEST
    )
    return (out ^ y_t).sum(1).reshape(2, -1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_flip_rates(schedule, method, prediction):
    """Against theta of float64. What the draw adds to it, 2^-24 of u's grid and 4e-6 relative of E, is far below what
    2^16 bits can show."""
    timesteps = schedule.subsequence(10)
    sparse, dense = schedule.step_table(timesteps, method), full_table(schedule, method)
    steps = [(sparse[s], timesteps[s]) for s in (0, 1, 5, 9)] + [(dense[t], t) for t in (1, 2, 500, 999)]
    flips = torch.stack([count_flips(row, t, prediction) for row, t in steps])
    expected = torch.stack([theta(row, LOGITS) for row, _ in steps])
    assert_binomial(flips, PIXELS, expected[:, None])


def test_flip_rates_would_show_a_mistake(schedule):
    """The test above has power: the bits of one method are not those of another, nor of another logit."""
    timesteps = schedule.subsequence(10)
    tables = {method: schedule.step_table(timesteps, method)[5] for method in METHODS}
    for drawn in METHODS:
        flips = count_flips(tables[drawn], timesteps[5], "epsilon")
        assert_binomial(flips, PIXELS, theta(tables[drawn], LOGITS))
        wrong = [theta(tables[other], LOGITS) for other in METHODS if other != drawn]
        wrong += [theta(tables[drawn], LOGITS + 0.3), theta(tables[drawn], -LOGITS)]
        for probability in wrong:
            with pytest.raises(AssertionError, match="p = "):
                assert_binomial(flips, PIXELS, probability)


# ---------------------------------------------------------------------- noise


def test_initial_noise_is_fair():
    seeds = torch.cat([image_seeds(1, 32), torch.arange(32), -1 - torch.arange(32)])
    masks = ops.initial_noise(seeds, (1, 256, 256), samples_per_image=2, backend=FASTEST)
    assert masks.shape == (192, 1, 256, 256)
    assert_binomial(masks.sum((1, 2, 3)), PIXELS, 0.5)
    assert_binomial(masks.sum(0).flatten(), len(masks), 0.5)


@pytest.mark.parametrize("stream", [rng.STREAM_INITIAL_NOISE, rng.STREAM_SAMPLING_STEP, rng.STREAM_TRAINING_NOISE])
def test_uniforms_are_uniform(stream):
    """Chi-square on 256 classes of each byte that reaches u; too even is as suspicious as too uneven."""
    words = rng.words(image_seeds(5, 8), 2**14, tag=417, stream=stream)
    expected = words.numel() / 256
    for shift in (24, 16, 8):
        counts = torch.bincount(((words >> shift) & 255).flatten(), minlength=256).double()
        p = scipy.stats.chi2.sf(float(((counts - expected) ** 2 / expected).sum()), 255)
        assert ALPHA / 6 <= p <= 1 - ALPHA / 6, f"bits {shift} to {shift + 7}"


def shifted(image: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An image and itself moved: pairs of pixels that far apart, none of them around a border."""
    height, width = image.shape[-2:]
    return image[..., rows:, columns:], image[..., : height - rows, : width - columns]


DISPLACEMENTS = [(0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (2, 0), (8, 0)]


def test_neighbouring_pixels_are_independent():
    uniforms = rng.uniform(rng.words(image_seeds(2, 4), 2**14, tag=3, stream=1)).view(4, 128, 128)
    noise = ops.initial_noise(image_seeds(2, 16), (256, 256), backend=FASTEST)
    pairs = [
        (f"{name} {rows} rows and {columns} columns apart", *shifted(image, rows, columns))
        for name, image in (("uniforms", uniforms), ("initial noise", noise))
        for rows, columns in DISPLACEMENTS
    ]
    assert_uncorrelated(pairs)


def test_words_of_a_block_are_independent():
    blocks = rng.uniform(rng.words(image_seeds(3, 8), 2**14, tag=3, stream=1)).view(-1, 4)
    pairs = [(f"words {i} and {j}", blocks[:, i], blocks[:, j]) for i in range(4) for j in range(i)]
    # The same word of neighbouring blocks.
    pairs += [(f"word {i} of blocks", blocks[1:, i], blocks[:-1, i]) for i in range(4)]
    assert_uncorrelated(pairs)


def fair_bits(seeds: torch.Tensor, *, timestep: int = 7, first_sample: int = 0, n: int = 1) -> torch.Tensor:
    """(B n, 65536) fair coins: the last step, P = R = S = 1, at logit 0 from masks of zeros."""
    zeros = torch.zeros(len(seeds) * n, PIXELS)
    last = torch.tensor([1.0, 0.0, 1.0, 1.0])
    return ops.sample_step(
        zeros, zeros, seeds, last, timestep, first_sample=first_sample, dtype=torch.bool, backend=FASTEST
    )


def test_draws_are_independent_of_each_other():
    """Whatever differs between two draws, a seed, a sample or a timestep, by as little as a bit: other coins."""
    seeds = image_seeds(4, 4)
    start = fair_bits(seeds)
    pairs = [
        (f"timesteps 7 and {t}", start, fair_bits(seeds, timestep=t)) for t in (0, 3, 6, 8, 107, 7 + 2**16, 7 + 2**31)
    ]
    pairs += [(f"samples 0 and {k}", start, fair_bits(seeds, first_sample=k)) for k in (1, 2, 7, 16, 2**16, 2**31)]
    # Key bits of both words, and seeds that count upward.
    pairs += [(f"seed bit {bit}", start, fair_bits(seeds ^ (1 << bit))) for bit in (0, 1, 31, 32, 62)]
    counting = fair_bits(torch.arange(9))
    pairs.append(("seeds s and s + 1", counting[1:], counting[:-1]))
    # Images of a batch, and batches of neighbouring seeds, also one image further on.
    batch, next_batch = fair_bits(image_seeds(100, 8)), fair_bits(image_seeds(101, 8))
    pairs.append(("images of a batch", batch[1:], batch[:-1]))
    pairs.append(("image_seeds of s and s + 1", batch, next_batch))
    pairs.append(("image_seeds of s and s + 1, next image", batch[1:], next_batch[:-1]))
    samples = fair_bits(seeds, n=8).view(4, 8, -1)
    pairs.append(("samples of a call", samples[:, 1:], samples[:, :-1]))
    # One purpose and another, with the same seed, sample and, as far as there is one, timestep.
    initial = ops.initial_noise(seeds, (PIXELS,), backend=FASTEST)
    half = NoiseSchedule.from_betas([0.999999999] * 8)  # A_t = 0: q_sample flips with 1/2
    clean = torch.zeros(4, PIXELS, dtype=torch.bool)
    training, at_zero = (ops.q_sample(clean, torch.full((4,), t), seeds, half, backend=FASTEST) for t in (7, 0))
    pairs.append(("initial noise and a step", initial, fair_bits(seeds, timestep=0)))
    pairs.append(("initial and training noise", initial, at_zero))
    pairs.append(("training noise and a step", training, start))
    assert_uncorrelated([(name, x.contiguous(), y.contiguous()) for name, x, y in pairs])


def test_the_correlation_test_would_show_a_mistake():
    bits = fair_bits(image_seeds(4, 1))
    other = fair_bits(image_seeds(5, 1))
    # One pixel in twenty shared.
    mixed = torch.where(torch.arange(PIXELS) % 20 == 0, bits, other)
    for wrong in (bits, ~bits, mixed):
        with pytest.raises(AssertionError, match="correlated"):
            assert_uncorrelated([("wrong", bits, wrong)])


# ---------------------------------------------------------------------- the forward process


@pytest.mark.parametrize("as_released", [False, True])
def test_forward_marginals(as_released):
    """y_t ~ q(y_t | y_0), for both values of y_0; nine masks for each timestep."""
    schedule = NoiseSchedule(as_released=as_released)
    t = torch.tensor([0, 1, 10, 100, 300, 500, 700, 900, 999]).repeat_interleave(9)
    y_0 = (torch.arange(256 * 256).view(1, 1, 256, 256) % 3 == 0).expand(len(t), -1, -1, -1)
    y_t = ops.q_sample(y_0, t, image_seeds(6, len(t)), schedule, backend=FASTEST)
    ones = torch.stack([(y_t & (y_0 == bit)).sum((1, 2, 3)) for bit in (False, True)], dim=1)
    trials = torch.stack([(y_0 == bit).sum((1, 2, 3)) for bit in (False, True)], dim=1)
    expected = schedule.q_mean(torch.tensor([[0.0, 1.0]]).expand(len(t), 2), t)
    assert_binomial(ones, trials, expected)


def test_single_forward_steps_compose_to_the_marginal():
    """Ten noising steps drawn one after another, each with its own beta_t, against q(y_t | y_0) at once."""
    betas = [0.01, 0.02, 0.05, 0.1, 0.02, 0.3, 0.05, 0.2, 0.1, 0.4]
    schedule = NoiseSchedule.from_betas(betas)
    y_0 = (torch.arange(PIXELS * 16).view(16, PIXELS) % 3 == 0).contiguous()
    y, ones, expected = y_0, [], []
    for t, beta in enumerate(betas):
        # A schedule that does this step alone at timestep t: one beta, and none before it to speak of.
        alone = NoiseSchedule.from_betas([1e-300] * t + [beta, 0.5])
        y = ops.q_sample(y, torch.full((16,), t), image_seeds(7, 16), alone, backend=FASTEST)
        ones.append([int((y & (y_0 == bit)).sum()) for bit in (False, True)])
        expected.append(schedule.q_mean(torch.tensor([[0.0, 1.0]]), torch.tensor([t]))[0])
    trials = [int((y_0 == bit).sum()) for bit in (False, True)]
    assert_binomial(ones, [trials] * len(betas), torch.stack(expected))


# ---------------------------------------------------------------------- the whole chain

PRIOR = 0.3


def perfect_logit(schedule: NoiseSchedule, prediction: str):
    """What a perfect network says about pixels that are one with probability PRIOR, whatever the image."""
    A = schedule.alphas_cumprod
    keep, flip = (1 + A) / 2, (1 - A) / 2  # q(y_t = y_0), q(y_t != y_0)
    prior = math.log(PRIOR / (1 - PRIOR))
    of_y_0 = torch.stack([prior + torch.log(flip / keep), prior + torch.log(keep / flip)])  # by y_t and t

    def logit(y_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        z = torch.where(y_t == 1, of_y_0[1][t], of_y_0[0][t])
        return (z if prediction == "y_0" else torch.where(y_t == 1, -z, z)).float()

    return logit


def chain_marginal(schedule: NoiseSchedule, method: str, timesteps: list[int]) -> float:
    """P(mask = 1) at the end of the chain, in float64."""
    logit = perfect_logit(schedule, "epsilon")
    one = 0.5
    for row, t in zip(schedule.step_table(timesteps, method).flip(0), torch.tensor(timesteps).flip(0), strict=True):
        from_zero, from_one = (float(theta(row, logit(torch.tensor(float(y)), t))) for y in (0, 1))
        one = (1 - one) * from_zero + one * (1 - from_one)
    return one


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_chain_with_a_perfect_network(method, prediction):
    """d3pm with every timestep is the exact reverse of the forward process: it returns the distribution of the data.
    The others end where their own rule leads, which is computed exactly too."""
    schedule = NoiseSchedule("cosine2", 50)
    masks = bf.sample(
        uniform_logits(perfect_logit(schedule, prediction)),
        torch.zeros(1, 1, 128, 128),
        n=16,
        steps=50,
        method=method,
        final="sample",
        seed=8,
        max_batch=1,  # small tensors stay in the cache
        schedule=schedule,
        prediction=prediction,
        backend=FASTEST,
    )
    marginal = chain_marginal(schedule, method, list(range(50)))
    assert_binomial(masks.sum((1, 3, 4)).flatten(), masks.numel(), marginal)
    if method == "d3pm":
        # It starts from B(1/2) instead of q(y_49), which is that up to A_49.
        assert abs(marginal - PRIOR) <= schedule.alphas_cumprod[-1]
        assert_binomial(masks.sum((1, 3, 4)).flatten(), masks.numel(), PRIOR)
    if method == "ddpm":
        assert abs(marginal - PRIOR) > 0.01, "plugging P(y_0 | y_t) into the posterior is not exact"
