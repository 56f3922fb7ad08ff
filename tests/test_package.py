# SPDX-License-Identifier: Apache-2.0
"""The package as installed: what importing it costs and loads, what it says of itself, the demo."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import berdiff_fast as bf
from berdiff_fast import cli, demo
from berdiff_fast.backends import select
from berdiff_fast.metrics import generalized_energy_distance

ROOT = Path(__file__).parent.parent


def python(code: str, **environment: str) -> str:
    done = run(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    # Python looks in the current folder first, and there the sources may lie without the compiled modules.
    where = Path(bf.__file__).parent.parent
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=where, capture_output=True, text=True)


def test_import_is_quick_and_lazy():
    code = """
import time, torch, sys
start = time.process_time()  # not the time that other work on the machine takes
import berdiff_fast
seconds = time.process_time() - start
names = ("triton", "berdiff_fast._cuda", "matplotlib", "scipy", "torchmetrics", "h5py")
loaded = [m for m in names if m in sys.modules]
print(seconds, *loaded)
"""
    runs = [python(code).split() for _ in range(3)]
    assert all(run[1:] == [] for run in runs), runs
    assert min(float(run[0]) for run in runs) < 0.3


def test_only_the_chosen_backend_is_loaded():
    code = """
import sys, torch, berdiff_fast as bf
bf.ops.initial_noise(bf.image_seeds(0, 1), (8, 8))
print("triton" in sys.modules, "berdiff_fast._cuda" in sys.modules)
"""
    if not torch.cuda.is_available():
        assert python(code).split() == ["False", "False"]


def test_the_compiled_module_is_there():
    assert select.can_run("cpp", "cpu"), select.why_not("cpp", "cpu")
    assert select.resolve("auto", "cpu") == "cpp"


def test_an_explicit_backend_never_falls_back():
    y = torch.zeros(1, 1, 4, 4)
    for backend in ("cuda",) if not torch.cuda.is_available() else ():
        with pytest.raises(bf.BackendUnavailableError, match=f"backend '{backend}' cannot run here: .*'cpu'"):
            bf.ops.sample_step(y, y, bf.image_seeds(0, 1), torch.ones(4), 0, backend=backend)


def test_triton_without_its_interpreter_says_why():
    code = """
import torch, berdiff_fast as bf
if not torch.cuda.is_available():
    try:
        bf.ops.initial_noise(bf.image_seeds(0, 1), (8,), backend="triton")
    except bf.BackendUnavailableError as error:
        print(error)
"""
    if not torch.cuda.is_available():
        assert re.search(r"triton' cannot run here: .*(interpreter|not installed)", python(code))


def test_auto_says_so_when_it_is_slow():
    code = """
