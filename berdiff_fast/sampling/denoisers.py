# SPDX-License-Identifier: Apache-2.0
"""The forms in which the loop asks a network for logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from berdiff_fast.network import inference
from berdiff_fast.network.graph import Graph
from berdiff_fast.network.window import Window

#: ``model(y_t, t, img) -> logits``; one that is told size classes takes them as a fourth argument.
Model = Callable[..., torch.Tensor]


class Denoiser(Protocol):
    """What the loop asks."""

    def condition(self, img: torch.Tensor, rows: int | torch.Tensor) -> torch.Tensor:
        """What ``__call__`` wants of images (b, C, *spatial).

        Args:
            img: the images.
            rows: so many masks of each image, one image after the other; or int64 (N,), the image of each mask.
        """

    def __call__(self, y: torch.Tensor, step: int | slice, condition: torch.Tensor) -> torch.Tensor:
        """Logits (N, K, *spatial) of states y of that shape, at a step of the plan.

        For several steps, y has the states of the same masks at each of them, one step after the other.
        """


class CapturedDenoiser(Denoiser, Protocol):
    """A denoiser whose work may become a CUDA graph, and which may be told size classes."""

    #: Graphs that were captured of it; None where none may be.
    graphs: dict[Any, Graph | bool] | None
    #: It was not written here: a graph's masks are compared with its own.
    check_graphs: bool
    #: What a graph's kernels read beside weights and inputs.
    kept_by_graphs: Any

    def graph_key(self) -> tuple[Any, ...]:
        """What a graph of it depends on, beside the plan and the images."""

    def __call__(
        self,
        y: torch.Tensor,
        step: int | slice,
        condition: torch.Tensor,
        classes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As of ``Denoiser``, of masks of these size classes: int64 (N,), for several steps once, like conditions."""


class ModelDenoiser:
    """A model as it is, called at a plan's timesteps.

    Args:
        model: see ``Model``.
        timesteps: those of the plan.
        device: where masks are.
        graphs: where CUDA graphs of it are kept; None: it is not to be captured.
    """

    check_graphs = True

    def __init__(
        self, model: Model, timesteps: tuple[int, ...], device: torch.device, graphs: dict[Any, Graph | bool] | None
    ) -> None:
        self.model = model
        self.t = self.kept_by_graphs = torch.tensor(timesteps).to(device, non_blocking=True)
        self.graphs = graphs if isinstance(model, nn.Module) else None

    def graph_key(self) -> tuple[Any, ...]:
        """Where the weights lie: a graph reads them where they lay when it was captured."""
        model: Any = self.model
        return tuple(x.data_ptr() for x in (*model.parameters(), *model.buffers()))

    def condition(self, img: torch.Tensor, rows: int | torch.Tensor) -> torch.Tensor:
        """The image of each mask; a view where there is one."""
        if isinstance(rows, torch.Tensor):
            return img[rows]
        return img.expand(rows, *img.shape[1:]) if len(img) == 1 else img.repeat_interleave(rows, 0)

    def __call__(
        self,
        y: torch.Tensor,
        step: int | slice,
        condition: torch.Tensor,
        classes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        t = self.t[step]
        if isinstance(step, slice):
            t = t.repeat_interleave(len(condition))
            condition = _at_each(step, condition)
            classes = None if classes is None else _at_each(step, classes)
        also = () if classes is None else (classes,)
        return self.model(y, t.expand(len(y)), condition, *also)


class PreparedDenoiser:
    """A ``UNet`` in its prepared form, looking through the model's window.

    Graphs are kept with the prepared weights, so that calls of ``sample`` share them and new weights have none.
    """

    check_graphs = False
    kept_by_graphs = None

    def __init__(self, prepared: inference.Prepared, window: Window, prediction: str) -> None:
        self.prepared, self.window, self.prediction = prepared, window, prediction
        self.graphs: dict[Any, Graph | bool] | None = prepared.graphs

    def graph_key(self) -> tuple[Any, ...]:
        return (self.window,)

    def condition(self, img: torch.Tensor, rows: int | torch.Tensor) -> torch.Tensor:
        """The first convolution of the images: once for each image, whose masks the prepared network shares it with."""
        encoded = self.prepared.encode(self.window.view(img))
        return encoded[rows] if isinstance(rows, torch.Tensor) else encoded

    def __call__(
        self,
        y: torch.Tensor,
        step: int | slice,
        condition: torch.Tensor,
        classes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if isinstance(step, slice) and len(condition) > 1:
            condition = _at_each(step, condition)
        also: Any = () if classes is None else (classes,)
        return self.window.fill(self.prepared(self.window.cut(y), step, condition, *also), y, self.prediction)


def _at_each(steps: slice, x: torch.Tensor) -> torch.Tensor:
    """What belongs to the masks, repeated for each of the steps."""
    return x.repeat(steps.stop - steps.start, *[1] * (x.ndim - 1))
