# SPDX-License-Identifier: Apache-2.0
"""The published U-Net, and how its checkpoints are read."""
