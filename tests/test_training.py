# SPDX-License-Identifier: Apache-2.0
"""The trainer: what a run does, that stopping it changes nothing, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import logging
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from support import ENVIRONMENT, phantom_file, torchrun
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import berdiff_fast as bf
from berdiff_fast import cli
from berdiff_fast.training.config import TrainConfig, read_yaml

pytest.importorskip("accelerate", reason="the trainer needs accelerate")
from berdiff_fast.training import checkpoints, loop, setup
from berdiff_fast.training.average import Average
from berdiff_fast.training.state import RunState

#: A network of two residual blocks on 8 x 8 patches: some milliseconds a step.
TINY = dict(
    channel_mult=[1],
    patch_size=4,
    norm_groups=8,
    attention_resolutions=[],
    batch_size=4,
    warmup=5,
    log_every=10,
    tensorboard=False,
    device="cpu",
)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("phantoms")
    return {
        "train_data": str(phantom_file(folder / "train.h5", 0, 24)),
        "val_data": str(phantom_file(folder / "val.h5", 100, 8)),
    }


def config(data, output, **changes) -> TrainConfig:
    return TrainConfig(train_data=data["train_data"], output=str(output), **{**TINY, "steps": 20, **changes})


def arguments(config: TrainConfig) -> list[str]:
    """The command line of a run."""
    words = ["train"]
    for name, value in config.to_dict().items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(value, list):
            words += [option, *map(str, value)]
        elif value != "":
            words += [option, str(value)]
    return words


def start(words: list[str], **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "berdiff_fast.cli", *words]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def weights(output: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(output / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """60 steps with validation, in this process."""
    output = tmp_path_factory.mktemp("run")
    loop.train(
        config(
            data,
            output,
            steps=60,
            checkpoint_every=20,
            validate_every=30,
            val_data=data["val_data"],
            validation_slices=4,
            validation_samples=3,
            validation_steps=4,
            tensorboard=True,
        )
    )
    return output


def test_a_run_leaves_what_it_promises(run):
    assert {p.name for p in run.iterdir()} >= {"model.safetensors", "best.safetensors", "config.yaml", "log.jsonl"}
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "step-00000040.safetensors",
        "step-00000060.safetensors",
    ]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [10, 20, 30, 40, 50, 60]
    seen = [line for line in lines if "validation_ged" in line]
    assert [line["step"] for line in seen] == [30, 60]
    assert all(0 <= line["validation_hm_iou"] <= 1 for line in seen)
    model = bf.load(run / "model.safetensors")
    assert model.preprocessing is not None and model.network.patch_size == 4
    img = model.preprocess(np.zeros((32, 32), np.uint8))
    assert bf.sample(model, img, n=2, steps=2, seed=0).shape == (1, 2, 1, 32, 32)


def test_previews_and_tensorboard(run):
    pytest.importorskip("matplotlib")
    assert sorted(p.name for p in (run / "previews").iterdir()) == ["step-00000030.png", "step-00000060.png"]
    pytest.importorskip("tensorboard")
    assert list((run / "tensorboard").glob("events*"))


def test_the_loss_falls(run):
    losses = [json.loads(line).get("loss") for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [x for x in losses if x is not None]
    assert losses[0] < 1.5 and losses[-1] < 0.85 * losses[0]


def test_the_saved_config_is_the_run(run, data):
    again = TrainConfig.from_dict(read_yaml(run / "config.yaml"))
    assert again.optimiser.steps == 60 and again.data.train == data["train_data"] and again.network.channel_mult == (1,)


def test_a_finished_run_has_nothing_left_to_do(run, data):
    before = (run / "model.safetensors").read_bytes()
    loop.train(TrainConfig.from_dict(read_yaml(run / "config.yaml")))
    assert (run / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"prediction": "y_0"},
        {"leave_one_out": True},
        {"accumulation": 2},
        {"decay": "constant", "clip": 0.0},
        {"as_released": True, "kl_weight": 0.0},
        {"dropout": 0.2, "use_scale_shift_norm": True},
        {"precision": "bf16", "channels_last": True},
        {"workers": 1, "in_memory": False},
        {"data_on_device": "true", "in_memory": False, "precision": "tf32"},
        {"rotate": 20.0, "scale": 0.2, "input_scale": 0.5},
        {"window": [0.0, 200.0], "schedule": "linear"},
        {"crop": 16, "crop_steps": 2},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_option_trains(data, tmp_path, changes):
    loop.train(config(data, tmp_path, steps=4, log_every=2, **changes))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(0 < line["loss"] < 5 for line in lines)
    assert bf.load(tmp_path / "model.safetensors").prediction == changes.get("prediction", "epsilon")


def test_accumulation_is_one_larger_batch(data, tmp_path):
    for accumulation in (1, 2):
        loop.train(config(data, tmp_path / str(accumulation), steps=10, accumulation=accumulation))
    a, b = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5


def test_the_rate(data, tmp_path):
    c = config(data, tmp_path, steps=100, warmup=10, learning_rate=1.0)
    assert c.learning_rate_at(0) == 0.1 and c.learning_rate_at(9) == c.learning_rate_at(10) == 1.0
    assert c.learning_rate_at(55) == pytest.approx(0.5) and c.learning_rate_at(99) < 1e-3
    assert config(data, tmp_path, decay="constant", learning_rate=1.0).learning_rate_at(19) == 1.0


# ---------------------------------------------------------------------- stopping and going on


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory) -> Path:
    """200 steps at one go; dropout, so that the generator's state matters too."""
    output = tmp_path_factory.mktemp("uninterrupted")
    process = start(arguments(resumable(data, output)))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


def resumable(data, output) -> TrainConfig:
    return config(data, output, steps=200, checkpoint_every=100, dropout=0.1, flip=True)


def wait_for(condition, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.01)


def logged_step(output: Path) -> int:
    log = output / "log.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.mark.slow
def test_killed_in_a_later_step(data, tmp_path, uninterrupted):
    words = arguments(resumable(data, tmp_path))
    process = start(words)
    wait_for(lambda: logged_step(tmp_path) >= 120, process)
    process.kill()
    process.communicate()
    assert not (tmp_path / "model.safetensors").exists()
    process = start(words)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert_same_weights(tmp_path, uninterrupted)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(10, 201, 10))  # nothing twice


KILLED_WHILE_WRITING = """
import os, signal, sys
from berdiff_fast import cli
replace, calls = os.replace, []
def kill(source, target):
    if "step-00000200" in str(target):
        data = open(source, "rb").read()
        open(source, "wb").write(data[: len(data) // 2])  # as it is in the middle of the write
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = kill
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(data, tmp_path, uninterrupted):
    words = arguments(resumable(data, tmp_path))
    script = tmp_path / "kill.py"
    script.write_text(KILLED_WHILE_WRITING)
    killed = subprocess.run([sys.executable, str(script), *words], env=ENVIRONMENT, capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    folder = tmp_path / "checkpoints"
    assert [p.name for p in folder.glob("step-*")] == ["step-00000100.safetensors"] and list(folder.glob(".step-*"))
    process = start(words)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert_same_weights(tmp_path, uninterrupted)
    assert not list(folder.glob(".step-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_a_signal_saves_and_exits(data, tmp_path, uninterrupted, number):
    words = arguments(resumable(data, tmp_path))
    process = start(words)
    wait_for(lambda: logged_step(tmp_path) >= 20, process)
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    (saved,) = (tmp_path / "checkpoints").glob("step-*")
    step = int(saved.stem.removeprefix("step-"))
    assert 20 <= step < 200 and f"stopped after step {step} of 200" in errors and str(saved) in out
    process = start(words)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert_same_weights(tmp_path, uninterrupted)


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_order_in_memory_changes_nothing(data, tmp_path, channels_last):
    """Of weights that a resumed run has channels last: their moments, which a file has in the usual order, follow."""
    options = dict(channels_last=channels_last, decay="constant")
    loop.train(config(data, tmp_path / "once", **options))
    loop.train(config(data, tmp_path / "twice", **options, steps=7))
    loop.train(config(data, tmp_path / "twice", **options))
    assert_same_weights(tmp_path / "once", tmp_path / "twice")
    # And a run may change from one to the other.
    loop.train(config(data, tmp_path / "other", **options, steps=7))
    loop.train(config(data, tmp_path / "other", **{**options, "channels_last": not channels_last}))
    a, b = weights(tmp_path / "once"), weights(tmp_path / "other")
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5


def test_a_truncated_checkpoint_falls_back(data, tmp_path, caplog):
    loop.train(config(data, tmp_path, checkpoint_every=10))
    whole = weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    newest = tmp_path / "checkpoints" / "step-00000020.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1000])
    with caplog.at_level(logging.WARNING, "berdiff_fast"):
        loop.train(config(data, tmp_path, checkpoint_every=10))
    assert "step-00000020.safetensors cannot be read (truncated or damaged?), trying the one before it" in caplog.text
    again = weights(tmp_path)
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_a_damaged_checkpoint_does_not_crowd_out_good_ones(data, tmp_path):
    """Of a later step, it is not the newest of those that count."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step-00001000.safetensors").write_bytes(b"damaged")
    loop.train(config(data, tmp_path, steps=4, checkpoint_every=2, keep=1))
    assert [p.name for p in folder.iterdir()] == ["step-00000004.safetensors"]
    assert checkpoints.newest(folder) is not None


