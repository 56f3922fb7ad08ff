# SPDX-License-Identifier: Apache-2.0
"""Networks of one's own: by their class in configs and model files, imported only where that is allowed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from support import ENVIRONMENT, phantom_data
from torch import nn

import berdiff_fast as bf
from berdiff_fast import cli
from berdiff_fast.training.config import Network, TrainConfig, read_yaml

#: A package as a user has one. Importing it leaves a trace, so that what was not allowed is seen not to have happened.
MODULE = """
import os
import pathlib

import torch
from torch import nn

if "OWN_NETWORKS_TRACE" in os.environ:
    pathlib.Path(os.environ["OWN_NETWORKS_TRACE"]).touch()


class Net(nn.Module):
    def __init__(self, width=8, depths=(1, 1), norm=True):
        super().__init__()
        self.depths = [int(d) for d in torch.linspace(1, 2, 2)]  # which a network without numbers could not do
        self.inside = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.outside = nn.Conv2d(width, 1, 3, padding=1)
        self.tied = self.outside

    def forward(self, y_t, t, img):
        time = (t.float() / 1000).reshape(-1, 1, 1, 1).expand_as(y_t)
        return self.outside(self.norm(self.inside(torch.cat([y_t, img, time], 1))).relu())


class Told(Net):
    def forward(self, y_t, t, img, mode):
        return super().forward(y_t, t, img) + mode.reshape(-1, 1, 1, 1)


class Outer:
    class Inner(Net):
        pass


class Two(Net):
    def forward(self, y_t, t, img):
        return super().forward(y_t, t, img).repeat(1, 2, 1, 1)


class Pair(Net):
    def forward(self, y_t, t, img):
        return super().forward(y_t, t, img), None


class Narrow(Net):
    def forward(self, y_t, t, img):
        return super().forward(y_t, t, img[:, :, 1:])


class Undefined(Net):
    def forward(self, y_t, t, img):
        return super().forward(y_t, t, img) / 0 * 0


class Empty(nn.Module):
    def forward(self, y_t, t, img):
        return y_t


class Picky(Net):
    def __init__(self, width):
        if width % 2:
            raise ValueError("width must be\\neven")
        super().__init__(width)


class Stateful(Net):
    def get_extra_state(self):
        return {"seen": 3}

    def set_extra_state(self, state):
        pass


def function(width):
    return Net(width)
"""

TINY = dict(batch_size=4, warmup=2, steps=4, log_every=2, device="cpu", tensorboard=False, quiet=True)


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """The folder of the package ``own_networks``."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "own_networks").mkdir()
    (folder / "own_networks" / "__init__.py").write_text("from own_networks.nets import Net\nimport torch\n")
    (folder / "own_networks" / "nets.py").write_text(MODULE)
    (folder / "own_networks" / "broken.py").write_text("import not_there_at_all\n")
    (folder / "own_networks" / "wrong.py").write_text("def f(:\n")
    return folder


@pytest.fixture(autouse=True)
def at_hand(package, monkeypatch):
    monkeypatch.syspath_prepend(package)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    return phantom_data(tmp_path_factory.mktemp("phantoms"))


def own(name: str = "Net", **arguments) -> nn.Module:
    from own_networks import nets

    torch.manual_seed(0)
    return getattr(nets, name)(**arguments)


def config(data, output, path="own_networks.Net", **changes) -> TrainConfig:
    return TrainConfig(train_data=data["train_data"], output=str(output), network_class=path, **{**TINY, **changes})


@pytest.fixture
def saved(tmp_path) -> Path:
    bf.BerDiff(own(width=4), preprocessing=bf.Preprocessing(), network_arguments={"width": 4}).save(
        tmp_path / "m.safetensors"
    )
    return tmp_path / "m.safetensors"


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("place", ["m.safetensors", "m"])
@pytest.mark.parametrize("allowed", [True, ["own_networks"], "own_networks", ["x", "own_networks.nets.Net"]])
def test_round_trip(tmp_path, place, allowed):
    """Weights that are shared, and counts that are whole numbers, come back too; so do the masks."""
    network = own(width=4, depths=(1, 2)).train()
    network(torch.rand(2, 1, 8, 8), torch.tensor([1, 2]), torch.rand(2, 1, 8, 8))
    model = bf.BerDiff(network, "linear", "y_0", network_arguments={"width": 4, "depths": (1, 2)}).eval()
    model.save(tmp_path / place)
    again = bf.load(tmp_path / place, allow_imports=allowed)
    assert type(again.network) is type(network) and again.to_config() == model.to_config()
    assert all(torch.equal(again.weights()[k], w) for k, w in model.weights().items())
    assert again.network.norm.num_batches_tracked == 1 and again.network.tied is again.network.outside
    img = torch.rand(1, 1, 8, 8)
    assert torch.equal(bf.sample(again, img, 3, 4, seed=1), bf.sample(model, img, 3, 4, seed=1))
    from berdiff_fast.model import fingerprint

    assert fingerprint(again) == fingerprint(model)


