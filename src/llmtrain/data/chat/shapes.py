"""The shape of a row: a conversation, a prompt with its completion, or text. Each row's keys tell which it is.

    {"messages": [{"role", "content"} …]}            ─┐
    {"conversations": [{"from", "value"} …]}         ─┼─→ Chat
    {"instruction", "input", "output"}               ─┤
    {"prompt": [messages], "completion": [messages]} ─┘
    {"prompt": "…", "completion": "…"}               ───→ PromptCompletion
    {"text": "…"}                                    ───→ Text

Roles and content are checked here, and brought into the form that chat templates know. What a row holds beside its
shape is named in `unused`. No tokenizer is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llmtrain.config.loading.messages import nearest
from llmtrain.data.chat.tools import calls_in_text, checked_calls, reject_what_cannot_be_shown, tools_of
from llmtrain.data.files.row_faults import RowError, kind_of

SHAPES = "messages, conversations, prompt + completion, instruction + output, or text"

COMPLETION_KEYS = ("completion", "response", "output")
INPUT_KEYS = ("input", "context")
_KNOWN_KEYS = ("messages", "conversations", "prompt", "instruction", "text", *COMPLETION_KEYS)

ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
"""Names that other formats have for a role."""
_CALL_ROLES = ("function_call", "tool_call")
"""Roles of turns whose text is the call of a tool."""
TRAIN_KEYS = ("weight", "train", "loss", "trainable")
"""Keys of a turn that say whether the model learns from it: 0 and false mean no."""

TEXT_PARTS = ("text", "input_text", "output_text", None)
"""Types of a part of a turn that is text."""

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Chat:
    """Turns, for a chat template."""

    shape: str
    """The name of the row's shape, for the counts."""
    messages: list[Message]
    """`role`, `content` (text), and whatever else a template may use: tool_calls, reasoning_content, name …"""
    tools: list[Any] | None
    """Descriptions of the functions that the assistant may call."""
    supervised: frozenset[int]
    """The assistant's turns to learn from, by index: all but those that `TRAIN_KEYS` exclude, or in the prompt."""
    unused: tuple[str, ...] = field(default=(), compare=False)
    """Fields of the row, and keys of turns, that hold something and are not used."""


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """A text and its continuation. No template is applied, and nothing is put between them."""

    prompt: str
    completion: str
    shape: str = "prompt + completion"
    unused: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Text:
    """Text to learn as it is."""

    text: str
    shape: str = "text"
    unused: tuple[str, ...] = field(default=(), compare=False)


Example = Chat | PromptCompletion | Text


def example_of(values: Mapping[str, Any], *, text_column: str | None = None) -> Example:
    """Return the content of a row. Raises RowError for a row of no known shape, or with an invalid turn.

    A row that has the key `text_column` is a row of text, whatever its other keys are; a row with `text` is one if no
    other shape fits.
    """
    given = {key: value for key, value in values.items() if value is not None}
    reject_what_cannot_be_shown(given, "")
    text = text_column if text_column in given else None
    if text is None:
        for shape in ("messages", "conversations"):
            if shape in given:
                return _chat(shape, _list_in_text(given[shape], shape), given, used=[shape])
        if "instruction" in given:
            return _instruction(given)
        if "prompt" in given:
            return _prompt(given)
        text = "text" if "text" in given else None
    if text is not None:
        return Text(_text(given, text), unused=_unused(given, [text]))
    raise RowError(_unknown_shape(values, given, text_column))


def is_text(values: Mapping[str, Any]) -> bool:
    """Return whether a row is a valid row of text alone."""
    try:
        return isinstance(example_of(values), Text)
    except RowError:
        return False


def _unknown_shape(values: Mapping[str, Any], given: Mapping[str, Any], text_column: str | None) -> str:
    empty = [key for key in values if key not in given and key in _KNOWN_KEYS]
    if empty:
        return f"{empty[0]!r} is null"
    if not values:
        return f"has no keys; a row has {SHAPES}"
    known = (*_KNOWN_KEYS, *([text_column] if text_column else []))
    guesses = ((key, nearest(key, known, cutoff=0.75)) for key in given)
    guess = next((f"; did you mean {guess!r} by {key!r}?" for key, guess in guesses if guess and guess != key), "")
    keys = ", ".join(map(repr, list(given)[:8])) + (" …" if len(given) > 8 else "")
    return f"has none of the known shapes ({SHAPES}), only the keys {keys}{guess}"


