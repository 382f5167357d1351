"""A real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.browser import Visit, chromium_path


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Chromium without a window; not for the session, since Playwright's event loop would be in other tests' way."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Visit]:
    """A new window, without a storage or a cache; it complained of nothing when the test is over."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    visit = Visit(context.new_page())
    yield visit
    context.close()
    assert visit.complaints == []
