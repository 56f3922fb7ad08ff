# SPDX-License-Identifier: Apache-2.0
"""Fixtures that open reports in Chromium, which tests skip without."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import IMAGE, MASKS, Open, write


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"there is none of {', '.join(names)}")
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"] if root else [])
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Write a report and open it; whatever the page complains of or asks for fails the test at its end."""
    complaints: list[str] = []
    contexts = []

    def opened(image: Any = IMAGE, masks: Any = MASKS, *, context: dict[str, Any] | None = None, **options: Any) -> Any:
        path = write(tmp_path, image, masks, **options)
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **(context or {})}))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda r: r.url != path.as_uri() and complaints.append(f"request: {r.url[:100]}"))
        page.goto(path.as_uri())
        if (context or {}).get("java_script_enabled", True):
            page.wait_for_function("() => document.getElementById('canvas').dataset.shows")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []
