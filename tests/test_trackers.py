# SPDX-License-Identifier: Apache-2.0
"""Accelerate's trackers: told once of each step, whatever happens to the run, and never in its way."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import types
from pathlib import Path
from typing import get_args

import pytest
from support import ENVIRONMENT, phantom_data, torchrun

from berdiff_fast import choices, cli
from berdiff_fast.training.config import TrainConfig, read_yaml

pytest.importorskip("accelerate", reason="the trainer needs accelerate")
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from berdiff_fast.training import loop, trackers

TINY = dict(
    channel_mult=[1],
    patch_size=4,
    norm_groups=8,
    attention_resolutions=[],
    batch_size=4,
    warmup=2,
    decay="constant",
    device="cpu",
    steps=12,
    log_every=2,
    checkpoint_every=5,
    validate_every=4,
    validation_slices=2,
    validation_samples=2,
    validation_steps=2,
    tensorboard=False,
    quiet=True,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    return phantom_data(tmp_path_factory.mktemp("phantoms"))


class Fake:
    """In the place of Accelerate's wandb; what came is kept in ``runs``, by the names of runs."""

    runs: dict[str, list[tuple]]
    name = "wandb"
    requires_logging_directory = False

    def __init__(self, run_name, **arguments):
        self.project, self.arguments = run_name, arguments

    def start(self):
        self.told = self.runs.setdefault(self.arguments["id"], [])

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        assert all(isinstance(value, (bool, int, float, str)) for value in values.values())
        self.told.append(("config", values["steps"], values["channel_mult"]))

    def log(self, values, step):
        self.told.append((step, *values))

    def log_images(self, values, step):
        ((name, (picture,)),) = values.items()
        assert picture.ndim == 3 and picture.shape[2] == 3
        self.told.append((step, name))

    def finish(self):
        self.told.append(("finish",))


@pytest.fixture
def fake(monkeypatch) -> type[Fake]:
    made = type("Made", (Fake,), {"runs": {}})
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", made)
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    return made


def config(data, output, **changes) -> TrainConfig:
    return TrainConfig(**data, output=str(output), **{**TINY, **changes})


class Killed(BaseException):
    """Instead of SIGKILL."""


def train_until_killed(monkeypatch, step: int, config: TrainConfig) -> None:
    """The process ends without a word after this step."""

    def step_or_die(self, done, *rest):
        real(self, done, *rest)
        if done == step:
            self._trackers._running = {}  # nothing is closed
            raise Killed

    real = loop.Records.step
    with monkeypatch.context() as patch:
        patch.setattr(loop.Records, "step", step_or_die)
        with pytest.raises(Killed):
            loop.train(config)


def test_a_tracker_is_told_everything_once(data, tmp_path, fake, monkeypatch):
    """A run is killed after step 9 and goes on from its checkpoint of step 5, in the same run of the tracker's."""
    train_until_killed(monkeypatch, 9, config(data, tmp_path / "a", log_with="wandb", project="nodules"))
    loop.train(config(data, tmp_path / "a", log_with="wandb", project="nodules"))
    ((run, told),) = fake.runs.items()
    assert json.loads((tmp_path / "a" / "trackers.json").read_text()) == {"wandb": run}
    assert [one for one in told if one[0] == "config"] == [("config", 12, "[1]")] and told[-1] == ("finish",)
    losses = [one for one in told if "loss" in one]
    assert losses == [(s, "loss", "gradient_norm", "learning_rate", "images_per_second") for s in range(2, 13, 2)]
    assert [one[:2] for one in told if "validation/ged" in one] == [(s, "validation/ged") for s in (4, 8, 12)]
    pytest.importorskip("matplotlib")
    assert [one for one in told if "previews" in one] == [(s, "previews") for s in (4, 8, 12)]


def test_where_a_tracker_puts_things_and_what_it_is_called(data, tmp_path, fake):
    started = []
    fake.start = lambda self: started.append(self) or Fake.start(self)
    loop.train(config(data, tmp_path / "a", steps=2, log_with=["wandb", "wandb"], project="nodules"))
    (one,) = started
    assert one.project == "nodules" and one.arguments["name"] == "a" and one.arguments["resume"] == "allow"
    assert one.arguments["dir"] == str(tmp_path / "a")


def test_only_the_main_process_has_trackers(data, tmp_path, fake):
    from berdiff_fast.training.records import Records

    with Records(tmp_path, config(data, tmp_path, log_with="wandb"), 0, enabled=False):
        assert not fake.runs and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_one_of_two_processes_writes(data, tmp_path):
    pytest.importorskip("tensorboard")
    words = ["--train-data", data["train_data"], "--output", str(tmp_path / "run"), "--log-with", "tensorboard"]
    words += ["--channel-mult", "1", "--patch-size", "4", "--norm-groups", "8", "--attention-resolutions"]
    words += ["--batch-size", "4", "--steps", "2", "--log-every", "1"]
    command = [*torchrun(2, tmp_path), "train", *words]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "run" / "tensorboard").glob("events*"))) == 1


