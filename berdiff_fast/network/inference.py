# SPDX-License-Identifier: Apache-2.0
"""The U-Net prepared for sampling: the same function of the same weights, arranged for speed.

=============================================================  ==================
what is done once instead of at every step                     exactness
=============================================================  ==================
time embeddings and their projections, a row per timestep      rounding only
added to a convolution's bias, or to GroupNorm's affine map    rounding only
the image's half of the first convolution                      rounding only
biases of the skip and the last convolution added up           rounding only
-------------------------------------------------------------  ------------------
what is done otherwise at every step
-------------------------------------------------------------  ------------------
channels last, so that convolutions reorder nothing            rounding only
GroupNorm and SiLU in one kernel, which also concatenates      rounding only
skip connections accumulate into the branch's result           rounding only
repetition and 3 x 3 convolution as one transposed             rounding only
convolution of 4 x 4, which multiplies 4 / 9 as much
3 x 3 convolutions by Winograd's algorithm, if asked for       rounding, of a
(float32 on the CPU)                                           digit more
half precision, if asked for                                   changes the result
=============================================================  ==================

"Rounding only" means: equal in exact arithmetic. In float32 the logits are within 1.5e-6 of the largest one of
float64's, and their mean error is at most twice the plain network's (tests/test_inference.py).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from berdiff_fast import ops
from berdiff_fast.backends import select
from berdiff_fast.network import fused
from berdiff_fast.network.blocks import (
    AttentionBlock,
    Downsample,
    EmbeddingSequential,
    Float32GroupNorm,
    ResBlock,
    Upsample,
    timestep_embedding,
)
from berdiff_fast.network.fused import FusedUNet
from berdiff_fast.network.graph import Graph, drop
from berdiff_fast.network.prepared_layers import CONVOLUTIONS, Maker, Rows, channels_last
from berdiff_fast.network.unet import UNet, check_size


class PreparedUNet:
    """A ``UNet`` at a fixed list of timesteps. It keeps copies: later changes of the network's weights do not show.

    Args:
        network: the trained network; dropout is left out.
        timesteps: (S,) as the network is given them.
        dtype: of activations and convolutions; the network's own by default. Norms compute in float32.
        winograd: 3 x 3 convolutions by F(4 x 4, 3 x 3), in float32 on the CPU.
        backend: of ``ops.group_norm_silu``.

    Raises:
        BackendUnavailableError: ``winograd`` without the compiled CPU module.
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        network: UNet,
        timesteps: torch.Tensor | Sequence[float],
        *,
        dtype: torch.dtype | None = None,
        winograd: bool = False,
        backend: str = "auto",
    ) -> None:
        if not isinstance(network, UNet):
            raise TypeError(f"network must be a berdiff_fast.UNet, got {type(network).__name__}")
        self.dtype = network.dtype if dtype is None else dtype
        if self.dtype not in ops.LOGIT_DTYPES:
            raise TypeError(f"dtype must be float32, float16 or bfloat16, got {self.dtype}")
        self.mask_channels, self.img_channels = network.mask_channels, network.img_channels
        self.spatial_dims, self.patch_size = network.spatial_dims, network.patch_size
        self._downsampling = network.downsampling
        #: CUDA graphs that the sampler captured of calls with these weights.
        self.graphs: dict[Any, Graph | bool] = {}
        device = next(network.parameters()).device
        timesteps = torch.as_tensor(timesteps, device=device)
        if timesteps.ndim != 1 or not len(timesteps):
            raise ValueError(f"timesteps must be one or more numbers, got shape {tuple(timesteps.shape)}")
        self.steps, self.classes = len(timesteps), network.num_classes
        if winograd:
            if (device.type, self.dtype, self.spatial_dims) != ("cpu", torch.float32, 2):
                raise ValueError(
                    f"winograd is for images, in float32 on the CPU; got {self.spatial_dims} dimensions, {self.dtype} "
                    f"on {device.type!r}"
                )
            select.can_run("cpp", "cpu", raise_error=True)
        make = Maker(self.dtype, self.spatial_dims, backend, winograd)
        with torch.no_grad():
            # In float32 at least: a table costs nothing.
            embed = timestep_embedding(timesteps, network.model_channels)
            for layer in network.time_embed:
                embed = make.linear(layer, embed) if isinstance(layer, nn.Linear) else F.silu(embed)
            if network.num_classes:  # a row for each class at each timestep
                embed = (embed[:, None] + network.label_emb.weight.float()).flatten(0, 1)
            embed = F.silu(embed)

            parts: Any = network  # torch types what is in a ModuleList as any Module
            first = parts.input_blocks[0][0]
            of_masks = self.mask_channels * self.patch_size**2
            self._mask_weight = make.weight(first.weight[:, :of_masks])
            self._img_weight = make.weight(first.weight[:, of_masks:])
            self._img_bias = make.vector(first.bias)
            self._down = [make.block(block, embed) for block in parts.input_blocks[1:]]
            self._middle = make.block(parts.middle_block, embed)
            self._up = [make.block(block, embed) for block in parts.output_blocks]
            self._norm = make.norm(parts.out[0])
            self._last = make.convolution(parts.out[2])

    def encode(self, img: torch.Tensor) -> torch.Tensor:
        """What the first convolution makes of images (B, C, *spatial): its share of every mask's first activations."""
        check_size(img.shape[2:], self._downsampling)
        x = self._patches(img.to(self.dtype))
        return CONVOLUTIONS[self.spatial_dims](channels_last(x), self._img_weight, self._img_bias, padding=1)

    def __call__(
        self, y_t: torch.Tensor, step: int | slice, features: torch.Tensor, classes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits (N, K, *spatial) for noisy masks.

        Args:
            y_t: (N, K, *spatial) of 0 and 1 in ``dtype``.
            step: index into ``timesteps``; or a slice of several, for N masks of which each has as many, in turn.
            features: ``encode`` of each mask's image (N, ...), or of B images with N / B masks each, in turn.
            classes: (N,) int64, of a network with classes; fastest where equal ones are neighbours. For a slice of
                steps those of the masks at one of them.
        """
        place: int | slice | Rows = step
        if classes is not None:
            steps = range(step.start, step.stop) if isinstance(step, slice) else (step,)
            place = Rows.of(torch.cat([s * self.classes + classes for s in steps]))
        h = CONVOLUTIONS[self.spatial_dims](channels_last(self._patches(y_t)), self._mask_weight, padding=1)
        images = features.shape[0]
        h.unflatten(0, (images, -1)).add_(features[:, None])
        skips = [h]
        for block in self._down:
            h = block(h, None, place)
            skips.append(h)
        h = self._middle(h, None, place)
        for block in self._up:
            h = block(h, skips.pop(), place)
        logits = self._last(self._norm(h, None))
        return F.pixel_shuffle(logits, self.patch_size) if self.patch_size > 1 else logits

    def _patches(self, x: torch.Tensor) -> torch.Tensor:
        return F.pixel_unshuffle(x, self.patch_size) if self.patch_size > 1 else x


# ---------------------------------------------------------------------- one for a network that may change

_KNOWN = {UNet, ResBlock, AttentionBlock, EmbeddingSequential, Downsample, Upsample, Float32GroupNorm}
_KNOWN |= {
    nn.Sequential,
    nn.ModuleList,
    nn.SiLU,
    nn.Dropout,
    nn.Identity,
    nn.Linear,
    nn.Embedding,
    nn.AvgPool2d,
    nn.AvgPool3d,
}
_KNOWN |= {nn.Conv1d, nn.Conv2d, nn.Conv3d}

#: Prepared forms of a network that are kept, each with a copy of its weights: in float32 and by Winograd, say.
KEPT = 2

#: For a GPU with tensor cores ``fused.FusedUNet``, else ``PreparedUNet``.
Prepared = PreparedUNet | FusedUNet

#: Prepared forms, (timesteps, dtype, winograd, fused) -> (weights' addresses and versions, their norms, form).
_prepared: WeakKeyDictionary[UNet, dict[Any, tuple[Any, torch.Tensor, Prepared]]] = WeakKeyDictionary()

# A form is made by one thread, and is whole before another one sees it.
_lock = threading.RLock()


_FORWARDS: dict[type, Any] = {kind: getattr(kind, "forward") for kind in _KNOWN}  # noqa: B009


def modules(module: nn.Module) -> Iterator[nn.Module]:
    """Those of ``module.modules()``, several times as fast: this is asked at every call of ``sample``."""
    left = [module]
    while left:
        found = left.pop()
        yield found
        left.extend(m for m in found._modules.values() if m is not None)


def is_changed(module: nn.Module, forward: Any) -> str | None:
    """What keeps a module from doing just what its class's own ``forward`` does; None if nothing does.

    Libraries wrap a module by a ``forward`` of the instance (Accelerate's offloading does), by hooks, or by patching
    the class.
    """
    if module._forward_hooks or module._forward_pre_hooks:
        return "has hooks"
    if "forward" in module.__dict__ or type(module).forward is not forward:
        return "has a forward of its own"
    return None


def why_not(network: Any) -> str | None:
    """Why a network has to be run as it is; None if its prepared form does the same."""
    if type(network) is not UNet:
        return f"it is a {type(network).__name__}, not a UNet"
    if network.num_classes and next(network.parameters()).device.type != "cpu":
        return "it is told the size class of each mask, and tables by class are for the CPU so far"
    if network.dtype not in ops.LOGIT_DTYPES:
        return f"it computes in {network.dtype}"
    if torch.is_autocast_enabled(next(network.parameters()).device.type):
        return "autocast is on"
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return "all modules have hooks"
    for module in modules(network):
        if type(module) not in _KNOWN:
            return f"its {_name(network, module)} is a {type(module).__name__}"
        if (change := is_changed(module, _FORWARDS[type(module)])) is not None:
            return f"its {_name(network, module)} {change}"
    return None


def _device_of(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _name(network: nn.Module, module: nn.Module) -> str:
    return next((name for name, m in network.named_modules() if m is module), "") or "module"


def prepare(
    network: UNet, timesteps: Sequence[float], *, dtype: torch.dtype | None = None, winograd: bool = False
) -> Prepared:
    """The prepared form of a network as it is now: a former one, unless timesteps or weights have changed.

    Weights are compared by their addresses and versions, and on the CPU also by their norms, since writes by way of
    ``.data`` change no version.
    """
    with _lock:
        parameters = [p for m in modules(network) for p in m._parameters.values() if p is not None]
        device = _device_of(network)
        dtype = parameters[0].dtype if dtype is None else dtype
        versions = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]
        weights = (versions, parameters[0].dtype, device)
        # On a GPU reading these would make the host wait.
        on_cpu = [p.detach() for p in parameters if p.is_cpu]
        norms = torch.stack(torch._foreach_norm(on_cpu)) if on_cpu else torch.zeros(())
        forms = _prepared.setdefault(network, {})
        fuse = not winograd and fused.why_not(network, device, dtype) is None
        key = (tuple(timesteps), dtype, winograd, fuse)
        found = forms.get(key)
        if found is None or found[0] != weights or not torch.equal(found[1], norms):
            # Forms of weights that are gone are of no more use.
            stale = [k for k, form in forms.items() if form[0] != weights or not torch.equal(form[1], norms)]
            for k in stale or list(forms)[: max(0, len(forms) + 1 - KEPT)]:
                drop(forms.pop(k)[2].graphs)
            form: Prepared
            if fuse:
                form = FusedUNet(network, timesteps, dtype=dtype)
            else:
                form = PreparedUNet(network, timesteps, dtype=dtype, winograd=winograd)
            if device.type == "cuda":
                # Once: another thread may read the weights on another stream.
                torch.cuda.current_stream(device).synchronize()
            found = forms[key] = (weights, norms, form)
        return found[2]
