"""A real headless Chromium for pages; tests that use it skip where there is none, but not in CI."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@contextmanager
def browser() -> Iterator[Any]:
    """Playwright's browser object."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None and not os.environ.get("CI"):
        pytest.skip("needs Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=found, args=FLAGS)
        try:
            yield one
        finally:
            one.close()


@contextmanager
def opened(one: Any, page: Path, **context: Any) -> Iterator[Any]:
    """A page offline, with a phone's or a desk's `viewport`, `color_scheme` ...; no error may reach its console."""
    room = one.new_context(offline=True, **context)
    tab = room.new_page()
    errors: list[str] = []
    tab.on("console", lambda message: errors.append(message.text) if message.type in {"error", "warning"} else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(page.resolve().as_uri())
    yield tab
    room.close()
    assert not errors
