# SPDX-License-Identifier: Apache-2.0
"""``BerDiff``: a network together with all that is needed to sample from it, as one object and one file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import nn

from berdiff_fast import checks, digests
from berdiff_fast.files import write_bytes
from berdiff_fast.network import described
from berdiff_fast.network.prior import ModePrior, class_logits, class_probabilities
from berdiff_fast.network.unet import UNet, check_size
from berdiff_fast.network.window import Window
from berdiff_fast.ops import PREDICTIONS
from berdiff_fast.preprocessing import Preprocessing, Statistics
from berdiff_fast.regions import Regions, check_names
from berdiff_fast.rng import DRAW_CONTRACT
from berdiff_fast.schedule import SPACINGS, NoiseSchedule

#: Version of the layout of saved models.
FORMAT = 1

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
#: Before the names of the mode prior's weights; the denoiser's have none.
PRIOR = "mode_prior."


class BerDiff(nn.Module):
    """A network, its noise schedule, what it predicts, and how its images are prepared.

    Args:
        network: called as ``network(y_t, t, img)``, returns logits of the shape of y_t. ``UNet`` can be saved, and with
            ``network_arguments`` a module of any class that can be imported; others can be sampled from and trained.
        schedule: a ``NoiseSchedule`` or its name.
        prediction: "epsilon": the logits say P(y_t xor y_0 = 1), the paper's calibration; "y_0": P(y_0 = 1).
        preprocessing: from raw intensities to ``img``; None if only the user knows.
        spacing: which timesteps ``sample`` visits unless told otherwise; see ``NoiseSchedule.subsequence``.
        rescale_timesteps: give the network t * 1000 / T, as the published scripts may.
        mask_channels, img_channels, spatial_dims: K, C and 2 or 3; read off the network where it has these attributes,
            else 1, unchecked and 2.
        output_crop: masks are denoised in the middle square of this many pixels, and nothing is marked around it; the
            shape of masks and logits stays that of the image. 0: everywhere.
        context, distance: what the network is shown beside the image in this window: the surroundings at half the
            resolution, and each pixel's distance from the middle, as further image channels (``network.window``).
        channels: the names of the image's C channels, such as "flair", "t1", "t1ce", "t2".
        regions: what the K channels of a mask stand for (``Regions``). Masks are then made to contain what is a part of
            them: the whole tumour has what the tumour core has.
        mode_prior: p(c | x), for a network that is told the size class c of the mask, as its fourth argument
            (``UNet(num_classes=...)``). ``sample`` then draws a mask's class first; see docs/math.md.
        network_arguments: the keyword arguments, JSON-able, that the network's class was called with. A file then says
            how to build it, which ``load`` does where ``allow_imports`` lets it.

    Attributes:
        output_window: these three, a ``network.window.Window``.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule | str = "cosine2",
        prediction: str = "epsilon",
        *,
        preprocessing: Preprocessing | None = None,
        spacing: str = "uniform",
        rescale_timesteps: bool = False,
        mask_channels: int | None = None,
        img_channels: int | None = None,
        spatial_dims: int | None = None,
        output_crop: int = 0,
        context: bool = False,
        distance: bool = False,
        mode_prior: ModePrior | None = None,
        channels: Sequence[str] | None = None,
        regions: Regions | Mapping[str, Sequence[int]] | None = None,
        network_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"network must be a torch.nn.Module, got {type(network).__name__}")
        if isinstance(schedule, str):
            schedule = NoiseSchedule(schedule)
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"schedule must be a NoiseSchedule or its name, got {type(schedule).__name__}")
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be 'epsilon' or 'y_0', got {prediction!r}")
        if preprocessing is not None and not isinstance(preprocessing, Preprocessing):
            raise TypeError(f"preprocessing must be a Preprocessing or None, got {type(preprocessing).__name__}")
        if spacing not in SPACINGS:
            raise ValueError(f"spacing must be one of {list(SPACINGS)}, got {spacing!r}")
        self.network = network
        #: Of a network of one's own that can be saved: its class and arguments.
        self.own_network = None if network_arguments is None else described.describe(network, network_arguments)
        self.spacing = spacing
        self.schedule = schedule
        self.prediction = prediction
        self.preprocessing = preprocessing
        self.rescale_timesteps = rescale_timesteps
        if mask_channels is None:
            mask_channels = getattr(network, "mask_channels", 1)
        self.output_window = Window(output_crop, context, distance)
        shown = getattr(network, "img_channels", None)
        if img_channels is None and shown is not None:
            img_channels = shown if self.output_window.plain else self.output_window.img_channels(shown)
        if spatial_dims is None:
            spatial_dims = getattr(network, "spatial_dims", 2)
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims!r}")
        self.mask_channels: int = checks.integer("mask_channels", mask_channels, 1)
        self.img_channels: int | None = img_channels and checks.integer("img_channels", img_channels, 1)
        self.spatial_dims: int = spatial_dims
        if spatial_dims == 3 and not (self.output_window.plain and mode_prior is None):
            raise ValueError("output_crop, distance and mode_prior are for images, got spatial_dims = 3")
        if isinstance(network, UNet) and self.output_window.size:
            check_size((output_crop, output_crop), network.downsampling, "output_crop")
        if mode_prior is not None and not isinstance(mode_prior, ModePrior):
            raise TypeError(f"mode_prior must be a ModePrior or None, got {type(mode_prior).__name__}")
        told, drawn = getattr(network, "num_classes", 0), 0 if mode_prior is None else mode_prior.classes
        if isinstance(network, UNet) and told != drawn:
            raise ValueError(
                f"mode_prior must be given exactly for a network that is told its {told} classes, got one of {drawn}"
            )
        if mode_prior is not None and self.img_channels not in (None, mode_prior.img_channels):
            raise ValueError(
                f"mode_prior must see the image's {self.img_channels} channels, got one of {mode_prior.img_channels}"
            )
        self.mode_prior = mode_prior
        self.channels = None if channels is None else check_names("channels", channels, placed=True)
        if self.channels is not None and self.img_channels not in (None, len(self.channels)):
            raise ValueError(f"channels must name the image's {self.img_channels} channels, got {list(self.channels)}")
        if preprocessing is not None:
            preprocessing.check_dims(spatial_dims)
        together = 2 * self.context_slices + 1
        if (self.img_channels or 0) % together:
            raise ValueError(
                f"img_channels must be a multiple of {together}, slices in context, got {self.img_channels}"
            )
        if isinstance(regions, Mapping):
            regions = Regions(tuple((name, tuple(labels)) for name, labels in regions.items()))
        if not isinstance(regions, (Regions, type(None))):
            raise TypeError(f"regions must be Regions, a mapping or None, got {type(regions).__name__}")
        if regions is not None and len(regions.table) != self.mask_channels:
            raise ValueError(f"regions must be the {self.mask_channels} channels of a mask, got {regions}")
        self.regions = regions

    def forward(
        self, y_t: torch.Tensor, t: torch.Tensor, img: torch.Tensor, mode: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits (N, K, *spatial) for noisy masks y_t (N, K, *spatial), timesteps t (N,) and img (N, C, *spatial).

        Args:
            mode: (N,) int64, the size class of each mask, for a model with a mode prior.
        """
        if (mode is None) != (self.mode_prior is None):
            raise ValueError(
                f"mode must be given exactly to a model with a mode prior, got {'none' if mode is None else 'one'}"
            )
        if self.rescale_timesteps:
            t = t.float() * (1000.0 / self.schedule.timesteps)
        told = () if mode is None else (mode,)
        if self.output_window.plain:
            return self.network(y_t, t, img, *told)
        self.output_window.check("img", img.shape)
        logits = self.network(self.output_window.cut(y_t), t, self.output_window.view(img), *told)
        return self.output_window.fill(logits, y_t, self.prediction)

    def prior(self, img: torch.Tensor | np.ndarray) -> torch.Tensor:
        """How likely a mask of each size class is, before anything is drawn: p(c | x).

        Class 0 is the empty mask, so ``1 - model.prior(img)[:, 0]`` is the probability that a reader marks something.

        Args:
            img: as in ``sample``: float (B, C, H, W) or (C, H, W), scaled as the network expects it.

        Returns:
            float32 (B, classes), of sum 1. The classes are those of ``model.mode_prior.edges``; see ``size_class``.

        Raises:
            ValueError, TypeError: the model has no mode prior, or a wrong ``img``.
        """
        if self.mode_prior is None:
            raise ValueError("this model has no mode prior: it draws masks of all sizes at once")
        weight = next(self.mode_prior.parameters())
        x = checks.tensor("img", img)
        if x is not img:
            x = x.to(weight.device)
        if not x.is_floating_point():
            raise TypeError(f"img must be floating point, scaled as the network expects it, got {x.dtype}")
        x = x[None] if x.ndim == 3 else x
        if x.ndim != 4 or x.shape[1] != self.mode_prior.img_channels or 0 in x.shape:
            raise ValueError(
                f"img must be (B, C, H, W) or (C, H, W) with {self.mode_prior.img_channels} channels, got shape "
                f"{tuple(x.shape)}"
            )
        if x.device != weight.device:
            raise ValueError(f"img must be on the model's device {weight.device}, got {x.device}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError("img must be finite, got NaN or infinite values")
        return class_probabilities(class_logits(self.mode_prior, x))

    def with_weights(self, network: nn.Module, mode_prior: ModePrior | None) -> BerDiff:
        """A model that is like this one but for its modules: averaged ones, say."""
        same = ("preprocessing", "spacing", "rescale_timesteps", "mask_channels", "img_channels", "spatial_dims")
        options: dict[str, Any] = {name: getattr(self, name) for name in (*same, "channels", "regions")}
        made = BerDiff(
            network,
            self.schedule,
            self.prediction,
            output_crop=self.output_window.size,
            context=self.output_window.context,
            distance=self.output_window.distance,
            mode_prior=mode_prior,
            **options,
        )
        made.own_network = self.own_network
        return made

    @property
    def context_slices(self) -> int:
        """How many neighbours of a slice on either side are channels beside it."""
        return 0 if self.preprocessing is None else self.preprocessing.context_slices

    @property
    def size_multiple(self) -> int:
        """What an image's height and width must be multiples of."""
        return self.network.downsampling if isinstance(self.network, UNet) and not self.output_window.size else 1

    def weights(self) -> dict[str, torch.Tensor]:
        """All weights by the names they have in a file: the network's, and behind ``mode_prior.`` the prior's."""
        found = dict(self.network.state_dict())
        if self.mode_prior is not None:
            found |= {PRIOR + name: tensor for name, tensor in self.mode_prior.state_dict().items()}
        return found

    def preprocess(self, raw: torch.Tensor | np.ndarray, statistics: Statistics | None = None) -> torch.Tensor:
        """Raw intensities (uint8, Hounsfield units, ...) to the ``img`` of ``sample``.

        Args:
            raw: (B, C, *spatial), (C, *spatial) or, with one channel, (*spatial,); any real dtype.
            statistics: of the volume whose slices these are, ``model.preprocessing.statistics(volume)``, for a model
                that scales by it (``Preprocessing(by_volume=True)``).

        Returns:
            float32 (B, C, *spatial) on the CPU or the device of ``raw``.

        Raises:
            ValueError: the model has no preprocessing, a wrong shape, NaN or infinite values, no statistics.
        """
        if self.preprocessing is None:
            raise ValueError("this model does not know how its images were prepared; scale them as in its training")
        x = checks.tensor("raw", raw)
        if x.numel() == 0:
            raise ValueError(f"raw must not be empty, got shape {tuple(x.shape)}")
        if x.is_complex() or x.dtype is torch.bool:
            raise ValueError(f"raw must have a real dtype, got {x.dtype}")
        if x.ndim == self.spatial_dims:
            x = x[None]
        if x.ndim == self.spatial_dims + 1:
            x = x[None]
        if x.ndim != self.spatial_dims + 2:
            raise ValueError(
                f"raw must have {self.spatial_dims} to {self.spatial_dims + 2} dimensions, got shape {tuple(x.shape)}"
            )
        if self.img_channels is not None and x.shape[1] != self.img_channels:
            raise ValueError(f"raw must have {self.img_channels} channels, got shape {tuple(x.shape)}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError("raw must be finite, got NaN or infinite values")
        return self.preprocessing(x, statistics)

    # ------------------------------------------------------------------ files

    def to_config(self) -> dict[str, Any]:
        """All but the weights; JSON-able.

        Raises:
            TypeError: the network is neither a ``UNet`` nor of ``network_arguments``, so a file could not say how to
                build it.
        """
        shape = {name: getattr(self, name) for name in ("mask_channels", "img_channels", "spatial_dims")}
        config: dict[str, Any] = {
            "format": FORMAT,
            "draw_contract": DRAW_CONTRACT,
            "network": described.to_config(self.network, self.own_network, **shape),
            "schedule": self.schedule.to_config(),
            "prediction": self.prediction,
            "spacing": self.spacing,
            "rescale_timesteps": self.rescale_timesteps,
            "preprocessing": self.preprocessing.to_config() if self.preprocessing else None,
        }
        # Only what is used is named: files of other models are what they were.
        window = self.output_window
        used = {"output_crop": window.size, "context": window.context, "distance": window.distance}
        config.update({name: value for name, value in used.items() if value})
        if self.mode_prior is not None:
            config["mode_prior"] = self.mode_prior.config
        if self.channels is not None:
            config["channels"] = list(self.channels)
        if self.regions is not None:
            config["regions"] = [[name, list(labels)] for name, labels in self.regions.table]
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, allow_imports: bool | Sequence[str] = False) -> BerDiff:
        """An untrained model as ``to_config`` described it; for ``allow_imports`` see ``load``."""
        if config.get("format") != FORMAT:
            raise ValueError(f"model format {config.get('format')!r:.80} is unknown; this version reads {FORMAT}")
        for key in ("network", "schedule"):
            if not isinstance(config[key], Mapping):
                raise ValueError(f"{key} must be an object, got {config[key]!r:.80}")
        network, own = described.rebuild(config["network"], allow_imports)
        preprocessing, prior = config.get("preprocessing"), config.get("mode_prior")
        if not isinstance(config["rescale_timesteps"], bool):
            raise ValueError(f"rescale_timesteps must be true or false, got {config['rescale_timesteps']!r:.80}")
        if not isinstance(preprocessing, (Mapping, type(None))):
            raise ValueError(f"preprocessing must be an object or null, got {preprocessing!r:.80}")
        if not isinstance(prior, (Mapping, type(None))):
            raise ValueError(f"mode_prior must be an object or null, got {prior!r:.80}")
        return cls(
            network,
            NoiseSchedule.from_config(config["schedule"]),
            config["prediction"],
            preprocessing=Preprocessing(**preprocessing) if preprocessing else None,
            spacing=config.get("spacing", "uniform"),
            rescale_timesteps=config["rescale_timesteps"],
            output_crop=config.get("output_crop", 0),
            context=config.get("context", False),
            distance=config.get("distance", False),
            mode_prior=None if prior is None else ModePrior(**prior),
            channels=config.get("channels"),
            regions=None if config.get("regions") is None else Regions(config["regions"]),
            **own,
        )

    def save(self, path: str | os.PathLike[str], *, follow: bool = True) -> None:
        """Write the model: one file if ``path`` ends in .safetensors, else a directory.

        A file carries the configuration in its header, with a checksum of all; a directory has it as config.json beside
        model.safetensors. Each file is written beside its place and renamed, so none is ever half there.

        Args:
            path: the file or the directory.
            follow: where a file is a symbolic link, replace the file behind it. In a directory links are replaced.

        Raises:
            TypeError: as ``to_config``.
            OSError: the place cannot be written.
        """
        config = self.to_config()
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.weights().items()}
        if self.own_network is not None:  # which may share some: safetensors refuses that
            weights = {name: tensor.clone() for name, tensor in weights.items()}
        data = safetensors.torch.save(weights, metadata={"berdiff_fast": digests.seal(config, weights)})
        path = Path(path)
        if path.suffix == ".safetensors":
            write_bytes(path, data, follow=follow)
        else:
            path.mkdir(parents=True, exist_ok=True)
            write_bytes(path / WEIGHTS, data, follow=False)
            write_bytes(path / CONFIG, (json.dumps(config, indent=2) + "\n").encode(), follow=False)


def fingerprint(model: BerDiff) -> str:
    """SHA-256 of a model's description and weights."""
    network = model.network
    what: dict[str, Any] = {
        "network": model.own_network or (network.config if isinstance(network, UNet) else repr(network)),
        "schedule": model.schedule.to_config(),
        "prediction": model.prediction,
        "rescale_timesteps": model.rescale_timesteps,
        "preprocessing": repr(model.preprocessing),
    }
    # Only what is used: models without it are called what they were.
    if not model.output_window.plain:
        what["window"] = repr(model.output_window)
    if model.mode_prior is not None:
        what["mode_prior"] = model.mode_prior.config
    if model.channels is not None:
        what["channels"] = list(model.channels)
    if model.regions is not None:
        what["regions"] = str(model.regions)
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode())
    for name, tensor in model.weights().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
