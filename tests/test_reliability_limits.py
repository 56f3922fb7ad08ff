# SPDX-License-Identifier: Apache-2.0
"""What input may ask for: no other file's content, no memory beyond what is meant, no address that is none."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import time
import zipfile

import h5py
import numpy as np
import pytest
import torch
from scans import bright, small_model
from support import CPU_BACKENDS, ENVIRONMENT

import berdiff_fast as bf
from berdiff_fast import NoiseSchedule, cli, limits, ops, scans
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.training.config import read_yaml

# ---------------------------------------------------------------------- HDF5 that reads other files


def external(file, name, secret):
    file.create_dataset(name, (1, 16, 16), np.uint8, external=[(str(secret), 0, 256)])


def external_link(file, name, secret):
    file[name] = h5py.ExternalLink(str(secret.with_suffix(".h5")), "d")


def soft_link_to_external(file, name, secret):
    file["away"] = h5py.ExternalLink(str(secret.with_suffix(".h5")), "/")
    file[name] = h5py.SoftLink("/away/d")


def virtual(file, name, secret):
    layout = h5py.VirtualLayout((1, 16, 16), np.uint8)
    layout[:] = h5py.VirtualSource(str(secret.with_suffix(".h5")), "d", (1, 16, 16))
    file.create_virtual_dataset(name, layout)


def link_to_a_pipe(file, name, secret):
    """Whoever opens it waits for ever."""
    os.mkfifo(secret.with_suffix(".pipe"))
    file[name] = h5py.ExternalLink(str(secret.with_suffix(".pipe")), "d")


@pytest.mark.parametrize("make", [external, external_link, soft_link_to_external, virtual, link_to_a_pipe])
@pytest.mark.parametrize("name", ["image", "mask", "patient_id"])
def test_hdf5_reads_no_other_file(tmp_path, make, name):
    secret = tmp_path / "secret"
    secret.write_bytes(b"TOP-SECRET-KEY-0" * 16)
    with h5py.File(secret.with_suffix(".h5"), "w") as file:
        file["d"] = np.frombuffer(secret.read_bytes(), np.uint8).reshape(1, 16, 16)
    path = tmp_path / "in.h5"
    whole = {"image": np.zeros((1, 16, 16), np.uint8), "mask": np.zeros((1, 2, 16, 16), np.uint8)}
    with h5py.File(path, "w") as file:
        for key, data in (whole | {"patient_id": np.zeros(1, int)}).items():
            if key == name:
                make(file, key, secret)
            else:
                file[key] = data
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: .*(another file|other files)"):
        RaterDataset(path)


def test_links_within_a_file_are_followed(tmp_path):
    path = tmp_path / "in.h5"
    with h5py.File(path, "w") as file:
        file["there/image"] = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
        file["here"] = h5py.SoftLink("/there")
        file["image"] = h5py.SoftLink("here/image")
        file["mask"] = np.ones((1, 2, 16, 16), np.uint8)
    assert RaterDataset(path)[0][0].flatten().tolist() == list(range(256))
    with h5py.File(path, "a") as file:
        del file["image"]
        file["image"] = h5py.SoftLink("/image")
    with pytest.raises(ValueError, match="links"):
        RaterDataset(path)


def memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("name", ["image", "mask"])
def test_hdf5_that_declares_more_than_it_holds(tmp_path, name, in_memory):
    """A file of a few kB, whose data set of 16 GB was never written; read whole, or in slices of 4 GB."""
    path = tmp_path / "in.h5"
    shapes = {"image": (4, 2**16, 2**16), "mask": (4, 1, 2**16, 2**16)}
    with h5py.File(path, "w") as file:
        for key, shape in shapes.items():
            chunks = (1,) * (len(shape) - 2) + (64, 64)
            file.create_dataset(key, shape, np.uint8, chunks=chunks, compression="gzip")
    assert path.stat().st_size < 10_000
    before = memory()
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(path))}: .*declares .* GB, and only 0 bytes of it are there"
    ):
        RaterDataset(path, in_memory=in_memory)
    assert memory() - before < 300e6


def test_a_packed_chunk_of_gigabytes(tmp_path):
    path = tmp_path / "in.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("image", (1, 40_000, 40_000), np.uint8, chunks=(1, 40_000, 40_000), compression="gzip")
        file["mask"] = np.zeros((1, 1, 8, 8), np.uint8)
    with pytest.raises(ValueError, match="a chunk of 'image' declares 1.6 GB"):
        RaterDataset(path)


def test_what_does_not_fit_into_the_memory_is_said_before(monkeypatch):
    limits.room("n", limits.HARMLESS)
    monkeypatch.setattr(limits, "available", lambda: 10**9)
    limits.room("n", 10**9)
    with pytest.raises(ValueError, match=r"^n would take 3.5 GB of memory, and 1 GB are free; give fewer$"):
        limits.room("n", 3_500_000_000, "give fewer")
    monkeypatch.undo()
    assert 2**28 < limits.available() < 2**62


# ---------------------------------------------------------------------- arguments and descriptions


@pytest.mark.parametrize("overlap", [0.999, 0.999999, 1 - 1e-16])
def test_an_overlap_near_one(overlap):
    """No more tiles than there are places, and no more of these than can be meant."""
    array, start = np.zeros((1, 40, 40), np.uint8), time.perf_counter()
    plan = scans.sample_volume(bright(size=(32, 32)), array, 1, 2, overlap=overlap).plan
    assert len(plan["tiles"]) == 81 and len({tuple(tile) for tile in plan["tiles"]}) == 81
    with pytest.raises(ValueError, match="has more than 10,000 tiles; give a smaller overlap"):
        scans.sample_volume(bright(size=(2, 2)), np.zeros((1, 512, 512), np.uint8), 1, 2, overlap=overlap)
    assert time.perf_counter() - start < 20


def test_slices_that_would_take_more_memory_than_there_is():
    array = np.zeros((1, 16, 16), np.uint8)
    for options, n in ((dict(size=(10**6, 10**6)), 1), (dict(size=(16, 16)), 10**12)):
        with pytest.raises(ValueError, match="would take .* TB of memory"):
            scans.sample_volume(bright(**options), array, n, 2)


def test_more_masks_than_files_can_be(tmp_path, capsys):
    np.save(tmp_path / "in.npy", np.zeros((1, 16, 16), np.uint8))
    words = ["sample", str(tmp_path / "in.npy"), "-n", str(10**10), "--output", str(tmp_path / "out")]
    assert cli.main(words) == 1
    assert "n must be at most 100,000" in capsys.readouterr().err and not (tmp_path / "out").exists()


def aliases(levels: int) -> str:
    lines = ["train_data: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"x{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, levels)]
    return "\n".join(lines)


YAML = {
    "aliases of aliases": (aliases(9), "must say at most 10000 values"),
    "an alias of itself": ("a: &a [*a]", "must say at most 10000 values"),
    "a key that is itself": ("&a {b: *a}", "must say at most 10000 values"),
    "nested": ("a: " + "[" * 5000, "is not YAML"),
    "a date that is none": ("a: 2020-99-99", "is not YAML"),
    "a number without end": ("a: " + "1" * 10_000, "is not YAML"),
    "megabytes": ("a: " + "1" * 2**21, "must have at most 1048576 bytes"),
    "no text": (b"\xff\xfe\x00", "is not YAML"),
}


@pytest.mark.parametrize("what", YAML)
def test_yaml_that_says_too_much(tmp_path, what, capsys):
    text, message = YAML[what]
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before, start = memory(), time.perf_counter()
    assert cli.main(["train", "--config", str(path)]) == 1
    err = capsys.readouterr().err
    assert str(path) in err and message in err and err.count("\n") == 1 and len(err) < 3000
    assert memory() - before < 200e6 and time.perf_counter() - start < 20


def test_yaml_may_use_an_alias(tmp_path):
    (tmp_path / "c.yaml").write_text("channel_mult: &a [1, 2]\nattention_resolutions: *a\n")
    assert read_yaml(tmp_path / "c.yaml") == {"channel_mult": [1, 2], "attention_resolutions": [1, 2]}


def test_more_timesteps_than_a_table_has():
    with pytest.raises(ValueError, match="timesteps must be at most 1,000,000"):
        NoiseSchedule("cosine2", 10**9)


def test_an_official_checkpoint_that_is_packed(tmp_path):
    path = tmp_path / "m.pt"
    torch.save({"a": torch.zeros(10**8, dtype=torch.uint8)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for part in plain.infolist():
            packed.writestr(part.filename, plain.read(part) * (4 if part.file_size > 1000 else 1))
    assert path.stat().st_size < 10**6
    before = memory()
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} declares 400 MB, and has"):
        bf.load_official(path)
    assert memory() - before < 100e6


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize("where", ["input", "output"])
@pytest.mark.parametrize("ending", [".nii", ".npy"])
def test_names_that_are_not_utf8(tmp_path, where, ending):
    """A result or one line, never the end of the process; in a process of its own, since it would be ours."""
    pytest.importorskip("SimpleITK")
    from berdiff_fast.imaging import volumes

    model = small_model(tmp_path / "m.safetensors", size=(16, 16))
    odd = os.fsdecode(b"o\xff\x1b[31m")
    array = np.zeros((1, 16, 16), np.int16)
    volumes.write(tmp_path / f"a{ending}", array, volumes.Volume(array, (1.0, 1.0, 1.0)))
    path, out = tmp_path / f"a{ending}", tmp_path / "out"
    if where == "input":
        path = path.rename(tmp_path / f"{odd}{ending}")
    else:
        out = tmp_path / odd
    words = [
        "sample",
        os.fsencode(path),
        "--output",
        os.fsencode(out),
        "--model",
        str(model),
        "-n",
        "2",
        "--steps",
        "2",
    ]
    done = subprocess.run([sys.executable, "-m", "berdiff_fast.cli", *words], env=ENVIRONMENT, capture_output=True)
    assert b"\x1b[31m" not in done.stdout + done.stderr
    if done.returncode == 0:
        assert (out / "summary.json").is_file()
    else:
        said = done.stderr.decode().splitlines()
        assert done.returncode == 1 and said[-1].startswith("berdiff-fast sample: ") and "UTF-8" in said[-1]
        assert r"o\xff\x1b[31m" in said[-1] and not out.exists()


# ---------------------------------------------------------------------- tensors without memory


def freed(tensor):
    """As FSDP leaves parameters."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def freed_view(tensor):
    """A part of a storage that is freed: its address is not 0."""
    whole = torch.cat([tensor.flatten(), tensor.flatten()])
    part = whole[tensor.numel() :].view(tensor.shape)
    whole.untyped_storage().resize_(0)
    return part


