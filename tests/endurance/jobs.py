# SPDX-License-Identifier: Apache-2.0
"""The jobs: what is run, in a folder of its own, and what it has to leave there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scans import GEOMETRIES, small_model
from support import phantom_file

import berdiff_fast as bf
from berdiff_fast import cli
from berdiff_fast.imaging import volumes
from berdiff_fast.imaging.volumes import Volume

#: By its name in a folder, the bytes of a file; of what holds times only what does not.
Tree = dict[str, bytes]


@dataclass(frozen=True)
class Job:
    """A command that may be killed at any moment, and given again.

    Attributes:
        prepare: makes its inputs in a folder.
        run: does the work there; returns the status.
        output: where in the folder its results are, and its hidden folders beside them.
        former: makes results of an earlier run, which this one replaces.
        timed: parts of names of files that hold times, and are compared by their existence alone.

    Of checkpoints, whose headers hold times, the tensors are compared.
    """

    prepare: Callable[[Path], None]
    run: Callable[[Path], int]
    output: str
    former: Callable[[Path], None] | None = None
    timed: tuple[str, ...] = ()

    def results(self, folder: Path) -> Tree:
        """What is there of the output, hidden files and folders included."""
        found = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if not name.lstrip(".").startswith(self.output) or not path.is_file():
                continue
            data = b"" if any(part in name for part in self.timed) else path.read_bytes()
            if "checkpoints" in name and path.suffix == ".safetensors":
                data = data[8 + int.from_bytes(data[:8], "little") :]
            found[name] = data.replace(str(folder).encode(), b"FOLDER")  # which import.json names
        return found


def _command(*words: object) -> int:
    return cli.main([*map(str, words)])


# ---------------------------------------------------------------------- sample


def _scan(folder: Path) -> None:
    small_model(folder / "model.safetensors", size=(16, 16))
    array = np.random.default_rng(3).integers(0, 255, (4, 16, 16), dtype=np.int16)
    volumes.write(folder / "in.nii.gz", array, Volume(array, **GEOMETRIES["oblique"]))  # type: ignore[arg-type]


def _sample(folder: Path, seed: int = 2, *more: str) -> int:
    fixed = ["--model", folder / "model.safetensors", "-n", 3, "--steps", 4, "--spacing", "trailing", "--quiet"]
    what = [folder / "in.nii.gz", *fixed, "--report", "--seed", seed, "--output", folder / "out"]
    return _command("sample", *what, *more)


# ---------------------------------------------------------------------- import


def _pictures(folder: Path) -> None:
    generator = np.random.default_rng(5)
    for kind in ("images", "masks_0", "masks_1"):
        (folder / "tree" / kind).mkdir(parents=True)
        for k in range(6):
            pixels = generator.integers(0, 255 if kind == "images" else 2, (16, 16)) * (1 if kind == "images" else 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "tree" / kind / f"p{k}_1.png")


def _import(folder: Path, *more: object) -> int:
    words = [folder / "tree", folder / "out", "--layout", "plain", "--split", "50/20/30", "--quiet"]
    return _command("import", *words, *more)


# ---------------------------------------------------------------------- save


def _model(seed: int) -> bf.BerDiff:
    torch.manual_seed(seed)
    network = bf.UNet(model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=())
    return bf.BerDiff(network, prediction="y_0", preprocessing=bf.Preprocessing())


def _save(folder: Path, seed: int = 2) -> int:
    """A file, and a folder of two files."""
    model = _model(seed)
    model.save(folder / "out.safetensors")
    model.save(folder / "out-folder")
    return 0


# ---------------------------------------------------------------------- train


def _slices(folder: Path) -> None:
    phantom_file(folder / "train.h5", 0, 8)
    phantom_file(folder / "val.h5", 100, 2)


def _train(folder: Path) -> int:
    small = ["--channel-mult", 1, "--model-channels", 32, "--patch-size", 4, "--norm-groups", 8]
    small += ["--attention-resolutions"]
    run = ["--batch-size", 4, "--warmup", 1, "--steps", 12, "--checkpoint-every", 2, "--keep", 2, "--log-every", 2]
    check = ["--validate-every", 6, "--validation-slices", 2, "--validation-samples", 2, "--validation-steps", 2]
    data = ["--train-data", folder / "train.h5", "--val-data", folder / "val.h5", "--output", folder / "out"]
    return _command("train", *data, *small, *run, *check, "--no-tensorboard", "--device", "cpu", "--quiet")


def same_log(one: bytes, other: bytes) -> bool:
    """Whether two logs of trainings tell the same, rates apart."""

    def rows(log: bytes) -> list[dict[str, float]]:
        return [{k: v for k, v in json.loads(line).items() if "per_second" not in k} for line in log.splitlines()]

    return rows(one) == rows(other)


JOBS = {
    "sample": Job(_scan, _sample, "out"),
    "sample-again": Job(_scan, lambda f: _sample(f, 2, "--overwrite"), "out", lambda f: _check(_sample(f, 1))),
    "import": Job(_pictures, _import, "out"),
    "import-again": Job(
        _pictures, lambda f: _import(f, "--overwrite"), "out", lambda f: _check(_import(f, "--seed", 3))
    ),
    "save": Job(lambda f: None, _save, "out"),
    "save-again": Job(lambda f: None, _save, "out", lambda f: _check(_save(f, 1))),
    "train": Job(_slices, _train, "out", timed=("log.jsonl", "config.yaml", ".lock")),
}


def _check(status: int) -> None:
    assert status == 0
