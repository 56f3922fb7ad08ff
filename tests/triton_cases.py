# SPDX-License-Identifier: Apache-2.0
"""Calls of the Triton backend that between them make every launch there is, each in the ways Triton specialises it.

Triton compiles anew for an argument of 1 (which becomes a constant), for sizes and addresses that are multiples of 16
(which it is told), for types, and for None. A new kernel wants a line here: tests/test_triton_specialised.py fails for
one that no case launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from berdiff_fast.backends import triton as backend
from berdiff_fast.backends.protocol import Rows
from berdiff_fast.backends.triton import common, group_norm

ARCHITECTURES = (80, 90, 100)

BF16, F16, F32, BOOL = torch.bfloat16, torch.float16, torch.float32, torch.bool
INT32, INT64, F64 = torch.int32, torch.int64, torch.float64


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, so that the backend goes the way it would there. Its memory is not touched."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]


def gpu(*shape: int, dtype: torch.dtype = F32, offset: int = 0) -> torch.Tensor:
    """A tensor of a shape; ``offset`` elements past an aligned address."""
    size = 1
    for n in shape:
        size *= n
    return torch.empty(offset + size, dtype=dtype)[offset:].view(shape).as_subclass(OnGpu)


@dataclass(frozen=True)
class Case:
    """A call of a function of the backend, or of a method of an object that launches kernels.

    Args:
        method: the function, or the method, bound to its object.
        arguments: in order.
        options: keyword arguments.
        wide: loads of 16 bytes that kernels have to have, at the least, by the kernel's name.
        architectures: that it is for.
    """

    method: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    wide: Mapping[str, int]
    architectures: tuple[int, ...]

    @property
    def label(self) -> str:
        given = [_told(a) for a in self.arguments] + [f"{k}={_told(a)}" for k, a in self.options.items()]
        return f"{self.method.__name__}({', '.join(given)})"


def case(
    method: Callable[..., Any],
    *arguments: Any,
    wide: Mapping[str, int] | None = None,
    architectures: tuple[int, ...] = ARCHITECTURES,
    **options: Any,
) -> Case:
    return Case(method, arguments, options, wide or {}, architectures)


def _told(argument: Any) -> str:
    if isinstance(argument, Rows):
        return f"Rows({', '.join(map(_told, argument))})"
    if not isinstance(argument, torch.Tensor):
        return repr(argument)
    odd = "" if argument.data_ptr() % 16 == 0 else " unaligned"
    return f"{str(argument.dtype).removeprefix('torch.')}{list(argument.shape)}{odd}"


def of_draws(*dtypes: torch.dtype) -> int:
    """Loads of 16 bytes with which a thread of a kernel of ``BLOCKS`` reads its share of tensors of these types."""
    return _loads(4 * common.BLOCKS, *dtypes)


def of_norms(*dtypes: torch.dtype) -> int:
    """As ``of_draws``, of the norm's kernels, for one tile."""
    return _loads(group_norm.SIZES["CHANNELS"] * group_norm.SIZES["PIXELS"], *dtypes)


