"""Makes questions of rows: the prompt that a model gets, and the expected answer.

prompt + completion ─▶ the prompt as it is, or a user's turn ─▶ the completion
messages            ─▶ the turns before the last answer      ─▶ that answer
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import PurePath
from typing import Any, NamedTuple

from llmtrain.data.chat.coverage import AFTER_LAST_ANSWER, cover
from llmtrain.data.chat.shapes import Chat, Example, Message, PromptCompletion, example_of
from llmtrain.data.chat.supervision import Rendered
from llmtrain.data.chat.templates import ChatTemplate
from llmtrain.data.files.read import Row, read_rows
from llmtrain.data.files.row_faults import RowError, RowFault, RowFaults


class Question(NamedTuple):
    """A row of an evaluation."""

    file: str
    """Path of its file, as the user wrote it."""
    source: str
    """`file:line`."""
    example: Chat | PromptCompletion
    """Example with the question; a conversation ends with the expected answer."""
    expected: str

    @property
    def prompt(self) -> str:
        """Prompt to show to people: a single question, or all turns with their roles."""
        if isinstance(self.example, PromptCompletion):
            return self.example.prompt
        turns = self.turns
        if [turn["role"] for turn in turns] == ["user"]:
            return str(turns[0]["content"])
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)

    @property
    def turns(self) -> list[Message]:
        """Turns before the answer; a prompt is one turn of a user."""
        if isinstance(self.example, PromptCompletion):
            return [{"role": "user", "content": self.example.prompt}]
        return self.example.messages[:-1]


@dataclass(frozen=True, kw_only=True)
class RenderedQuestion:
    """A question as text for a model."""

    text: str
    is_complete: bool
    """True if a template made the text, so that no BOS token is added."""
    with_answer: Rendered
    """The text followed by the expected answer, whose loss is measured."""
    key: str
    """Hash of the text and the expected answer, which is the same for equal questions."""
    unused: tuple[str, ...] = ()
    """Names of the row's values that the text does not contain."""


def read_questions(
    paths: Sequence[str], *, key: str, text_column: str | None = None, max_samples: int | None = None
) -> list[Question]:
    """Read the questions at `paths`, at most `max_samples` of each, in their order.

    Raises ConfigError that names every faulty row by `file:line`; a row of plain text is one, since it has no answer.
    """
    faults = RowFaults()
    questions: list[Question] = []
    for path in paths:
        rows = read_rows([path], key=key, default_split="test")
        questions += islice(_questions(rows, path, faults, text_column), max_samples)
    faults.raise_if_any("Correct these rows, or name other files.")
    return questions


def render_question(question: Question, template: ChatTemplate, *, chat: bool) -> RenderedQuestion:
    """Render a question by the chat template. A plain prompt is rendered as a turn only with `chat`.

    Raises RowError if the template rejects the turns.
    """
    example: Example = question.example
    if isinstance(example, PromptCompletion) and chat:
        answer: Message = {"role": "assistant", "content": example.completion.strip()}
        example = Chat(example.shape, [*question.turns, answer], None, frozenset([1]), example.unused)
    if isinstance(example, Chat):
        text, is_complete = template.render_prompt(example.messages[:-1], example.tools), True
    else:
        assert isinstance(example, PromptCompletion)
        text, is_complete = example.prompt, False
    covered = cover(example, template=template, supervise="last")
    with_answer = covered.texts[-1]
    digest = hashlib.sha256(f"{text}\0{question.expected}".encode()).hexdigest()
    unused = tuple(covered.unused)
    return RenderedQuestion(text=text, is_complete=is_complete, with_answer=with_answer, key=digest[:32], unused=unused)


def short_names(files: Iterable[str]) -> dict[str, str]:
    """Return a name for each path, to show in tables: the file's name, or the path if two files have that name."""
    paths = list(dict.fromkeys(files))
    names = [PurePath(path).name or path for path in paths]
    return {path: name if names.count(name) == 1 else path for path, name in zip(paths, names, strict=True)}


def _questions(
    rows: Iterable[Row | RowFault], path: str, faults: RowFaults, text_column: str | None
) -> Iterable[Question]:
    for row in rows:
        if isinstance(row, RowFault):
            faults.add(row)
            continue
        try:
            yield _question(row.values, path, row.source, text_column)
        except RowError as error:
            faults.add(RowFault(row.source, str(error)))


def _question(values: dict[str, Any], path: str, source: str, text_column: str | None) -> Question:
    example = example_of(values, text_column=text_column)
    if isinstance(example, PromptCompletion):
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
    after = [AFTER_LAST_ANSWER] if last + 1 < len(example.messages) else []
    asked = replace(example, messages=messages, supervised=frozenset([last]), unused=(*example.unused, *after))
    return Question(path, source, asked, expected)
