# SPDX-License-Identifier: Apache-2.0
"""Checksums of what is read back: tensors with the text that describes them, sealed in one safetensors header.

They tell damage, not forgery: who can write the file can write its checksum.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

#: The key under which a sealed JSON object has its checksum.
KEY = "sha256"

_BLANK = "0" * 64


def seal(content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """JSON of ``content`` with a checksum of itself and of all tensors (names, dtypes, shapes, bytes) added."""
    text = json.dumps({**content, KEY: _BLANK})
    return text.replace(_BLANK, _digest(text, tensors))


def parsed(text: str) -> dict[str, Any]:
    """The content that ``seal`` was given, not yet compared with its checksum.

    Raises:
        ValueError: not a JSON object.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("its description is not JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"its description is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"its description must be a JSON object, got {type(content).__name__}")
    content.pop(KEY, None)
    return content


def check(text: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError if the checksum in the text does not match; files from before there were any have none."""
    kept = json.loads(text).get(KEY, _BLANK)
    if kept == _BLANK:
        return
    if not isinstance(kept, str) or len(kept) != len(_BLANK) or _digest(text.replace(kept, _BLANK), tensors) != kept:
        raise ValueError("its checksum does not match what it holds: it is damaged")


def _digest(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def of_bytes(*parts: bytes | memoryview) -> str:
    """A short checksum, of slices of masks."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
