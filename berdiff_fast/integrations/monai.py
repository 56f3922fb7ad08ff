# SPDX-License-Identifier: Apache-2.0
"""For users of MONAI: a scheduler for its inferers, its networks as models, its dictionaries and our files.

    pip install "berdiff_fast[monai]"

>>> from berdiff_fast.integrations.monai import BernoulliScheduler, as_dicts, as_model, to_hdf5
>>> masks = bf.sample(as_model(network), img, n=16, schedule="cosine2", prediction="epsilon", seed=7)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

try:
    from monai.data import Dataset
    from monai.networks.schedulers import Scheduler
except ImportError as error:
    raise ImportError(
        f'berdiff_fast.integrations.monai needs MONAI 1.4 or newer: pip install "berdiff_fast[monai]" ({error})'
    ) from None

from berdiff_fast import checks
from berdiff_fast._version import __version__
from berdiff_fast.data import importers, pixels
from berdiff_fast.data.hdf5 import RaterDataset
from berdiff_fast.data.importers.trees import Slice
from berdiff_fast.data.importers.writing import SplitReport, Writer
from berdiff_fast.files import whole_file
from berdiff_fast.integrations.scheduling import BernoulliSteps, StepOutput, schedule_of
from berdiff_fast.schedule import NoiseSchedule

__all__ = ["BernoulliScheduler", "StepOutput", "as_dicts", "as_model", "to_hdf5"]

# ---------------------------------------------------------------------- the scheduler


class BernoulliScheduler(BernoulliSteps, Scheduler):
    """Bernoulli diffusion as a MONAI scheduler, for ``DiffusionInferer`` and its like.

    Masks are 0 and 1, the network's output is logits, and noise is uniform or comes from seeds: see ``step``,
    ``add_noise`` and ``initial_noise``. An inferer passes ``step`` no generator; give ``set_timesteps`` the seeds, or
    call ``torch.manual_seed``.

    Args:
        num_train_timesteps: T, at least 2; 1000, or that of ``schedule``, by default.
        schedule: "cosine2" (the paper's), "cosine", "linear" or a ``NoiseSchedule``. (MONAI's own "cosine" is another:
            see ``NoiseSchedule``.)
        prediction_type: what the logits say: "epsilon", P(y_t xor y_0 = 1), or "y_0", P(y_0 = 1), which MONAI calls
            "sample".
        method: "ddim", "ddpm" or "d3pm"; see ``NoiseSchedule.step_table``.
        timestep_spacing: "uniform", "quadratic", "trailing" or "trailing-quadratic"; see ``NoiseSchedule.subsequence``.
        final: the last step: "threshold" or "sample".
        leave_one_out: shift the logit to its leave-one-out version; see ``NoiseSchedule.step_table``.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self,
        num_train_timesteps: int | None = None,
        schedule: NoiseSchedule | str = "cosine2",
        prediction_type: str = "epsilon",
        method: str = "ddim",
        timestep_spacing: str = "uniform",
        final: str = "threshold",
        leave_one_out: bool = False,
    ) -> None:
        if not isinstance(schedule, NoiseSchedule):
            schedule = schedule_of("schedule", schedule, 1000 if num_train_timesteps is None else num_train_timesteps)
        if schedule.as_released:
            raise ValueError("schedule must not be as_released, which is for comparisons only")
        if num_train_timesteps not in (None, schedule.timesteps):
            raise ValueError(
                f"num_train_timesteps must be the schedule's {schedule.timesteps}, got {num_train_timesteps!r}"
            )
        Scheduler.__init__(self, schedule.timesteps)
        # MONAI's constructor has made a Gaussian process of one of its own schedules.
        self.betas, self.alphas = schedule.betas.float(), schedule.alphas.float()
        self.alphas_cumprod = schedule.alphas_cumprod.float()
        self._set_up(schedule, prediction_type, method, timestep_spacing, final, leave_one_out)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """There is none.

        Raises:
            NotImplementedError: always; a Bernoulli process has no velocity.
        """
        raise NotImplementedError("a Bernoulli process has no velocity; its networks predict epsilon or y_0")


# ---------------------------------------------------------------------- networks


