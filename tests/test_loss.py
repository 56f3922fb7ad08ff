# SPDX-License-Identifier: Apache-2.0
"""The training loss: the equation, in float64; every backend against it; and as torch sees it.

Its bits are not promised. Values and gradients are, to 1e-6 of themselves: 2^-24 = 6e-8 is one rounding, a slope takes
some sixteen of them, and the two of exp(-|z|) count twice where the KL term prevails.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support import PREDICTIONS, golden, threads
from torch._subclasses.fake_tensor import FakeTensorMode
from variants import VARIANTS

from berdiff_fast import NoiseSchedule, image_seeds, ops

SCHEDULES = ("linear", "cosine", "cosine2")
TIMESTEPS = torch.tensor([0, 1, 2, 60, 500, 998, 999])
TOLERANCE = 1e-6
SCHEDULE = NoiseSchedule()

every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)


def masks(t: torch.Tensor, *shape: int, schedule: NoiseSchedule = SCHEDULE, seed: int = 0, scale: float = 4.0):
    """Logits up to 80 either way, y_t and y_0: half of the pixels noisy as at t, half of them at random."""
    generator = torch.Generator().manual_seed(seed)
    y_0 = torch.rand(len(t), *shape, generator=generator) < 0.4
    y_t = ops.q_sample(y_0, t, image_seeds(seed, len(t)), schedule, backend="reference")
    y_t ^= torch.rand(y_0.shape, generator=generator) < 0.25
    z = torch.randn(y_0.shape, generator=generator) * scale
    return torch.where(torch.rand(y_0.shape, generator=generator) < 0.1, z * 8, z).clamp(-80, 80), y_t, y_0


def on(variant, z, y_t, y_0, rows, ignore=None, prediction="epsilon"):
    """Value and gradient from a variant, back on the CPU."""
    moved = [None if x is None else x.to(variant.device) for x in (z, y_t, y_0, rows, ignore)]
    with variant.use():
        value, gradient = torch.ops.berdiff_fast.diffusion_loss(*moved, prediction, variant.backend)
    return value.cpu(), gradient.cpu()


def exact(z, y_t, y_0, rows, ignore=None, prediction="epsilon"):
    return torch.ops.berdiff_fast.diffusion_loss(z.double(), y_t, y_0, rows, ignore, prediction, "reference")


def assert_close(got, expected, *, tolerance=TOLERANCE, what=""):
    for name, a, b in zip(("value", "gradient"), got, expected, strict=True):
        a = a.double()
        # Float32 holds seven digits down to 1e-38, and a number on the way may be a hundredth of the result.
        error = (a - b).abs() / b.abs().clamp(min=1e-36)
        assert a.isfinite().all() and error.max() <= tolerance, f"{what} {name}: {error.max():.3g}"


# ---------------------------------------------------------------------- the equation


def chain(z, y_t, y_0, t, schedule, *, prediction="epsilon", leave_one_out=False, kl=1.0, bce=1.0):
    """BerDiff, eq. 8 in plain PyTorch, from q_posterior_mean: bits of every pixel.

    It forms 1 - p, which at t = 1, where p is within 1e-9 of 1, leaves it seven digits of the smaller term.
    """
    z = torch.where(y_t, -z, z) if prediction == "y_0" else z
    epsilon = (y_t ^ y_0).to(z)
    cross_entropy = F.binary_cross_entropy_with_logits(z, epsilon, reduction="none")
    A = schedule.alphas_cumprod[t].reshape(-1, *[1] * (z.ndim - 1))
    e = torch.sigmoid(z + torch.log((1 + A) / (1 - A)) if leave_one_out else z)
    p = schedule.q_posterior_mean((y_t.to(z) - e).abs(), y_t, t)
    q = schedule.q_posterior_mean(y_0, y_t, t)
    divergence = torch.xlogy(q, q) - torch.xlogy(q, p) + torch.xlogy(1 - q, 1 - q) - torch.xlogy(1 - q, 1 - p)
    first = (t == 0).reshape(A.shape)
    return (kl * torch.where(first, cross_entropy, divergence) + bce * cross_entropy) / math.log(2)


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_reference_is_the_equation(name, prediction, leave_one_out):
    schedule = NoiseSchedule(name)
    z, y_t, y_0 = masks(TIMESTEPS, 1, 9, 7, schedule=schedule, scale=2)
    z = z.double().clamp(-12, 12).requires_grad_()
    options = dict(prediction=prediction, leave_one_out=leave_one_out)
    for kl, bce in ((1.0, 1.0), (0.3, 2.0), (1.0, 0.0)):
        expected = chain(z, y_t, y_0, TIMESTEPS, schedule, kl=kl, bce=bce, **options).mean((1, 2, 3))
        got = ops.diffusion_loss(z, y_t, y_0, TIMESTEPS, schedule, kl_weight=kl, bce_weight=bce, **options)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-14)
        (slope,) = torch.autograd.grad(got.sum(), z)
        (expected_slope,) = torch.autograd.grad(expected.sum(), z)
        torch.testing.assert_close(slope, expected_slope, rtol=1e-6, atol=1e-13)


def test_weights_and_ignored_pixels():
    z, y_t, y_0 = masks(TIMESTEPS, 2, 5, 3)
    z = z.double()
    ignore = torch.rand(z.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    ignore[2] = True
    weights = torch.linspace(0, 2, 1000)
    bits = chain(z.clamp(-12, 12), y_t, y_0, TIMESTEPS, SCHEDULE).masked_fill(ignore, 0).sum((1, 2, 3))
    expected = weights.double()[TIMESTEPS] * bits / (~ignore).sum((1, 2, 3)).clamp(min=1)
    got = ops.diffusion_loss(z.clamp(-12, 12), y_t, y_0, TIMESTEPS, SCHEDULE, weights=weights, ignore=ignore)
    assert got[2] == 0
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gradcheck(prediction, leave_one_out):
    z, y_t, y_0 = masks(TIMESTEPS, 4, scale=1)
    options = dict(prediction=prediction, leave_one_out=leave_one_out)

    def loss(z):
        plain = ops.diffusion_loss(z, y_t, y_0, TIMESTEPS, SCHEDULE, **options)
        weights, ignore = torch.linspace(1, 3, 1000), torch.tensor([0, 1, 0, 0]).bool().expand(z.shape)
        return plain, ops.diffusion_loss(
            z, y_t, y_0, TIMESTEPS, SCHEDULE, **options, kl_weight=0.5, weights=weights, ignore=ignore
        )

    assert torch.autograd.gradcheck(loss, z.double().clamp(-6, 6).requires_grad_())


def test_against_the_published_values():
    """The published KL adds 1e-7 inside its logarithms, which near t = 0 changes it by up to 0.35 nats, and its tables
    are rounded to float32. So three steps lead from its values to ours: its KL is its formula, epsilon and all, on its
    own posteriors; on ours, that formula gives its values but for the rounding of its tables, which the first timesteps
    feel; without the epsilon, the formula on our posteriors is our KL. And where no posterior is within 0.01 of 0 or 1,
    ours is its KL directly."""

    def published(q, p, epsilon):
        def term(q, p):
            return torch.xlogy(q, q + epsilon) - torch.xlogy(q, p + epsilon)

        return term(q, p) + term(1 - q, 1 - p)

    def ours(**weights):
        pixels = [x.reshape(-1, 1) for x in (torch.logit(e), y_t, y_0)]
        bits = ops.diffusion_loss(*pixels, t[:, None].expand(len(t), 256).reshape(-1), SCHEDULE, **weights)
        return bits.reshape(e.shape) * math.log(2)

    values = golden("maths")
    t, y_t, y_0, e = values["t"], values["y_t"] != 0, values["y_0"] != 0, values["eps_hat"].double()
    kl, q, p = (values[name].double() for name in ("kl_nats", "posterior_hard", "posterior_soft"))
    assert (published(q, p, 1e-7) - kl).abs().max() < 1e-6

    our_q, our_p = SCHEDULE.q_posterior_mean(y_0, y_t, t), SCHEDULE.q_posterior_mean((y_t.double() - e).abs(), y_t, t)
    difference = (published(our_q, our_p, 1e-7) - kl).abs().amax((1, 2, 3))
    assert difference.max() < 0.03
    assert difference[t >= 50].max() < 3e-4
    assert difference[t >= 400].max() < 3e-6

    our_kl = ours(bce_weight=0.0)
    assert (published(our_q, our_p, 0.0) - our_kl).abs().max() < 1e-9
    inside = torch.stack([q, 1 - q, p, 1 - p]).amin(0) > 0.01
    assert inside.sum() > 1000
    assert (our_kl - kl)[inside].abs().max() < 1e-6

    torch.testing.assert_close(ours(kl_weight=0.0), values["bce_nats"].double(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("t", [1, 10, 300, 999])
def test_leave_one_out_makes_both_terms_agree(t):
    """The KL term's expectation over epsilon ~ P(epsilon | y_t) is least at that probability with the leave-one-out
    shift; without, at the leave-one-out logit, where the BCE is not."""
    probability = torch.tensor([0.02, 0.3, 0.6, 0.97], dtype=torch.float64)
    y_t, y_0 = torch.zeros(8, 1, dtype=torch.bool), torch.tensor([False, True]).repeat(4)[:, None]
    chance = torch.stack([1 - probability, probability], 1).reshape(-1)

    def slope(z, **options):
        z = z.repeat_interleave(2)[:, None].requires_grad_()
        loss = ops.diffusion_loss(z, y_t, y_0, torch.full((8,), t), SCHEDULE, **options)
        (gradient,) = torch.autograd.grad((chance * loss).sum(), z)
        return gradient.reshape(4, 2).sum(1), gradient.reshape(4, 2).abs().sum(1)

    z = torch.logit(probability)
    A = SCHEDULE.alphas_cumprod[t]
    for options, minimum, other in (
        (dict(bce_weight=0.0, leave_one_out=True), z, z - torch.log((1 + A) / (1 - A))),
        (dict(bce_weight=0.0), z + torch.log((1 + A) / (1 - A)), z),
        (dict(kl_weight=0.0), z, z + torch.log((1 + A) / (1 - A))),
    ):
        total, size = slope(minimum, **options)
        assert (total.abs() < 1e-9 * size).all()
        if t < 999:  # where A = 0 there is no shift
            total, size = slope(other, **options)
            assert (total.abs() > 1e-3 * size).all()


# ---------------------------------------------------------------------- every backend against it


@every_variant
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_value_and_gradient(variant, name, leave_one_out):
    schedule = NoiseSchedule(name)
    cases = [(p, kl, bce) for p in PREDICTIONS for kl, bce in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0))]
    for seed, size in enumerate((4097, 1, 7, 4095)):
        if variant.is_interpreted:  # which takes its time: some of it
            cases = cases[: 2 if size == 4097 else 0]
        z, y_t, y_0 = masks(TIMESTEPS, size, schedule=schedule, seed=seed)
        ignore = (torch.rand(z.shape, generator=torch.Generator().manual_seed(seed)) < 0.5) if seed % 2 else None
        for prediction, kl, bce in cases:
            rows = schedule.loss_rows(TIMESTEPS, kl_weight=kl, bce_weight=bce, leave_one_out=leave_one_out)
            arguments = (z, y_t, y_0, rows, ignore, prediction)
            assert_close(on(variant, *arguments), exact(*arguments), what=f"{size} {prediction} {kl} {bce}")


@every_variant
def test_every_bfloat16_logit(variant):
    z = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    z = z[z.abs() <= 80].expand(4, -1)
    y_t, y_0 = (torch.tensor(x).bool()[:, None].expand(z.shape) for x in ([0, 1, 0, 1], [0, 0, 1, 1]))
    for t in (0, 1, 500, 999):
        rows = SCHEDULE.loss_rows(torch.full((4,), t))
        assert_close(on(variant, z, y_t, y_0, rows), exact(z, y_t, y_0, rows), what=f"t = {t}")


@every_variant
def test_extreme_logits(variant):
    """Infinite ones have a loss; those beyond 87 have the slope of 87, which no sum of float32 would show. A NaN is NaN
    in its own mask, unless it is ignored."""
    t = torch.full((4,), 300)
    z = torch.tensor([[torch.inf, 0.0], [-torch.inf, 100.0], [torch.nan, 1.0], [torch.nan, 1.0]])
    y_t, y_0 = torch.zeros(4, 2, dtype=torch.bool), torch.tensor([[True, False]]).expand(4, 2)
    ignore = torch.zeros(4, 2, dtype=torch.bool)
    ignore[3, 0] = True
    value, gradient = on(variant, z, y_t, y_0, SCHEDULE.loss_rows(t), ignore)
    assert value.isfinite().tolist() == [True, False, False, True]
    assert value[1] == torch.inf and value[2].isnan()
    assert gradient.isnan().tolist() == [[False, False], [False, False], [True, False], [False, False]]
    assert gradient[0, 0].abs() < 1e-30 and gradient[1, 0] < 0 < gradient[1, 1] and gradient[3, 0] == 0


@every_variant
def test_a_mask_of_which_nothing_counts(variant):
    z, y_t, y_0 = masks(TIMESTEPS[:3], 1, 5, 5)
    ignore = torch.zeros_like(y_0)
    ignore[1] = True
    value, gradient = on(variant, z, y_t, y_0, SCHEDULE.loss_rows(TIMESTEPS[:3]), ignore)
    assert value[1] == 0 and (value[[0, 2]] > 0).all()
    assert (gradient[1] == 0).all() and (gradient[[0, 2]] != 0).all()


@every_variant
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_are_widened(variant, dtype):
    """And the gradient is rounded once: to bfloat16, or for float16 when it has been scaled."""
    z, y_t, y_0 = masks(TIMESTEPS, 1, 33, 31)
    z, rows = z.to(dtype), SCHEDULE.loss_rows(TIMESTEPS)
    value, gradient = on(variant, z, y_t, y_0, rows)
    wide_value, wide_gradient = on(variant, z.float(), y_t, y_0, rows)
    assert torch.equal(value, wide_value)
    assert gradient.dtype is (torch.float32 if dtype is torch.float16 else dtype)
    if variant.is_interpreted and dtype is torch.bfloat16:  # Triton's interpreter truncates
        torch.testing.assert_close(gradient.float(), wide_gradient, rtol=2.0**-7, atol=1e-37)
    else:
        assert torch.equal(gradient, wide_gradient.to(gradient.dtype))


@every_variant
def test_masks_of_every_dtype(variant):
    z, y_t, y_0 = masks(TIMESTEPS, 1, 9, 11)
    ignore = torch.rand(z.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    rows = SCHEDULE.loss_rows(TIMESTEPS)
    expected = on(variant, z, y_t, y_0, rows, ignore)
    dtypes = ops.MASK_DTYPES
    for i, dtype in enumerate(dtypes):
        # All three at once, each of a type of its own; -0.0 is no, and whatever else is not zero is yes.
        a, b, c = (
            m.to(other) * -3 if other.is_floating_point else m.to(other)
            for m, other in zip((y_t, y_0, ignore), (dtype, dtypes[i - 1], dtypes[i - 2]), strict=True)
        )
        got = on(variant, z, a, b, rows, c)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True)), dtype


@every_variant
def test_what_is_not_contiguous(variant):
    z, y_t, y_0 = masks(TIMESTEPS, 6, 4, 10)
    rows = SCHEDULE.loss_rows(TIMESTEPS)
    views = [x[..., ::2].transpose(1, 2) for x in (z, y_t, y_0)]
    got = on(variant, *views, rows, views[1])
    copies = [x.contiguous() for x in views]
    assert all(torch.equal(a, b) for a, b in zip(got, on(variant, *copies, rows, copies[1]), strict=True))
    assert got[1].is_contiguous()


@every_variant
def test_a_mask_alone_and_in_a_batch(variant):
    """Equal bits, on any number of threads."""
    t = TIMESTEPS.repeat(1 if variant.is_interpreted else 3)
    z, y_t, y_0 = masks(t, 1, 120, 130)
    rows = SCHEDULE.loss_rows(t)
    with threads(1):
        value, gradient = on(variant, z, y_t, y_0, rows, y_0)
    for count in (2, 3, 8) if variant.backend == "cpp" else (1,):
        with threads(count):
            again = on(variant, z, y_t, y_0, rows, y_0)
        assert torch.equal(value, again[0]) and torch.equal(gradient, again[1])
    for i in (0, len(t) - 1):
        alone = on(variant, *(x[i : i + 1] for x in (z, y_t, y_0, rows, y_0)))
        assert torch.equal(value[i : i + 1], alone[0]) and torch.equal(gradient[i : i + 1], alone[1])


@every_variant
@pytest.mark.parametrize("shape", [(0, 1, 4, 4), (3, 1, 0, 4)])
def test_nothing_to_do(variant, shape):
    z, y = torch.empty(shape), torch.empty(shape, dtype=torch.bool)
    value, gradient = on(variant, z, y, y, SCHEDULE.loss_rows(torch.zeros(shape[0], dtype=torch.int64)))
    assert value.tolist() == [0.0] * shape[0] and gradient.shape == shape


# ---------------------------------------------------------------------- as torch sees it


def test_backward_scales_each_mask():
    z, y_t, y_0 = masks(TIMESTEPS, 1, 6, 6)
    _, gradient = torch.ops.berdiff_fast.diffusion_loss(
        z, y_t, y_0, SCHEDULE.loss_rows(TIMESTEPS), None, "epsilon", "auto"
    )
    z.requires_grad_()
    scale = torch.linspace(-1, 2, len(z))
    (ops.diffusion_loss(z, y_t, y_0, TIMESTEPS, SCHEDULE) * scale).sum().backward()
    assert torch.equal(z.grad, gradient * scale.reshape(-1, 1, 1, 1))


def test_a_float16_gradient_is_scaled_before_it_is_rounded():
    z, y_t, y_0 = masks(TIMESTEPS, 1, 128, 128)
    narrow, wide = z.half().requires_grad_(), z.half().float().requires_grad_()
    for logits in (narrow, wide):
        (ops.diffusion_loss(logits, y_t, y_0, TIMESTEPS, SCHEDULE).sum() * 65536).backward()
    assert narrow.grad.dtype is torch.float16
    assert torch.equal(narrow.grad, wide.grad.half())


def test_differentiable_once():
    z, y_t, y_0 = masks(TIMESTEPS, 1, 6, 6)
    z.requires_grad_()
    value, gradient = torch.ops.berdiff_fast.diffusion_loss(
        z, y_t, y_0, SCHEDULE.loss_rows(TIMESTEPS), None, "epsilon", "auto"
    )
    assert value.requires_grad and not gradient.requires_grad
    with pytest.raises(RuntimeError, match=r"diffusion_loss can be differentiated once; create_graph=True"):
        torch.autograd.grad(value.sum(), z, create_graph=True)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_opcheck(backend):
    z, y_t, y_0 = masks(TIMESTEPS, 2, 9, 7)
    rows = SCHEDULE.loss_rows(TIMESTEPS)
    for logits, ignore, prediction in ((z.requires_grad_(), None, "epsilon"), (z.detach().half(), y_0, "y_0")):
        arguments = (logits, y_t.float(), y_0, rows, ignore, prediction, backend)
        torch.library.opcheck(torch.ops.berdiff_fast.diffusion_loss.default, arguments)


@pytest.mark.slow
def test_a_compiled_training_step():
    torch.manual_seed(0)
    network = torch.nn.Conv2d(2, 1, 3, padding=1)
    _, y_t, y_0 = masks(TIMESTEPS, 1, 12, 12)
    img, weights = torch.randn(len(TIMESTEPS), 1, 12, 12), torch.linspace(1, 2, 1000)

    def loss(y_t, y_0, img, t):
        logits = network(torch.cat([y_t.float(), img], 1))
        return ops.diffusion_loss(logits, y_t, y_0, t, SCHEDULE, weights=weights, ignore=img > 2).mean()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        network.zero_grad()
        value = function(y_t, y_0, img, TIMESTEPS)
        value.backward()
        results.append((value.detach(), network.weight.grad.clone()))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def test_fake_and_meta_tensors():
    with FakeTensorMode():
        z = torch.empty(3, 1, 8, 8, dtype=torch.bfloat16, requires_grad=True)
        y = torch.empty(3, 1, 8, 8, dtype=torch.bool)
        rows = torch.empty(3, 14, dtype=torch.float64)
        value, _ = torch.ops.berdiff_fast.diffusion_loss(z, y, y, rows, None, "epsilon", "auto")
        assert value.shape == (3,) and value.dtype is torch.float32
        value.sum().backward()
        assert z.grad.dtype is torch.bfloat16
    y, t = torch.empty(3, 1, 8, 8, device="meta"), torch.zeros(3, dtype=torch.int64, device="meta")
    value = ops.diffusion_loss(y.double(), y, y, t, SCHEDULE)
    assert value.device.type == "meta" and value.dtype is torch.float64
