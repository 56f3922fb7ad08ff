# SPDX-License-Identifier: Apache-2.0
"""What the documentation shows runs, and its links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support import ENVIRONMENT, threads

from berdiff_fast import cli

ROOT = Path(__file__).resolve().parents[1]

#: Pages with code. What a page's blocks need that is not always there.
PAGES = {
    "index.md": (),
    "tutorial.md": ("accelerate",),
    "scans.md": (),
    "own_network.md": ("accelerate",),
    "kernels.md": (),
    "integrations.md": ("monai", "diffusers"),
}


def blocks(page: Path, language: str = "python") -> list[tuple[str, str]]:
    """Language and text of what is in one of ``language``, names with | between them."""
    return re.findall(rf"^```({language})\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def commands(block: str) -> list[list[str]]:
    """The words after ``berdiff-fast`` of each line; a backslash goes on with the next."""
    lines = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    assert all(line[0] == "berdiff-fast" for line in lines if line), block
    return [line[1:] for line in lines if line]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(page, tmp_path, monkeypatch):
    """From top to bottom, in an empty folder, as a reader would try them: Python, files that its first line names, and
    commands."""
    for package in PAGES[page]:
        pytest.importorskip(package, reason=f"{package} is not installed")
    found = blocks(ROOT / "docs" / page, "python|sh")
    assert found
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names: dict = {"__name__": "__main__"}
    with threads(1):
        for number, (language, block) in enumerate(found, start=1):
            if language == "sh":
                for words in commands(block):
                    assert cli.main(words) == 0, words
            elif file := re.match(r"# (\w+\.py)\n", block):
                Path(file[1]).write_text(block)
            else:
                exec(compile(block, f"{page}, block {number}", "exec"), names)


def test_no_page_with_code_is_left_out():
    """But for fragments: pages whose blocks need files of the reader's."""
    with_code = {p.name for p in (ROOT / "docs").glob("*.md") if blocks(p)}
    assert with_code - PAGES.keys() <= {"data.md", "metrics.md", "design.md", "math.md", "draw.md", "training.md"}


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_builds_and_links_lead_somewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    for name in ("sample", "Sampler", "BerDiff", "ops.sample_step", "imaging.volumes.read"):
        assert f'id="berdiff_fast.{name}"' in page
    # Reading is not told to anybody: nothing is loaded from elsewhere.
    for file in (tmp_path / "site").rglob("*.html"):
        outside = re.findall(r'(?:src|<link[^>]+href)="(https?://[^"]+)"', file.read_text(encoding="utf-8"))
        assert not [url for url in outside if "squidfunk" not in url], file


@pytest.mark.skipif(
    any(importlib.util.find_spec(p) is None for p in ("nbclient", "ipykernel", "matplotlib")),
    reason="nbclient, ipykernel or matplotlib is not installed",
)
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks(path, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    for name in ("OMP_NUM_THREADS", "PYTHONPATH"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit notebooks without outputs"
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert sum(len(cell.get("outputs", [])) for cell in notebook.cells) >= 5