def as_model(
    network: nn.Module,
    *,
    mask_channels: int | None = None,
    img_channels: int | None = None,
    spatial_dims: int | None = None,
) -> nn.Module:
    """A MONAI network as a model of this package: ``sample`` and ``Sampler`` take it, and so does ``BerDiff``.

    Args:
        network: called as ``network(x, timesteps=t)`` with x (N, K + C, *spatial), mask and image concatenated, and t
            (N,); returns logits (N, K, *spatial). ``DiffusionModelUNet`` is one.
        mask_channels: K; the network's ``out_channels`` by default.
        img_channels: C; its ``in_channels`` less K by default.
        spatial_dims: 2 or 3; that of its first convolution, ``conv_in``, by default.

    Returns:
        A module with these three attributes, ``network``, and ``forward(y_t, t, img) -> logits``.

    Raises:
        ValueError, TypeError: naming the argument; among others where the network does not tell what is not given.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network must be a torch.nn.Module, got {type(network).__name__}")
    if mask_channels is None:
        mask_channels = _told(network, "out_channels", "mask_channels")
    mask_channels = checks.integer("mask_channels", mask_channels, 1)
    if img_channels is None:
        both = _told(network, "in_channels", "img_channels")
        if both <= mask_channels:
            raise ValueError(
                f"network must have in_channels for mask and image together, got {both} with {mask_channels} of the "
                "mask"
            )
        img_channels = both - mask_channels
    if spatial_dims is None:
        tells = network if hasattr(network, "spatial_dims") else getattr(network, "conv_in", network)
        spatial_dims = _told(tells, "spatial_dims", "spatial_dims")
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims!r}")
    return _Concatenating(network, mask_channels, checks.integer("img_channels", img_channels, 1), spatial_dims)


def _told(network: nn.Module, attribute: str, argument: str) -> int:
    value = getattr(network, attribute, None)
    if value is None:
        raise ValueError(f"{argument} must be given for a {type(network).__name__}, which has no {attribute}")
    return checks.integer(argument, value)


class _Concatenating(nn.Module):
    def __init__(self, network: nn.Module, mask_channels: int, img_channels: int, spatial_dims: int) -> None:
        super().__init__()
        self.network = network
        self.mask_channels, self.img_channels, self.spatial_dims = mask_channels, img_channels, spatial_dims

    def forward(self, y_t: torch.Tensor, t: torch.Tensor, img: torch.Tensor) -> torch.Tensor:
        return self.network(torch.cat([y_t, img], dim=1), timesteps=t)


# ---------------------------------------------------------------------- data

_LARGEST = 2**31 - 1  # numbers are stored as int32


def to_hdf5(
    dataset: Any,
    path: str | os.PathLike[str],
    *,
    image_key: str = "image",
    mask_keys: Sequence[str] = ("label",),
    patient_key: str,
    valid_key: str | None = None,
    window: tuple[float, float] | None = None,
    overwrite: bool = False,
) -> SplitReport:
    """Write a data set of dictionaries as a file that our trainer reads (docs/data.md), whole or not at all.

    Every item is asked for once, in order, so random transforms are drawn once. Split by patient before: one call for
    each of training, validation and test.

    Args:
        dataset: with a length, and items that are dictionaries, as MONAI's ``Dataset`` and ``CacheDataset``.
        path: the file.
        image_key: the key of the slice (1, H, W), a tensor or an array. uint8 stays as it is, all else is scaled to
            0..255.
        mask_keys: the keys of the raters' masks, (1, H, W) each, or (R, H, W) for R raters under one key; of 0 and one
            other value, 1 or 255.
        patient_key: the key of the patient: an int, which becomes its ``patient_id``, or a name, which gives it the
            first 31 bits of its SHA-256: the same in every file, since the trainer refuses files that share patients.
        valid_key: the key of who read the slice, R of 0 and 1; by default everybody did.
        window: (low, high), which become 0 and 255; by default each slice's own minimum and maximum do. For images that
            a transform brought to [0, 1], (0, 1).
        overwrite: replace a file that is there.

    Returns:
        How many patients and slices there are, and each rater's empty masks.

    Raises:
        FileExistsError: the file is there already.
        ValueError, TypeError: naming the argument, or the item and its key.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"path: {path} exists; overwrite=True replaces it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: there is no folder {path.parent}")
    if isinstance(mask_keys, str) or not mask_keys:
        raise TypeError(f"mask_keys must be a sequence of keys, one at least, got {mask_keys!r}")
    limits = None if window is None else checks.increasing_pair("window", window)
    try:
        count = len(dataset)
    except TypeError:
        raise TypeError(f"dataset must have a length, got {type(dataset).__name__}") from None
    if not count:
        raise ValueError("dataset must not be empty")
    parameters = {
        "image_key": image_key,
        "mask_keys": list(mask_keys),
        "patient_key": patient_key,
        "valid_key": valid_key,
        "window": None if limits is None else list(limits),
    }
    attributes = {
        "format": importers.FORMAT,
        "berdiff_fast": __version__,
        "source": "monai",
        "split": path.stem,
        "parameters": json.dumps(parameters),
    }
    names: dict[int, str] = {}
    seen: Counter[int] = Counter()
    writer: Writer | None = None
    with whole_file(path) as temporary:
        try:
            for index in range(count):
                item = _Item(dataset[index], index)
                image, where = item.image(image_key, limits)
                masks = np.concatenate([item.masks(key, image.shape) for key in mask_keys])
                patient, name = item.patient(patient_key)
                if names.setdefault(patient, name) != name:
                    raise ValueError(
                        f"item {index}: patients {names[patient]!r} and {name!r} have the same number {patient}; "
                        "give numbers instead of names"
                    )
                if writer is None:
                    writer = Writer(temporary, count, image.shape, masks.shape, attributes)
                    shape = masks.shape
                elif masks.shape != shape:
                    raise ValueError(
                        f"item {index}: every item must have masks (R, H, W) = {shape} as the first, got {masks.shape}"
                    )
                one = Slice(name, "0", seen[patient], where, dict.fromkeys(range(len(masks)), where))
                seen[patient] += 1
                valid = None if valid_key is None else item.valid(valid_key, len(masks))
                writer.append(image, masks, patient, 0, one, valid)
            assert writer is not None
            return writer.finish()
        finally:
            if writer is not None:
                writer.close()


