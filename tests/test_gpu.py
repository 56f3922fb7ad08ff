# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show. (Equal bits on a GPU are in test_equal_bits.py, whose variants include it.)"""

from __future__ import annotations

import concurrent.futures
from functools import partial

import pytest
import torch

from berdiff_fast import BerDiff, NoiseSchedule, Sampler, UNet, image_seeds, load, metrics, ops, sample
from berdiff_fast.backends import select
from berdiff_fast.network import inference
from berdiff_fast.network.graph import Graph

pytestmark = pytest.mark.gpu

SCHEDULE = NoiseSchedule("cosine2")
TAUS = SCHEDULE.subsequence(10)
BACKENDS = ["cuda", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if not select.can_run(request.param, "cuda"):
        pytest.skip(select.why_not(request.param, "cuda"))
    return request.param


def chain(backend, seeds, z, flag, table):
    y = ops.initial_noise(seeds, z.shape[1:], samples_per_image=len(z), backend=backend)
    for row in (9, 8, 7):
        y = ops.sample_step(y, z, seeds, table[row], TAUS[row], nan_flag=flag, backend=backend)
    return y


def test_a_captured_graph_draws_fresh_noise_for_fresh_seeds(backend):
    table = SCHEDULE.step_table(TAUS).float().cuda()
    z, flag = torch.randn(8, 1, 64, 64, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    seeds = image_seeds(1, 1).cuda()
    chain(backend, seeds, z, flag, table)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(backend, seeds, z, flag, table)
    for seed in (1, 2, 3):
        seeds.copy_(image_seeds(seed, 1))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, chain(backend, image_seeds(seed, 1).cuda(), z, flag, table))


def test_the_current_stream_is_honoured(backend):
    table = SCHEDULE.step_table(TAUS).float().cuda()
    flag, seeds = torch.zeros(1, dtype=torch.int32, device="cuda"), image_seeds(1, 1).cuda()
    z = torch.randn(64, 1, 128, 128, device="cuda")
    expected = chain(backend, seeds, z, flag, table)
    stream = torch.cuda.Stream()
    late = torch.zeros_like(z)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # the logits arrive late: a kernel on another stream would read zeros
        late.copy_(z)
        got = chain(backend, seeds, late, flag, table)
    stream.synchronize()
    assert torch.equal(expected, got)


def test_sample_on_the_gpu(backend):
    torch.manual_seed(0)
    network = UNet(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,)).cuda()
    torch.nn.init.normal_(network.out[2].weight, std=0.1)
    img = torch.randn(2, 1, 32, 32, device="cuda")
    options = dict(n=4, seed=3, schedule="cosine2", prediction="epsilon")
    masks = sample(network, img, backend=backend, **options)
    assert masks.is_cuda
    assert torch.equal(masks, sample(network, img, backend="reference", **options))


