# SPDX-License-Identifier: Apache-2.0
"""For ``mkdocs build``: links out of docs/, which lead to files of the repository, become the names of these files."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_OUTWARD = re.compile(r"\[(?P<text>[^\]]+)\]\(\.\./(?P<path>[^)#]+)[^)]*\)")


def on_page_markdown(markdown: str, page, **_) -> str:
    def name(match: re.Match[str]) -> str:
        if not (ROOT / match["path"]).exists():
            raise FileNotFoundError(f"{page.file.src_path} links to {match['path']}, which is not there")
        return f"`{match['path']}`"

    return _OUTWARD.sub(name, markdown)
