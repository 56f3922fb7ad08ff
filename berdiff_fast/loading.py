# SPDX-License-Identifier: Apache-2.0
"""Models from files: of this package, bundled with it, or checkpoints of the published code."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch

from berdiff_fast import digests, words
from berdiff_fast.model import PRIOR, WEIGHTS, BerDiff
from berdiff_fast.network import described, official
from berdiff_fast.network.prior import ModePrior
from berdiff_fast.network.unet import UNet
from berdiff_fast.schedule import NoiseSchedule

_BUNDLED = Path(__file__).parent / "weights"


def bundled_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(p.name for p in _BUNDLED.iterdir() if (p / WEIGHTS).is_file()) if _BUNDLED.is_dir() else []


def load(name_or_path: str | os.PathLike[str], *, allow_imports: bool | Sequence[str] = False) -> BerDiff:
    """A model from a directory, a .safetensors file, or the package (``bundled_models()``); in eval mode on the CPU.

    Weights are float32, whatever precision they were stored in.

    Args:
        name_or_path: the model.
        allow_imports: a model may be of a network of somebody's own, whose class the file names. Importing it runs code
            of an installed package, with arguments from the file. The packages that may be imported for this, or True
            for any; by default a file that asks for it is refused.

    Raises:
        FileNotFoundError: neither a path nor a bundled name.
        ValueError: unreadable, truncated, not a model of this package, or a class that may not be imported; the message
            names the file.
    """
    described.allowed_packages(allow_imports)
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(f"name_or_path must be a name or a path, got {type(name_or_path).__name__}")
    path = Path(name_or_path)
    bundled = str(name_or_path) in bundled_models()
    if bundled and not (path.is_file() or (path / WEIGHTS).is_file()):  # a folder of that name may hold anything
        path = _BUNDLED / str(name_or_path)
    if not path.exists():
        raise FileNotFoundError(
            f"name_or_path: no file or directory {str(name_or_path)!r}, and no bundled model of that name "
            f"(there are {bundled_models()})"
        )
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"name_or_path: {path} has no {WEIGHTS}")
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read as safetensors (truncated or damaged?): {error}") from error
    if "berdiff_fast" not in metadata:
        raise ValueError(
            f"{file} does not describe a berdiff_fast model; load_official reads checkpoints of the published code"
        )
    try:
        config = digests.parsed(metadata["berdiff_fast"])
        of_prior = {k.removeprefix(PRIOR): weights[k] for k in weights if k.startswith(PRIOR)}
        of_network = {k: w for k, w in weights.items() if not k.startswith(PRIOR)}
        _check_network(config.get("network"), of_network, allow_imports)
        _check_prior(config.get("mode_prior"), of_prior)
        if described.names_class(config["network"]):  # before any code of that is run
            digests.check(metadata["berdiff_fast"], weights)
        model = BerDiff.from_config(config, allow_imports=allow_imports).float()  # whatever torch's default dtype is
        if unknown := config.keys() - model.to_config().keys():
            raise ValueError(f"its description has the unknown key {min(unknown)!r:.80}")
        digests.check(metadata["berdiff_fast"], weights)  # last: what can be said more plainly has been
        wide = {k: w.float() if w.is_floating_point() else w for k, w in of_network.items()}
        model.network.load_state_dict(wide)
        if model.mode_prior is not None:
            model.mode_prior.load_state_dict({name: tensor.float() for name, tensor in of_prior.items()})
    except described.ImportRefusedError as error:
        raise described.ImportRefusedError(f"{file}: {error}") from None
    except Exception as error:  # what the header says may be of any kind
        raise ValueError(f"{file} does not hold a complete berdiff_fast model: {words.line(error)}") from error
    return model.eval()


def _check_network(config: Any, weights: Mapping[str, torch.Tensor], allow_imports: bool | Sequence[str]) -> None:
    """That the weights are those of the network described, before memory is taken for that.

    Raises:
        ImportRefusedError: it is of a class that may not be imported.
        ValueError, TypeError, RuntimeError: they are not, or no network can be described so.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"network must be an object, got {config!r:.80}")
    described.refuse(config, allow_imports)
    if config.get("type") != "UNet":
        return  # a class of one's own may need more than shapes to be made, and another type is refused
    arguments = {name: value for name, value in config.items() if name != "type"}
    with torch.device("meta"):
        UNet(**arguments).load_state_dict({name: tensor.to("meta") for name, tensor in weights.items()})


def _check_prior(config: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """The same of the mode prior, where there is one."""
    if config is None:
        if weights:
            raise ValueError("it has weights of a mode prior that it does not describe")
        return
    if not isinstance(config, Mapping):
        raise ValueError(f"mode_prior must be an object, got {config!r:.80}")
    with torch.device("meta"):
        ModePrior(**config).load_state_dict({name: tensor.to("meta") for name, tensor in weights.items()})


def load_official(
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, torch.Tensor], **their_arguments: Any
) -> BerDiff:
    """A checkpoint of the published BerDiff code, with the arguments that its scripts were given.

    Args:
        path_or_state_dict: a .pt or .safetensors file, or a mapping of tensors. Files are read with
            ``weights_only=True``: no code in them is run.
        **their_arguments: as in the published scripts, with the published defaults: image_size, img_channels,
            num_channels, num_res_blocks, num_heads, num_heads_upsample, attention_resolutions ("16,8"), dropout,
            use_scale_shift_norm, diffusion_steps, noise_schedule, mean_type ("xstart" or "epsilon"),
            rescale_timesteps; and channel_mult where image_size does not tell it. ltype and timestep_respacing are
            accepted and unused: steps and spacing belong to ``sample``. The number of heads leaves no trace in a
            checkpoint, so a wrong one cannot be noticed.

    Returns:
        A ``BerDiff`` in eval mode on the CPU, whose network returns logits where theirs returns probabilities. It has
        no preprocessing, since the published code does not say how its images were scaled.

    Raises:
        FileNotFoundError, ValueError: unreadable, or it does not fit the arguments.
        TypeError: an argument that the published scripts do not have.
    """
    unet, diffusion = official.split_arguments(their_arguments)
    predictions = {"xstart": "y_0", "epsilon": "epsilon"}
    if diffusion["mean_type"] not in predictions:
        raise ValueError(f"mean_type must be one of {sorted(predictions)}, got {diffusion['mean_type']!r}")
    schedule = NoiseSchedule(diffusion["noise_schedule"], diffusion["diffusion_steps"])
    network = official.build_unet(official.read_state_dict(path_or_state_dict), **official.unet_arguments(**unet))
    return BerDiff(
        network,
        schedule,
        predictions[diffusion["mean_type"]],
        rescale_timesteps=diffusion["rescale_timesteps"],
    ).eval()
