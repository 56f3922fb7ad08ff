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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from berdiff_fast import ops
from berdiff_fast.backends import select
from berdiff_fast.network import fused
from berdiff_fast.network.fused import FusedUNet
from berdiff_fast.network.graph import Graph, drop
from berdiff_fast.network.unet import (
    AttentionBlock,
    Downsample,
    EmbeddingSequential,
    Float32GroupNorm,
    ResBlock,
    UNet,
    Upsample,
    check_size,
    timestep_embedding,
)

_CONVOLUTIONS: dict[int, Callable[..., torch.Tensor]] = {2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., torch.Tensor]] = {2: F.conv_transpose2d, 3: F.conv_transpose3d}


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
        make = _Maker(self.dtype, self.spatial_dims, backend, winograd)
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
        return _CONVOLUTIONS[self.spatial_dims](_channels_last(x), self._img_weight, self._img_bias, padding=1)

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
        place: int | slice | _Rows = step
        if classes is not None:
            steps = range(step.start, step.stop) if isinstance(step, slice) else (step,)
            place = _Rows.of(torch.cat([s * self.classes + classes for s in steps]))
        h = _CONVOLUTIONS[self.spatial_dims](_channels_last(self._patches(y_t)), self._mask_weight, padding=1)
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


# ---------------------------------------------------------------------- layers
#
# Each is called with the activations, those of the skip connection that are to be concatenated (or None), and the place
# in the tables: the step or, in a network that is told classes, a row for each mask.


@dataclass
class _Rows:
    """Each mask's row of the tables, whose rows are of steps and classes."""

    index: torch.Tensor  # (N,)
    runs: list[tuple[int, int, int]]  # neighbours that have one in common: first, last + 1, row

    @classmethod
    def of(cls, index: torch.Tensor) -> _Rows:
        rows, counts = index.unique_consecutive(return_counts=True)
        ends = counts.cumsum(0).tolist()
        return cls(index, list(zip([0, *ends], ends, rows.tolist(), strict=False)))


