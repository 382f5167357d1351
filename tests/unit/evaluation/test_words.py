"""Words as Unicode has them: those of rouge-score in ASCII, characters where a script has no spaces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.tokenize import tokenize

from llmtrain.evaluation.words import composed, split_at_blanks, split_words, tokenizer_by_script


@given(st.text(st.characters(max_codepoint=127)))
def test_words_of_ascii_are_those_of_rouge_score(text: str) -> None:
    assert split_words(text) == tokenize(text, None)
    assert split_at_blanks(text) == text.lower().split()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("不是 1。", ["不", "是", "1"]),
        ("ラーメンABC", ["ラ", "ー", "メ", "ン", "abc"]),
        ("ก็ดี ๑๒", ["ก็", "ดี", "๑๒"]),
        ("नमस्ते दुनिया।", ["नमस्ते", "दुनिया"]),
        ("می\u200cخواهم، سلام", ["می\u200cخواهم", "سلام"]),
        ("학교에 갔다", ["학교에", "갔다"]),
        ("Привет, МИР!", ["привет", "мир"]),
        ("naïve STRASSE", ["naïve", "strasse"]),
        ("👩\u200d👩\u200d👧🇩🇪 ❤\ufe0f", ["👩\u200d👩\u200d👧", "🇩🇪", "❤"]),
        ("→ ∑ 。", []),
    ],
)
def test_words_are_those_of_the_script(text: str, words: list[str]) -> None:
    assert split_words(text) == words


def test_names_with_underscores_are_one_word_on_request() -> None:
    assert split_words("call read_file(x)", with_underscores=True) == ["call", "read_file", "x"]
    assert split_words("call read_file(x)") == ["call", "read", "file", "x"]


def test_pieces_between_blanks_keep_their_punctuation() -> None:
    assert split_at_blanks("Привет, мир!") == ["привет,", "мир!"]
    assert split_at_blanks("世界。 Go!") == ["世", "界", "。", "go!"]


@pytest.mark.parametrize(
    ("text", "tokenizer"),
    [("yes", "13a"), ("да, 한국", "13a"), ("用 Python", "zh"), ("東京で", "char"), ("ดี", "char"), ("😀", "13a")],
)
def test_bleu_takes_the_tokenizer_of_the_script(text: str, tokenizer: str) -> None:
    assert tokenizer_by_script(text) == tokenizer


def test_texts_that_unicode_defines_as_equal_have_equal_words() -> None:
    assert composed("e\u0301❤\ufe0f") == "\u00e9❤"
