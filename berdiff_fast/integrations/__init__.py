# SPDX-License-Identifier: Apache-2.0
"""Bernoulli diffusion inside other people's pipelines (docs/integrations.md); each needs the package it is named after.

``monai.py`` has a scheduler for MONAI's inferers, MONAI's networks as models, and dictionaries to and from our files.
``diffusers.py`` has a scheduler for diffusers. Neither is imported unless asked for. What a scheduler does is in
``scheduling.py``, once for both.
"""
