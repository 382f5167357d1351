"""Units that a corpus is counted in: the tokens of a tokenizer, or words where there is none.

texts ─ Encode ─▶ ids of all texts, and where each ends ─▶ frequencies.py, bigrams.py ─ CountedUnit ─▶ names
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from llmtrain.data.inspection.analysis_options import AnalysisOptions
from llmtrain.data.order import Ints

if TYPE_CHECKING:
    from llmtrain.data.tokenizers import Tokenizer

OTHER_WORDS: Final = 0
"""The id of all words that came when MAX_WORDS others were known."""
MAX_WORDS = 1 << 20
MAX_WORD_CHARACTERS = 64
"""Longer words count as their beginnings."""

_NO_BLANKS = r"([\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}])"
"""Scripts that are written without blanks between words: each character counts as a word."""
_BETWEEN_WORDS = r"[^\p{L}\p{M}\p{N}]+"


Encode = Callable[[Sequence[str]], tuple[NDArray[Any], Ints]]
"""Gives the ids of all texts, one after the other, and where each text ends in them."""


class CountedUnit(Protocol):
    """Names of ids."""

    unit: Literal["tokens", "words"]
    size: int | None
    """One more than the largest id; None where it is not known before the texts are."""
    ignored: int | None
    """An id that stands for no single token."""

    def names_of(self, ids: Sequence[int]) -> list[str]:
        """Return the text that each id stands for."""
        ...


class TokenVocabulary:
    """The tokens of a tokenizer."""

    def __init__(self, size: int, *, decode: Callable[[list[int]], str], name_of: Callable[[int], str | None]) -> None:
        """`decode` gives the text of ids, `name_of` what the vocabulary calls an id."""
        self.unit: Literal["tokens", "words"] = "tokens"
        self.size: int | None = size
        self.ignored: int | None = None
        self._decode = decode
        self._name_of = name_of

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenVocabulary:
        """Return the vocabulary of a tokenizer."""
        return cls(tokenizer.vocab_size, decode=tokenizer.decode, name_of=tokenizer.name_of)

    def names_of(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token; for a part of a character what the vocabulary calls it."""
        texts = [self._decode([token]) for token in ids]
        return [
            text if text and "\ufffd" not in text else self._name_of(token) or text
            for token, text in zip(ids, texts, strict=True)
        ]


def encoder_of(tokenizer: Tokenizer) -> Encode:
    """Return what encodes texts by a tokenizer, without end tokens."""
    from llmtrain.data.tokenizers import library_threads

    def encode(texts: Sequence[str]) -> tuple[NDArray[Any], Ints]:
        with library_threads(True):
            parts = tokenizer.encode_batch(texts)
        return np.concatenate([np.zeros(0, np.uint32), *parts]), np.cumsum(
            [len(part) for part in parts], dtype=np.int64
        )

    return encode


class WordVocabulary:
    """Words in lower case: letters, marks and digits. Memory: that of MAX_WORDS words of at most 64 characters."""

    def __init__(self, *, max_words: int = MAX_WORDS) -> None:
        self.unit: Literal["tokens", "words"] = "words"
        self.size: int | None = None
        self.ignored: int | None = OTHER_WORDS
        self._max_words = max_words
        self._words = ["(other words)"]
        self._ids: dict[str, int] = {}

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[Any], Ints]:
        """Return the ids of all words; a word that was not seen before gets the next id."""
        lower = pc.utf8_lower(pa.array(texts, pa.large_string()))
        apart = pc.replace_substring_regex(lower, pattern=_NO_BLANKS, replacement=r" \1 ")
        pieces = pc.split_pattern_regex(apart, pattern=_BETWEEN_WORDS)
        words = pc.utf8_slice_codeunits(pieces.flatten(), 0, MAX_WORD_CHARACTERS)
        is_word = pc.greater(pc.binary_length(words), 0).to_numpy(zero_copy_only=False)
        ends = np.concatenate([[0], np.cumsum(is_word)])[pieces.offsets.to_numpy()[1:]].astype(np.int64)
        distinct = words.filter(is_word).dictionary_encode()
        table = np.array([self._id_of(word) for word in distinct.dictionary.to_pylist()], np.uint32)
        return table[distinct.indices.to_numpy()], ends

    def names_of(self, ids: Sequence[int]) -> list[str]:
        """Return the words."""
        return [self._words[number] for number in ids]

    def _id_of(self, word: str) -> int:
        found = self._ids.get(word)
        if found is not None:
            return found
        if len(self._words) > self._max_words:
            return OTHER_WORDS
        self._words.append(word)
        return self._ids.setdefault(word, len(self._words) - 1)


def vocabulary_of(options: AnalysisOptions) -> tuple[CountedUnit, Encode]:
    """Return what texts are counted in: the tokens of the tokenizer that was asked for, else words.

    Raises ConfigError when the tokenizer cannot be had.
    """
    if options.tokenizer is None:
        words = WordVocabulary()
        return words, words.encode
    from llmtrain.data.tokenizers import load_hf_tokenizer  # which imports torch; words need none

    tokenizer = load_hf_tokenizer(options.tokenizer)
    return TokenVocabulary.of(tokenizer), encoder_of(tokenizer)
