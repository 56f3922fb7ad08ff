# SPDX-License-Identifier: Apache-2.0
"""The ops as torch sees them: opcheck, FakeTensor, meta, torch.compile, the profiler."""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.util
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch
from support import threads
from torch._subclasses.fake_tensor import FakeTensorMode

from berdiff_fast import NoiseSchedule, image_seeds, ops
from berdiff_fast.backends import select
from berdiff_fast.ops import _registry

SCHEDULE = NoiseSchedule("cosine2")
TAUS = SCHEDULE.subsequence(10)
TABLE = SCHEDULE.step_table(TAUS).float()


def arguments(dtype: torch.dtype = torch.float32, rows: int = 6):
    y = (torch.rand(rows, 2, 9, 7) < 0.5).to(dtype)
    z = torch.randn(rows, 2, 9, 7)
    seeds = image_seeds(1, 3)
    flag = torch.zeros(1, dtype=torch.int32)
    return y, z, seeds, TABLE[4], flag


def calls():
    y, z, seeds, coefficients, flag = arguments()
    t = torch.arange(6) * 100
    yield "initial_noise", (seeds, [2, 9, 7], 6, 2, 0, 0, torch.float32, "auto")
    yield "q_sample", (y, t, SCHEDULE.flip_probability(t), seeds, 2, 0, 0, torch.bool, "auto")
    yield "sample_step", (y, z, seeds, coefficients, flag, 400, 2, 0, 0, "epsilon", False, torch.bool, "auto")
    yield "sample_step", (y, z, seeds, coefficients, flag, 400, 2, 0, 0, "y_0", True, torch.float32, "reference")
    yield "posterior", (y, z, coefficients, "epsilon", "auto")
    yield "overlap", (y, z, "auto")
    yield "overlap", (y, None, "reference")
    x = torch.randn(2, 16, 5, 6)
    yield "group_norm_silu", (x, None, torch.ones(16), torch.zeros(16), 4, 1e-5, True, "auto")
    weight = ops.winograd_weight(torch.randn(32, 16, 3, 3))
    yield "winograd", (x, weight, torch.ones(32), torch.randn(2, 32, 10, 12), True, "auto")
    yield "winograd", (x, weight, torch.ones(32), None, False, "reference")


@pytest.mark.parametrize(("name", "args"), list(calls()), ids=lambda x: x if isinstance(x, str) else "")
def test_opcheck(name, args):
    torch.library.opcheck(getattr(torch.ops.berdiff_fast, name).default, args)


def four_steps(model, y, img, seeds, flags):
    for i, step in enumerate((9, 8, 7, 6)):
        logits = model(y, img)
        y = ops.sample_step(y, logits, seeds, TABLE[step], TAUS[step], nan_flag=flags[i : i + 1])
    return y, ops.posterior(y, logits, TABLE[5])


def test_compiled_loop_gives_the_eager_bits():
    torch.manual_seed(0)
    # Integer-valued weights and bits: the convolution is exact, so the compiler may order its sums as it likes.
    conv = torch.nn.Conv2d(3, 2, 3, padding=1).requires_grad_(False)
    conv.weight.copy_(torch.randint(-2, 3, conv.weight.shape))
    conv.bias.copy_(torch.randint(-2, 3, conv.bias.shape))
    img = torch.randint(-2, 3, (6, 1, 12, 12)).float()
    seeds = image_seeds(2, 3)

    def model(y, img):
        return conv(torch.cat([y, img], 1)) * 0.25

    y = ops.initial_noise(seeds, (2, 12, 12), samples_per_image=2, dtype=torch.float32)
    flags, compiled_flags = (torch.zeros(4, dtype=torch.int32) for _ in range(2))
    eager, eager_probability = four_steps(model, y, img, seeds, flags)
    compiled = torch.compile(four_steps, fullgraph=True)
    got, probability = compiled(model, y, img, seeds, compiled_flags)
    assert torch.equal(eager, got)
    assert torch.equal(eager_probability, probability)
    assert not torch.equal(y, eager)
    # A NaN raises its flag in a compiled loop too.
    img[0, 0, 3, 3] = float("nan")
    compiled(model, y, img, seeds, compiled_flags)
    assert compiled_flags.tolist() == [1, 1, 1, 1]


def test_compiled_noise_and_forward_process():
    seeds, t = image_seeds(3, 4), torch.tensor([0, 10, 500, 999])

    def forward(seeds, t):
        y = ops.initial_noise(seeds, (1, 8, 8))
        return ops.q_sample(y, t, seeds, SCHEDULE, dtype=torch.float32)

    assert torch.equal(forward(seeds, t), torch.compile(forward, fullgraph=True)(seeds, t))


def test_fake_and_meta_tensors():
    with FakeTensorMode():
        y, z = torch.empty(6, 1, 8, 8), torch.empty(6, 1, 8, 8, dtype=torch.bfloat16)
        seeds, flag = torch.empty(3, dtype=torch.int64), torch.empty(1, dtype=torch.int32)
        out = ops.sample_step(y, z, seeds, torch.empty(4), 5, nan_flag=flag, dtype=torch.bool)
        assert out.shape == y.shape
        assert out.dtype is torch.bool
        with pytest.raises(ValueError, match="logits must have the shape of y_t"):
            ops.sample_step(y, z[:, :, :4], seeds, torch.empty(4), 5, nan_flag=flag)
    meta = ops.initial_noise(
        torch.empty(3, dtype=torch.int64, device="meta"), (1, 8, 8), samples_per_image=2, dtype=torch.bfloat16
    )
    assert meta.shape == (6, 1, 8, 8)
    assert meta.device.type == "meta"
    y = torch.empty(6, 1, 8, 8, device="meta")
    assert ops.posterior(y, y, torch.empty(4, device="meta")).dtype is torch.float32


