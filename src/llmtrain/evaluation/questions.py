"""Rows as questions: what a model is asked, and what it should answer.

prompt + completion ─▶ the prompt as it is, or a user's turn ─▶ the completion
messages           ─▶ the turns before the last answer      ─▶ that answer
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePath
from typing import Any, NamedTuple

from llmtrain.data.chat.faults import Fault, Faults, RowError
from llmtrain.data.chat.rows import Row, read_rows
from llmtrain.data.chat.shapes import Chat, Completion, Example, Message, example_of
from llmtrain.data.chat.supervision import Rendered, render
from llmtrain.data.chat.templates import ChatTemplate


class Question(NamedTuple):
    """A row of an evaluation."""

    file: str
    """The path that it comes from, as it was named."""
    source: str
    """`file:line`."""
    example: Chat | Completion
    """Of a conversation, all up to the answer that is expected."""
    expected: str

    @property
    def prompt(self) -> str:
        """For people: the question alone, or all turns with their roles."""
        if isinstance(self.example, Completion):
            return self.example.prompt
        turns = self.turns
        if [turn["role"] for turn in turns] == ["user"]:
            return str(turns[0]["content"])
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)

    @property
    def turns(self) -> list[Message]:
        """Those before the answer; of a prompt, the one of a user."""
        if isinstance(self.example, Completion):
            return [{"role": "user", "content": self.example.prompt}]
        return self.example.messages[:-1]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question as a model reads it, whichever model."""

    text: str
    is_complete: bool
    """Whether a template made it, so that no BOS token is added."""
    whole: Rendered
    """The same with the expected answer after it, which is learned or measured."""
    key: str
    """Of the text and what is expected: the same for the same question, wherever it stands."""


def read_questions(
    paths: Sequence[str], *, key: str, text_column: str | None = None, max_samples: int | None = None
) -> list[Question]:
    """The rows at `paths`, at most `max_samples` of each, in their order.

    Raises ConfigError with every fault of the rows by `file:line`: a row of text has nothing to answer.
    """
    faults = Faults()
    questions: list[Question] = []
    for path in paths:
        rows = read_rows([path], key=key, default_split="test")
        questions += islice(_questions(rows, path, faults, text_column), max_samples)
    faults.raise_if_any("Correct these rows, or name other files.")
    return questions


def ask(question: Question, template: ChatTemplate, *, chat: bool) -> Asked:
    """The question's text by the template; a prompt that is no conversation is put through it with `chat` alone.

    Raises RowError where the template does not take the turns.
    """
    example: Example = question.example
    if isinstance(example, Completion) and chat:
        answer: Message = {"role": "assistant", "content": example.completion.strip()}
        example = Chat(example.shape, [*question.turns, answer], None, frozenset([1]))
    if isinstance(example, Chat):
        text, is_complete = template.render_prompt(example.messages[:-1], example.tools), True
    else:
        assert isinstance(example, Completion)
        text, is_complete = example.prompt, False
    whole = render(example, template=template, supervise="last")[-1]
    digest = hashlib.sha256(f"{text}\0{question.expected}".encode()).hexdigest()
    return Asked(text=text, is_complete=is_complete, whole=whole, key=digest[:32])


def short_names(files: Iterable[str]) -> dict[str, str]:
    """By path a name for tables: the file's own where no two are the same."""
    paths = list(dict.fromkeys(files))
    names = [PurePath(path).name or path for path in paths]
    return {path: name if names.count(name) == 1 else path for path, name in zip(paths, names, strict=True)}


def _questions(rows: Iterable[Row | Fault], path: str, faults: Faults, text_column: str | None) -> Iterable[Question]:
    for row in rows:
        if isinstance(row, Fault):
            faults.add(row)
            continue
        try:
            yield _question(row.values, path, row.source, text_column)
        except RowError as error:
            faults.add(Fault(row.source, str(error)))


def _question(values: dict[str, Any], path: str, source: str, text_column: str | None) -> Question:
    example = example_of(values, text_column=text_column)
    if isinstance(example, Completion):
        return Question(path, source, example, example.completion)
    if not isinstance(example, Chat):
        raise RowError("is a row of text, which asks nothing: give it a prompt and a completion, or messages")
    last = max(example.supervised)
    if not last:
        raise RowError("begins with the assistant's turn: nothing is asked before it")
    messages = example.messages[: last + 1]
    expected = str(messages[-1]["content"])
    if not expected.strip():
        raise RowError("expects an answer without text (a call of a tool): there is nothing to compare with")
    return Question(path, source, Chat(example.shape, messages, example.tools, frozenset([last])), expected)
