# SPDX-License-Identifier: Apache-2.0
"""What runs go through: killed at random moments, and every write that fails once.

PYTHONPATH=tests python -m endurance kills --count 50
PYTHONPATH=tests python -m endurance writes
"""
