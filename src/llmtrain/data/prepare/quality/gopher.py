"""The step `gopher`: the quality and repetition rules of MassiveText.

Source of every rule and number: Rae et al., Scaling Language Models: Methods, Analysis and Insights from Training
Gopher, 2021 (arXiv 2112.11446), appendix A.1.1, Quality Filtering and Repetition Removal, with its table A1. Where the
text leaves open how something is counted, a docstring here says how it is.
"""

from __future__ import annotations

import re
from typing import ClassVar, Final, get_args

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.sections.quality import GopherRule, GopherStep
from llmtrain.data.prepare.quality.step import Dropped
from llmtrain.data.prepare.quality.words import Hashes, ngram_hashes

# Quality filtering, A.1.1
WORDS: Final = (50, 100_000)
MEAN_WORD_LENGTH: Final = (3, 10)
MAX_SYMBOLS_PER_WORD: Final = 0.1
"""Limit for the hash sign and for the ellipsis, each."""
MAX_BULLET_LINES: Final = 0.9
MAX_ELLIPSIS_LINES: Final = 0.3
MIN_WORDS_WITH_LETTERS: Final = 0.8
STOP_WORDS: Final = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
MIN_STOP_WORDS: Final = 2

# Repetition removal, table A1: shares of lines or paragraphs, and of characters in them or in n-grams
MAX_DUPLICATE_LINES: Final = 0.30
MAX_DUPLICATE_LINE_CHARACTERS: Final = 0.20
MAX_DUPLICATE_PARAGRAPHS: Final = 0.30
MAX_DUPLICATE_PARAGRAPH_CHARACTERS: Final = 0.20
MAX_TOP_NGRAM_CHARACTERS: Final = {2: 0.20, 3: 0.18, 4: 0.16}
MAX_DUPLICATE_NGRAM_CHARACTERS: Final = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

_BULLETS: Final = ("\u2022", "\u2023", "\u25e6", "\u2043", "\u25aa", "\u25cf", "*", "-")
_ELLIPSES: Final = ("...", "\u2026")
_LETTER = re.compile(r"[^\W\d_]")
_PARAGRAPH_END = re.compile(r"\n\s*\n")


class Gopher:
    """Drops texts that break a rule. The first broken one, in the order of `rules`, is the reason.

    Words are separated by whitespace. Shares of characters leave whitespace between words out.
    """

    version: ClassVar[int] = 1
    rules: ClassVar[tuple[str, ...]] = get_args(GopherRule)
    alters = False

    def __init__(self, options: GopherStep, *, key: str) -> None:
        self._rules = tuple(rule for rule in self.rules if rule not in options.skip)

    def apply(self, text: str) -> str | Dropped:
        """Return the text if it keeps all rules."""
        measured = _Measured(text)
        broken = (rule for rule in self._rules if getattr(measured, rule)())
        return next(map(Dropped, broken), text)


class _Measured:
    """A text and its parts; each method returns whether the rule of its name is broken."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.words = text.split()
        self.lines = [line for line in map(str.strip, text.split("\n")) if line]
        self._numbers: tuple[Hashes, NDArray[np.int64]] | None = None

    def too_few_words(self) -> bool:
        return len(self.words) < WORDS[0]

    def too_many_words(self) -> bool:
        return len(self.words) > WORDS[1]

    def mean_word_length(self) -> bool:
        least, most = (bound * len(self.words) for bound in MEAN_WORD_LENGTH)
        return not least <= sum(map(len, self.words)) <= most

    def symbols(self) -> bool:
        most = MAX_SYMBOLS_PER_WORD * len(self.words)
        return self.text.count("#") > most or sum(map(self.text.count, _ELLIPSES)) > most

    def bullet_lines(self) -> bool:
        return sum(line.startswith(_BULLETS) for line in self.lines) > MAX_BULLET_LINES * len(self.lines)

    def ellipsis_lines(self) -> bool:
        return sum(line.endswith(_ELLIPSES) for line in self.lines) > MAX_ELLIPSIS_LINES * len(self.lines)

    def words_without_letters(self) -> bool:
        with_letters = sum(1 for word in self.words if _LETTER.search(word))
        return with_letters < MIN_WORDS_WITH_LETTERS * len(self.words)

    def stop_words(self) -> bool:
        """Count the different stop words, in any case of letters."""
        return len(STOP_WORDS.intersection(self.text.lower().split())) < MIN_STOP_WORDS

    def duplicate_lines(self) -> bool:
        return _repeated(self.lines)[0] > MAX_DUPLICATE_LINES

    def duplicate_line_characters(self) -> bool:
        return _repeated(self.lines)[1] > MAX_DUPLICATE_LINE_CHARACTERS

    def duplicate_paragraphs(self) -> bool:
        return _repeated(self._paragraphs())[0] > MAX_DUPLICATE_PARAGRAPHS

    def duplicate_paragraph_characters(self) -> bool:
        return _repeated(self._paragraphs())[1] > MAX_DUPLICATE_PARAGRAPH_CHARACTERS

    def top_ngrams(self) -> bool:
        """Measure the most frequent n-gram: its occurrences times its length. An n-gram that occurs once is not one."""
        words, lengths = self._numbered()
        total = int(lengths.sum())
        for n, most in MAX_TOP_NGRAM_CHARACTERS.items():
            grams = ngram_hashes(words, n)
            _, first, counts = np.unique(grams, return_index=True, return_counts=True)
            if len(counts) and (highest := counts.max()) > 1:
                at = first[counts == highest]
                characters = sum(lengths[at + offset] for offset in range(n))
                if int(highest) * int(characters.max()) > most * total:
                    return True
        return False

    def duplicate_ngrams(self) -> bool:
        """Measure the characters in n-grams that came before; those in several of them count once."""
        words, lengths = self._numbered()
        total = int(lengths.sum())
        for n, most in MAX_DUPLICATE_NGRAM_CHARACTERS.items():
            grams = ngram_hashes(words, n)
            came_before = np.ones(len(grams), np.bool_)
            came_before[np.unique(grams, return_index=True)[1]] = False
            if not came_before.any():
                return False  # without an n-gram that repeats, no longer one does
            inside = np.zeros(len(words), np.bool_)
            for offset in range(n):
                inside[offset : offset + len(grams)] |= came_before
            if int(lengths[inside].sum()) > most * total:
                return True
        return False

    def _paragraphs(self) -> list[str]:
        return [part for part in map(str.strip, _PARAGRAPH_END.split(self.text)) if part]

    def _numbered(self) -> tuple[Hashes, NDArray[np.int64]]:
        """Return a number for each word, the same for the same word, and its length."""
        if self._numbers is None:
            numbers: dict[str, int] = {}
            ids = [numbers.setdefault(word, len(numbers) + 1) for word in self.words]
            self._numbers = np.array(ids, np.uint64), np.array([len(word) for word in self.words], np.int64)
        return self._numbers


def _repeated(parts: list[str]) -> tuple[float, float]:
    """Return the share of parts that came before, and the share of characters in them."""
    if not parts:
        return 0.0, 0.0
    seen: set[str] = set()
    count = characters = 0
    for part in parts:
        if part in seen:
            count += 1
            characters += len(part)
        seen.add(part)
    return count / len(parts), characters / sum(map(len, parts))