import logging, torch
logging.basicConfig(level=logging.INFO)
import berdiff_fast as bf
bf.ops.initial_noise(bf.image_seeds(0, 1), (8,))
bf.ops.initial_noise(bf.image_seeds(0, 1), (8,))
"""
    done = run(code, BERDIFF_FAST_ISA="avx9000")
    assert done.returncode == 0
    assert done.stderr.count("WARNING:berdiff_fast:backend 'auto' uses the slow 'reference'") == 1
    assert "BERDIFF_FAST_ISA: isa must be 'auto' or one of" in done.stderr


def test_info(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("berdiff_fast", "torch", "instruction sets", "reference", "triton", "cuda"):
        assert word in text
    assert cli.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backends"]["reference"] is None
    assert set(report["backends"]) == set(select.BACKENDS)
    if not torch.cuda.is_available():
        assert report["backends"]["cuda"]


def test_demo(tmp_path, capsys):
    picture = tmp_path / "demo.png"
    assert cli.main(["demo", "--output", str(picture), "--slice-count", "1", "--n", "4", "--steps", "10"]) == 0
    text = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["demo.png"]
    for word in ("4 masks", "network", "step kernel", "backend       " + select.resolve("auto", _device())):
        assert word in text


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def test_the_bundled_model_knows_its_raters():
    """Nearer to the raters than their own majority vote is, which needs diversity in the right places."""
    from berdiff_fast.data import phantom

    cases = phantom.generate(8, seed=demo.SLICES_SEED + 1, raters=16)
    model = bf.load("phantom64")
    masks = bf.sample(model, model.preprocess(cases.images), n=8, seed=1)
    majority = (cases.raters.float().mean(1, keepdim=True) > 0.5).expand(-1, 8, -1, -1, -1)
    ged = [float(generalized_energy_distance(cases.raters, m).mean()) for m in (masks, majority)]
    assert ged[0] < ged[1]
    assert bool((masks.flatten(2).sum(-1) > 0).all())


def test_covers():
    """Real code runs on its own major version, PTX on everything newer."""
    built = "80-real 90-real 120"
    assert select.covers(built, (8, 0))
    assert select.covers(built, (8, 9))
    assert select.covers(built, (9, 0))
    assert select.covers(built, (12, 1))
    assert not select.covers(built, (7, 5))
    assert not select.covers(built, (10, 0))
    assert select.covers("80", (10, 0))


def test_the_cuda_module_without_a_gpu():
    """It imports without a driver, was built for what it should, and fails in words when called."""
    cuda = pytest.importorskip("berdiff_fast._cuda", reason="the CUDA module was not built")
    assert cuda.architectures
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            cuda.device_count()
        assert "'cpu'" in select.why_not("cuda", "cpu")
    # The kernels' index arithmetic, beyond 2^31 pixels in all and in one row.
    per_row = (2**31 + 5 + 15) // 16
    row, pixel, offset, live = cuda.locate_chunk(3 * per_row + per_row - 1, 2**31 + 5)
    assert (row, pixel, offset, live) == (3, 16 * (per_row - 1), 3 * (2**31 + 5) + 16 * (per_row - 1), 5)
    assert cuda.locate_chunk(2**33, 16) == (2**33, 0, 2**37, 16)


def test_a_default_device_plays_no_part():
    with torch.device("meta"):
        assert bf.image_seeds(1, 2).device.type == "cpu"
        assert bf.NoiseSchedule("linear").step_table([0, 10]).device.type == "cpu"


def test_dispatch_where_it_is_needed():
    """Tracing, transforms and views with a pending negation see the op, not the memory behind it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    y, z = torch.zeros(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    row = torch.tensor([1.0, 0.0, 1.0, 1.0])
    traced = torch.jit.trace(lambda z: bf.ops.posterior(y, z, row), z, check_trace=False)
    assert torch.equal(traced(-z), bf.ops.posterior(y, -z, row))
    negative = torch.complex(z, z).conj().imag
    assert negative.is_neg()
    assert torch.equal(bf.ops.posterior(y, negative, row), bf.ops.posterior(y, -z, row))
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(z)
    with pytest.raises(Exception, match="(?i)fake"):
        bf.ops.posterior(y, fake, row)
    assert not bf.ops.posterior(y, z.clone().requires_grad_(), row, backend="reference").requires_grad


def test_errors_of_the_command_are_one_line(tmp_path, capsys):
    assert cli.main(["demo", "--output", str(tmp_path / "no" / "such" / "folder.png"), "--n", "0"]) == 1
    error = capsys.readouterr().err
    assert error == f"berdiff-fast demo: output: there is no folder {tmp_path / 'no' / 'such'}\n"
    assert cli.main(["demo", "--output", str(tmp_path / "x.png"), "--n", "0"]) == 1
    assert capsys.readouterr().err == "berdiff-fast demo: n must be at least 1, got 0\n"
    assert list(tmp_path.iterdir()) == []


def readme_blocks() -> list[str]:
    text = (ROOT / "README.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


def test_readme_code_runs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.chdir(tmp_path)
    first, second = readme_blocks()
    names: dict = {}
    exec(first, names)
    assert names["masks"].shape == (6, 16, 1, 128, 128)
    assert [path.name for path in tmp_path.iterdir()] == ["masks.png"]
    names.update(torch=torch, img=torch.zeros(1, 1, 8, 8), network=lambda x, t: x[:, :1] * 0.0 - 2.0)
    exec(second, names)
    assert names["masks"].shape == names["more"].shape == (1, 16, 1, 8, 8)
    assert not torch.equal(names["masks"], names["more"])
