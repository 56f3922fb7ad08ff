# SPDX-License-Identifier: Apache-2.0
"""The examples run as a reader runs them, and files that repeat the version agree."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[1]

#: Arguments, extras that it needs, words that its output has.
EXAMPLES = {
    "quick_start.py": ([], (), "16 masks, and 4 more"),
    "own_network.py": (["30"], (), "generalised energy distance"),
    "scan.py": ([], ("nibabel", "SimpleITK"), "report.html"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, tmp_path):
    arguments, packages, words = EXAMPLES[name]
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is not installed")
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout


def test_no_example_is_left_out():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == EXAMPLES.keys()


def test_files_that_name_the_version_agree():
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), flags=re.M)[1]
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## .*\b{re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
