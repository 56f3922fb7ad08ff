# SPDX-License-Identifier: Apache-2.0
"""Damaged models, checkpoints and data: noticed, named in one line, passed by where there is a whole one before."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import struct

import h5py
import numpy as np
import pytest
import torch
from scans import small_model
from support import phantom_file

import berdiff_fast as bf
from berdiff_fast import cli
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.imaging import volumes

#: Of the header's bits; 1 for all.
EVERY = int(os.environ.get("BERDIFF_FAST_TEST_EVERY_BIT", "61"))

TINY = dict(model_channels=8, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), norm_groups=4)


def header_of(data: bytes) -> tuple[int, dict]:
    length = struct.unpack("<Q", data[:8])[0]
    return length, json.loads(data[8 : 8 + length])


def with_header(data: bytes, change) -> bytes:
    """Another description, as a file of before had it: without a checksum."""
    length, header = header_of(data)
    metadata = header["__metadata__"]
    ((key, text),) = metadata.items()
    content = json.loads(text)
    content.pop("sha256")
    changed = change(content)
    metadata[key] = changed if isinstance(changed, str) else json.dumps(changed)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    torch.manual_seed(0)
    bf.BerDiff(bf.UNet(**TINY), preprocessing=bf.Preprocessing("window", (-1000, 400), size=(32, 32))).save(path)
    return path


# ---------------------------------------------------------------------- models


@pytest.mark.slow
def test_a_flipped_bit_anywhere_in_a_model_is_noticed(saved, tmp_path):
    """Bits of the header and its length, and of every tensor: a choice of them, since all take a quarter of an hour."""
    data, path = saved.read_bytes(), tmp_path / "m.safetensors"
    length, header = header_of(data)
    at = [(i, 1 << bit) for i in range(8 + length) for bit in range(8)]
    starts = [8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"]
    random = np.random.default_rng(0)
    at += [(i, bit) for i in starts for bit in (1, 128)]
    at += [(int(i), 1 << int(i) % 8) for i in random.integers(8 + length, len(data), 50)]
    chosen = [pair for k, pair in enumerate(at) if pair[0] >= 8 + length or k % EVERY == length % EVERY]
    assert len(chosen) > 500
    for i, bit in chosen:
        damaged = bytearray(data)
        damaged[i] ^= bit
        path.write_bytes(damaged)
        with pytest.raises(ValueError) as caught:
            bf.load(path)
        assert str(caught.value).startswith(str(path)), (i, bit, str(caught.value))


def test_the_checksum_is_of_names_dtypes_shapes_bytes_and_description(saved):
    from safetensors import safe_open

    from berdiff_fast import digests

    with safe_open(saved, framework="pt") as file:
        text = file.metadata()["berdiff_fast"]
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    digests.check(text, weights)
    name = "time_embed.0.weight"
    other = {
        "name": {("x" if k == name else k): v for k, v in weights.items()},
        "dtype": {**weights, name: weights[name].view(torch.int32)},
        "shape": {**weights, name: weights[name].reshape(-1)},
        "bytes": {**weights, name: weights[name].neg()},
        "missing": {k: v for k, v in weights.items() if k != name},
    }
    for changed in other.values():
        with pytest.raises(ValueError, match="its checksum does not match"):
            digests.check(text, changed)
    with pytest.raises(ValueError, match="its checksum does not match"):
        digests.check(text.replace('"epsilon"', '"y_0"'), weights)


def test_models_of_before_load(saved, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(with_header(saved.read_bytes(), lambda config: config))
    assert "sha256" not in path.read_bytes()[:4000].decode("latin1")
    a, b = bf.load(path), bf.load(saved)
    assert a.to_config() == b.to_config()
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert bf.load("lidc")


DESCRIPTIONS = {
    "null": "null",
    "5": "5",
    "[]": "[]",
    "a text": '"x"',
    "nothing": "",
    "nested": "[" * 100_000,
    "huge number": "1" * 10_000,
    "network null": lambda c: {**c, "network": None},
    "network a list": lambda c: {**c, "network": [1]},
    "network empty": lambda c: {**c, "network": {}},
    "schedule null": lambda c: {**c, "schedule": None},
    "schedule a text": lambda c: {**c, "schedule": "cosine2"},
    "schedule without a name": lambda c: {**c, "schedule": {}},
    "timesteps a text": lambda c: {**c, "schedule": {**c["schedule"], "timesteps": "1000"}},
    "timesteps without end": lambda c: {**c, "schedule": {**c["schedule"], "timesteps": 10**9}},
    "betas null": lambda c: {**c, "schedule": {"name": "custom", "betas": None}},
    "prediction a list": lambda c: {**c, "prediction": ["epsilon"]},
    "spacing a dict": lambda c: {**c, "spacing": {}},
    "rescale a text": lambda c: {**c, "rescale_timesteps": "no"},
    "preprocessing a list": lambda c: {**c, "preprocessing": [1]},
    "size of texts": lambda c: {**c, "preprocessing": {**c["preprocessing"], "size": ["a", "b"]}},
    "window a number": lambda c: {**c, "preprocessing": {**c["preprocessing"], "window": 3}},
    "unknown key": lambda c: {**c, "surprise": 1},
    "format a dict": lambda c: {**c, "format": {}},
    "ten million blocks": lambda c: {**c, "network": {**c["network"], "num_res_blocks": 10**7}},
    "ten million levels": lambda c: {**c, "network": {**c["network"], "channel_mult": [1] * 10**5}},
    "wide": lambda c: {**c, "network": {**c["network"], "model_channels": 2**17, "norm_groups": 8}},
    "wider": lambda c: {**c, "network": {**c["network"], "model_channels": 10**12}},
    "negative": lambda c: {**c, "network": {**c["network"], "model_channels": -8}},
    "a float": lambda c: {**c, "network": {**c["network"], "num_res_blocks": 1.0}},
    "large patches": lambda c: {**c, "network": {**c["network"], "patch_size": 10**6}},
}


@pytest.mark.parametrize("what", DESCRIPTIONS)
def test_descriptions_of_any_kind_are_one_line(saved, tmp_path, what, capsys):
    """Named, in one line, at once, and without the memory that was asked for."""
    import resource
    import time

    path, change = tmp_path / "m.safetensors", DESCRIPTIONS[what]
    path.write_bytes(with_header(saved.read_bytes(), change if callable(change) else lambda _: change))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(ValueError) as caught:
        bf.load(path)
    words = str(caught.value)
    assert words.startswith(str(path)) and "\n" not in words and len(words) < 3000
    assert time.perf_counter() - start < 20 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


# ---------------------------------------------------------------------- checkpoints

TRAINING = ["--channel-mult", "1", "--patch-size", "4", "--norm-groups", "4", "--attention-resolutions"]
TRAINING += ["--model-channels", "8", "--batch-size", "2", "--warmup", "0", "--no-tensorboard", "--device", "cpu"]
TRAINING += ["--checkpoint-every", "1", "--decay", "constant", "--num-heads", "1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Training data, a run of four steps, and one of three."""
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("runs")
    data = phantom_file(folder / "data.h5", 0, 8)

    def train(output, steps):
        return cli.main(["train", "--train-data", str(data), "--output", str(output), "--steps", str(steps), *TRAINING])

    assert train(folder / "whole", 4) == 0 and train(folder / "three", 3) == 0
    return train, folder


