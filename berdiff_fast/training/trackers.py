# SPDX-License-Identifier: Apache-2.0
"""Accelerate's trackers (TensorBoard, wandb, mlflow, ...), each of which has one run of its own for one of ours."""

from __future__ import annotations

import importlib
import json
import logging
import uuid
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from berdiff_fast import _optional
from berdiff_fast.files import write_text
from berdiff_fast.training.config import TrainConfig
from berdiff_fast.words import line

logger = logging.getLogger("berdiff_fast")

#: In a run's folder: the trackers that were started, and what each calls its run.
FILE = "trackers.json"
#: Those whose run is what lies in ours' folder, and has no name of its own.
_IN_FOLDER = ("tensorboard", "dvclive")


def check(config: TrainConfig) -> None:
    """That all trackers of ``records.log_with`` can be had.

    Raises:
        ImportError: a package is missing; the message says how it is installed.
        ValueError: the installed Accelerate does not know one of them yet.
    """
    for name in config.records.log_with:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(
                f"records.log_with: {name} needs a newer Accelerate than {accelerate.__version__}, which knows "
                f"{', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
            )
        _optional.require(name, "train" if name == "tensorboard" else None)


class Trackers:
    """The trackers of a run. They are the main process's: no other makes this.

    A tracker that fails on the way is named in a warning and gets no more: the training goes on.

    Args:
        output: the run's folder.
        config: the run.
        first: the step after which it goes on, 0 at its beginning.
        told: which numbers of later steps they have from a former process, as ``numbers`` is told them: its step and
            whether they are a validation's. They are not told twice; TensorBoard forgets them instead.

    Raises:
        ValueError: a tracker cannot be started; those before it are closed again.
    """

    def __init__(self, output: Path, config: TrainConfig, first: int, told: Collection[tuple[int, bool]] = ()) -> None:
        names = list(dict.fromkeys(config.records.log_with))
        if config.records.tensorboard and "tensorboard" not in names and _has_tensorboard():
            names.append("tensorboard")
        self._running: dict[str, Any] = {}
        self._told: dict[str, Collection[tuple[int, bool]]] = {}
        former, runs = _former(output / FILE), {}
        for name in names:
            try:
                tracker, runs[name] = _started(name, output, config, former.get(name), first)
                self._running[name] = tracker
                if name not in former:
                    tracker.store_init_configuration(_plain(config.to_dict()))
            except Exception as error:  # of whatever kind the package has
                self.finish()
                raise ValueError(f"records.log_with: {name} cannot be started: {line(error)}") from error
            self._told[name] = told if name in former and name != "tensorboard" else ()
        if runs.keys() - former.keys():
            write_text(output / FILE, json.dumps({**former, **runs}, indent=1) + "\n", follow=False)

    def numbers(self, step: int, values: Mapping[str, float], *, validation: bool = False) -> None:
        """Tell what was measured after a step."""
        shown = {name.replace("validation_", "validation/"): value for name, value in values.items()}
        self._each(step, validation, lambda _, tracker: tracker.log(shown, step=step))

    def picture(self, step: int, path: Path) -> None:
        """Show the preview of a validation, where the tracker can."""
        self._each(step, True, lambda name, tracker: _show(name, tracker, path, step))

    def finish(self) -> None:
        """Close them all; a run that is resumed opens the same ones again."""
        for name, tracker in self._running.items():
            try:
                tracker.finish()
            except Exception as error:
                logger.warning("%s could not be closed: %s", name, line(error))
        self._running = {}

    def _each(self, step: int, validation: bool, tell: Callable[[str, Any], object]) -> None:
        for name, tracker in list(self._running.items()):
            if (step, validation) in self._told[name]:
                continue
            try:
                tell(name, tracker)
            except Exception as error:  # a network that is down must not end a training of days
                logger.warning("%s failed after step %d and is told no more of this run: %s", name, step, line(error))
                del self._running[name]


