"""The step `c4`: the rules of the Colossal Clean Crawled Corpus.

Source of every rule and number: Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer, JMLR 21(140), 2020 (arXiv 1910.10683), section 2.2. Not here: its list of bad words; spans of three
sentences that occur twice, for which the duplicates steps stand; English alone, which `language` does.
"""

from __future__ import annotations

import re
from typing import ClassVar, Final

from llmtrain.config.sections.quality import C4Step
from llmtrain.data.prepare.quality.step import Dropped

END_MARKS: Final = (".", "!", "?", '"', "\u201d")
"""A line has to end in terminal punctuation: a period, exclamation mark, question mark or closing quotation mark."""
MIN_LINE_WORDS: Final = 5
"""Lines of fewer words are removed."""
MIN_SENTENCES: Final = 3
"""Documents of fewer sentences are dropped. Sentences are counted by their end marks."""
POLICY_NOTICES: Final = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
"""Lines with one of these are removed."""

_CITATION = re.compile(r"\[(?:\d+|edit|citation needed)\]")
"""Wikipedia's markers of citations."""
_SENTENCE_END = re.compile(r"[.!?]+[\"'\u201d\u2019)]*(?=\s|$)")


class C4:
    """Removes lines, then drops documents of which too little is left.

    The line rules keep the lines that stay as they are, so a second pass changes nothing.
    """

    version: ClassVar[int] = 1
    rules = ("lorem_ipsum", "curly_brackets", "few_sentences", "empty")
    alters = True

    def __init__(self, options: C4Step, *, key: str) -> None:
        self._skip = frozenset(options.skip)

    def apply(self, text: str) -> str | Dropped:
        """Return the lines that stay."""
        if "curly_brackets" not in self._skip and ("{" in text or "}" in text):
            return Dropped("curly_brackets")  # it is code
        if "lorem_ipsum" not in self._skip and "lorem ipsum" in text.lower():
            return Dropped("lorem_ipsum")
        if "citations" not in self._skip and "[" in text:
            text = _without_citations(text)
        lines = text.split("\n")
        kept = [line for line in lines if self._stays(line)]
        if len(kept) < len(lines):
            text = "\n".join(kept)
        if "few_sentences" not in self._skip and _has_few_sentences(text):
            return Dropped("few_sentences")
        return text

    def _stays(self, line: str) -> bool:
        skip = self._skip
        if "terminal_punctuation" not in skip and not line.rstrip().endswith(END_MARKS):
            return False
        if "short_lines" not in skip and len(line.split()) < MIN_LINE_WORDS:
            return False
        lower = line.lower()
        if "javascript" not in skip and "javascript" in lower:
            return False
        return "policy_notices" in skip or not any(notice in lower for notice in POLICY_NOTICES)


def _without_citations(text: str) -> str:
    """Remove the markers, and those that only appear once others are gone: `[[1]1]`."""
    while (removed := _CITATION.sub("", text)) != text:
        text = removed
    return text


def _has_few_sentences(text: str) -> bool:
    ends = _SENTENCE_END.finditer(text)
    return sum(1 for _ in zip(range(MIN_SENTENCES), ends, strict=False)) < MIN_SENTENCES
