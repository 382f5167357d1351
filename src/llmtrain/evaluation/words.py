"""Splits text of any script into words, for metrics and the search for contamination.

A word is a run of letters, marks and digits, lower-cased. A script that is written without spaces (Chinese, Japanese,
Thai, …) has no such runs: each of its characters, with its marks, is a word. So is each emoji. Texts that Unicode
defines as equal have equal words. In ASCII text the words are those of rouge-score.
"""

from __future__ import annotations

import unicodedata

import regex

_SCRIPTS = (
    *("Han", "Hiragana", "Katakana", "Bopomofo", "Yi", "Tangut", "Nushu"),
    *("Thai", "Lao", "Khmer", "Myanmar", "Tai_Le", "New_Tai_Lue", "Tai_Tham", "Tai_Viet", "Balinese", "Javanese"),
)
"""Scripts that are written without spaces between words."""
_UNSPACED = "".join([r"[[\p{L}\p{M}]&&[", *(rf"\p{{{name}}}" for name in _SCRIPTS), "]]"])
_ALONE = rf"{_UNSPACED}\p{{M}}*|(?=[\p{{Extended_Pictographic}}\p{{Regional_Indicator}}])\X"
"""A character that is a word, or an emoji."""
_RUN = rf"[[\p{{L}}\p{{M}}\p{{N}}]--{_UNSPACED}]"
_JOINED = rf"{_RUN}+(?:[\u200c\u200d]+{_RUN}+)*"
"""Joiners within a word, as Persian and Hindi have them, do not end it."""

_WORD = regex.compile(rf"{_ALONE}|{_JOINED}", regex.V1)
_WORD_OR_NAME = regex.compile(rf"{_ALONE}|(?:{_JOINED}|_)+", regex.V1)
_PIECE = regex.compile(rf"{_ALONE}|(?:(?!{_ALONE}).)+", regex.V1)
_OF_UNSPACED = regex.compile(_UNSPACED, regex.V1)
_OF_CHINESE = regex.compile(r"\p{Han}", regex.V1)


def composed(text: str) -> str:
    """Return `text` in one form of those that Unicode defines as equal: marks composed, no emoji variants."""
    return text if text.isascii() else unicodedata.normalize("NFC", text).translate({0xFE0E: None, 0xFE0F: None})


def split_words(text: str, *, with_underscores: bool = False) -> list[str]:
    """Return the words of `text`. `with_underscores`: an underscore belongs to a word, as in names of programs."""
    found: list[str] = (_WORD_OR_NAME if with_underscores else _WORD).findall(composed(text.lower()))
    return found


def split_at_blanks(text: str) -> list[str]:
    """Return the pieces between blanks, lower-cased, with punctuation; each word of an unspaced script is a piece."""
    lowered = composed(text.lower())
    if lowered.isascii():
        return lowered.split()
    return [piece for part in lowered.split() for piece in _PIECE.findall(part)]


def tokenizer_by_script(text: str) -> str:
    """Return the name of sacreBLEU's tokenizer for the script of `text`.

    sacreBLEU has one for Chinese; text of other scripts without spaces is split into characters.
    """
    unspaced = set(_OF_UNSPACED.findall(text))
    if not unspaced:
        return "13a"
    return "zh" if all(_OF_CHINESE.match(character) for character in unspaced) else "char"