@dataclass
class _Norm:
    """GroupNorm and SiLU; where the timestep scales and shifts, weight and bias have a row per step."""

    weight: torch.Tensor
    bias: torch.Tensor
    groups: int
    eps: float
    silu: bool
    backend: str

    def __call__(self, x: torch.Tensor, other: torch.Tensor | None, step: int | slice | _Rows = 0) -> torch.Tensor:
        if self.weight.ndim == 1:
            return self._norm(x, other, self.weight, self.bias)
        if isinstance(step, int):
            return self._norm(x, other, self.weight[step], self.bias[step])
        assert other is None  # a block's second norm
        if isinstance(step, slice):
            steps = range(step.start, step.stop)
            parts = [
                self._norm(part, None, self.weight[s], self.bias[s])
                for s, part in zip(steps, x.chunk(len(steps)), strict=True)
            ]
        else:
            parts = [self._norm(x[a:b], None, self.weight[row], self.bias[row]) for a, b, row in step.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _norm(
        self, x: torch.Tensor, other: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        return ops.group_norm_silu(
            x,
            weight,
            bias,
            self.groups,
            other=other,
            eps=self.eps,
            silu=self.silu,
            backend=self.backend,
        )


@dataclass
class _Convolution:
    """A convolution; where it adds the timestep, its bias has a row per step."""

    call: Callable[..., torch.Tensor]
    weight: torch.Tensor
    bias: torch.Tensor
    options: dict[str, Any]

    def __call__(self, x: torch.Tensor, step: int | slice | _Rows = 0) -> torch.Tensor:
        if self.bias.ndim == 1:
            return self.call(x, self.weight, self.bias, **self.options)
        if isinstance(step, int):
            return self.call(x, self.weight, self.bias[step], **self.options)
        out = self.unbiased(x)
        if isinstance(step, slice):
            bias = self.bias[step]
            out.unflatten(0, (len(bias), -1)).add_(bias.view(len(bias), 1, -1, *[1] * (x.ndim - 2)))
            return out
        return out.add_(self.bias[step.index].reshape(*out.shape[:2], *[1] * (out.ndim - 2)))

    def unbiased(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x, self.weight, None, **self.options)

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The convolution of x, and ``residual`` added."""
        return self(x).add_(residual)


@dataclass
class _Winograd(_Convolution):
    """A convolution by ``ops.winograd``."""

    def unbiased(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x, self.weight, torch.zeros_like(self.bias[0]), **self.options)

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.call(x, self.weight, self.bias, residual=residual, **self.options)


@dataclass
class _Residual:
    """``ResBlock``: h = conv(norm(conv(norm(x)))), onto which the skip path is added in place."""

    norm_1: _Norm
    conv_1: _Convolution
    norm_2: _Norm
    conv_2: _Convolution
    skip: torch.Tensor | None  # (inputs, outputs); its bias is in conv_2's

    def __call__(self, x: torch.Tensor, other: torch.Tensor | None, step: int | slice | _Rows) -> torch.Tensor:
        h = self.norm_2(self.conv_1(self.norm_1(x, other), step), None, step)
        if self.skip is None:
            both = x if other is None else _channels_last(torch.cat([x, other], dim=1))
            return self.conv_2.plus(h, both)
        h = self.conv_2(h)
        # conv(cat(x, other)) = conv_x(x) + conv_other(other)
        tokens = _tokens(h)
        tokens.addmm_(_tokens(x), self.skip[: x.shape[1]])
        if other is not None:
            tokens.addmm_(_tokens(other), self.skip[x.shape[1] :])
        return h


@dataclass
class _Attention:
    """``AttentionBlock``, on (N, positions, channels)."""

    norm: _Norm
    qkv: tuple[torch.Tensor, torch.Tensor]
    out: tuple[torch.Tensor, torch.Tensor]
    heads: int

    def __call__(self, x: torch.Tensor, other: torch.Tensor | None, step: int | slice | _Rows) -> torch.Tensor:
        n, channels = x.shape[:2]
        qkv = F.linear(_tokens(self.norm(x, None)).view(n, -1, channels), *self.qkv)
        # Channels are ordered head first, then q, k, v.
        q, k, v = qkv.unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, -1, channels)
        h = F.linear(h, *self.out).view(n, *x.shape[2:], channels).movedim(-1, 1)
        return h.add_(x)


@dataclass
class _Resize:
    """``Downsample`` or ``Upsample``."""

    call: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, x: torch.Tensor, other: torch.Tensor | None, step: int | slice | _Rows) -> torch.Tensor:
        return self.call(x)


@dataclass
class _Sequence:
    """Layers in a row; the first takes what is concatenated."""

    layers: list[Any]

    def __call__(self, x: torch.Tensor, other: torch.Tensor | None, step: int | slice | _Rows) -> torch.Tensor:
        for layer in self.layers:
            x, other = layer(x, other, step), None
        return x


class _Maker:
    """Makes the layers above from those of ``unet.py``, which torch types too loosely to be of use here."""

    def __init__(self, dtype: torch.dtype, dims: int, backend: str, winograd: bool) -> None:
        self.dtype, self.dims, self.backend, self.winograd = dtype, dims, backend, winograd

    def block(self, block: Any, embed: torch.Tensor) -> _Sequence:
        return _Sequence([self.layer(layer, embed) for layer in block])

    def layer(self, layer: Any, embed: torch.Tensor) -> Any:
        if isinstance(layer, ResBlock):
            return self.residual(layer, embed)
        if isinstance(layer, AttentionBlock):
            return _Attention(
                self.norm(layer.norm, silu=False),
                (self.matrix(layer.qkv), self.vector(layer.qkv.bias)),
                (self.matrix(layer.proj_out), self.vector(layer.proj_out.bias)),
                layer.heads,
            )
        if isinstance(layer, Downsample):
            return _Resize(self.convolution(layer.op) if isinstance(layer.op, _Conv) else layer.op)
        if isinstance(layer, Upsample):
            return _Resize(self.upsample(layer))
        raise TypeError(f"network has a layer of type {type(layer).__name__}, which is not prepared")

    def residual(self, block: Any, embed: torch.Tensor) -> _Residual:
        norm_1, _, conv_1 = block.in_layers
        norm_2, _, _, conv_2 = block.out_layers
        condition = self.linear(block.emb_layers[1], embed)  # (S, outputs), or (S, 2 outputs)
        first, second = self.convolution(conv_1), self.norm(norm_2)
        if block.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            second.weight = (second.weight * (1 + scale)).contiguous()
            second.bias = (second.bias * (1 + scale) + shift).contiguous()
        else:
            first.bias = (conv_1.bias.float() + condition).to(self.dtype)
        last, skip = self.convolution(conv_2), None
        if not isinstance(block.skip_connection, nn.Identity):
            skip = self.matrix(block.skip_connection).t().contiguous()
            last.bias = (conv_2.bias.float() + block.skip_connection.bias.float()).to(self.dtype)
        return _Residual(self.norm(norm_1), first, second, last, skip)

    def upsample(self, layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        if not isinstance(layer.conv, _Conv):
            return lambda x: F.interpolate(x, scale_factor=layer.scale, mode="nearest")
        if self.can_winograd(layer.conv):
            return self.by_winograd(layer.conv, upsample=True)
        steps = [int(scale) for scale in layer.scale]
        # Repetition is a transposed convolution with a kernel of ones; one after the other they are one, whose kernel
        # is the convolution of both. An axis that is not doubled keeps its kernel of 3.
        kernel = layer.conv.weight.float().flip(tuple(range(2, 2 + self.dims))).transpose(0, 1)
        for axis, step in enumerate(steps, start=2):
            if step == 2:
                pad = [0, 0] * self.dims
                pad[2 * (self.dims - 1 - (axis - 2))] = 1
                before = F.pad(kernel, pad)
                kernel = before + before.roll(-1, axis)
        return _Convolution(
            _TRANSPOSED[self.dims],
            _channels_last(kernel.to(self.dtype)),
            self.vector(layer.conv.bias),
            {"stride": steps, "padding": 1},
        )

    def norm(self, norm: Any, silu: bool = True) -> _Norm:
        weight, bias = norm.weight.detach().float().clone(), norm.bias.detach().float().clone()
        return _Norm(weight, bias, norm.num_groups, norm.eps, silu, self.backend)

    def convolution(self, conv: Any) -> _Convolution:
        if self.can_winograd(conv):
            return self.by_winograd(conv)
        options = {"stride": conv.stride, "padding": conv.padding}
        return _Convolution(_CONVOLUTIONS[self.dims], self.weight(conv.weight), self.vector(conv.bias), options)

    def can_winograd(self, conv: Any) -> bool:
        """Whether the algorithm is asked for and fits: its kernel takes channels by sixteens."""
        outputs, channels, *size = conv.weight.shape
        fits = size == [3, 3] and conv.stride == (1, 1) and outputs % 16 == 0 and channels % 16 == 0
        return self.winograd and fits

    def by_winograd(self, conv: Any, **options: Any) -> _Winograd:
        options["backend"] = "cpp"
        return _Winograd(ops.winograd, ops.winograd_weight(conv.weight), self.vector(conv.bias), options)

    def linear(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, layer.weight.float(), layer.bias.float())

    def matrix(self, conv: Any) -> torch.Tensor:
        """(outputs, inputs) of a convolution of size 1."""
        return self.vector(conv.weight.flatten(1))

    def vector(self, parameter: Any) -> torch.Tensor:
        return parameter.detach().to(self.dtype, copy=True)

    def weight(self, parameter: Any) -> torch.Tensor:
        return _channels_last(self.vector(parameter))


_Conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    if x.shape[1] == 1:
        # One channel lies in memory in both ways; these strides say which one is meant, for convolutions to follow.
        x = x.contiguous()
        return x.as_strided(x.shape, [x.stride(0), 1, *x.stride()[2:]])
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """(N, C, *spatial), channels last in memory, as a view (N * positions, C)."""
    return x.movedim(1, -1).view(-1, x.shape[1])