def test_the_profiler_sees_the_ops():
    y, z, seeds, coefficients, flag = arguments()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.sample_step(y, z, seeds, coefficients, 400, nan_flag=flag)
    assert any(e.key == "berdiff_fast::sample_step" for e in profile.key_averages())


def test_direct_and_dispatched_calls_are_the_same():
    y, z, seeds, coefficients, flag = arguments()
    direct = ops.sample_step(y, z, seeds, coefficients, 400, nan_flag=flag)
    dispatched = torch.ops.berdiff_fast.sample_step(
        y, z, seeds, coefficients, flag, 400, 2, 0, 0, "epsilon", False, torch.float32, "auto"
    )
    assert torch.equal(direct, dispatched)


@contextlib.contextmanager
def transformed():
    """Inside ``torch.func``'s transforms, of which there is no public ``with`` block."""
    with torch._functorch.eager_transforms.grad_increment_nesting():
        yield


STATES = {
    "a dispatch mode": FakeTensorMode,
    "a transform": transformed,
    "the profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
}


@pytest.mark.parametrize("state", STATES)
def test_who_watches_is_noticed(state):
    """The one place where torch's private names are used, against what they are used for."""
    y, z, _, coefficients, _ = arguments()
    direct, names = _registry.KERNELS["posterior"], ("y_t", "logits", "coefficients")
    assert not _registry.is_watched()
    assert _registry.entry("posterior", names, y, z, coefficients) is direct
    with STATES[state]():
        assert _registry.is_watched()
        assert _registry.entry("posterior", names, y, z, coefficients) is torch.ops.berdiff_fast.posterior
    for quiet in (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")):
        with quiet():
            assert not _registry.is_watched()


def test_a_tracer_is_noticed():
    seen = []
    torch.jit.trace(lambda x: seen.append(_registry.is_watched()) or x + 1, torch.zeros(2), check_trace=False)
    assert seen == [True] and not _registry.is_watched()


def test_a_torch_without_the_private_names_sends_every_call_to_the_dispatcher(monkeypatch):
    monkeypatch.delattr(torch.autograd, "_profiler_enabled")
    monkeypatch.setattr(torch.library, "Library", lambda *_: None)  # there is one already
    spec = importlib.util.spec_from_file_location("another_registry", _registry.__file__)
    another = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(another)
    assert another.is_watched()


def test_inputs_are_never_written():
    y, z, seeds, coefficients, flag = arguments()
    before = [x.clone() for x in (y, z, seeds, coefficients)]
    ops.sample_step(y, z, seeds, coefficients, 400, nan_flag=flag)
    ops.posterior(y, z, coefficients)
    ops.q_sample(y, torch.arange(6), seeds, SCHEDULE, samples_per_image=2)
    assert all(torch.equal(a, b) for a, b in zip(before, (y, z, seeds, coefficients), strict=True))


def test_compiled_fake_and_meta_overlap():
    def ious(a, b):
        shared = ops.overlap(a, b)
        area = shared.diagonal(0, 1, 2)
        return shared / (area[:, :, None] + area[:, None] - shared)

    a, b = torch.rand(2, 3, 9, 7) < 0.5, torch.rand(2, 4, 9, 7) < 0.5
    # Nothing here is worth the time that generating code takes.
    assert torch.equal(ious(a, b), torch.compile(ious, fullgraph=True, backend="aot_eager")(a, b))
    with FakeTensorMode():
        out = ops.overlap(torch.empty(2, 3, 8, 8), torch.empty(2, 4, 8, 8, dtype=torch.bool))
        assert (out.shape, out.dtype) == ((2, 7, 7), torch.int64)
    assert ops.overlap(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 3, 3)


# ---------------------------------------------------------------------- threads


@pytest.mark.skipif(not select.can_run("cpp", "cpu"), reason="berdiff_fast._cpu not built")
def test_torch_s_threads_or_our_own():
    """The same bits on torch's pool, on plain threads, and in the child of a fork, where the pool's threads are not."""
    from berdiff_fast.backends import cpp

    z = torch.linspace(-4, 4, 2**20).view(4, 1, 512, 512)
    y, seeds, flag = torch.zeros_like(z), image_seeds(0, 4), torch.zeros(1, dtype=torch.int32)

    def many_bits():  # to NumPy, since torch's own parallel loops hang in the child of a fork
        return ops.sample_step(y, z, seeds, TABLE[5], 500, nan_flag=flag, dtype=torch.bool, backend="cpp").numpy()

    pool = cpp._openmp()
    if sys.platform == "linux" and "OpenMP" in torch.__config__.parallel_info().split("parallel backend:")[1]:
        assert pool, "torch's OpenMP was not found"
    try:
        with threads(2):
            on_pool = many_bits()
            cpp._cpu.set_pool(0)
            assert np.array_equal(many_bits(), on_pool)
            cpp._cpu.set_pool(pool)
            if hasattr(os, "fork"):
                child = os.fork()
                if not child:
                    status = 1
                    try:
                        status = int(not np.array_equal(many_bits(), on_pool))
                    finally:
                        os._exit(status)  # whatever happens, this is not to go on as a second pytest
                deadline, ended = time.monotonic() + 60, (0, 0)
                while ended == (0, 0) and time.monotonic() < deadline:
                    time.sleep(0.01)
                    ended = os.waitpid(child, os.WNOHANG)
                if ended == (0, 0):
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                assert ended == (child, 0), "the child of a fork hangs, or has other bits"
            with concurrent.futures.ThreadPoolExecutor(3) as executor:
                assert all(np.array_equal(bits, on_pool) for bits in executor.map(lambda _: many_bits(), range(12)))
    finally:
        cpp._cpu.set_pool(pool)
