# SPDX-License-Identifier: Apache-2.0
"""Schedules, sub-sequences and the four numbers of a step: against the published code and against the equations."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from support import CPU_BACKENDS, METHODS, PREDICTIONS, full_table, golden, theta

from berdiff_fast import NoiseSchedule, ops

NAMES = ("linear", "cosine", "cosine2")
LOGITS = torch.linspace(-20, 20, 81, dtype=torch.float64)
#: Half a unit in the last place of a float32 in [1/2, 1): what rounding a table entry near 1 can cost.
ROUNDING = 2.0**-25
#: Of ops.posterior against float64. E is good to 6e-7 for |z| <= 8 and 3.7e-6 beyond (csrc/include/berdiff/draw.h), the
#: logit to 2^-24 |z|, and about ten more roundings follow; d theta <= theta (1 - theta) of the sum of them, which is
#: 1/4 at most, and e^-8 beyond |z| = 8.
POSTERIOR_ERROR = 0.25 * (6e-7 + 8 * 2.0**-24 + 10 * 2.0**-24)


@pytest.fixture(scope="module")
def maths() -> dict[str, torch.Tensor]:
    return golden("maths")


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    return NoiseSchedule()


def previous(schedule: NoiseSchedule) -> torch.Tensor:
    """A_{t-1} for every t."""
    return torch.cat([torch.ones(1, dtype=torch.float64), schedule.alphas_cumprod[:-1]])


# ---------------------------------------------------------------------- tables


@pytest.mark.parametrize("name", NAMES)
def test_betas_are_the_published_ones(maths, name):
    schedule = NoiseSchedule(name)
    assert schedule.betas.dtype == torch.float64 and schedule.timesteps == 1000
    torch.testing.assert_close(schedule.betas, maths[f"betas.{name}"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("timesteps", [50, 1000, 4000])
def test_tables(name, timesteps):
    schedule = NoiseSchedule(name, timesteps)
    assert schedule.betas.shape == (timesteps,)
    assert bool(((schedule.betas > 0) & (schedule.betas <= 0.999)).all())
    assert torch.equal(schedule.alphas, 1 - schedule.betas)
    product = 1.0
    for t, alpha in enumerate(schedule.alphas.tolist()):
        product *= alpha
        assert schedule.alphas_cumprod[t].item() == pytest.approx(product, rel=1e-12)
    assert product < 1e-4, "nothing may be left of the mask at the end"


def test_linear_keeps_its_noise_with_fewer_timesteps():
    # Scaled by 1000 / T, so that the sum of betas does not depend on T.
    sums = [NoiseSchedule("linear", T).betas.sum().item() for T in (100, 500, 1000)]
    assert sums == pytest.approx([10.05] * 3, rel=1e-12)


def test_from_betas():
    betas = [0.1, 0.2, 0.5]
    schedule = NoiseSchedule.from_betas(betas)
    assert schedule.timesteps == 3 and schedule.name == "custom"
    torch.testing.assert_close(
        schedule.alphas_cumprod, torch.tensor([0.9, 0.72, 0.36], dtype=torch.float64), rtol=1e-15, atol=0
    )
    given = torch.tensor(betas, dtype=torch.float64)
    schedule = NoiseSchedule.from_betas(given)
    given.fill_(0.3)
    assert schedule.betas.tolist() == betas, "the schedule must not follow the caller's tensor"


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule("linear", 100),
        NoiseSchedule("cosine"),
        NoiseSchedule("cosine2", 50, as_released=True),
        NoiseSchedule.from_betas([0.1, 1 / 3]),
        NoiseSchedule.from_betas([0.1, 1 / 3], as_released=True),
    ],
    ids=repr,
)
def test_config_round_trip(schedule):
    config = json.loads(json.dumps(schedule.to_config()))
    again = NoiseSchedule.from_config(config)
    assert again.to_config() == config and repr(again) == repr(schedule)
    assert torch.equal(again.betas, schedule.betas)
    t = torch.arange(schedule.timesteps)
    assert torch.equal(again.flip_probability(t), schedule.flip_probability(t))


# ---------------------------------------------------------------------- sub-sequences


@pytest.mark.parametrize(
    "name, steps, spacing",
    [
        ("ddimuni2", 2, "uniform"),
        ("ddimuni10", 10, "uniform"),
        ("ddimuni50", 50, "uniform"),
        ("ddimuni100", 100, "uniform"),
        ("ddimqua10", 10, "quadratic"),
    ],
)
def test_subsequences_are_the_published_ones(maths, schedule, name, steps, spacing):
    assert schedule.subsequence(steps, spacing) == maths[f"timesteps.{name}"].tolist()


def test_ten_uniform_steps_start_at_900(schedule):
    assert schedule.subsequence(10) == list(range(0, 1000, 100))
    assert schedule.subsequence(10, "trailing") == list(range(99, 1000, 100))


@pytest.mark.parametrize("T", [2, 3, 7, 50, 100, 257, 1000])
def test_trailing_quadratic_gives_every_number_of_steps(T):
    schedule = NoiseSchedule("linear", T) if T >= 50 else NoiseSchedule.from_betas([0.1] * T)
    for steps in range(1, T + 1):
        found = schedule.subsequence(steps, "trailing-quadratic")
        assert len(found) == steps and found == sorted(set(found)), steps
        assert found[-1] == T - 1 and found[0] >= 0


def test_trailing_quadratic(schedule):
    expected = [189, 359, 509, 639, 749, 839, 909, 959, 989, 999]
    assert schedule.subsequence(10, "trailing-quadratic") == expected
    # Where the parabola asks for less than one timestep, one is what there is.
    assert schedule.subsequence(100, "trailing-quadratic")[-9:] == list(range(991, 1000))


@pytest.mark.parametrize("T", [2, 3, 7, 50, 100, 257, 1000])
def test_trailing_gives_every_number_of_steps(T):
    schedule = NoiseSchedule("linear", T) if T >= 50 else NoiseSchedule.from_betas([0.1] * T)
    for steps in range(1, T + 1):
        found = schedule.subsequence(steps, "trailing")
        assert len(found) == steps and found == sorted(set(found)), steps
        assert found[-1] == T - 1 and found[0] >= 0
        gaps = {b - a for a, b in pairwise(found)}
        assert not gaps or max(gaps) - min(gaps) <= 1, f"{steps} steps are not evenly spaced"


@pytest.mark.parametrize("steps", [1, 3, 7, 30, 60, 999])
def test_trailing_is_that_of_lin_et_al(schedule, steps):
    """arXiv 2305.08891, table 2: round(flip(arange(T, 0, -T / S))) - 1."""
    expected = np.round(1000 - np.arange(steps)[::-1] * 1000 / steps) - 1
    assert schedule.subsequence(steps, "trailing") == expected.astype(int).tolist()


@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
@pytest.mark.parametrize("T", [50, 100, 257, 1000])
def test_published_spacings_give_the_number_asked_for_or_say_so(T, spacing):
    schedule = NoiseSchedule("linear", T)
    given = 0
    for steps in range(1, T + 1):
        try:
            found = schedule.subsequence(steps, spacing)
        except ValueError as error:
            message = str(error)
        else:
            message = ""
        if message:
            assert str(steps) in message
            assert spacing in message
            continue
        given += 1
        assert len(found) == steps and found == sorted(set(found)) and found[0] >= 0 and found[-1] < T
        if spacing == "uniform" and steps > 1:
            assert found == list(range(0, T, found[1]))
    assert given >= 5


@pytest.mark.parametrize("spacing", ["uniform", "trailing", "trailing-quadratic"])
def test_all_timesteps(schedule, spacing):
    assert schedule.subsequence(1000, spacing) == list(range(1000))


def test_explicit_timesteps_are_sorted(schedule):
    assert schedule.subsequence([900, 3, 40]) == [3, 40, 900]
    assert schedule.subsequence((999,)) == [999]
    assert schedule.subsequence(range(0, 1000, 250)) == [0, 250, 500, 750]
    assert schedule.subsequence(torch.tensor([5, 1])) == [1, 5]


# ---------------------------------------------------------------------- the forward process


@pytest.mark.parametrize("name", NAMES)
def test_single_steps_compose_to_the_marginal(name):
    """The product of the transitions B((1 - beta_t) y + beta_t / 2) is q(y_t | y_0)."""
    schedule = NoiseSchedule(name)
    both = torch.tensor([[0.0, 1.0]])
    transition = torch.eye(2, dtype=torch.float64)  # row y_0, column y_t
    for t, beta in enumerate(schedule.betas.tolist()):
        flip = beta / 2
        transition = transition @ torch.tensor([[1 - flip, flip], [flip, 1 - flip]], dtype=torch.float64)
        mean = schedule.q_mean(both, torch.tensor([t]))[0]
        torch.testing.assert_close(mean, transition[:, 1], rtol=0, atol=1e-12)


def test_flip_probability(schedule):
    t = torch.tensor([0, 500, 999, 0])
    flip = schedule.flip_probability(t)
    assert flip.dtype == torch.float32 and flip.shape == (4, 2)
    expected = ((1 - schedule.alphas_cumprod[t]) / 2)[:, None].expand(4, 2).float()
    assert torch.equal(flip, expected)


def test_as_released_noises_the_foreground_alone():
    """The fault of the published code: q_mean = A_t y_0, without the term (1 - A_t) / 2."""
    schedule = NoiseSchedule(as_released=True)
    t = torch.tensor([0, 500, 999])
    A = schedule.alphas_cumprod[t]
    flip = schedule.flip_probability(t)
    assert torch.equal(flip[:, 0], torch.zeros(3))
    torch.testing.assert_close(flip[:, 1].double(), 1 - A, rtol=2**-23, atol=0)
    both = torch.tensor([[0.0, 1.0]]).expand(3, 2)
    torch.testing.assert_close(schedule.q_mean(both, t), torch.stack([0 * A, A], 1), rtol=0, atol=1e-15)
    # It changes nothing else.
    assert torch.equal(full_table(schedule, "ddpm"), full_table(NoiseSchedule(), "ddpm"))
    assert NoiseSchedule().to_config() != schedule.to_config()


# ---------------------------------------------------------------------- the posterior


def posterior_tolerance(schedule: NoiseSchedule, t: torch.Tensor) -> torch.Tensor:
    """How far the golden values may be from the exact ones: their alpha_t and A_{t-1} are rounded to float32.

    In the odds of the posterior, 1 - alpha_t and 1 - A_{t-1} stand as factors; a probability changes by at most a
    quarter of the relative change of its odds. 1e-6 everywhere but at the first timesteps, where both are tiny.
    """
    relative = ROUNDING / (1 - schedule.alphas[t]) + ROUNDING / (1 - previous(schedule)[t])
    return torch.where(t <= 2, relative / 4, 1e-6)


def published_y_0(maths: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    return maths["y_0"].double() if kind == "hard" else (maths["y_t"].double() - maths["eps_hat"].double()).abs()


def test_y_0_from_epsilon(maths):
    """The calibration F_C: P(y_0 = 1) = |y_t - e|, which the last row of a step table gives."""
    assert torch.equal(published_y_0(maths, "soft").float(), maths["y0_hat"])
    last = NoiseSchedule().step_table([0])[0].float()
    z = torch.logit(maths["eps_hat"].double()).float()
    found = ops.posterior(maths["y_t"], z, last, backend="reference")
    torch.testing.assert_close(found, maths["y0_hat"], rtol=0, atol=POSTERIOR_ERROR)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_q_posterior_mean_is_the_published_one(maths, schedule, kind):
    t, y_0 = maths["t"], published_y_0(maths, kind)
    expected = maths[f"posterior_{kind}"].double()
    error = (schedule.q_posterior_mean(y_0, maths["y_t"], t) - expected).abs().amax((1, 2, 3))
    assert bool((error <= posterior_tolerance(schedule, t)).all())

    # With the two tables rounded as theirs were, the exception for the first timesteps is not needed: what is left
    # are their few float32 operations.
    rounded = copy.copy(schedule)
    rounded.alphas = schedule.alphas.float().double()
    rounded.alphas_cumprod = schedule.alphas_cumprod.float().double()
    error = (rounded.q_posterior_mean(y_0, maths["y_t"], t) - expected).abs()
    assert error.max() <= 4 * 2**-24


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_posterior_is_the_published_one(maths, schedule, kind, prediction, backend):
    t, y_t = maths["t"], maths["y_t"]
    y_0 = published_y_0(maths, kind)
    # Certainty is a logit of 100: the kernels clamp at 64, where the other probability is e^-64.
    of_y_0 = torch.logit(y_0) if kind == "soft" else torch.where(y_0 == 1, 100.0, -100.0)
    z = (of_y_0 if prediction == "y_0" else torch.where(y_t == 1, -of_y_0, of_y_0)).float()
    table = full_table(schedule, "ddpm").float()
    found = torch.cat(
        [
            ops.posterior(y_t[i : i + 1], z[i : i + 1], table[t[i]], prediction=prediction, backend=backend)
            for i in range(len(t))
        ]
    ).double()
    error = (found - maths[f"posterior_{kind}"].double()).abs().amax((1, 2, 3))
    assert bool((error <= posterior_tolerance(schedule, t)).all())
    exact = schedule.q_posterior_mean(y_0, y_t, t)
    # The table's four numbers are float32 as well.
    assert (found - exact).abs().max() <= POSTERIOR_ERROR + 2**-24


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_ddim_means_are_the_published_ones(maths, schedule, backend):
    """Ten steps of cosine2; step i is taken from the golden y_t with the golden eps_hat."""
    timesteps = schedule.subsequence(10)
    assert timesteps == maths["subsequence.timestep_map"].tolist()
    A = schedule.alphas_cumprod[timesteps]
    torch.testing.assert_close(A, maths["subsequence.alphas_cumprod"], rtol=0, atol=1e-12)
    table = schedule.step_table(timesteps, "ddim")
    y_t, z = maths["y_t"], torch.logit(maths["eps_hat"].double())
    for i in range(1, 10):
        expected = maths[f"subsequence.mean.{i}"].double()
        # Theirs: sigma = (1 - A_prev) / (1 - A_t) from rounded A, and three float32 operations.
        theirs = 2 * ROUNDING / (1 - A[i]) + 4 * 2.0**-24
        flip = theta(table[i], z)
        exact = torch.where(y_t == 1, 1 - flip, flip)
        assert (exact - expected).abs().max() <= theirs
        found = ops.posterior(y_t, z.float(), table[i].float(), backend=backend).double()
        assert (found - expected).abs().max() <= theirs + POSTERIOR_ERROR


@pytest.mark.parametrize("name", NAMES)
def test_posterior_summed_over_y_t_is_the_marginal(name):
    """sum over y_t of q(y_{t-1} | y_t, y_0) q(y_t | y_0) = q(y_{t-1} | y_0)."""
    schedule = NoiseSchedule(name)
    t = torch.arange(1, 1000)
    for bit in (0.0, 1.0):
        y_0 = torch.full((999, 1), bit)
        one = schedule.q_mean(y_0, t)
        total = (1 - one) * schedule.q_posterior_mean(y_0, torch.zeros(999, 1), t) + one * schedule.q_posterior_mean(
            y_0, torch.ones(999, 1), t
        )
        torch.testing.assert_close(total, schedule.q_mean(y_0, t - 1), rtol=0, atol=1e-12)
        # At t = 0 nothing is left to undo.
        for y_t in (0.0, 1.0):
            at_zero = schedule.q_posterior_mean(y_0[:1], torch.full((1, 1), y_t), torch.tensor([0]))
            assert at_zero.item() == bit


# ---------------------------------------------------------------------- the rule: P, Q, R, S


def direct_mean(method: str, A: float, A_prev: float, y_t: int, z: torch.Tensor) -> torch.Tensor:
    """P(y_prev = 1) as the equations say it (DESIGN, section 2), from the logit of e = P(epsilon = 1)."""
    # P(y_0 = 1) = |y_t - e|. Both probabilities from the logit: 1 - p would lose what is left of a small one.
    p, q = (torch.sigmoid(-z), torch.sigmoid(z)) if y_t else (torch.sigmoid(z), torch.sigmoid(-z))
    if method == "ddim":
        sigma = (1 - A_prev) / (1 - A)
        # The constant completes the mean: it is zero by the choice of sigma.
        constant = ((1 - A_prev) - sigma * (1 - A)) / 2
        return sigma * y_t + (A_prev - sigma * A) * p + constant
    alpha = A / A_prev

    def posterior(y_0: torch.Tensor | float, not_y_0: torch.Tensor | float) -> torch.Tensor | float:
        one = (alpha * y_t + (1 - alpha) / 2) * (A_prev * y_0 + (1 - A_prev) / 2)
        zero = (alpha * (1 - y_t) + (1 - alpha) / 2) * (A_prev * not_y_0 + (1 - A_prev) / 2)
        return one / (one + zero)

    if method == "ddpm":
        return posterior(p, q)
    return p * posterior(1.0, 0.0) + q * posterior(0.0, 1.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "steps, spacing", [(1000, "uniform"), (50, "uniform"), (10, "uniform"), (10, "trailing"), (10, "quadratic")]
)
def test_rule_is_the_equations(name, method, steps, spacing):
    schedule = NoiseSchedule(name)
    timesteps = schedule.subsequence(steps, spacing)
    table = schedule.step_table(timesteps, method)
    assert table.shape == (steps, 4) and table.dtype == torch.float64
    A = schedule.alphas_cumprod[timesteps].tolist()
    for s in range(1, steps, max(1, steps // 100)):
        flip = theta(table[s], LOGITS)
        for y_t in (0, 1):
            expected = direct_mean(method, A[s], A[s - 1], y_t, LOGITS)
            torch.testing.assert_close(1 - flip if y_t else flip, expected, rtol=0, atol=1e-12)
    # The last bit drawn: P(epsilon = 1) itself.
    torch.testing.assert_close(theta(table[0], LOGITS), torch.sigmoid(LOGITS), rtol=0, atol=1e-15)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [2, 10, 50, 250, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_probabilities_never_leave_the_unit_interval(name, steps, method):
    """The published float32 ddim mean exceeds 1 with 50 and 250 steps of cosine2, and torch then refuses to draw."""
    schedule = NoiseSchedule(name)
    table = schedule.step_table(schedule.subsequence(steps), method)
    for rows in (table, table.float()):
        assert bool((rows >= 0).all())
        assert bool((rows[:, 0] <= rows[:, 2]).all() and (rows[:, 1] <= rows[:, 3]).all())
    z = torch.cat([LOGITS, torch.tensor([-1e4, -64.0, 64.0, 1e4], dtype=torch.float64)]).float()
    for row in table.float()[:: max(1, steps // 50)]:
        for y in (0, 1):
            p = ops.posterior(torch.full(z.shape, y, dtype=torch.uint8), z, row, backend="reference")
            assert bool(((p >= 0) & (p <= 1)).all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_ddpm_with_the_leave_one_out_shift_is_d3pm(name, steps):
    """arXiv 2605.22765. The only error is that of alpha = A_t / A_prev: one rounding, which 1 - alpha and
    1 - alpha A_prev magnify near t = 0; elsewhere the two agree to 1e-14."""
    schedule = NoiseSchedule(name)
    timesteps = schedule.subsequence(steps)
    shifted = theta(schedule.step_table(timesteps, "ddpm", leave_one_out=True)[:, None], LOGITS)
    exact = theta(schedule.step_table(timesteps, "d3pm")[:, None], LOGITS)
    A = schedule.alphas_cumprod[timesteps]
    alpha = A / torch.cat([A.new_ones(1), A[:-1]])
    relative = ((shifted - exact).abs() / exact).amax(1)
    magnified = 2.0**-53 * (1 / (1 - A) + 1 / (1 - alpha))
    assert bool((relative <= 1e-14 + magnified).all())
    far = magnified < 1e-15
    assert steps == 1000 or far.any()
    assert bool((relative[far] <= 1e-14).all())
    # Without the shift the two are different samplers.
    plain = theta(schedule.step_table(timesteps, "ddpm")[:, None], LOGITS)
    assert ((plain - exact).abs() / exact).max() > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_leave_one_out_is_a_shift_of_the_logit(schedule, method):
    timesteps = schedule.subsequence(10)
    A = schedule.alphas_cumprod[timesteps]
    shift = torch.log((1 + A) / (1 - A))
    plain, shifted = (schedule.step_table(timesteps, method, leave_one_out=x) for x in (False, True))
    torch.testing.assert_close(
        theta(shifted[1:, None], LOGITS), theta(plain[1:, None], LOGITS + shift[1:, None]), rtol=1e-13, atol=0
    )
    assert torch.equal(shifted[0], plain[0])
