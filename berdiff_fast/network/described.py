# SPDX-License-Identifier: Apache-2.0
"""Networks as a config and a model file describe them: the ``UNet``, or an importable class with its arguments.

Importing a class runs code. What a user names is imported; what a *file* names only where the user said that it may be.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from berdiff_fast.network.unet import UNet
from berdiff_fast.words import line


class ImportRefusedError(ValueError):
    """A file names a class that may not be imported."""


def allowed_packages(allow_imports: bool | Sequence[str]) -> tuple[str, ...] | None:
    """``allow_imports`` as names of packages; None: all of them.

    Raises:
        TypeError, ValueError: neither a bool nor names of packages, modules or classes.
    """
    if isinstance(allow_imports, bool):
        return None if allow_imports else ()
    names = (allow_imports,) if isinstance(allow_imports, str) else allow_imports
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"allow_imports must be True, False or names of packages, got {allow_imports!r:.200}")
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"allow_imports must be names of packages, as in an import, got {name!r:.200}")
    return tuple(names)


def find(name: str, path: str) -> type[nn.Module]:
    """The class at ``package.module.Class``, imported.

    Args:
        name: what a message calls the path.
        path: of the class.

    Raises:
        ValueError: it is no such path, cannot be imported, or is no class of ``nn.Module``.
    """
    parts = path.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ValueError(f"{name} must be the path of a class, package.Class, got {path!r:.200}")
    found: Any = None
    for count in range(len(parts) - 1, 0, -1):  # the longest module: a class may lie within a class
        module = ".".join(parts[:count])
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError as error:
            if count == 1 or error.name is None or not f"{module}.".startswith(f"{error.name}."):
                where = " (is its folder in PYTHONPATH?)" if error.name == parts[0] else ""
                raise ValueError(f"{name}: {path} cannot be imported: {line(error)}{where}") from error
        except Exception as error:  # the module's own code
            raise ValueError(f"{name}: {path} cannot be imported: {line(error)}") from error
    for part in parts[count:]:
        if not hasattr(found, part):
            raise ValueError(f"{name}: {path} cannot be imported: {module} has no {'.'.join(parts[count:])}")
        found = getattr(found, part)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        what = found.__name__ if isinstance(found, type) else type(found).__name__
        raise ValueError(f"{name} must be a class of torch.nn.Module, and {path} is {what}")
    return found


def build(name: str, path: str, arguments: Mapping[str, Any]) -> nn.Module:
    """An untrained network: the class at ``path``, called with ``arguments``.

    Raises:
        ValueError: see ``find``; arguments that the class does not take, or takes badly.
    """
    owner = find(name, path)
    _bind(name, path, owner, arguments)
    try:
        return owner(**arguments)
    except Exception as error:  # the class's own code
        raise ValueError(f"{name}: {path}(**{json.dumps(arguments)}) failed: {line(error)}") from error


def _bind(name: str, path: str, owner: type[nn.Module], arguments: Mapping[str, Any]) -> None:
    signature = inspect.signature(owner)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        takes = ", ".join(signature.parameters) or "nothing"
        raise ValueError(f"{name}: {path} takes {takes}, got {json.dumps(arguments)} ({line(error)})") from None


def describe(network: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a model file says of a network of one's own: the path of its class, and the arguments that it had.

    Raises:
        TypeError: arguments that are not JSON.
        ValueError: a class that nobody else can import, arguments that make another network, or weights that a file
            cannot hold.
    """
    path = f"{type(network).__module__}.{type(network).__qualname__}"
    try:
        kept = json.loads(json.dumps(dict(arguments)))
    except (TypeError, ValueError) as error:
        raise TypeError(f"network_arguments must be what JSON can hold, got {arguments!r:.200} ({error})") from None
    if path.startswith("__main__.") or "<locals>" in path:
        raise ValueError(f"network: {path} cannot be imported elsewhere; move its class into a module")
    if find("network", path) is not type(network):
        raise ValueError(f"network: {path} is another class than that of the network")
    _bind("network_arguments", path, type(network), kept)
    weights = network.state_dict()
    for key, tensor in weights.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"network must have a state of tensors, and {key} is {type(tensor).__name__}")
    try:
        with torch.device("meta"):
            again = type(network)(**kept).state_dict()
    except Exception:  # it computes with its weights, which it cannot where there are no numbers
        again = weights
    if {k: v.shape for k, v in again.items()} != {k: v.shape for k, v in weights.items()}:
        raise ValueError(f"network_arguments must be those of the network: {path} has other weights with {kept}")
    return {"type": path, "arguments": kept}


def to_config(network: nn.Module, own: Mapping[str, Any] | None, **shape: int | None) -> dict[str, Any]:
    """What a model file says of a network: of a ``UNet``, or of one that ``describe`` made ``own`` of.

    Args:
        shape: mask_channels, img_channels and spatial_dims, which a network of one's own need not tell.

    Raises:
        TypeError: the network is neither.
    """
    if own is not None:
        return {**own, **shape}
    if not isinstance(network, UNet):
        raise TypeError(
            f"only a berdiff_fast.UNet can be saved with its architecture, got {type(network).__name__}; give BerDiff "
            "the network_arguments of its class, or save that network's own state_dict instead"
        )
    return {"type": "UNet", **network.config}


def rebuild(config: Mapping[str, Any], allow_imports: bool | Sequence[str]) -> tuple[nn.Module, dict[str, Any]]:
    """The untrained network of a model file, and the arguments of ``BerDiff`` that go with it.

    Raises:
        ImportRefusedError: it is of a class that may not be imported.
        ValueError, TypeError: it cannot be built.
    """
    kind, rest = config["type"], {key: value for key, value in config.items() if key != "type"}
    if kind == "UNet":
        return UNet(**rest), {}
    if not names_class(config):
        raise ValueError(f"network type must be 'UNet', got {kind!r:.80}")
    refuse(config, allow_imports)
    if not isinstance(arguments := rest.pop("arguments"), Mapping):
        raise ValueError(f"network arguments must be an object, got {arguments!r:.80}")
    if rest.keys() != {"mask_channels", "img_channels", "spatial_dims"}:
        raise ValueError(f"network must say mask_channels, img_channels and spatial_dims, got {sorted(rest)!r:.200}")
    # A path may lead through a package to a class of another one.
    owner = find("network type", kind)
    refuse({"type": f"{owner.__module__}.{owner.__qualname__}"}, allow_imports)
    return build("network type", kind, arguments), {"network_arguments": arguments, **rest}


def names_class(config: Mapping[str, Any]) -> bool:
    """Whether the network of a file is of a class that would have to be imported."""
    return isinstance(kind := config.get("type"), str) and "." in kind


def refuse(config: Mapping[str, Any], allow_imports: bool | Sequence[str]) -> None:
    """Raise ImportRefusedError for the network of a file whose class is of none of the packages."""
    packages = allowed_packages(allow_imports)
    if packages is None or not names_class(config):
        return
    kind = config["type"]
    if not any(f"{kind}.".startswith(f"{package}.") for package in packages):
        package = kind.split(".")[0]
        raise ImportRefusedError(
            f"its network is the class {kind:.200}, whose code would be imported and run; if you trust both, allow it: "
            f'allow_imports=["{package:.80}"] (--allow-imports {package:.80})'
        )
