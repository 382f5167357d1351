"""The page of an analysed corpus in a real browser: drawn, light and dark, of one file; a hostile text is text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli.app import run
from llmtrain.screen import CONTROL
from tests.support.browser import Visit
from tests.support.planted import PLANTED

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a corpus with planted text among text of several lengths and sources."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(12):
        part = folder / "texts" / ("one", "two", "three")[number % 3]
        part.mkdir(parents=True, exist_ok=True)
        words = " ".join(f"the word{index % (number + 2)} is" for index in range(10 * number + 40))
        (part / f"{number}.txt").write_text(f"{words} {PLANTED} {words}")
    assert run(["inspect", str(folder / "texts"), "--html", str(folder / "page.html")]) == 0
    return folder / "page.html"


def inside_the_figure(page: Any) -> list[str]:
    """Titles of pictures that have a mark or a text outside of their own area."""
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll("figure > svg")].filter((svg) => {
             const frame = svg.getBoundingClientRect();
             return [...svg.querySelectorAll("rect, circle, text")].some((mark) => {
               const box = mark.getBoundingClientRect();
               return box.left < frame.left - 1 || box.right > frame.right + 1
                 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
             });
           }).map((svg) => svg.querySelector("title").textContent)"""
    )
    return found


def test_every_part_is_drawn_and_nothing_is_asked_for(visit: Visit, page_file: Path) -> None:
    page = visit.page
    page.goto(page_file.as_uri())
    titles = page.locator("figure > svg > title").all_text_contents()
    assert titles == [
        "Lengths in words",
        "Frequencies of words",
        "Which words follow each other",
        "Compression",
        "Languages",
        "Sources by words",
    ]
    assert [url for url in visit.requests if not url.startswith("file:")] == []
    assert inside_the_figure(page) == []
    for width in (1280, 400):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), width
    heights = page.evaluate("[...document.querySelectorAll('svg rect.column')].map((bar) => bar.getBBox().height)")
    assert max(heights) > 100  # no style of the page's tables reaches the bars


def test_pictures_follow_the_readers_dark_setting(visit: Visit, page_file: Path) -> None:
    page = visit.page
    colours = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.goto(page_file.as_uri())
        colours.append(
            page.evaluate(
                "[...document.querySelectorAll('body, svg.chart text, svg.bigrams text, svg.bigrams .token')]"
                ".map((one) => getComputedStyle(one)[one.tagName == 'BODY' ? 'backgroundColor' : 'fill'])"
            )
        )
    assert len(colours[0]) == len(colours[1]) > 20
    assert all(light != dark for light, dark in zip(*colours, strict=True))


def test_planted_text_of_a_corpus_is_text(visit: Visit, page_file: Path) -> None:
    page = visit.page
    page.goto(page_file.as_uri())
    assert page.locator("img, script, a").count() == 0
    text = page.evaluate("document.body.textContent")
    assert CONTROL.search(text) is None
    assert "<script>planted()</script>" in text
