"""Documents with planted near-duplicates of known similarity. The same seed gives the same texts everywhere."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class PlantedDuplicates:
    """Texts in order, and how similar each is to the earlier text that it was made of."""

    texts: list[str]
    similarity: list[float]
    """Exact Jaccard similarity of the sets of word 5-grams; 0 for originals."""
    original: list[int]
    """Index of the text that it was made of; its own for originals."""


def plant(num_originals: int, *, seed: int, least_words: int = 150, most_words: int = 600) -> PlantedDuplicates:
    """Return `num_originals` texts in random words, and one copy of each, changed in one of three ways.

    Words replaced here and there, a passage appended (a footer), or a passage left out; so much that similarities lie
    all over 0.3 to 1. Case and punctuation of copies differ too, which counts for nothing.
    """
    draw = random.Random(seed)
    vocabulary = ["".join(draw.choices("abcdefghijklmnoprstuvwz", k=draw.randint(2, 9))) for _ in range(20_000)]
    weights = list(accumulate(1 / rank for rank in range(1, len(vocabulary) + 1)))

    def words(count: int) -> list[str]:
        return draw.choices(vocabulary, cum_weights=weights, k=count)

    originals = [words(draw.randint(least_words, most_words)) for _ in range(num_originals)]
    copies = [_changed(original, draw, words) for original in originals]
    order = [(number, False) for number in range(num_originals)]
    order += [(number, True) for number in range(num_originals)]
    draw.shuffle(order)
    place: dict[int, int] = {}
    planted = PlantedDuplicates([], [], [])
    for number, is_copy in order:
        mine = copies[number] if is_copy else originals[number]
        came_before = number in place
        planted.texts.append(_written(mine, draw))
        planted.similarity.append(jaccard(originals[number], copies[number]) if came_before else 0.0)
        planted.original.append(place.setdefault(number, len(planted.original)))
    return planted


def jaccard(one: Sequence[str], other: Sequence[str], n: int = 5) -> float:
    """Return the similarity of two sets of n-grams."""
    first, second = ({tuple(words[at : at + n]) for at in range(len(words) - n + 1)} for words in (one, other))
    return len(first & second) / len(first | second)


def _changed(words: list[str], draw: random.Random, fresh: Callable[[int], list[str]]) -> list[str]:
    kind = draw.choice(("replaced", "appended", "left out"))
    if kind == "replaced":
        share = draw.uniform(0, 0.15)
        return [fresh(1)[0] if draw.random() < share else word for word in words]
    count = int(len(words) * draw.uniform(0, 0.6))
    if kind == "appended":
        return words + fresh(count)
    start = draw.randint(0, len(words) - count)
    return words[:start] + words[start + count :]


def _written(words: list[str], draw: random.Random) -> str:
    """Return the words as a text, with case and punctuation at random."""
    ends = draw.choices((" ", ", ", ". ", ".\n"), (20, 2, 1, 1), k=len(words))
    cased = [word.title() if draw.random() < 0.05 else word for word in words]
    return "".join(map("".join, zip(cased, ends, strict=True)))
