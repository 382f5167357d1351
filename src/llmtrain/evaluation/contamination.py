"""Finds questions that a model was trained on: the same prompt, or 13 consecutive words.

13-grams are of lower-cased words (characters, in scripts without spaces), as in Brown et al. 2020 (arXiv:2005.14165,
appendix C). As there, a 13-gram in more than ten training rows does not count: it is boilerplate, such as a system text
or a common instruction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from llmtrain.data.chat.holdout import prompt_of
from llmtrain.data.chat.shapes import Chat, Example, PromptCompletion
from llmtrain.evaluation.questions import Question
from llmtrain.evaluation.words import composed, split_words

NGRAM = 13
BOILERPLATE_ROWS = 10


class Overlap(NamedTuple):
    """A question that the training data contain."""

    question: int
    """Index of the question."""
    kind: Literal["exact", "13-gram"]
    trained_on: str
    """`file:line` of the first such training row."""


def find_overlaps(questions: Sequence[Question], training: Iterable[tuple[Example, str]]) -> list[Overlap]:
    """Return at most one overlap for each question, in their order; an exact one is preferred to a 13-gram."""
    prompts: dict[str, list[int]] = {}
    ngrams: dict[int, list[int]] = {}
    for index, question in enumerate(questions):
        prompts.setdefault(composed(prompt_of(question.example)), []).append(index)
        for ngram in _ngrams(question.example):
            ngrams.setdefault(ngram, []).append(index)
    exact: dict[int, str] = {}
    met: dict[int, tuple[int, str]] = {}
    for example, source in training:
        if isinstance(example, Chat | PromptCompletion):
            for index in prompts.get(composed(prompt_of(example)), ()):
                exact.setdefault(index, source)
        for ngram in _ngrams(example):
            if ngram in ngrams:
                count, first = met.get(ngram, (0, source))
                met[ngram] = count + 1, first
    found = {index: Overlap(index, "exact", source) for index, source in exact.items()}
    for ngram, (count, source) in met.items():
        if count <= BOILERPLATE_ROWS:
            for index in ngrams[ngram]:
                found.setdefault(index, Overlap(index, "13-gram", source))
    return [found[index] for index in sorted(found)]


def _ngrams(example: Example) -> set[int]:
    words = split_words(_text(example), with_underscores=True)
    return {hash(tuple(words[begin : begin + NGRAM])) for begin in range(len(words) - NGRAM + 1)}


def _text(example: Example) -> str:
    if isinstance(example, PromptCompletion):
        return f"{example.prompt} {example.completion}"
    if isinstance(example, Chat):
        return " ".join(str(turn["content"]) for turn in example.messages)
    return example.text
