"""Words of a text as numbers, and their n-grams, in numpy: what the repetition rules and near-duplicates count."""

from __future__ import annotations

import sys
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

_BLOCK_CHARS: Final = 1 << 20
"""Characters that are hashed at a time, 60 bytes of memory each; a word across two blocks becomes two words."""
_BASE: Final = np.uint64(0x9E3779B97F4A7C15)
_NGRAM_BASE: Final = np.uint64(0xD6E8FEB86659FD93)
"""Odd, so their powers have inverses modulo 2^64."""

_SEPARATOR, _LETTER, _ALONE = 0, 1, 2


def word_hashes(text: str) -> Hashes:
    """Return a 64-bit hash of each word, in order. Case and punctuation do not matter.

    Words are runs of letters and digits. In scripts that are written without spaces (Chinese, Japanese, Thai and their
    like) each character is a word. A text without any word counts as one.
    """
    text = text.lower()
    hashes = [_block(text[start : start + _BLOCK_CHARS]) for start in range(0, len(text), _BLOCK_CHARS)]
    found = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
    return found if len(found) else _mixed(_sums(_codes(text[:_BLOCK_CHARS]))[-1:])


def ngram_hashes(words: Hashes, n: int) -> Hashes:
    """Return a 64-bit hash of each n-gram of words, in order; none where there are fewer words."""
    if len(words) < n:
        return np.zeros(0, np.uint64)
    hashes = np.zeros(len(words) - n + 1, np.uint64)
    for offset in range(n):
        hashes = hashes * _NGRAM_BASE + words[offset : offset + len(hashes)]
    return _mixed(hashes)


def _codes(text: str) -> NDArray[np.uint32]:
    order = "le" if sys.byteorder == "little" else "be"
    return np.frombuffer(text.encode(f"utf-32-{order}", "surrogatepass"), np.uint32)


def _block(text: str) -> Hashes:
    codes = _codes(text)
    kinds = _kinds()[np.minimum(codes, 0x10000)]
    inside, alone = kinds == _LETTER, kinds == _ALONE
    before, after = np.zeros_like(inside), np.zeros_like(inside)
    before[1:], after[:-1] = inside[:-1], inside[1:]
    starts = np.flatnonzero(alone | (inside & ~before))
    ends = np.flatnonzero(alone | (inside & ~after)) + 1
    sums = _sums(codes)
    return _mixed((sums[ends] - sums[starts]) * _powers()[1][starts])


def _sums(codes: NDArray[np.uint32]) -> Hashes:
    """Return prefix sums of code × base^position. The difference of two, times base^-start, hashes the text between.

    Overflow is meant: all is modulo 2^64.
    """
    sums = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum((codes.astype(np.uint64) + np.uint64(1)) * _powers()[0][: len(codes)], out=sums[1:])
    return sums


def _mixed(hashes: Hashes) -> Hashes:
    """Spread every bit over all bits (the finalizer of splitmix64)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Hashes = hashes ^ (hashes >> np.uint64(31))
    return mixed


@cache
def _powers() -> tuple[Hashes, Hashes]:
    """Return powers of the base and of its inverse, for each position in a block."""
    inverse = np.uint64(pow(int(_BASE), -1, 1 << 64))
    found = []
    for base in (_BASE, inverse):
        powers = np.full(_BLOCK_CHARS, base, np.uint64)
        powers[0] = 1
        found.append(np.multiply.accumulate(powers))
    return found[0], found[1]


_UNSPACED: Final = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3400, 0x9FFF),  # Chinese characters
    (0xF900, 0xFAFF),  # compatibility forms of them
    (0x10000, 0x10000),  # beyond the basic plane: more of them, emoji, old scripts
)


@cache
def _kinds() -> NDArray[np.uint8]:
    """Return the kind of each character of the basic plane; the last entry stands for all beyond it."""
    kinds = np.zeros(0x10001, np.uint8)
    kinds[:0x10000] = [_LETTER if chr(code).isalnum() else _SEPARATOR for code in range(0x10000)]
    for first, last in _UNSPACED:
        span = kinds[first : last + 1]
        span[(span == _LETTER) | (first == 0x10000)] = _ALONE
    return kinds
