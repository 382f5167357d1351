"""A page in a real browser, for tests: where the browser is, and what the page complained of or asked for."""

from __future__ import annotations

import shutil
from typing import Any


def chromium_path() -> str:
    """Debian's Chromium. Raises RuntimeError, which says how to install it, where there is none."""
    path = shutil.which("chromium")
    if path is None:
        raise RuntimeError("Chromium is not installed, and the tests of pages need it: apt-get install chromium")
    return path


class Visit:
    """A page that is open, and all that it complained of or asked for."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self._heard(message.type, message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def _heard(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.complaints.append(text)

    def open(self, url: str) -> Any:
        """The page at `url`, when its first chart is drawn."""
        self.page.goto(url)
        self.page.wait_for_selector(".plot .main-svg")
        return self.page

    def draw_all(self) -> None:
        """Scroll through the page until every chart is drawn."""
        for plot in self.page.locator(".plot").all():
            plot.scroll_into_view_if_needed()
            plot.locator(".main-svg").first.wait_for()
        self.page.evaluate("scrollTo(0, 0)")
