# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation: ``config``, ``loop``, ``checkpoints``, ``evaluate``. Needs the extra ``[train]``."""
