# SPDX-License-Identifier: Apache-2.0
"""Names that users choose from, as types: the command line and the config read them without importing torch."""

from __future__ import annotations

from typing import Literal

#: Samplers; see ``NoiseSchedule.step_table``.
Method = Literal["ddim", "ddpm", "d3pm"]
#: Which timesteps a sampler visits; see ``NoiseSchedule.subsequence``.
Spacing = Literal["uniform", "quadratic", "trailing", "trailing-quadratic"]
#: Noise schedules by their published names; see ``NoiseSchedule``.
Schedule = Literal["linear", "cosine", "cosine2"]
#: What a network predicts; see ``BerDiff``.
Prediction = Literal["epsilon", "y_0"]
#: Kernels, the fastest first; see ``backends.select``.
Backend = Literal["cuda", "cpp", "triton", "reference"]
#: Accelerate's trackers by its names, which are those of the packages too; see ``training.trackers``.
Tracker = Literal["tensorboard", "wandb", "mlflow", "comet_ml", "clearml", "aim", "dvclive", "swanlab", "trackio"]
