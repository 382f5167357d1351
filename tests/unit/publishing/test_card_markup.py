"""Text that comes from users' data is shown on a model's card, and never obeyed by what renders the card."""

from __future__ import annotations

from typing import Any

import pytest
from markdown_it import MarkdownIt

from llmtrain.publishing.markdown import Code, plain, table
from llmtrain.publishing.model_card import Card, render
from tests.support.planted import PLANTED

LINK = "[click](javascript:planted) ![x](http://planted.example/x.png) <http://planted.example> `code` **loud** | cell"
FENCE = "```\n</details>\n# planted\n<script>planted()</script>\n````"
TEXT = f"{PLANTED} {LINK}\n# planted\n\n{FENCE}"


def elements(text: str) -> list[Any]:
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    return [token for one in tokens for token in (one, *(one.children or []))]


def planted_card(text: str) -> Card:
    comparison = {"tuned": 1.0, "base": 0.5, "difference": 0.5, "low": 0.1, "high": 0.9}
    return Card(
        name=text,
        license="mit",
        library="transformers",
        summary=text,
        loading=f"import torch\n{text}",
        description=text,
        data=[{"source": text, text: "1"}],
        results={text: text},
        comparison={text: {**comparison, "wins": 1, "ties": 0, "losses": 0, "verdict": text}},
        comparison_about=text,
        making={"command": Code(text), text: text},
        config=f"run: |\n  {text}",
        limits=[text],
    )


def test_nothing_planted_in_a_card_is_markup() -> None:
    card = render(planted_card(TEXT)).partition("\n---\n")[2]
    found = elements(card)
    html = [token.content for token in found if token.type.startswith("html")]
    assert html == ["<details><summary>The full config</summary>\n", "</details>\n"]
    assert not any((ord(character) < 32 and character != "\n") or character == "\u202e" for character in card)
    tables = [token for token in found if token.type == "table_open"]
    assert len(tables) == 4, "no cell ends its table"


@pytest.mark.parametrize("text", [TEXT, "snake_case_name", "a_", "\\", "`", "``", "a|b", "<b>", "&lt;", "~~x~~", "*x*"])
def test_plain_text_is_shown_as_it_is(text: str) -> None:
    allowed = {"paragraph_open", "paragraph_close", "inline", "text", "text_special"}
    shown = [token for token in elements(f"Of {plain(text)}.") if token.type not in allowed]
    assert shown == []
    if "\n" not in text:
        content = "".join(token.content for token in elements(f"Of {plain(text)}.") if token.type.startswith("text"))
        assert content == f"Of {text}."


@pytest.mark.parametrize("text", ["llmtrain train a.yaml", "`", "a `b` c", "``", "a|b"])
def test_code_is_shown_as_it_is(text: str) -> None:
    [found] = [token for token in elements(table(("", ""), [("command", Code(text))])) if token.type == "code_inline"]
    assert found.content == text
