# SPDX-License-Identifier: Apache-2.0
"""What a training run shows and writes down: progress bar, ``log.jsonl``, preview pictures, trackers."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from berdiff_fast.files import append_text, own_folder, remove_link, write_text
from berdiff_fast.training.trackers import Trackers

if TYPE_CHECKING:
    from accelerate import Accelerator

    from berdiff_fast.training.config import TrainConfig


class Records:
    """The main process's; elsewhere it takes part in the reductions and writes nothing.

    A run that resumes after step ``first`` forgets what was noted of later steps.

    Raises:
        ValueError: a tracker cannot be started; nothing has been written by then.
    """

    def __init__(self, output: Path, config: TrainConfig, first: int, *, enabled: bool) -> None:
        self.output, self.config, self.enabled = output, config, enabled
        self._log = output / "log.jsonl"
        self._sum: torch.Tensor | None = None
        self._since, self._count = time.monotonic(), 0
        if not enabled:
            return
        kept, told = self._former(first)
        self._trackers = Trackers(output, config, first, told)
        write_text(self._log, "".join(line + "\n" for line in kept), follow=False)
        self._bar = tqdm(
            total=config.optimiser.steps,
            initial=first,
            unit="step",
            desc="training",
            dynamic_ncols=True,
            disable=config.quiet,
        )

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            self._bar.close()
            self._trackers.finish()

    def _former(self, first: int) -> tuple[list[str], set[tuple[int, bool]]]:
        """Lines of a former process that stay, and what trackers were told of the steps after: which step, and whether
        it was a validation."""
        kept: list[str] = []
        told: set[tuple[int, bool]] = set()
        for line in self._log.read_text(errors="replace").splitlines() if self._log.is_file() else ():
            try:
                noted = json.loads(line)
                if noted["step"] <= first:
                    kept.append(line)
                else:
                    told.add((noted["step"], "loss" not in noted))
            except (ValueError, KeyError, TypeError, RecursionError):
                break  # the line that a killed process was writing
        return kept, told

    def say(self, text: str) -> None:
        """A line for the user."""
        if self.enabled and not self.config.quiet:
            tqdm.write(text, file=sys.stderr)

    def step(
        self, step: int, loss: torch.Tensor, norm: torch.Tensor, learning_rate: float, accelerator: Accelerator
    ) -> None:
        """Note one step; the losses stay on their device until a line is due.

        Args:
            loss: of the denoiser, or (2,) with the mode prior's.

        Raises:
            FloatingPointError: the loss of some step since the last line is not finite.
        """
        self._sum = loss if self._sum is None else self._sum + loss
        self._count += 1
        if self.enabled:
            self._bar.update()
        if step % self.config.records.log_every and step != self.config.optimiser.steps:
            return
        mean, *of_prior = (accelerator.reduce(self._sum, "mean").reshape(-1) / self._count).tolist()
        now = time.monotonic()
        speed = self._count * self.config.optimiser.batch_size / (now - self._since)
        if not all(x < float("inf") for x in (mean, *of_prior)):
            shown = ", ".join(map(str, (mean, *of_prior)))
            raise FloatingPointError(
                f"the loss is {shown} after step {step}; the newest checkpoint is from before "
                "(a lower learning_rate, or bf16 instead of fp16, may help)"
            )
        self._write(
            step,
            {
                "loss": mean,
                "gradient_norm": float(norm),
                "learning_rate": learning_rate,
                "images_per_second": speed,
                **({"prior_loss": of_prior[0]} if of_prior else {}),
            },
        )
        if self.enabled:
            self._bar.set_postfix_str(f"loss {mean:.5f} bits/px, {speed:.1f} images/s")
        self._sum, self._count, self._since = None, 0, now

    def validation(
        self, step: int, numbers: dict[str, float], preview: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    ) -> None:
        """Note a validation, and draw its first slices where matplotlib is there.

        Args:
            step, numbers: when, and what came out.
            preview: images (B, H, W), raters' masks (B, R, H, W) and samples (B, n, H, W) to be drawn.
        """
        self._write(step, {f"validation_{k}": v for k, v in numbers.items()}, validation=True)
        self.say(f"step {step}: validation " + ", ".join(f"{k} {v:.3f}" for k, v in numbers.items()))
        self._since = time.monotonic()  # the time that validation took is not training's
        if preview is None:
            return
        try:
            from berdiff_fast.imaging import figures

            figures.require_matplotlib()
        except ImportError:
            return
        images, raters, samples = (x[:4] for x in preview)
        path = own_folder(self.output / "previews") / f"step-{step:08d}.png"
        remove_link(path)
        figures.contact_sheet(
            path,
            images,
            samples,
            raters=raters,
            title=f"Validation after step {step}",
        )
        self._trackers.picture(step, path)

    def _write(self, step: int, numbers: dict[str, float], *, validation: bool = False) -> None:
        if not self.enabled:
            return
        append_text(self._log, json.dumps({"step": step, **{k: round(v, 6) for k, v in numbers.items()}}) + "\n")
        self._trackers.numbers(step, numbers, validation=validation)
