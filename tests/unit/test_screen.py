"""Text as a screen shows it: widths, wrapping between words, and the width that is known of a stream."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from llmtrain.screen import columns_of, known_width, padded, visible, wrapped


@pytest.mark.parametrize(
    ("text", "columns"),
    [("abc", 3), ("é", 1), ("e\u0301", 1), ("日本", 4), ("한국", 4), ("ดี", 1), ("😀", 2), ("█⟦", 2)],
)
def test_columns_are_those_of_a_terminal(text: str, columns: int) -> None:
    assert columns_of(text) == columns
    assert columns_of(padded(text, 6)) == columns_of(padded(text, 6, right=True)) == 6


def test_lines_are_wrapped_between_words_and_words_stay_whole() -> None:
    assert wrapped("one two three", None) == ["one two three"]
    assert wrapped("one two three", 13) == ["one two three"]
    assert wrapped("one two three", 9, indent=2) == ["one two", "  three"]
    assert wrapped("  a: one two", 8, indent=2) == ["  a: one", "    two"]
    assert wrapped("a /a/very/long/path b", 8) == ["a", "/a/very/long/path", "b"]
    assert wrapped("a-b-c-d e", 4) == ["a-b-c-d", "e"]
    assert wrapped("x  y  z", 4) == ["x  y", "z"]
    assert wrapped("东京很大", 5) == ["东京", "很大"]
    assert wrapped("", 4) == [""]


def test_control_characters_are_written_out_and_line_ends_are_not() -> None:
    assert visible("a\tb\nc") == "a\tb\nc"
    assert visible("\x1b[1m\r\x9b\u202e\u200f\u2028") == r"\x1b[1m\x0d\x9b\u202e\u200f\u2028"


def test_columns_wins_and_a_pipe_without_a_terminal_has_no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "from llmtrain.screen import known_width; print(known_width(1), known_width(2))"

    def told(**environment: str) -> str:
        kept = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
        command = [sys.executable, "-c", script]
        return subprocess.run(
            command, env=kept | environment, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
        ).stdout.strip()

    assert told() == "None None"
    assert told(COLUMNS="60") == "60 60"
    assert told(COLUMNS="0") == "None None"
    monkeypatch.setenv("COLUMNS", "77")
    assert known_width(1) == 77