def _loads(elements: int, *dtypes: torch.dtype) -> int:
    threads = 32 * common.LAUNCH_OPTIONS["num_warps"]
    return sum(elements // threads * dtype.itemsize // 16 for dtype in dtypes)


#: Sizes of a mask: of 1, a chunk that is not full, one that is, full ones and one that is not, 4 chunks, 16 chunks.
PIXELS = (1, 63, 1024, 4097, 4096, 16384)
SAMPLES = (1, 16)


def cases(quick: bool) -> Iterator[Case]:
    """All of them; ``quick``: the sizes and types that a sampler or a training of the bundled models meets."""
    yield from draws(quick)
    yield from losses(quick)
    yield from overlaps(quick)
    yield from networks(quick)
    yield from layers(quick)


def draws(quick: bool) -> Iterator[Case]:
    rows = 4
    seeds, flag = gpu(rows, dtype=INT64), gpu(1, dtype=INT32)
    pixels = (1, 16384) if quick else PIXELS

    def mask(size: int, dtype: torch.dtype) -> torch.Tensor:
        return gpu(rows, size, dtype=dtype)

    for dtype, size, n in product((BF16,) if quick else (BOOL, F32, BF16, F16), pixels, SAMPLES):
        yield case(backend.initial_noise, mask(size, dtype), Rows(seeds, n, 0, 0))
    # With a first sample of each image.
    yield case(backend.initial_noise, mask(16384, BF16), Rows(gpu(rows, 2, dtype=INT64), 16, 0, 0))
    # Of a chunk that does not begin with the first mask: not to be specialised.
    for first_row, first_sample in ((1, 1), (16, 16)):
        yield case(backend.initial_noise, mask(16384, BF16), Rows(seeds, 16, first_row, first_sample))

    for dtype, size, n in product((BOOL,) if quick else (BOOL, F32, BF16, F16), pixels, (1,) if quick else SAMPLES):
        y, t = mask(size, dtype), gpu(rows, dtype=INT64)
        yield case(backend.q_sample, y, y, t, gpu(rows, 2), Rows(seeds, n, 0, 0))

    # What becomes of y_t, y_t, the logits: steps on the way, the last one, and with masks of any type.
    types = ((BF16, BF16, BF16), (F32, F32, F32), (F16, F16, F16), (BOOL, F32, F32), (BOOL, BF16, BF16))
    for (out, y_t, z), size, n in product(types[:1] if quick else types, pixels, SAMPLES):
        wide = {"sample_step_kernel": of_draws(y_t, z)} if size % 16 == 0 else {}
        given = mask(size, out), mask(size, y_t), mask(size, z), gpu(4)
        for predicts_y0 in (False, True) if size == 16384 or not quick else (False,):
            yield case(backend.sample_step, *given, flag, 500, predicts_y0, False, Rows(seeds, n, 0, 0), wide=wide)
        if n == 1 and (size == 16384 or not quick):
            yield case(backend.sample_step, *given, flag, 0, False, True, Rows(seeds, n, 0, 0), wide=wide)
    y, z = mask(16384, BOOL), mask(16384, F32)
    yield case(
        backend.sample_step,
        y,
        y,
        z,
        gpu(4),
        flag,
        1,
        False,
        False,
        Rows(seeds, 1, 2**33, 0),
        wide={"sample_step_kernel": of_draws(F32)},
    )
    y, z, pairs = mask(16384, BF16), mask(16384, BF16), gpu(rows, 2, dtype=INT64)
    yield case(backend.sample_step, y, y, z, gpu(4), flag, 1, False, False, Rows(pairs, 16, 0, 0))
    # A step's own flag lies where it lies; so may masks that are slices.
    y = mask(16384, BF16)
    yield case(
        backend.sample_step, y, y, y, gpu(4), gpu(1, dtype=INT32, offset=1), 1, False, False, Rows(seeds, 16, 0, 0)
    )
    y = gpu(rows, 16384, dtype=BF16, offset=1)
    yield case(backend.sample_step, y, y, y, gpu(4), flag, 1, False, False, Rows(seeds, 16, 0, 0))

    types_2 = ((BF16, BF16), (BOOL, F32), (F32, F32), (F16, F16))
    for (y_t, z), size in product(types_2[:1] if quick else types_2, pixels):
        for predicts_y0 in (True,) if quick else (False, True):
            wide = {"posterior_kernel": of_draws(y_t, z)} if size % 16 == 0 else {}
            yield case(
                backend.posterior, gpu(rows, size), mask(size, y_t), mask(size, z), gpu(4), predicts_y0, wide=wide
            )


def losses(quick: bool) -> Iterator[Case]:
    rows = 4
    types = ((BF16, BF16, BOOL), (F32, F32, BOOL), (F32, F16, F16), (F32, F32, F32))
    for (gradient, z, y), size, ignores in product(types[:2] if quick else types, PIXELS[::5], (False, True)):
        masks = gpu(rows, size, dtype=y), gpu(rows, size, dtype=y)
        ignore = gpu(rows, size, dtype=BOOL if quick else y) if ignores else None
        for predicts_y0 in (ignores,) if quick else (False, True):
            yield case(
                backend.diffusion_loss,
                *(gpu(rows), gpu(rows, size, dtype=gradient), gpu(rows, size, dtype=z), *masks),
                *(gpu(rows, 14, dtype=F64), ignore, gpu(rows, dtype=INT64) if ignores else None, predicts_y0),
                wide={"diffusion_loss_kernel": of_draws(z, y, y) if y is not BOOL else of_draws(z)}
                if size % 16 == 0
                else {},
            )
    if quick:
        return
    for size in (63, 1024, 4097, 4096):
        y = gpu(rows, size, dtype=BOOL)
        given = gpu(rows), gpu(rows, size), gpu(rows, size), y, y, gpu(rows, 14, dtype=F64)
        yield case(backend.diffusion_loss, *given, None, None, False)
        yield case(backend.diffusion_loss, *given, y, gpu(rows, dtype=INT64), True)
    y = gpu(1, 16384, dtype=BOOL)  # one mask
    yield case(
        backend.diffusion_loss, gpu(1), gpu(1, 16384), gpu(1, 16384), y, y, gpu(1, 14, dtype=F64), None, None, False
    )


def overlaps(quick: bool) -> Iterator[Case]:
    for a, b in ((4, 16),) if quick else ((1, 0), (1, 1), (4, 16), (16, 0), (3, 40)):
        for size in (16384,) if quick else (1, 63, 4097, 16384):
            for type_a, type_b in ((BOOL, BOOL), (F32, F32), (BF16, BOOL), (F16, F16))[: 1 if quick else 4]:
                masks = gpu(2, a, size, dtype=type_a), gpu(2, b, size, dtype=type_b)
                yield case(backend.overlap, gpu(2, a + b, a + b, dtype=INT64), *masks)


def networks(quick: bool) -> Iterator[Case]:
    """Norms: pixels, channels of the one and of the other tensor, groups."""
    #: Levels of the published U-Net, of ``lidc`` and ``phantom64``, and what is none of them.
    large = ((16384, 128, 128, 32), (1024, 96, 64, 8)) if quick else ((16384, 128, 0, 32), (64, 512, 384, 32))
    small = ((1, 32, 0, 1), (64, 1, 1, 1))
    if not quick:
        large += ((16384, 128, 128, 32), (4096, 128, 0, 32), (256, 384, 256, 32), (1024, 96, 64, 8), (4096, 32, 0, 8))
        small += ((64, 1, 0, 1), (64, 1, 1, 2), (4096, 100, 20, 1), (64, 512, 0, 512), (63, 48, 3, 17), (16, 16, 0, 16))
    for (pixels, of_x, of_other, groups), dtype in product(large + small, (BF16,) if quick else (BF16, F16, F32)):
        channels = of_x + of_other
        # Channels last in memory.
        x = gpu(2, pixels, of_x, dtype=dtype).transpose(1, 2)
        other = gpu(2, pixels, of_other, dtype=dtype).transpose(1, 2) if of_other else None
        wide = {}
        if (pixels, of_x, of_other, groups) in large:
            # Where there is no other tensor the kernels take x for it, and leave it out by a mask.
            wide = {f"group_norm_{part}_kernel": of_norms(dtype, dtype) for part in ("sums", "apply")}
        for silu in (True,) if quick else (True, False):
            out = gpu(2, pixels, channels, dtype=dtype).transpose(1, 2)
            given = out, x, other, gpu(channels), gpu(channels)
            yield case(backend.group_norm_silu, *given, groups, 1e-5, silu, wide=wide)


def layers(quick: bool) -> Iterator[Case]:
    """The fused network's: TMA descriptors, compute capability 9."""
    from berdiff_fast.backends.triton.activations import Activation
    from berdiff_fast.backends.triton.convolution import Weight
    from berdiff_fast.backends.triton.layers import TritonLayers

    hopper = (90,)
    net = TritonLayers()
    for dtype in (BF16,) if quick else (BF16, F16):

        def act(side: int, channels: int, dtype: torch.dtype = dtype) -> Activation:
            return Activation(gpu(2, side, side, channels, dtype=dtype), gpu(2, 4, 2, channels))

        def weight(taps: int, i: int, o: int, p: tuple[int, ...] = (), stride: int = 1, dtype=dtype) -> Weight:
            rows = o * (4 if taps == 4 else 1)
            return Weight(gpu(rows, taps * i + sum(p), dtype=dtype), gpu(o), i, p, taps, stride)

        for masks, patch in ((1, 1), (1, 2)):
            y, features = gpu(4, masks, 128, 128, dtype=dtype), gpu(1, 128 // patch, 128 // patch, 32, dtype=dtype)
            taps = masks * patch**2
            rows = 16 if patch == 1 else 64
            yield case(net.stem, y, gpu(rows, 32, dtype=dtype), features, patch, architectures=hopper)
            x = act(128 // patch, 32)
            yield case(net.head, x, gpu(2, 2, 32), gpu(32, 64, dtype=dtype), gpu(taps), 1, patch, architectures=hopper)
        for side, c, other in ((128, 128, 0), (64, 128, 128), (8, 512, 384)):
            x, second = act(side, c), act(side, other) if other else None
            vector = gpu(c + other)
            yield case(net.factors, x, second, vector, vector, 32, 1e-5, architectures=hopper)
            for silu in (True, False):
                yield case(net.norm, x, second, gpu(2, 2, c + other), silu, architectures=hopper)
        for side, i, o in ((128, 128, 128), (64, 128, 128), (8, 512, 512)):
            x = act(side, i).x
            yield case(net.convolution, x, weight(9, i, o), gpu(o), architectures=hopper)
            yield case(net.convolution, x, weight(9, i, o), gpu(o), residual=act(side, o).x, architectures=hopper)
            yield case(net.convolution, x, weight(9, i, o, (i, i)), gpu(o), projected=(x, x), architectures=hopper)
            yield case(net.convolution, x, weight(9, i, o, stride=2), gpu(o), architectures=hopper)
            yield case(net.convolution, x, weight(4, i, o), gpu(o), architectures=hopper)
            yield case(net.convolution, x, weight(1, i, o), gpu(o), residual=act(side, o).x, architectures=hopper)