def test_no_synchronisation_inside_the_loop(backend):
    network = UNet(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,)).cuda()
    img = torch.randn(1, 1, 32, 32, device="cuda")
    calls = []

    def watched(y_t, t, img):
        calls.append(1)
        torch.cuda.set_sync_debug_mode("error" if len(calls) < 10 else "default")
        return network(y_t, t, img)

    try:
        sample(watched, img, n=4, steps=10, seed=1, schedule=SCHEDULE, prediction="epsilon", backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 10


def test_nan_is_found_on_the_gpu(backend):
    y = torch.zeros(2, 1, 8, 8, device="cuda")
    z = y.clone()
    z[1, 0, 7, 7] = float("nan")
    with pytest.raises(FloatingPointError, match="timestep 5"):
        ops.sample_step(y, z, image_seeds(0, 2).cuda(), torch.ones(4, device="cuda"), 5, backend=backend)


def test_the_loss_on_the_gpu(backend):
    """Against float64 on the CPU (test_loss.py has the rest); captured in a graph; equal bits in another batch."""
    torch.manual_seed(0)
    t = torch.tensor([0, 1, 500, 999]).repeat(16)
    z, y_0 = torch.randn(64, 1, 65, 67) * 5, torch.rand(64, 1, 65, 67) < 0.4
    y_t = ops.q_sample(y_0, t, image_seeds(1, 64), SCHEDULE)
    rows = SCHEDULE.loss_rows(t)
    op = torch.ops.berdiff_fast.diffusion_loss
    expected = op(z.double(), y_t, y_0, rows, None, "epsilon", "reference")
    on_gpu = [x.cuda() for x in (z, y_t, y_0, rows)]
    got = op(*on_gpu, None, "epsilon", backend)
    for a, b in zip(got, expected, strict=True):
        assert ((a.cpu() - b).abs() / b.abs()).max() < 1e-6
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(*on_gpu, None, "epsilon", backend)
    graph.replay()
    alone = op(*(x[5:6] for x in on_gpu), None, "epsilon", backend)
    for a, b, c in zip(got, captured, alone, strict=True):
        assert torch.equal(a, b) and torch.equal(a[5:6], c)


def test_opcheck_and_compile_on_the_gpu(backend):
    y, z = torch.zeros(2, 1, 8, 8, device="cuda"), torch.randn(2, 1, 8, 8, device="cuda")
    seeds, flag = image_seeds(0, 2).cuda(), torch.zeros(1, dtype=torch.int32, device="cuda")
    row = SCHEDULE.step_table(TAUS).float()[4].cuda()
    arguments = (y, z, seeds, row, flag, 400, 1, 0, 0, "epsilon", False, torch.float32, backend)
    torch.library.opcheck(torch.ops.berdiff_fast.sample_step.default, arguments)

    def two_steps(y, z):
        for t in (400, 300):
            y = ops.sample_step(y, z, seeds, row, t, nan_flag=flag, backend=backend)
        return y

    assert torch.equal(two_steps(y, z), torch.compile(two_steps, fullgraph=True)(y, z))


def test_overlap_in_a_captured_graph(backend):
    """Counts are added to a result that has to be zero again at every replay."""
    a, b = (
        torch.rand(3, 4, 128, 130, device="cuda") < 0.5,
        (torch.rand(3, 40, 128, 130, device="cuda") < 0.1).bfloat16(),
    )
    ops.overlap(a, b, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.overlap(a, b, backend=backend)
    for _ in range(2):
        graph.replay()
        assert torch.equal(captured.cpu(), ops.overlap(a.cpu(), b.cpu(), backend="reference"))
        a.logical_not_()
    torch.library.opcheck(torch.ops.berdiff_fast.overlap.default, (a, b, backend))


def test_metrics_on_the_gpu():
    raters, samples = torch.rand(3, 4, 40, 40) < 0.3, torch.rand(3, 6, 40, 40) < 0.3
    expected = metrics.evaluate(raters, samples)
    for name, value in metrics.evaluate(raters.cuda(), samples.cuda()).items():
        assert value.is_cuda
        assert torch.equal(value.cpu(), expected[name])


@pytest.fixture
def exact_float32():
    """Convolutions without TF32."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_prepared_call_is_one_graph(exact_float32, dtype):
    """The captured call draws what the network does as it is, for images and seeds it was not captured with."""
    torch.manual_seed(0)
    model = BerDiff(UNet(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, norm_groups=8))
    with torch.no_grad():
        for p in model.network.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model = model.to("cuda", dtype)
    for seed in range(3):
        img = torch.randn(2, 1, 64, 64, device="cuda").to(dtype)
        got = sample(model, img, 4, 10, seed=seed)
        expected = sample(model, img, 4, 10, seed=seed, prepare=False)
        assert (got != expected).float().mean() < (1e-3 if dtype is torch.float32 else 0.05)
        assert torch.equal(got, sample(model, img, 4, 10, seed=seed))
        across = sample(model, img, 4, 10, seed=seed, max_batch=3)  # chunks across images are not captured
        assert (got != across).float().mean() < (1e-3 if dtype is torch.float32 else 0.05)
    ((_, _, prepared),) = inference._prepared[model.network].values()
    graphs = [g for key, g in prepared.graphs.items() if key[0][0] == 2]
    assert graphs and all(isinstance(g, Graph) for g in graphs), "it was not captured; the log says why"
    with torch.no_grad():
        model.network.out[2].weight.mul_(-1)
    assert not torch.equal(sample(model, img, 4, 10, seed=seed), got), "changed weights were not noticed"


def test_nothing_waits_in_the_captured_call():
    model = load("lidc-v1").cuda()
    img = torch.randn(1, 1, 128, 128, device="cuda")
    for _ in range(2):
        sample(model, img, 16, 10, seed=0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        sample(model, img, 16, 10, seed=1)
    counts = {e.key: e.count for e in profiler.key_averages()}
    assert counts.get("cudaGraphLaunch") == 1
    assert sum(c for k, c in counts.items() if "LaunchKernel" in k) <= 12  # copies, flags
    # At the end, for the flags; the profiler waits once, too.
    assert sum(c for k, c in counts.items() if k.startswith("cuda") and k.endswith("Synchronize")) <= 2


def wrapped(body):
    """A module that nobody here knows, around a small network."""

    class Other(torch.nn.Module):
        mask_channels = 1

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.convolution = torch.nn.Conv2d(2, 1, 5, padding=2)

        def forward(self, y_t, t, img):
            return body(self.convolution(torch.cat([y_t, img], 1)) * (1 + t.view(-1, 1, 1, 1) / 1000) * 5)

    return Other().cuda()


def test_other_modules_are_captured_by_a_sampler(exact_float32, caplog):
    module = wrapped(lambda z: z)
    options = dict(schedule="cosine2", prediction="epsilon")
    sampler, img = Sampler(module, 4, 10, **options), torch.randn(2, 1, 64, 64, device="cuda")
    for seed in range(3):
        expected = sample(module, img, 4, 10, seed=seed, prepare=False, **options)
        assert torch.equal(sampler(img, seed=seed), expected)
        assert [isinstance(g, Graph) for g in sampler.graphs.values()] == [seed > 0]
    assert not caplog.records
    with torch.no_grad():
        module.convolution.weight.mul_(-1)  # in place: the graph reads it
    assert torch.equal(sampler(img, seed=2), sample(module, img, 4, 10, seed=2, prepare=False, **options))
    module.convolution.weight.data = module.convolution.weight.data * -1  # elsewhere: another graph
    for _ in range(2):
        assert torch.equal(sampler(img, seed=2), expected)


def test_threads_and_streams_take_turns(exact_float32):
    """Four threads sample other images with one captured graph, each on a stream of its own."""
    sampler = Sampler(wrapped(lambda z: z), 4, 10, schedule="cosine2", prediction="epsilon")
    images = torch.randn(8, 1, 64, 64, device="cuda")
    expected = [sampler(img, seed=i) for i, img in enumerate(images)]

    def draw(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            masks = sampler(images[i], seed=i)
            torch.cuda.current_stream().synchronize()
            return masks

    torch.cuda.synchronize()
    with concurrent.futures.ThreadPoolExecutor(4) as executor:
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(executor.map(draw, range(8)), expected, strict=True))


def test_a_module_that_waits_is_not_captured(exact_float32, caplog):
    module = wrapped(lambda z: z * (1 if float(z.mean()) > -1e9 else 2))
    sampler, img = (
        Sampler(module, 4, 10, schedule="cosine2", prediction="epsilon"),
        torch.randn(1, 1, 8, 8, device="cuda"),
    )
    masks = [sampler(img, seed=1) for _ in range(3)]
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])
    (record,) = caplog.records
    assert "no CUDA graph" in record.getMessage()
    assert torch.cuda.get_sync_debug_mode() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_not_finite_on_the_gpu(value):
    model, img = load("lidc-v1").cuda(), torch.zeros(1, 1, 128, 128, device="cuda")
    img[0, 0, 5, 5] = value
    for _ in range(2):
        with pytest.raises(ValueError, match="img must be finite in torch.float32"):
            sample(model, img, 2, 5, seed=0)


def test_size_classes_on_the_gpu(backend):
    """Equal logits give the CPU's classes; a call with a prior makes the host wait for nothing before its flags."""
    from berdiff_fast.network.prior import ModePrior, class_weights, size_class
    from berdiff_fast.sampling.modes import draw_classes

    torch.manual_seed(0)
    logits, seeds = torch.randn(500, 7) * 3, image_seeds(4, 500)
    for stratify in (True, False):
        draw = partial(draw_classes, n=16, first_sample=9, stratify=stratify)
        expected = draw(class_weights(logits), seeds)
        found = draw(class_weights(logits.cuda()), seeds.cuda())
        assert torch.equal(found.cpu(), expected)

    shape = dict(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,), num_classes=5)
    network, prior = UNet(img_channels=2, **shape), ModePrior(1, (16, 64, 128), channels=(8, 16))
    torch.nn.init.normal_(network.out[2].weight, std=0.1)
    torch.nn.init.normal_(prior.members[0].head[-1].weight, std=1.0)
    model = BerDiff(network, "cosine2", "y_0", output_crop=32, distance=True, mode_prior=prior).cuda().eval()
    img = torch.randn(3, 1, 48, 40, device="cuda")
    masks, classes = sample(model, img, n=8, seed=3, backend=backend, return_modes=True)
    assert masks.is_cuda and torch.equal(size_class(masks, (16, 64, 128)), classes)
    assert torch.equal(masks, sample(model, img, n=8, seed=3, backend="reference"))
    fewer, classes_of_fewer = sample(model, img, n=5, seed=3, backend=backend, return_modes=True)
    assert torch.equal(classes[:, :5], classes_of_fewer)
    # The draws are the same; cuDNN may add up another way in another batch, and a changed pixel changes the next step.
    assert (masks[:, :5] != fewer).double().mean() < 0.01
    assert (classes.cpu() == sample(model.cpu(), img.cpu(), n=8, seed=3, return_modes=True)[1]).double().mean() > 0.95


def test_chunks_of_a_call_are_replays_of_one_graph():
    model, img = load("lidc-v1").cuda().bfloat16(), torch.randn(1, 1, 128, 128, device="cuda").bfloat16()
    masks = sample(model, img, 64, 5, seed=3, max_batch=16)
    ((_, _, prepared),) = inference._prepared[model.network].values()
    assert [type(g) for g in prepared.graphs.values()] == [Graph]
    for first in (0, 16, 48):
        alone = sample(model, img, 16, 5, seed=3, first_sample=first)
        assert torch.equal(alone, masks[:, first : first + 16])
    assert len(prepared.graphs) == 1


def test_a_graph_survives_what_others_do_with_the_memory():
    """Workspaces that ``empty_cache`` unmaps must not be the graph's."""
    model, img = load("lidc-v1").cuda(), torch.randn(1, 1, 128, 128, device="cuda")
    expected = [sample(model, img, 4, 5, seed=3) for _ in range(3)][-1]
    for _ in range(3):
        torch.cuda.empty_cache()
        _ = [torch.full((1 << 22,), float("nan"), device="cuda") @ torch.ones(1 << 22, device="cuda") for _ in range(4)]
        assert torch.equal(sample(model, img, 4, 5, seed=3), expected)


def test_a_capture_that_failed_leaves_the_allocator_in_order(exact_float32, caplog):
    waits = wrapped(lambda z: z * (1 if float(z.mean()) > -1e9 else 2))
    sampler, img = (
        Sampler(waits, 4, 3, schedule="cosine2", prediction="epsilon"),
        torch.randn(1, 1, 8, 8, device="cuda"),
    )
    for _ in range(3):
        sampler(img, seed=1)
    assert "no CUDA graph" in caplog.text
    before = torch.cuda.memory_reserved()
    for _ in range(20):  # in a pool that nobody empties each of these would be new memory
        torch.empty(1 << 24, device="cuda")
        torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + (1 << 26)
    fine = Sampler(wrapped(lambda z: z), 4, 3, schedule="cosine2", prediction="epsilon")
    for _ in range(3):
        fine(img, seed=1)
    assert any(isinstance(g, Graph) for g in fine.graphs.values())


def test_threads_prepare_once_on_streams_of_their_own():
    model, img = load("lidc-v1").cuda(), torch.randn(1, 1, 128, 128, device="cuda")

    def draw(_):
        with torch.cuda.stream(torch.cuda.Stream()):
            masks = sample(model, img, 4, 5, seed=3)
            torch.cuda.current_stream().synchronize()
            return masks

    with concurrent.futures.ThreadPoolExecutor(4) as executor:
        found = list(executor.map(draw, range(8)))
    assert all(torch.equal(masks, found[0]) for masks in found)
    assert len(inference._prepared[model.network]) == 1