def _has_tensorboard() -> bool:
    try:
        importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        return False
    return True


def _former(path: Path) -> dict[str, str]:
    """What the trackers of a former process call this run."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not all(isinstance(run, str) for run in found.values()):
            raise ValueError("it must name a run for each tracker")
    except (ValueError, RecursionError) as error:
        logger.warning("%s cannot be read (%s): trackers begin a new run", path, line(error))
        return {}
    return found


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as every tracker takes them: lists as text."""
    return {k: json.dumps(v) if isinstance(v, list) else v for k, v in values.items()}


def _started(name: str, output: Path, config: TrainConfig, former: str | None, first: int) -> tuple[Any, str]:
    """A tracker at work, and what it calls its run: ``former`` if there was one."""
    run = former or (name if name in _IN_FOLDER else uuid.uuid4().hex)
    tracker = LOGGER_TYPE_TO_CLASS[name](**_arguments(name, output, config, former, run, first))
    if hasattr(tracker, "start"):  # of an older Accelerate it has started
        tracker.start()
    theirs = tracker.tracker
    if name == "comet_ml":
        theirs.set_name(output.resolve().name)
    elif name == "mlflow":
        run = theirs.info.run_id
    elif name == "aim":
        run = theirs.hash
    elif name == "clearml":
        run = theirs.id
        theirs.set_initial_iteration(0)  # else it adds the last step that it knows to ours
    return tracker, run


def _arguments(
    name: str, output: Path, config: TrainConfig, former: str | None, run: str, first: int
) -> dict[str, Any]:
    """With what a tracker is started: under which names, where its files go, and which of its runs goes on.

    Some are told the name of a new run (``run``), and others only that of a ``former`` one.
    """
    project, title = config.records.project, output.resolve().name
    several: dict[str, dict[str, Any]] = {
        "tensorboard": dict(run_name="tensorboard", logging_dir=str(output), purge_step=first + 1),
        "wandb": dict(run_name=project, id=run, resume="allow", name=title, dir=str(output)),
        "mlflow": dict(experiment_name=project, run_name=title, run_id=former),
        "comet_ml": dict(run_name=project, experiment_key=run),
        "clearml": dict(
            run_name=project,
            task_name=title,
            continue_last_task=former or False,
            reuse_last_task_id=False,
            auto_connect_frameworks=False,  # from which it would have everything twice
            auto_connect_arg_parser=False,
        ),
        "aim": dict(run_name=title, logging_dir=str(output), experiment=project, run_hash=former),
        "dvclive": dict(dir=str(output / "dvclive"), resume=former is not None, dvcyaml=None),
        "swanlab": dict(run_name=project, id=run, resume="allow", name=title, log_dir=str(output / "swanlab")),
        "trackio": dict(run_name=project, name=run, resume="allow"),
    }
    if name == "wandb" and config.quiet:
        several[name]["settings"] = {"silent": True}
    return several[name]


def _show(name: str, tracker: Any, path: Path, step: int) -> None:
    """A picture of the run's folder in a tracker; nothing where that takes none."""
    if name == "mlflow":
        tracker.log_artifact(str(path), "previews")
    elif name == "comet_ml":
        tracker.tracker.log_image(str(path), name="previews", step=step)
    elif name == "dvclive":
        tracker.tracker.log_image(f"previews/{path.name}", str(path))
    elif name == "trackio":
        import trackio

        tracker.log({"previews": trackio.Image(str(path))}, step=step)
    elif hasattr(tracker, "log_images"):
        from PIL import Image

        with Image.open(path) as file:
            pixels = np.asarray(file.convert("RGB"))
        if name == "tensorboard":
            tracker.log_images({"previews": pixels[None]}, step=step, dataformats="NHWC")
        else:  # a list of pictures, but for those that take one
            tracker.log_images({"previews": pixels if name in ("aim", "clearml") else [pixels]}, step=step)