KINDS = {
    "freed": freed,
    "a view of what was freed": freed_view,
    "zero": lambda tensor: torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype),
    "functional": torch._to_functional_tensor,
}

Y, Z = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
SEEDS, FOUR, T = torch.tensor([1, 2]), torch.ones(4), torch.tensor([3, 5])
X, W, B = torch.randn(2, 4, 4, 4), torch.ones(4), torch.zeros(4)
SCHEDULE = NoiseSchedule()

CALLS = {
    "noise: seeds": lambda k, b: ops.initial_noise(k(SEEDS), (1, 4, 4), backend=b),
    "q_sample: y_0": lambda k, b: ops.q_sample(k(Y), T, SEEDS, SCHEDULE, backend=b),
    "q_sample: seeds": lambda k, b: ops.q_sample(Y, T, k(SEEDS), SCHEDULE, backend=b),
    "step: y_t": lambda k, b: ops.sample_step(k(Y), Z, SEEDS, FOUR, 5, backend=b),
    "step: logits": lambda k, b: ops.sample_step(Y, k(Z), SEEDS, FOUR, 5, backend=b),
    "step: seeds": lambda k, b: ops.sample_step(Y, Z, k(SEEDS), FOUR, 5, backend=b),
    "step: coefficients": lambda k, b: ops.sample_step(Y, Z, SEEDS, k(FOUR), 5, backend=b),
    "step: nan_flag": lambda k, b: ops.sample_step(
        Y, Z, SEEDS, FOUR, 5, nan_flag=k(torch.zeros(1, dtype=torch.int32)), backend=b
    ),
    "posterior: logits": lambda k, b: ops.posterior(Y, k(Z), FOUR, backend=b),
    "loss: logits": lambda k, b: ops.diffusion_loss(k(Z), Y, Y, T, SCHEDULE, backend=b),
    "loss: y_0": lambda k, b: ops.diffusion_loss(Z, Y, k(Y), T, SCHEDULE, backend=b),
    "loss: ignore": lambda k, b: ops.diffusion_loss(Z, Y, Y, T, SCHEDULE, ignore=k(Y), backend=b),
    "overlap: a": lambda k, b: ops.overlap(k(torch.ones(1, 2, 4, 4)), backend=b),
    "overlap: b": lambda k, b: ops.overlap(torch.ones(1, 2, 4, 4), k(torch.ones(1, 2, 4, 4)), backend=b),
    "group_norm: x": lambda k, b: ops.group_norm_silu(k(X), W, B, 2, backend=b),
    "group_norm: other": lambda k, b: ops.group_norm_silu(X, W.repeat(2), B.repeat(2), 2, other=k(X), backend=b),
    "group_norm: weight": lambda k, b: ops.group_norm_silu(X, k(W), B, 2, backend=b),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each call is a process")
@pytest.mark.parametrize("backend", CPU_BACKENDS[1:])
@pytest.mark.parametrize("what", CALLS)
def test_tensors_without_memory_end_no_process(what, backend):
    """Each in a process of its own: it raises, or computes as torch does; and a whole tensor computes."""
    ended = {}
    for name, kind in {**KINDS, "whole": torch.clone}.items():
        if not (child := os.fork()):
            try:
                CALLS[what](kind, backend)
                os._exit(0)
            except Exception as error:
                os._exit(1 if "has no memory" in str(error) or name in ("zero", "functional") else 3)
        ended[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended["whole"] == 0
    assert ended["freed"] == ended["a view of what was freed"] == 1, ended
    assert ended["zero"] in (0, 1) and ended["functional"] in (0, 1), ended


def test_expanded_and_empty_tensors_are_fine():
    y = torch.zeros(1, 1, 4, 4).expand(2, 1, 4, 4)
    assert torch.equal(ops.sample_step(y, Z, SEEDS, FOUR, 5), ops.sample_step(Y, Z, SEEDS, FOUR, 5))
    assert ops.overlap(torch.ones(1, 0, 4, 4), torch.ones(1, 2, 4, 4)).tolist() == [[[16, 16], [16, 16]]]
    assert ops.sample_step(Y[:0], Z[:0], SEEDS[:1], FOUR, 5, samples_per_image=1).shape == (0, 1, 4, 4)