def test_a_full_disk_leaves_the_checkpoint_before(data, tmp_path):
    first = config(data, tmp_path, steps=10, decay="constant")
    loop.train(first)
    (kept,) = (tmp_path / "checkpoints").iterdir()
    before, size = kept.read_bytes(), kept.stat().st_size
    # A limit on file sizes stands in for the disk; it hits while the file is written.
    process = start(
        arguments(dataclasses.replace(first, steps=20)),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2)),
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "checkpoint" in errors and "Traceback" not in errors
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [kept.name] and kept.read_bytes() == before


@pytest.mark.slow
def test_two_processes_train_what_one_does(data, tmp_path):
    def run(processes: int, on_device: str = "auto") -> Path:
        output = tmp_path / f"{processes}-{on_device}"
        words = arguments(config(data, output, steps=30, val_data=data["val_data"], validation_slices=4, device="auto"))
        command = [*torchrun(processes, tmp_path), *words, "--validation-samples", "2", "--data-on-device", on_device]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return output

    one, two = run(1), run(2)
    a, b = weights(one), weights(two)
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5
    assert_same_weights(two, run(2, "false"))  # by loaders, each of which makes its part of a batch

    def losses(output):
        return [json.loads(line).get("loss", 0) for line in (output / "log.jsonl").read_text().splitlines()]

    assert losses(one) == pytest.approx(losses(two), abs=1e-5) and len(losses(one)) == 4


# ---------------------------------------------------------------------- runs that cannot be