def test_what_the_file_says(saved):
    with safe_open(saved, "pt") as file:
        told = json.loads(file.metadata()["berdiff_fast"])["network"]
    assert told == {
        "type": "own_networks.nets.Net",
        "arguments": {"width": 4},
        "mask_channels": 1,
        "img_channels": None,
        "spatial_dims": 2,
    }


def test_a_class_within_a_class(tmp_path):
    from own_networks.nets import Outer

    bf.BerDiff(Outer.Inner(), network_arguments={}).save(tmp_path / "m")
    assert type(bf.load(tmp_path / "m", allow_imports=["own_networks"]).network) is Outer.Inner


def test_nothing_is_imported_that_is_not_allowed(saved, package, tmp_path):
    """In a process that has not imported it before."""
    trace = tmp_path / "trace"
    environment = ENVIRONMENT | {"OWN_NETWORKS_TRACE": str(trace)}
    environment["PYTHONPATH"] += f":{package}"

    def load(allowed: str) -> subprocess.CompletedProcess:
        script = f"import berdiff_fast as bf\nbf.load({str(saved)!r}{allowed})"
        command = [sys.executable, "-c", script]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert load("").returncode == 1 and not trace.exists()
    assert load(", allow_imports=['own_networks']").returncode == 0 and trace.exists()


@pytest.mark.parametrize(
    "allowed", [False, [], ["own"], ["own_networks.other"], ["own_networks.nets.Net2"], ["torch", "berdiff_fast"]]
)
def test_what_is_not_allowed(saved, allowed, monkeypatch):
    from berdiff_fast.network import described

    monkeypatch.setattr(described, "find", None)
    with pytest.raises(ValueError, match="its network is the class own_networks.nets.Net, whose code") as raised:
        bf.load(saved, allow_imports=allowed)
    assert str(raised.value).startswith(f"{saved}: ")
    assert 'allow_imports=["own_networks"] (--allow-imports own_networks)' in str(raised.value)