def _instruction(given: Mapping[str, Any]) -> Chat:
    """Return the question with its input, after the questions and answers of `history` where the row has them."""
    answer = _answer_key(given, "instruction")
    question = [_text(given, "instruction"), *(_checked(given[key], key) for key in INPUT_KEYS if key in given)]
    history = _history(given.get("history"))
    turns = [
        *(history or ()),
        {"role": "user", "content": "\n\n".join([question[0], *filter(str.strip, question[1:])])},
        {"role": "assistant", "content": _text(given, answer)},
    ]
    used = ["instruction", *INPUT_KEYS, answer, *(["history"] if history else [])]
    return _chat("instruction + output", turns, given, used=used)


def _history(history: object) -> list[Message] | None:
    """Return pairs of question and answer as turns; turns as they are. None for anything else."""
    history = _list_in_text(history, "history")
    if not isinstance(history, list) or not history:
        return None
    if all(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in history):
        return history
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        return None
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in history for role, text in zip(roles, pair, strict=True)]


def _list_in_text(value: object, key: str) -> object:
    """Return the list that JSON text holds (cells of tables often do); anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    if not isinstance(parsed, list):
        return value
    reject_what_cannot_be_shown(parsed, key)
    return parsed


def _prompt(given: Mapping[str, Any]) -> Chat | PromptCompletion:
    answer = _answer_key(given, "prompt")
    prompt, completion = given["prompt"], given[answer]
    if isinstance(prompt, list):
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        if not isinstance(completion, list):
            raise RowError(f"{answer!r} is no list of turns, but 'prompt' is one")
        turns = [*prompt, *completion]
        return _chat("prompt + completion", turns, given, used=["prompt", answer], num_prompt_turns=len(prompt))
    unused = _unused(given, ["prompt", answer])
    return PromptCompletion(_checked(prompt, "prompt"), _text(given, answer), unused=unused)


def _answer_key(given: Mapping[str, Any], question: str) -> str:
    for key in COMPLETION_KEYS:
        if key in given:
            return key
    guesses = ((key, nearest(key, COMPLETION_KEYS, cutoff=0.75)) for key in given)
    guess = next((f"; did you mean {guess!r} by {key!r}?" for key, guess in guesses if guess), "")
    wanted = "output" if question == "instruction" else "completion"
    others = " or ".join(repr(key) for key in COMPLETION_KEYS if key != wanted)
    raise RowError(f"has {question!r} but no {wanted!r} (nor {others}){guess}")


def _text(given: Mapping[str, Any], key: str) -> str:
    text = _checked(given[key], key)
    if not text or text.isspace():
        raise RowError(f"{key!r} is empty")
    return text


def _checked(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{what!r} should be text, but is {kind_of(value)}")
    return value


def _unused(given: Mapping[str, Any], used: Sequence[str]) -> tuple[str, ...]:
    """Return the fields that hold something, and are not among those that were used."""
    return tuple(key for key, value in given.items() if key not in used and holds_something(value))


def holds_something(value: object) -> bool:
    """Return whether a value is more than null, blank text, or an empty list or object."""
    return bool(value.strip()) if isinstance(value, str) else value is not None and value != [] and value != {}


class _Turn(NamedTuple):
    message: Message
    is_trained: bool
    unused: list[str]


def _chat(
    shape: str, turns: object, given: Mapping[str, Any], *, used: Sequence[str], num_prompt_turns: int = 0
) -> Chat:
    if not isinstance(turns, list):
        raise RowError(f"{shape!r} should be a list of turns, but is {kind_of(turns)}")
    parsed = [_turn(turn, number) for number, turn in enumerate(turns, 1)]
    tools = tools_of(given, wrapped=shape == "conversations")
    system: list[Message] = []
    if isinstance(given.get("system"), str) and given["system"].strip():
        stands_first = bool(parsed) and parsed[0].message == {"role": "system", "content": given["system"]}
        system = [] if stands_first else [{"role": "system", "content": given["system"]}]
        used = [*used, "system"]
    supervised = [
        len(system) + index
        for index, (message, is_trained, _) in enumerate(parsed)
        if message["role"] == "assistant" and is_trained and index >= num_prompt_turns
    ]
    if not supervised:
        roles = ", ".join(dict.fromkeys(str(turn.message["role"]) for turn in parsed)) or "no turns"
        where = "the completion" if num_prompt_turns else repr(shape)
        raise RowError(f"has no turn of the assistant to learn from in {where} ({roles})")
    unused = _unused(given, [*used, "tools" if given.get("tools") else "functions"])
    of_turns = dict.fromkeys(name for turn in parsed for name in turn.unused)
    messages = [*system, *(turn.message for turn in parsed)]
    return Chat(shape, messages, tools, frozenset(supervised), unused=(*unused, *of_turns))


def _turn(turn: object, number: int) -> _Turn:
    """Return the turn in the form that templates know, and whether the model learns from it."""
    if not isinstance(turn, dict):
        raise RowError(f"turn {number} should be an object with role and content, but is {kind_of(turn)}")
    role_key, content_key = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    role = turn.get(role_key)
    if role is None:
        keys = ", ".join(map(repr, turn)) or "none"
        raise RowError(f"turn {number} has no {role_key!r}, only the keys {keys}")
    known = _role(role, number)
    content = turn.get(content_key)
    if content is None and content_key == "content" and "value" in turn:
        raise RowError(f"turn {number} ({role}) has 'value' beside 'role': name it 'content'")
    message: Message = {"role": known, "content": _content(content, role, number)}
    for key, value in turn.items():
        if key not in (role_key, content_key, "function_call", *TRAIN_KEYS) and value is not None:
            message[key] = value
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)  # templates ask whether there is the key
    if role.lower() in _CALL_ROLES and not message.get("tool_calls"):
        message |= {"content": "", "tool_calls": calls_in_text(message["content"], number)}
    elif message.get("tool_calls"):
        message["tool_calls"] = checked_calls(message["tool_calls"], number)
    elif turn.get("function_call"):
        message["tool_calls"] = checked_calls([{"type": "function", "function": turn["function_call"]}], number)
    elif known != "tool" and not message["content"].strip():
        missing = content is None
        raise RowError(f"turn {number} ({role}) " + (f"has no {content_key!r}" if missing else "is empty"))
    given = [(key, turn[key]) for key in TRAIN_KEYS if turn.get(key) is not None]
    for key, value in given:
        if value not in (0, 1):  # false and true among them
            raise RowError(f"turn {number} has the {key} {value!r}, but only 0 (not learned from) and 1 are known")
    unused = [f"turn.{key} ({known})" for key, value in given if value and known != "assistant"]
    return _Turn(message, all(value for _, value in given), unused)


def _role(role: object, number: int) -> str:
    if role in ROLES:
        return str(role)
    if isinstance(role, str) and role.lower() in (*ROLES, *_OTHER_ROLES):
        return _OTHER_ROLES.get(role.lower(), role.lower())
    guess = nearest(str(role), (*ROLES, *_OTHER_ROLES))
    hint = f"; did you mean {guess!r}?" if guess else f"; known are {', '.join(ROLES)}"
    raise RowError(f"turn {number} has the unknown role {role!r}{hint}")


def _content(content: object, role: object, number: int) -> str:
    """Return the text of a turn; of a list of parts, their texts put together."""
    if content is None:
        return ""
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in content]
        other = next((part for part in parts if not _is_text_part(part)), None)
        if other is not None:
            kind = other.get("type", "text")
            what = "whose text is missing" if kind in TEXT_PARTS else f"of type {kind!r}"
            raise RowError(f"turn {number} ({role}) has a part {what}; only text is learned")
        content = "".join(part["text"] for part in parts)
    if not isinstance(content, str):
        raise RowError(f"turn {number} ({role}) should have text as its content, but has {kind_of(content)}")
    return content


def _is_text_part(part: Mapping[str, Any]) -> bool:
    """Return whether a part of a turn is text that it says; the text of a part of reasoning is not."""
    return isinstance(part.get("text"), str) and part.get("type", "text") in TEXT_PARTS
