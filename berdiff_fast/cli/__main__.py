# SPDX-License-Identifier: Apache-2.0
"""``python -m berdiff_fast.cli``: the command for launchers of several processes, such as accelerate and torchrun."""

from berdiff_fast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