def _name_number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1


class _Item:
    """A dictionary of a data set; errors say which, and under which key."""

    def __init__(self, item: Any, index: int) -> None:
        if not isinstance(item, Mapping):
            raise TypeError(f"item {index}: must be a dictionary, got {type(item).__name__}")
        self.item, self.index = item, index

    def _array(self, key: str) -> np.ndarray:
        x = checks.tensor(f"item {self.index}: {key!r}", self._value(key)).detach().cpu()
        # NumPy has no bfloat16.
        return np.asarray(x.float() if x.dtype is torch.bfloat16 else x)

    def _value(self, key: str) -> Any:
        if key not in self.item:
            raise ValueError(f"item {self.index}: has no key {key!r}; it has {sorted(map(str, self.item))}")
        return self.item[key]

    def image(self, key: str, window: tuple[float, float] | None) -> tuple[np.ndarray, str]:
        """(H, W) uint8, and the path it was read from where MONAI remembers it."""
        x = self._array(key)
        if x.ndim != 3 or x.shape[0] != 1 or not x.size:
            raise ValueError(f"item {self.index}: {key!r} must be a slice (1, H, W), got shape {x.shape}")
        if x.dtype.kind == "f" and not np.isfinite(x).all():
            raise ValueError(f"item {self.index}: {key!r} has NaN or infinite values")
        meta = getattr(self.item[key], "meta", None) or {}
        try:
            return pixels.to_image(x[0], window), str(meta.get("filename_or_obj", ""))
        except ValueError as error:
            raise ValueError(f"item {self.index}: {key!r} {error}") from None

    def masks(self, key: str, size: tuple[int, ...]) -> np.ndarray:
        """(R, H, W) uint8 of 0 and 1."""
        x = self._array(key)
        if x.ndim != 3 or x.shape[1:] != size or not x.shape[0]:
            raise ValueError(
                f"item {self.index}: {key!r} must be (R, H, W) with the image's H and W, {size}, got shape {x.shape}"
            )
        try:
            return np.stack([pixels.to_mask(one, False, None) for one in x])
        except ValueError as error:
            raise ValueError(f"item {self.index}: {key!r} {error}") from None

    def valid(self, key: str, raters: int) -> np.ndarray:
        """(R,) bool, with one reader at least."""
        x = np.asarray(checks.tensor(f"item {self.index}: {key!r}", np.asarray(self._value(key)))).reshape(-1)
        if x.shape != (raters,) or not np.isin(x, (0, 1)).all() or not x.any():
            raise ValueError(
                f"item {self.index}: {key!r} must be {raters} of 0 and 1, one of them 1, got {x.tolist()!r:.80}"
            )
        return x != 0

    def patient(self, key: str) -> tuple[int, str]:
        """Number and name."""
        value = self._value(key)
        if isinstance(value, (torch.Tensor, np.ndarray)) and value.shape in ((), (1,)):
            value = value.reshape(()).item()
        if isinstance(value, str) and value:
            return _name_number(value), value
        number = checks.integer(f"item {self.index}: {key!r}", value, 0)
        if number > _LARGEST:
            raise ValueError(f"item {self.index}: {key!r} must be at most {_LARGEST}, got {number}")
        return number, str(number)


def as_dicts(dataset: RaterDataset, transform: Callable[[Any], Any] | None = None) -> Dataset:
    """Our slices as MONAI's dictionaries.

    Args:
        dataset: the data set whose items are written.
        transform: applied to every dictionary, as in ``monai.data.Dataset``.

    Returns:
        A ``monai.data.Dataset`` of {"image": (C, H, W) in the file's dtype, "label": (R * K, H, W) uint8 of 0 and 1,
        "rater_valid": (R,) uint8, "index": ..., and what the file tells of patient_id, nodule and slice}. Raters are
        channels of the label (rater r's class k is channel r K + k), since a dictionary transform takes all but the
        first dimension for space.

    Raises:
        TypeError: naming the argument.
    """
    if not isinstance(dataset, RaterDataset):
        raise TypeError(f"dataset must be a RaterDataset, got {type(dataset).__name__}")
    return Dataset(_Dicts(dataset), transform)


class _Dicts(Sequence):
    def __init__(self, dataset: RaterDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        image, masks = self.dataset[index]
        read = torch.from_numpy(self.dataset.rater_valid[index].astype(np.uint8))
        label = masks.flatten(0, 1).to(torch.uint8)
        return {"image": image, "label": label, "rater_valid": read, **self.dataset.describe(index)}
