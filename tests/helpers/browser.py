"""A headless Chromium for page tests; the tests skip without Chromium, except in CI."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@contextmanager
def open_browser() -> Iterator[Any]:
    """Playwright's browser object."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None and not os.environ.get("CI"):
        pytest.skip("needs Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_page(browser: Any, file: Path, **options: Any) -> Iterator[Any]:
    """A page opened offline; fails if its console receives an error or a warning.

    `options` are those of Playwright's `new_context`, such as `viewport` and `color_scheme`.
    """
    context = browser.new_context(offline=True, **options)
    page = context.new_page()
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type in {"error", "warning"} else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(file.resolve().as_uri())
    yield page
    context.close()
    assert not errors