BAD_RUNS = {
    "no output": (dict(output=""), "output must be given"),
    "no data": (dict(train_data=""), r"data\.train \(--train-data\) must be given"),
    "missing data": (dict(train_data="nowhere.h5"), "no file 'nowhere.h5'"),
    "size": (dict(channel_mult=[1, 1, 1, 1, 1, 1], attention_resolutions=[]), "sides divisible by 128"),
    "large crop": (dict(crop=64), "--crop 0"),
    "same patients": (dict(val_data="train"), "24 patients are in both"),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_bad_runs(data, tmp_path, case):
    changes, message = BAD_RUNS[case]
    if changes.get("val_data") == "train":
        changes = {"val_data": data["train_data"]}
    values = {**config(data, tmp_path / "out").to_dict(), **changes}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        loop.train(TrainConfig.from_dict(values))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_run(data, tmp_path):
    loop.train(config(data, tmp_path, steps=4))
    message = r"another config \(network.channel_mult was \[1\] and is \[2\]; optimiser.learning_rate was 0.001 and is"
    with pytest.raises(ValueError, match=message):
        loop.train(config(data, tmp_path, steps=4, channel_mult=[2], learning_rate=2e-3))
    # The same config, and yet another architecture: data with another number of channels.
    found = checkpoints.newest(tmp_path / "checkpoints")
    assert found is not None
    other = config(data, tmp_path, steps=4)
    with pytest.raises(ValueError, match=r"step-00000004\.safetensors is of another architecture"):
        checkpoints.restore(found, other, RunState(other, setup.build_model(other, mask_channels=2, img_channels=1)))


def test_what_of_a_run_may_change(data, tmp_path):
    """Validations, and the end of cropping while it lies ahead."""
    loop.train(config(data, tmp_path, steps=4, crop=16, crop_steps=8))
    loop.train(config(data, tmp_path, steps=5, crop=16, crop_steps=6, validation_samples=3, spacing="uniform"))
    assert bf.load(tmp_path / "model.safetensors").spacing == "uniform"
    for crop_steps in (3, 0):
        with pytest.raises(ValueError, match=f"crop_steps was 6 and is {crop_steps}"):
            loop.train(config(data, tmp_path, steps=6, crop=16, crop_steps=crop_steps))


def test_accumulation_may_change(data, tmp_path):
    """The same examples in every step, in other portions: the weights are those of a run that changed nothing."""
    for output, accumulation in (("same", 1), ("changed", 4)):
        loop.train(config(data, tmp_path / output, steps=10, decay="constant"))
        loop.train(config(data, tmp_path / output, steps=20, decay="constant", accumulation=accumulation))
    a, b = weights(tmp_path / "same"), weights(tmp_path / "changed")
    assert 0 < max((a[k] - b[k]).abs().max() for k in a) < 1e-5


@pytest.mark.parametrize("changes", [{"data_on_device": False}, {"data_on_device": False, "workers": 1}])
def test_where_batches_are_made_changes_nothing(data, tmp_path, changes):
    options = dict(steps=6, rotate=10.0, crop=16, crop_steps=3)
    loop.train(config(data, tmp_path / "resident", **options))
    loop.train(config(data, tmp_path / "other", **options, **changes))
    assert_same_weights(tmp_path / "resident", tmp_path / "other")


def test_both_files_are_read_at_once(data, tmp_path, monkeypatch):
    """Slices of a validation are spread over a compressed file, which takes seconds at every validation."""
    monkeypatch.setattr(loop.RaterDataset, "_read", None)
    monkeypatch.setattr(loop.RaterDataset, "__getitem__", None)
    loop.train(config(data, tmp_path, steps=2, val_data=data["val_data"], validation_slices=2))


def test_quiet(data, tmp_path, capfd):
    words = arguments(config(data, tmp_path / "loud", steps=2, val_data=data["val_data"], validation_slices=2))
    assert cli.main(words) == 0
    out, errors = capfd.readouterr()
    assert "model.safetensors" in out and "training" in errors and "validation" in errors
    words = arguments(config(data, tmp_path / "quiet", steps=2, val_data=data["val_data"], validation_slices=2))
    assert cli.main([*words, "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")


def test_the_average_is_torchs():
    """Bit for bit; nothing is copied to where the weights are and read back, for which the host would wait."""
    network, decay = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7)), 0.9

    def torchs(averages, currents, count):
        get_ema_multi_avg_fn(min(decay, (1 + float(count)) / (10 + float(count))))(averages, currents, count)

    average, expected = Average(network, decay), AveragedModel(network, multi_avg_fn=torchs)
    for _ in range(100):
        with torch.no_grad():
            for tensor in (*network.parameters(), network[1].running_mean):
                tensor.add_(torch.randn_like(tensor))
        expected.update_parameters(network)
        average.update()
        for (name, ours), theirs in zip(
            average.model.state_dict().items(), expected.state_dict().values(), strict=True
        ):
            assert torch.equal(ours, theirs), name
    on_meta = Average(torch.nn.Linear(5, 7, device="meta"), decay)  # whose numbers nobody can read
    on_meta.update()
    on_meta.update()


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, monkeypatch):
    real = bf.ops.diffusion_loss
    monkeypatch.setattr(loop.ops, "diffusion_loss", lambda *a, **k: real(*a, **k) * float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan after step 10"):
        loop.train(config(data, tmp_path))


def test_errors_are_one_line(data, tmp_path, capsys):
    assert cli.main(["train", "--train-data", "nowhere.h5", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "berdiff-fast train: path: there is no file 'nowhere.h5'\n"
    with pytest.raises(SystemExit):
        cli.main(["train", "--steps", "many"])
