"""Text of a run in a real browser: it runs nothing, makes no element, and moves no text beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.reports.run_page import write_report
from llmtrain.screen import CONTROL
from tests.support.browser import Visit
from tests.support.planted import PLANTED, planted_run

pytestmark = pytest.mark.slow


def test_planted_text_is_text_on_every_part_of_the_page(visit: Visit, tmp_path: Path) -> None:
    folder = planted_run(tmp_path, "a", PLANTED)
    write_report([folder], tmp_path / "page.html")
    page = visit.open((tmp_path / "page.html").as_uri())
    visit.draw_all()
    assert visit.complaints == []
    assert [url for url in visit.requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert page.locator("img, a[href*=planted]").count() == 0
    text = page.evaluate("document.body.innerText + document.querySelector('#events details').textContent")
    assert CONTROL.search(text) is None
    assert text.count("<script>planted()</script>") > 10
    assert "\\x1b[31mred" in text
    assert "\\u202egnihsif" in text