@pytest.mark.parametrize("named", [True, False])
def test_tensorboard(data, tmp_path, monkeypatch, named):
    """By name, and by ``records.tensorboard`` as before there were names; both together write once."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = dict(tensorboard=True, log_with=["tensorboard"] if named else [])
    train_until_killed(monkeypatch, 9, config(data, tmp_path / "a", **options))
    loop.train(config(data, tmp_path / "a", **options))
    found = EventAccumulator(str(tmp_path / "a" / "tensorboard"), size_guidance={"images": 0})
    found.Reload()
    assert [event.step for event in found.Scalars("loss")] == list(range(2, 13, 2))
    assert [event.step for event in found.Scalars("validation/ged")] == [4, 8, 12]
    assert len(list((tmp_path / "a" / "tensorboard").glob("*/hparams.yml"))) == 1, "the config, once"
    pytest.importorskip("matplotlib")
    assert [event.step for event in found.Images("previews")] == [4, 8, 12]


def test_a_tracker_that_fails_on_the_way_is_left_alone(data, tmp_path, fake, caplog):
    def log(self, values, step):
        if step == 4:
            raise ConnectionError("no route\nto host")
        Fake.log(self, values, step)

    fake.log = log
    with caplog.at_level(logging.WARNING, "berdiff_fast"):
        path = loop.train(config(data, tmp_path / "a", log_with="wandb"))
    assert path.is_file()
    said = [r.getMessage() for r in caplog.records]
    assert said == ["wandb failed after step 4 and is told no more of this run: no route to host"]
    ((_, told),) = fake.runs.items()
    assert [one[0] for one in told] == ["config", 2]


def test_a_damaged_list_of_runs_begins_new_ones(data, tmp_path, fake, caplog):
    loop.train(config(data, tmp_path / "a", steps=5, log_with="wandb"))
    for damage in ("{not json", "[1]", '{"wandb": 3}'):
        (tmp_path / "a" / "trackers.json").write_text(damage)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "berdiff_fast"):
            loop.train(config(data, tmp_path / "a", steps=5, log_with="wandb"))
        assert "trackers begin a new run" in caplog.text
    assert len(fake.runs) == 4


def test_names_are_accelerates():
    assert set(get_args(choices.Tracker)) <= set(LOGGER_TYPE_TO_CLASS)


def test_one_name_or_several(tmp_path):
    (tmp_path / "c.yaml").write_text("records:\n  log_with: wandb\n  project: nodules\n")
    one = TrainConfig.from_dict(read_yaml(tmp_path / "c.yaml"))
    assert one.records.log_with == ("wandb",) and one == TrainConfig.from_dict(one.to_dict())
    (tmp_path / "c.yaml").write_text(one.to_yaml())
    assert TrainConfig.from_dict(read_yaml(tmp_path / "c.yaml")) == one
    command = cli.command("train")
    words = ["--config", str(tmp_path / "c.yaml"), "--log-with", "mlflow", "tensorboard"]
    assert command.parse("train", words).checked().records.log_with == ("mlflow", "tensorboard")


# ---------------------------------------------------------------------- trackers that cannot be


def nothing_left(tmp_path: Path) -> bool:
    return not (tmp_path / "run").exists()


def test_an_unknown_tracker(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"records.log_with must be one of \['tensorboard', 'wandb', .*got 'wandbb'"):
        TrainConfig(log_with=["wandbb"])
    with pytest.raises(TypeError, match="records.log_with must be a list, got 3"):
        TrainConfig(log_with=3)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--log-with", "wandbb", "--train-data", "x", "--output", str(tmp_path / "run")])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and "tensorboard" in said.err + said.out and nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("name", "advice"), [("comet_ml", "pip install comet_ml"), ("tensorboard", 'pip install "berdiff_fast[train]"')]
)
def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch, capsys, name, advice):
    """Said before the data are read."""
    monkeypatch.setitem(sys.modules, name, None)
    words = ["train", "--log-with", name, "--train-data", "nowhere.h5", "--output", str(tmp_path / "run")]
    assert cli.main(words) == 1
    said = capsys.readouterr().err
    assert said == f"berdiff-fast train: {name} is needed for this, and missing: {advice}\n" and nothing_left(tmp_path)


def test_a_tracker_that_accelerate_does_not_know_yet(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(LOGGER_TYPE_TO_CLASS, "trackio")
    words = ["train", "--log-with", "trackio", "--train-data", "nowhere.h5", "--output", str(tmp_path / "run")]
    assert cli.main(words) == 1
    assert "log_with: trackio needs a newer Accelerate than" in capsys.readouterr().err and nothing_left(tmp_path)


@pytest.mark.parametrize("where", ["start", "store_init_configuration"])
def test_a_tracker_that_cannot_be_started(data, tmp_path, fake, monkeypatch, where):
    """Not logged in, say: one line, what was started before is closed, and the folder is not there."""

    def fail(self, *_):
        raise RuntimeError("no API key\nconfigured")

    closed = []
    other = type("Other", (Fake,), {"runs": {}, "finish": lambda self: closed.append(self)})
    other.start = lambda self: None
    other.store_init_configuration = lambda self, values: None
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "swanlab", other)
    monkeypatch.setitem(sys.modules, "swanlab", types.ModuleType("swanlab"))
    setattr(fake, where, fail)
    with pytest.raises(ValueError, match="^records.log_with: wandb cannot be started: no API key configured$"):
        loop.train(config(data, tmp_path / "run", log_with=["swanlab", "wandb"]))
    assert nothing_left(tmp_path) and len(closed) == 1


def test_a_link_in_the_place_of_a_trackers_folder(data, tmp_path, fake):
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "wandb").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match="wandb is a symbolic link"):
        loop.train(config(data, tmp_path / "run", log_with="wandb"))
    assert not list((tmp_path / "elsewhere").iterdir()) and not fake.runs


def test_trackers_are_closed_when_the_run_fails(data, tmp_path, fake, monkeypatch):
    monkeypatch.setattr(trackers.Trackers, "picture", lambda *_: 1 / 0)
    pytest.importorskip("matplotlib")
    with pytest.raises(ZeroDivisionError):
        loop.train(config(data, tmp_path / "run", log_with="wandb"))
    ((_, told),) = fake.runs.items()
    assert told[-1] == ("finish",)
