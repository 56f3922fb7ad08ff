# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the published code: its argument names, its files, and the network they belong to."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from berdiff_fast import limits
from berdiff_fast.network.unet import UNet

#: The network's arguments in the published scripts, with their defaults. ``channel_mult`` is ours: the
#: published scripts know only the one that belongs to ``image_size``.
UNET_ARGUMENTS: dict[str, Any] = dict(
    image_size=128,
    img_channels=1,
    num_channels=128,
    num_res_blocks=2,
    num_heads=4,
    num_heads_upsample=-1,
    attention_resolutions="16,8",
    dropout=0.0,
    use_checkpoint=False,
    use_scale_shift_norm=True,
    channel_mult=None,
)

#: The diffusion's arguments in the published scripts, with their defaults.
DIFFUSION_ARGUMENTS: dict[str, Any] = dict(
    diffusion_steps=1000,
    noise_schedule="linear",
    timestep_respacing="",
    ltype="bce",
    mean_type="xstart",
    rescale_timesteps=True,
)

#: Levels of the published network for each image size it was written for.
CHANNEL_MULT: dict[int, tuple[int, ...]] = {
    512: (1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}

#: Parameters that tell an argument: where one of these does not fit, look at the arguments beside it.
_CLUES = (
    ("time_embed.", "model_channels (published name: num_channels)"),
    ("input_blocks.0.0.weight", "in_channels, img_channels, dims"),
    ("in_layers.2.weight", "channel_mult (published: by image_size), num_res_blocks"),
    ("qkv.weight", "attention_resolutions"),
    ("emb_layers.1.weight", "use_scale_shift_norm"),
)
_LISTED = 5


def _refuse_unknown(given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(f"unknown argument {', '.join(unknown)}; the known ones are {', '.join(known)}")


def split_arguments(their_arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sort arguments of the published scripts into those of the network and those of the diffusion.

    Args:
        their_arguments: any of ``UNET_ARGUMENTS`` and ``DIFFUSION_ARGUMENTS``.

    Returns:
        The network's arguments, by their published names as :func:`unet_arguments` takes them, and the
        diffusion's. Both are complete: what was not given has its published default.

    Raises:
        TypeError: naming unknown arguments and listing the known ones.
    """
    _refuse_unknown(their_arguments, UNET_ARGUMENTS | DIFFUSION_ARGUMENTS)
    unet, diffusion = (
        {name: their_arguments.get(name, default) for name, default in defaults.items()}
        for defaults in (UNET_ARGUMENTS, DIFFUSION_ARGUMENTS)
    )
    return unet, diffusion


def unet_arguments(**their_arguments: Any) -> dict[str, Any]:
    """Translate the published scripts' network arguments to those of :class:`UNet`.

    Args:
        **their_arguments: any of ``UNET_ARGUMENTS``; the others take their published defaults.
            ``attention_resolutions`` are pixels, as in ``"16,8"``. ``use_checkpoint`` saves memory in their
            training, is not part of the function, and is ignored. ``channel_mult`` overrides the levels
            that belong to ``image_size``.

    Returns:
        Keyword arguments of :class:`UNet`.

    Raises:
        TypeError: naming unknown arguments and listing the known ones.
        ValueError: if ``image_size`` or ``attention_resolutions`` has no meaning.
    """
    _refuse_unknown(their_arguments, UNET_ARGUMENTS)
    given = UNET_ARGUMENTS | their_arguments
    size, channel_mult = given["image_size"], given["channel_mult"]
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"image_size must be a positive int, got {size!r}")
    if channel_mult is None:
        if size not in CHANNEL_MULT:
            sizes = ", ".join(map(str, sorted(CHANNEL_MULT)))
            raise ValueError(f"image_size must be one of {sizes} unless channel_mult is given, got {size}")
        channel_mult = CHANNEL_MULT[size]
    return dict(
        in_channels=1,
        img_channels=given["img_channels"],
        model_channels=given["num_channels"],
        num_res_blocks=given["num_res_blocks"],
        attention_resolutions=_downsampling_factors(given["attention_resolutions"], size),
        dropout=given["dropout"],
        channel_mult=channel_mult,
        num_heads=given["num_heads"],
        num_heads_upsample=given["num_heads_upsample"],
        use_scale_shift_norm=given["use_scale_shift_norm"],
    )


def _downsampling_factors(resolutions: Any, image_size: int) -> tuple[int, ...]:
    try:
        pixels = [int(pixel) for pixel in resolutions.split(",")]
    except (AttributeError, ValueError):
        pixels = []
    if not pixels or not all(1 <= pixel <= image_size for pixel in pixels):
        raise ValueError(
            f"attention_resolutions must be pixels between 1 and image_size = {image_size}, separated by "
            f'commas, as in "16,8"; got {resolutions!r}'
        )
    return tuple(image_size // pixel for pixel in pixels)


def read_state_dict(source: str | os.PathLike[str] | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, by name.

    Files are read as data: a checkpoint that asks for anything but plain tensors and containers to be
    unpickled is refused, and no code in it runs.

    Args:
        source: a mapping of tensors, a ``.safetensors`` file, or any other path as a file of ``torch.save``.

    Returns:
        The tensors, detached, without the ``module.`` that DistributedDataParallel puts before every name;
        on the CPU if they come from a file. Those of a mapping are not copied.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or is not a checkpoint of tensors alone; names the path and, where
            there is one, the key.
    """
    if isinstance(source, Mapping):
        where, content = "state_dict", source
    else:
        path = Path(source)
        where, content = f"checkpoint {path}", _read_file(path)
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{where} must map names to tensors, got {_describe(content)}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{where} must map names to tensors, but {key!r} holds {_describe(value)}; "
                "if the state dict is one of its entries, pass that"
            )
    prefix = "module." if all(key.startswith("module.") for key in content) else ""
    return {key.removeprefix(prefix): value.detach() for key, value in content.items()}


def _describe(value: Any) -> str:
    kind = type(value).__name__
    return f"an empty {kind}" if isinstance(value, Mapping) and not value else f"a value of type {kind}"


def _read_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} is not an existing file")
    path.open("rb").close()  # a file we may not read is its own error: below, any error means damage
    _check_unpacked(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that torch did not write; they are read or refused
            return torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file can fail anywhere in the readers, with almost any exception. The cause is left out of the
    # traceback because torch's text recommends to load the file again and let it run code.
    except Exception as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            problem = f"holds more than tensors: it asks for {refused[1]}, which was refused and not run"
        else:
            problem = f"is damaged, or is no checkpoint of tensors: {type(error).__name__} while reading it"
        raise ValueError(f"checkpoint {path} {problem}") from None


def _check_unpacked(path: Path) -> None:
    """Refuse an archive whose parts are packed so that they take far more memory than the file: torch packs nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            declared = sum(part.file_size for part in archive.infolist())
    except (
        OSError,
        ValueError,
        NotImplementedError,
        zipfile.BadZipFile,
    ):  # of another kind, or damaged: for the reader
        return
    there = path.stat().st_size
    if declared > limits.HARMLESS and declared > 4 * there:
        raise ValueError(f"checkpoint {path} declares {limits.size(declared)}, and has {limits.size(there)}")


def build_unet(state_dict: Mapping[str, torch.Tensor], **arguments: Any) -> UNet:
    """A :class:`UNet` with the weights of ``state_dict``, in float32 on the CPU.

    Args:
        state_dict: every parameter by its published name, of any dtype; copied.
        **arguments: arguments of :class:`UNet`. The number of heads shows in no shape, so a wrong
            ``num_heads`` is not noticed here.

    Raises:
        ValueError: if names or shapes differ, listing up to five of each kind and the arguments to check.
    """
    with torch.device("meta"):  # neither memory nor random numbers before the weights are known to fit
        network = UNet(**arguments)
    _check_fit(state_dict, network.state_dict())
    network.float().to_empty(device="cpu").load_state_dict(state_dict)
    return network


def _check_fit(given: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    misshapen = [key for key in expected if key in given and given[key].shape != expected[key].shape]
    wrong = [*missing, *unexpected, *misshapen]
    if not wrong:
        return
    shapes = [f"{key} {tuple(given[key].shape)} instead of {tuple(expected[key].shape)}" for key in misshapen]
    lines = ["the state dict does not fit the network"]
    for title, entries in (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes)):
        if entries:
            more = ["..."] if len(entries) > _LISTED else []
            lines.append(f"  {title} ({len(entries)}): " + "; ".join(entries[:_LISTED] + more))
    clues = [arguments for pattern, arguments in _CLUES if any(pattern in key for key in wrong)]
    lines.append("check " + ", ".join(clues or [arguments for _, arguments in _CLUES]))
    raise ValueError("\n".join(lines))
