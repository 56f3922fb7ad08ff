# SPDX-License-Identifier: Apache-2.0
"""Pictures of images and masks, and a report to look at."""

from berdiff_fast.imaging import figures
from berdiff_fast.imaging.report import write_report

__all__ = ["figures", "write_report"]