def bit_of(name: str):
    def change(data: bytes) -> bytes:
        length, header = header_of(data)
        damaged = bytearray(data)
        damaged[8 + length + header[name]["data_offsets"][0] + 2] ^= 64
        return bytes(damaged)

    return change


def zeros(data: bytes) -> bytes:
    length, header = header_of(data)
    start, end = (8 + length + x for x in header["network.time_embed.0.weight"]["data_offsets"])
    return data[:start] + bytes(end - start) + data[end:]


CHECKPOINTS = {
    "cut short": lambda data: data[:-5],
    "empty": lambda _: b"",
    "one bit of a weight": bit_of("network.time_embed.0.weight"),
    "one bit of the average": bit_of("ema.module.time_embed.0.weight"),
    "one bit of the optimizer": bit_of("optimizer.0.exp_avg_sq"),
    "a tensor of zeros": zeros,
    "one bit of the config": lambda data: data.replace(b'\\"learning_rate\\": 0.001', b'\\"learning_rate\\": 0.003', 1),
    "a list": lambda data: with_header(data, lambda c: [c]),
    "null": lambda data: with_header(data, lambda _: "null"),
    "config null": lambda data: with_header(data, lambda c: {**c, "config": None}),
    "config empty": lambda data: with_header(data, lambda c: {**c, "config": {}}),
    "extra null": lambda data: with_header(data, lambda c: {**c, "extra": None}),
    "best a text": lambda data: with_header(data, lambda c: {**c, "extra": {"best_ged": "x"}}),
    "step a text": lambda data: with_header(data, lambda c: {**c, "step": "3"}),
    "another step": lambda data: with_header(data, lambda c: {**c, "step": 2}),
    "no step": lambda data: with_header(data, lambda c: {k: v for k, v in c.items() if k != "step"}),
    "format a list": lambda data: with_header(data, lambda c: {**c, "format": []}),
    "unknown key": lambda data: with_header(data, lambda c: {**c, "surprise": 1}),
    "a tensor by another name": lambda data: with_header(data, lambda c: c).replace(b'"ema.n_av', b'"emA.n_av'),
    "an optimizer by another name": lambda data: with_header(data, lambda c: c).replace(
        b'"optimizer.1.exp_avg"', b'"optimizer.x.exp_avg"'
    ),
    "a part of the optimizer gone": lambda data: with_header(data, lambda c: c).replace(
        b'"optimizer.1.exp_avg"', b'"anything.1.exp_avg."'
    ),
}


