# SPDX-License-Identifier: Apache-2.0
"""Pictures of images and masks."""

from berdiff_fast.imaging import figures

__all__ = ["figures"]