def rewrite(path: Path, change) -> None:
    weights = safetensors.torch.load_file(path)
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["berdiff_fast"])
    told.pop("sha256")
    change(told["network"])
    safetensors.torch.save_file(weights, path, metadata={"berdiff_fast": json.dumps(told)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda n: n.update(type="own_networks.nets.Nut"), "own_networks.nets has no Nut"),
        (lambda n: n.update(type="own_networks.nets.function"), "a class of torch.nn.Module, and .* is function"),
        (lambda n: n.update(type="own_networks.nets.os.system"), "a class of torch.nn.Module, and .* is builtin"),
        (lambda n: n.update(type="own_networks.not_there.Net"), "own_networks has no not_there.Net"),
        (lambda n: n.update(type="own_networks.broken.Net"), "cannot be imported: No module named 'not_there_at_all'"),
        (lambda n: n.update(type="own_networks. nets.Net"), "must be the path of a class"),
        # A class of another package, by way of one that is allowed.
        (lambda n: n.update(type="own_networks.torch.nn.Linear"), "its network is the class torch.nn.modules"),
        (lambda n: n.update(type=3), "network type must be 'UNet', got 3"),
        (lambda n: n.update(arguments={"widht": 4}), "takes width, depths, norm, got .*'widht'"),
        (lambda n: n.update(arguments=[4]), "network arguments must be an object, got"),
        (lambda n: n.update(arguments={"width": "wide"}), r"Net\(\*\*.*failed"),
        (lambda n: n.update(arguments={"width": 5}), "size mismatch"),
        (lambda n: n.pop("arguments"), "'arguments'"),
        (lambda n: n.pop("mask_channels"), "network must say mask_channels, img_channels and spatial_dims"),
        (lambda n: n.update(mask_channels="two"), "mask_channels must be an int"),
        (lambda n: n.update(novelty=2), "network must say mask_channels, img_channels and spatial_dims"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit(saved, change, words):
    rewrite(saved, change)
    with pytest.raises(ValueError, match=words) as raised:
        bf.load(saved, allow_imports=["own_networks"])
    assert str(raised.value).startswith(str(saved)) and "\n" not in str(raised.value)


def test_a_damaged_file_runs_no_code(saved, monkeypatch):
    saved.write_bytes(saved.read_bytes()[:-4] + b"\1\2\3\4")
    from berdiff_fast.network import described

    monkeypatch.setattr(described, "find", None)
    with pytest.raises(ValueError, match="its checksum does not match"):
        bf.load(saved, allow_imports=True)


@pytest.mark.parametrize(
    ("allowed", "error", "words"),
    [
        (["own networks"], ValueError, "allow_imports must be names of packages, as in an import, got 'own networks'"),
        ([""], ValueError, "names of packages, as in an import, got ''"),
        (3, TypeError, "allow_imports must be True, False or names of packages, got 3"),
        ([b"x"], TypeError, "allow_imports must be True, False or names"),
    ],
)
def test_bad_permissions(saved, allowed, error, words):
    with pytest.raises(error, match=words):
        bf.load(saved, allow_imports=allowed)


def test_models_that_cannot_be_saved(tmp_path):
    class Local(nn.Linear):
        pass

    cases = [
        (
            Local(1, 1),
            {"in_features": 1, "out_features": 1},
            ValueError,
            "cannot be imported elsewhere; move its class",
        ),
        (own(), {"width": {1, 2}}, TypeError, "network_arguments must be what JSON can hold"),
        (own(), {"widht": 8}, ValueError, "network_arguments: own_networks.nets.Net takes width, depths, norm, got"),
        (nn.Linear(2, 3), {"in_features": 2, "out_features": 4}, ValueError, "has other weights with"),
        (own("Stateful"), {}, ValueError, "network must have a state of tensors, and _extra_state is dict"),
    ]
    for network, arguments, error, words in cases:
        with pytest.raises(error, match=words):
            bf.BerDiff(network, network_arguments=arguments)
    with pytest.raises(TypeError, match="give BerDiff the network_arguments of its class"):
        bf.BerDiff(own()).save(tmp_path / "m")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- commands


def test_train_evaluate_and_sample(data, tmp_path, capsys):
    pytest.importorskip("accelerate")
    pytest.importorskip("nibabel")
    words = ["--train-data", data["train_data"], "--output", str(tmp_path / "run"), "--steps", "3", "--batch-size", "4"]
    words += [
        "--network-class",
        "own_networks.Net",
        "--network-arguments",
        '{"width": 4}',
        "--device",
        "cpu",
        "--quiet",
    ]
    assert cli.main(["train", *words, "--no-tensorboard"]) == 0
    assert cli.main(["train", *words, "--no-tensorboard"]) == 0, "and again, which resumes"
    file = str(tmp_path / "run" / "model.safetensors")
    capsys.readouterr()
    np.save(tmp_path / "slice.npy", np.random.default_rng(0).random((32, 32), np.float32))
    evaluate = ["evaluate", "--model", file, "--data", data["val_data"], "--n", "2", "--steps", "2", "--device", "cpu"]
    sample = ["sample", str(tmp_path / "slice.npy"), "--model", file, "--n", "2", "--steps", "2", "--device", "cpu"]
    for command in (evaluate, sample):
        output = tmp_path / command[0]
        assert cli.main([*command, "--output", str(output)]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "(--allow-imports own_networks)" in said and not output.exists()
        assert cli.main([*command, "--output", str(output), "--allow-imports", "own_networks"]) == 0
        capsys.readouterr()
    assert bf.load(file, allow_imports=["own_networks"]).network.inside.out_channels == 4
    # And a run that starts with its weights: the class is the config's own, so it needs no permission.
    more = [word.replace("/run", "/more") for word in words]
    assert cli.main(["train", *more, "--no-tensorboard", "--initial-weights", file]) == 0
    unet = ["--steps", "1", "--batch-size", "4", "--no-tensorboard", "--device", "cpu", "--quiet"]
    unet += ["--train-data", data["train_data"], "--output", str(tmp_path / "unet"), "--initial-weights", file]
    capsys.readouterr()
    assert cli.main(["train", *unet]) == 1 and "--allow-imports own_networks" in capsys.readouterr().err
    assert cli.main(["train", *unet, "--allow-imports", "own_networks"]) == 1
    assert "is of another architecture" in capsys.readouterr().err and not (tmp_path / "unet").exists()


def test_spellings_of_the_config(tmp_path):
    wanted = TrainConfig(network=Network(class_path="a.B", arguments='{"depth": [1, 2], "width": 3}'))
    texts = [
        "network: {class: a.B, arguments: {width: 3, depth: [1, 2]}}",
        'network:\n  class_path: a.B\n  arguments: \'{"width":3,"depth":[1,2]}\'',
        "network_class: a.B\nnetwork_arguments: {depth: [1, 2], width: 3}",
        wanted.to_yaml(),
    ]
    for text in texts:
        (tmp_path / "c.yaml").write_text(text)
        assert TrainConfig.from_dict(read_yaml(tmp_path / "c.yaml")) == wanted, text
    (tmp_path / "c.yaml").write_text("network: a.B")
    assert TrainConfig.from_dict(read_yaml(tmp_path / "c.yaml")).network == Network(class_path="a.B")
    assert hash(wanted) == hash(TrainConfig.from_dict(wanted.to_dict())) and wanted.network.halvings == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(network_arguments={"a": 1}), "network.arguments needs a class_path"),
        (dict(network_class="a.B", network_arguments="{width"), "network.arguments must be JSON, got '{width'"),
        (dict(network_class="a.B", network_arguments="[3]"), "network.arguments must be a JSON object"),
        (dict(network_class="a.B", network_arguments={"a": {1}}), "network.arguments must be what JSON can hold"),
        (dict(network_class="a.B", network_arguments=3), "network.arguments must be a string, got 3"),
    ],
)
def test_bad_arguments_in_a_config(changes, words):
    with pytest.raises((ValueError, TypeError), match=words):
        TrainConfig(**changes)