@pytest.mark.parametrize("what", CHECKPOINTS)
def test_a_damaged_checkpoint_falls_back(runs, tmp_path, what, caplog):
    train, folder = runs
    shutil.copytree(folder / "three", tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    changed = CHECKPOINTS[what](newest.read_bytes())
    assert changed != newest.read_bytes()
    newest.write_bytes(changed)
    with caplog.at_level(logging.WARNING, "berdiff_fast"):
        assert train(tmp_path / "run", 4) == 0
    warnings = [r.getMessage() for r in caplog.records if str(newest) in r.getMessage()]
    assert len(warnings) == 1 and "trying the" in warnings[0] and "\n" not in warnings[0], caplog.text
    expected = (folder / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == expected


def test_a_checkpoint_of_before_is_resumed(runs, tmp_path, caplog):
    train, folder = runs
    shutil.copytree(folder / "three", tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.write_bytes(with_header(path.read_bytes(), lambda c: c))
    with caplog.at_level(logging.WARNING, "berdiff_fast"):
        assert train(tmp_path / "run", 4) == 0
    assert not caplog.records
    expected = (folder / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == expected


def test_where_no_checkpoint_fits_nothing_is_begun_anew(runs, tmp_path, capsys):
    """The same config on data of two structures: every checkpoint is of another network, and stays."""
    _, folder = runs
    shutil.copytree(folder / "three", tmp_path / "run")
    with h5py.File(folder / "data.h5") as old, h5py.File(tmp_path / "data.h5", "w") as new:
        new["image"] = old["image"][()]
        new["mask"] = old["mask"][()][:, :, None].repeat(2, axis=2)
    words = ["train", "--train-data", str(tmp_path / "data.h5"), "--output", str(tmp_path / "run"), "--steps", "4"]
    assert cli.main([*words, *TRAINING]) == 1
    assert "is of another architecture" in capsys.readouterr().err
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == sorted(p.name for p in (folder / "three" / "checkpoints").iterdir())


# ---------------------------------------------------------------------- data


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "data.h5"
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for name, shape in (("image", (4, 16, 16)), ("mask", (4, 2, 16, 16))):
            values = random.integers(0, 255 if name == "image" else 2, shape).astype(np.uint8)
            file.create_dataset(name, data=values, chunks=(1, *shape[1:]), compression="gzip")
        file["patient_id"] = np.arange(4)
    return path


@pytest.mark.parametrize("name", ["image", "mask"])
def test_a_damaged_chunk_is_named(data_file, name, capsys):
    with h5py.File(data_file) as file:
        where = file[name].id.get_chunk_info(2).byte_offset
    content = bytearray(data_file.read_bytes())
    content[where : where + 20] = b"\xff" * 20
    data_file.write_bytes(content)
    said = rf"{re.escape(str(data_file))}: .*cannot be read \(damaged\?\)"
    with pytest.raises(ValueError, match=said):
        RaterDataset(data_file, in_memory=True)
    slices = RaterDataset(data_file)
    slices[1], slices[3]
    with pytest.raises(ValueError, match=said):
        slices[2]
    if name == "image":
        with pytest.raises(ValueError, match=re.escape(str(data_file))):
            volumes.read(data_file)


def test_any_damaged_byte_of_data_is_one_line_or_nothing(data_file):
    """Mutants of the whole file: a result or a ValueError that begins with the path, never anything else."""
    whole, random = data_file.read_bytes(), np.random.default_rng(1)
    found = {"result": 0, "error": 0}
    for _ in range(400):
        damaged = bytearray(whole)
        for at in random.integers(0, len(whole), int(random.integers(1, 4))):
            damaged[at] = int(random.integers(0, 256))
        data_file.write_bytes(damaged[: int(random.integers(1, len(whole)))] if random.random() < 0.1 else damaged)
        for in_memory in (True, False):
            try:
                slices = RaterDataset(data_file, in_memory=in_memory)
                for k in range(min(len(slices), 10)):
                    slices[k]
                found["result"] += 1
            except ValueError as error:
                found["error" if str(error).startswith(str(data_file)) else repr(error)] += 1
    assert min(found.values()) > 50, found


def test_a_model_by_its_own_command(saved, tmp_path, capsys):
    path = tmp_path / "m.safetensors"
    damaged = bytearray(saved.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(damaged)
    np.save(tmp_path / "in.npy", np.zeros((1, 32, 32)))
    words = ["sample", str(tmp_path / "in.npy"), "--model", str(path), "--output", str(tmp_path / "out")]
    assert cli.main(words) == 1
    err = capsys.readouterr().err
    assert str(path) in err and "its checksum does not match" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert small_model(tmp_path / "s.safetensors").exists()
