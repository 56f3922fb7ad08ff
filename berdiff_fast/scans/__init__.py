# SPDX-License-Identifier: Apache-2.0
"""Scans: masks of volumes, slice by slice, and what the command ``sample`` leaves in a folder."""

from berdiff_fast.scans.sample import hints, sample_volume
from berdiff_fast.scans.sampled import SampledRegions, SampledVolume, sampled_region
from berdiff_fast.scans.until import sample_until

__all__ = ["SampledRegions", "SampledVolume", "hints", "sample_until", "sample_volume", "sampled_region"]