BAD_NETWORKS = {
    "no package": ("Net", {}, "network.class_path must be the path of a class, package.Class, got 'Net'"),
    "not there": ("not_there.Net", {}, r"not_there.Net cannot be imported: .* 'not_there' \(is its folder in"),
    "no class": ("own_networks.nets.Nut", {}, "own_networks.nets.Nut cannot be imported: own_networks.nets has no Nut"),
    "broken": ("own_networks.broken.Net", {}, "cannot be imported: No module named 'not_there_at_all'$"),
    "no Python": ("own_networks.wrong.Net", {}, "own_networks.wrong.Net cannot be imported: invalid syntax"),
    "function": ("own_networks.nets.function", {}, "a class of torch.nn.Module, and own_networks.* is function"),
    "another class": ("own_networks.nets.Outer", {}, "a class of torch.nn.Module, and own_networks.* is Outer"),
    "arguments": ("own_networks.Net", {"widht": 3}, "takes width, depths, norm, got .*'widht'"),
    "missing": ("own_networks.nets.Picky", {}, "Picky takes width, got {} .*missing a required argument: 'width'"),
    "refused": ("own_networks.nets.Picky", {"width": 3}, r"Picky\(\*\*{\"width\": 3}\) failed: width must be even"),
    "shape": ("own_networks.nets.Two", {}, r"must return float logits of .*, \(2, 1, 32, 32\), got torch"),
    "tuple": ("own_networks.nets.Pair", {}, "must return float logits .*, got tuple"),
    "inside": ("own_networks.nets.Narrow", {}, r"failed with y_t \(2, 1, 32, 32\), t \(2,\), img .*: Sizes of"),
    "nan": ("own_networks.nets.Undefined", {}, "returns NaN or infinite logits with blank y_t"),
    "nothing to train": ("own_networks.nets.Empty", {}, "own_networks.nets.Empty has no parameters to train"),
    "not told": ("own_networks.Net", {}, "failed with .* and mode .*takes 4 positional"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_NETWORKS)
def test_networks_that_cannot_be_trained(data, tmp_path, case):
    """One line that names the class, before the run's folder is made."""
    pytest.importorskip("accelerate")
    from berdiff_fast.training import loop

    path, arguments, words = BAD_NETWORKS[case]
    with pytest.raises(ValueError, match=words) as raised:
        loop.train(config(data, tmp_path / "run", path, network_arguments=arguments, mode_prior=case == "not told"))
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [{"crop": 16}, {"output_crop": 16, "distance": True}, {"mode_prior": True}])
def test_networks_with_the_rest_of_the_config(data, tmp_path, changes):
    pytest.importorskip("accelerate")
    from berdiff_fast.training import loop

    path = "own_networks.nets.Told" if "mode_prior" in changes else "own_networks.Net"
    if "distance" in changes:  # one more channel than the class has
        with pytest.raises(ValueError, match=r"img \(2, 2, 16, 16\)"):
            loop.train(config(data, tmp_path / "run", path, **changes))
        changes = {"output_crop": 16}
    file = loop.train(config(data, tmp_path / "run", path, prior_channels=[8], **changes))
    model = bf.load(file, allow_imports=["own_networks"])
    img = model.preprocess(np.random.default_rng(0).random((32, 32)))
    assert bf.sample(model, img, 2, 2, seed=0).shape == (1, 2, 1, 32, 32)


def test_another_class_is_another_run(data, tmp_path):
    pytest.importorskip("accelerate")
    from berdiff_fast.training import loop

    loop.train(config(data, tmp_path / "run", network_arguments={"width": 4}))
    loop.train(config(data, tmp_path / "run", network_arguments='{ "width":4}', allow_imports=["x"]))
    with pytest.raises(ValueError, match=r"network.arguments was '{\"width\": 4}' and is '{\"width\": 5}'"):
        loop.train(config(data, tmp_path / "run", network_arguments={"width": 5}))
