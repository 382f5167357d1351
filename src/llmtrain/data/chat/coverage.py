"""Nothing that a row holds is lost in silence: each value is rendered, or named as unused, or makes the row invalid.

    Chat ─ every value marked ─▶ rendered again ─▶ a mark in the text: shown; in a learned span: learned
                             └─▶ the text is the same as before: nothing depends on these values
                             └─▶ else: half of them, and the other half

So a value counts as shown if the text depends on it, whatever the template makes of it: trimmed text, JSON, another
order. A template that loses a turn, a call, a tool, or the reasoning of an answer that is learned would teach something
else than the row says, so the row is invalid. System text is an exception: what the template does not show in training
it does not show in use either. It is counted, and so is any other value that is not shown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from llmtrain.data.chat.shapes import Chat, Example, holds_something
from llmtrain.data.chat.supervision import Rendered, learned_answers, render
from llmtrain.data.chat.templates import ChatTemplate
from llmtrain.data.chat.tools import function_of
from llmtrain.data.files.row_faults import RowError

AFTER_LAST_ANSWER = "turns after the last answer"
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_THINKING_END = "</think>"
_MARK = "90817263"
"""Digits, which templates neither trim nor write in another way."""
_MARKED = re.compile(_MARK + r"(\d{6})")
_ADVICE = ": name a template that does in data.chat_template, or take it out of the row"

_Path = tuple[str | int, ...]


class _Value(NamedTuple):
    """A value of a conversation that should be shown."""

    path: _Path
    name: str
    """Name under which the value is counted."""
    lost: str | None
    """Fault of the row if the value is not shown; None if it is only counted."""
    answer: int | None
    """Index of the learned answer that it is part of."""
    before: str = ""
    """Text that the mark is put before; empty: at the end."""


class Covered(NamedTuple):
    """The texts of a row, and its unused values."""

    texts: list[Rendered]
    unused: list[str]
    """Names of the values that neither the texts show nor anything else uses."""


def cover(example: Example, *, template: ChatTemplate, supervise: str) -> Covered:
    """Return the texts of a row, and what they leave out.

    Raises RowError as `render` does, for what must not be lost, and for an answer that would be learned as nothing but
    its end token.
    """
    rendered = partial(render, template=template, supervise=supervise)
    texts = rendered(example)
    if not isinstance(example, Chat):
        return Covered(texts, list(example.unused))
    answers = learned_answers(example, supervise)
    try:
        return _covered(example, texts, rendered, answers, template=template, supervise=supervise)
    except RowError:
        if len(answers) == 1 or len(texts) > 1 or supervise == "all":
            raise
        # Reasoning of earlier answers, which the template drops once others follow, is in a text that ends with it.
        rendered = partial(rendered, apart=True)
        try:
            texts = rendered(example)
        except RowError:
            texts = []
        if not texts:
            raise
        return _covered(example, texts, rendered, answers, template=template, supervise=supervise)


def _covered(
    chat: Chat,
    texts: list[Rendered],
    rendered: Callable[[Chat], list[Rendered]],
    answers: Sequence[int],
    *,
    template: ChatTemplate,
    supervise: str,
) -> Covered:
    shown_turns = len(chat.messages) if supervise == "all" else max(answers) + 1
    values = list(_values(chat, shown_turns, answers))
    shown, learned = _find(chat, values, texts, rendered)
    lost = [value for number, value in enumerate(values) if number not in shown]
    for value in lost:
        if value.lost is not None:
            raise RowError(value.lost)
    if supervise != "all":
        _check_learned(texts, answers, {values[number].answer for number in learned}, template)
    not_learned = {
        f"{value.name}, which is shown but not learned"
        for number, value in enumerate(values)
        if value.answer is not None and number in shown - learned
    }
    names = {value.name for value in lost}
    shown_names = {values[number].name for number in shown} - names
    unused = [*chat.unused, *sorted({_shortest(name, shown_names) for name in names} | not_learned)]
    return Covered(texts, unused + [AFTER_LAST_ANSWER] * (shown_turns < len(chat.messages)))


def _check_learned(
    texts: Sequence[Rendered], answers: Sequence[int], learned: set[int | None], template: ChatTemplate
) -> None:
    for answer in answers:
        if answer not in learned:
            raise RowError(f"the chat template shows turn {answer + 1}, but nothing of it would be learned")
    spans = [text.text[begin:end] for text in texts for begin, end in text.spans]
    if sum(bool(template.without_control_tokens(span).strip()) for span in spans) < len(answers):
        raise RowError("has an answer of which nothing would be learned but the end token")


def _find(
    chat: Chat, values: Sequence[_Value], texts: Sequence[Rendered], render: Callable[[Chat], list[Rendered]]
) -> tuple[set[int], set[int]]:
    """Return the values that are shown and those that are learned, by number."""
    shown: set[int] = set()
    learned: set[int] = set()

    def look_for(numbers: list[int]) -> None:
        if not numbers:
            return
        try:
            found = render(_marked(chat, [(values[number], number) for number in numbers]))
        except RowError:
            found = []  # the template looks at one of them
        if found == texts:
            return
        seen: set[int] = set()
        for text in found:
            for match in _MARKED.finditer(text.text):
                seen.add(int(match[1]))
                if any(begin <= match.start() < end for begin, end in text.spans):
                    learned.add(int(match[1]))
        seen.intersection_update(numbers)
        if not seen and len(numbers) == 1:  # the text depends on it
            seen = set(numbers)
            learned.update(seen)
        shown.update(seen)
        rest = [number for number in numbers if number not in seen]
        half = len(rest) if seen else len(rest) // 2
        look_for(rest[:half])
        look_for(rest[half:])

    # Templates look at types and at the form of ids: changed along with the others, these could hide them.
    looked_at = [number for number, value in enumerate(values) if value.path[-1] in ("type", "id", "tool_call_id")]
    look_for([number for number in range(len(values)) if number not in looked_at])
    look_for(looked_at)
    return shown, learned


# -- the values of a conversation --------------------------------------------------------------------------------------


def _values(chat: Chat, num_turns: int, answers: Sequence[int]) -> Iterator[_Value]:
    for index, message in enumerate(chat.messages[:num_turns]):
        yield from _values_of_turn(message, index, index if index in answers else None)
    for index, tool in enumerate(chat.tools or ()):
        name = function_of(tool).get("name") if isinstance(function_of(tool), dict) else None
        for path, words in _inside(tool, ("tools", index), "tools"):
            is_name = path[-1] == "name" and len(path) <= 4 and isinstance(name, str)
            lost = f"the chat template does not show the tool {name!r}{_ADVICE}" if is_name else None
            yield _Value(path, words, lost, None)


def _values_of_turn(message: dict[str, Any], index: int, answer: int | None) -> Iterator[_Value]:
    role, turn = message["role"], f"turn {index + 1}"
    thoughts: list[Any] = []
    reasoning = f"the chat template does not show the reasoning of {turn}{_ADVICE}" if answer is not None else None
    for key, value in message.items():
        path: _Path = ("messages", index, key)
        if key == "content":
            thought, end, _ = value.partition(_THINKING_END)
            if role == "assistant" and end and thought.replace("<think>", "").strip():
                yield _Value(path, "turn.content <think>", reasoning, answer, before=_THINKING_END)
            if value.strip() or role == "tool":
                lost = f"the chat template does not show {turn} ({role}){_ADVICE}"
                is_system = role in ("system", "developer")
                yield _Value(path, f"turn.content ({role})", None if is_system else lost, answer)
        elif key == "tool_calls":
            yield from _values_of_calls(value, path, turn, answer)
        elif key in REASONING_KEYS and role == "assistant":
            if holds_something(value) and value not in thoughts:  # some rows give it under two names
                thoughts.append(value)
                yield _Value(path, f"turn.{key}", reasoning, answer)
        elif key != "role" and holds_something(value):
            yield _Value(path, f"turn.{key}", None, None)


def _values_of_calls(calls: Sequence[Any], path: _Path, turn: str, answer: int | None) -> Iterator[_Value]:
    for index, call in enumerate(calls):
        name = function_of(call)["name"]
        for inner, words in _inside(call, (*path, index), "turn.tool_calls"):
            lost = None
            if "arguments" in inner:
                lost = f"the chat template does not show the arguments of the call of {name!r} in {turn}{_ADVICE}"
            elif inner[-1] == "name":
                lost = f"the chat template does not show the call of {name!r} in {turn}{_ADVICE}"
            yield _Value(inner, words, lost, answer if lost else None)


def _inside(value: Any, path: _Path, name: str) -> Iterator[tuple[_Path, str]]:
    """Yield where each value inside of a call or a tool is, and its name: keys, without those that the user invents."""
    if isinstance(value, dict) and value:
        is_free = path[-1] == "properties"
        for key, inner in value.items():
            below = name if _is_argument(path) else f"{name}.{'*' if is_free else key}"
            yield from _inside(inner, (*path, key), below)
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from _inside(inner, (*path, index), name)
    elif (
        path[-1] == "arguments" and not _is_argument(path[:-1]) and isinstance(value, str) and value.strip()[:1] in "[{"
    ):
        yield from _inside(json.loads(value.strip() or "{}"), path, name)
    elif _is_argument(path[:-1]) or (holds_something(value) and (path[-1], value) != ("type", "function")):
        yield path, name  # what a call and a tool are is known without their type


def _is_argument(path: _Path) -> bool:
    """Return whether the path leads to the arguments of a call or into them."""
    return path[0] == "messages" and "arguments" in path


def _shortest(name: str, shown: set[str]) -> str:
    """Return the shortest beginning of a name under which nothing is shown: `tools.parameters` for all below it."""
    parts = name.split(".")
    for length in range(2, len(parts)):
        begin = ".".join(parts[:length])
        if not any(other == begin or other.startswith(f"{begin}.") for other in shown):
            return begin
    return name


# -- marks -------------------------------------------------------------------------------------------------------------


def _marked(chat: Chat, values: Sequence[tuple[_Value, int]]) -> Chat:
    """Return the conversation with a mark in each of the values."""
    root: Any = {"messages": chat.messages, "tools": chat.tools}
    for value, number in values:
        root = _put(root, value.path, f"{_MARK}{number:06d}", value.before)
    return replace(chat, messages=root["messages"], tools=root["tools"])


def _put(value: Any, path: _Path, mark: str, before: str) -> Any:
    """Return a copy of `value` with the mark at `path`. Arguments that are JSON text stay JSON text."""
    if not path:
        if not isinstance(value, str):
            return mark
        return value.replace(before, mark + before, 1) if before else value + mark
    if isinstance(value, str):
        return json.dumps(_put(json.loads(value), path, mark, before), ensure_ascii=False)
    step: Any = path[0]
    copy = list(value) if isinstance(value, list) else dict(value)
    is_json_text = path == ("arguments",) and isinstance(value[step], str)
    copy[step] = json.dumps(mark) if is_json_text else _put(value[step], path[1:], mark, before)
    return copy
