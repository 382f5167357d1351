"""What a row is: a conversation, a prompt with its completion, or text; told row by row, by its keys.

    {"messages": [{"role", "content"} …]}            ─┐
    {"conversations": [{"from", "value"} …]}         ─┼─→ Chat
    {"instruction", "input", "output"}               ─┤
    {"prompt": [messages], "completion": [messages]} ─┘
    {"prompt": "…", "completion": "…"}               ───→ Completion
    {"text": "…"}                                    ───→ Text

Roles and content are checked here, and brought into the form that chat templates know. No tokenizer is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmtrain.config.faults import nearest
from llmtrain.data.chat.faults import RowError

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
}
"""Names that other formats have for a role."""

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Chat:
    """Turns, for a chat template."""

    shape: str
    """What the row's keys were, for the counts."""
    messages: list[Message]
    """`role`, `content` (text), and whatever else a template may know: tool_calls, reasoning_content, name …"""
    tools: list[Any] | None
    """Descriptions of the functions that the assistant may call."""
    supervised: frozenset[int]
    """The assistant's turns to learn from, by index: all but those with a weight of 0 or in the prompt."""


@dataclass(frozen=True, slots=True)
class Completion:
    """Text to go on from, and how it goes on. No template is applied; what lies between them stands in one of them."""

    prompt: str
    completion: str
    shape: str = "prompt + completion"


@dataclass(frozen=True, slots=True)
class Text:
    """Text to learn as it is."""

    text: str
    shape: str = "text"


Example = Chat | Completion | Text


def example_of(values: Mapping[str, Any], *, text_column: str | None = None) -> Example:
    """What a row says. Raises RowError for a row of no known shape, or with a turn that cannot be.

    `text_column`, where the row has it, makes it a row of text whatever its other keys are; without it, `text` does
    where nothing else fits.
    """
    given = {key: value for key, value in values.items() if value is not None}
    if text_column is not None and text_column in given:
        return Text(_text(given, text_column))
    if "messages" in given:
        return _chat("messages", given["messages"], given)
    if "conversations" in given:
        return _chat("conversations", given["conversations"], given)
    if "instruction" in given:
        return _instruction(given)
    if "prompt" in given:
        return _prompt(given)
    if "text" in given:
        return Text(_text(given, "text"))
    raise RowError(_unknown_shape(values, given, text_column))


def is_text(values: Mapping[str, Any]) -> bool:
    """Whether a row is nothing but text. What is no row that can be is not."""
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
    answer = _answer_key(given, "instruction")
    question = _text(given, "instruction")
    context = next((_checked(given[key], key) for key in INPUT_KEYS if key in given), "")
    if context.strip():
        question = f"{question}\n\n{context}"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": _text(given, answer)}]
    if isinstance(given.get("system"), str) and given["system"].strip():
        messages.insert(0, {"role": "system", "content": _text(given, "system")})
    return Chat("instruction + output", messages, None, frozenset([len(messages) - 1]))


def _prompt(given: Mapping[str, Any]) -> Chat | Completion:
    answer = _answer_key(given, "prompt")
    prompt, completion = given["prompt"], given[answer]
    if isinstance(prompt, list):
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        if not isinstance(completion, list):
            raise RowError(f"{answer!r} is no list of turns, but 'prompt' is one")
        return _chat("prompt + completion", [*prompt, *completion], given, num_prompt_turns=len(prompt))
    return Completion(_checked(prompt, "prompt"), _text(given, answer))


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
    """`value` if it is text that can be encoded."""
    if not isinstance(value, str):
        raise RowError(f"{what!r} should be text, but is {_kind(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RowError(f"{what!r} holds half of a surrogate pair, which is no valid Unicode") from None
    return value


def _chat(shape: str, turns: object, given: Mapping[str, Any], *, num_prompt_turns: int = 0) -> Chat:
    if not isinstance(turns, list):
        raise RowError(f"{shape!r} should be a list of turns, but is {_kind(turns)}")
    messages: list[Message] = []
    supervised: list[int] = []
    system = given.get("system")
    if isinstance(system, str) and system.strip() and shape == "conversations":
        messages.append({"role": "system", "content": _checked(system, "system")})
    for number, turn in enumerate(turns, 1):
        message, is_trained = _message(turn, number)
        if message["role"] == "assistant" and is_trained and number > num_prompt_turns:
            supervised.append(len(messages))
        messages.append(message)
    if not supervised:
        roles = ", ".join(dict.fromkeys(str(message["role"]) for message in messages)) or "no turns"
        where = "the completion" if num_prompt_turns else repr(shape)
        raise RowError(f"has no turn of the assistant to learn from in {where} ({roles})")
    return Chat(shape, messages, _tools(given.get("tools")), frozenset(supervised))


def _message(turn: object, number: int) -> tuple[Message, bool]:
    """The turn in the form that templates know, and whether it is to be learned from (`weight`)."""
    if not isinstance(turn, dict):
        raise RowError(f"turn {number} should be an object with role and content, but is {_kind(turn)}")
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
        if key not in (role_key, content_key, "weight") and value is not None:
            message[key] = value
    if message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(message["tool_calls"], number)
    elif known != "tool" and not message["content"].strip():
        missing = content is None
        raise RowError(f"turn {number} ({role}) " + (f"has no {content_key!r}" if missing else "is empty"))
    return message, _is_trained(turn.get("weight"), number)


def _role(role: object, number: int) -> str:
    if role in ROLES:
        return str(role)
    if isinstance(role, str) and role.lower() in (*ROLES, *_OTHER_ROLES):
        return _OTHER_ROLES.get(role.lower(), role.lower())
    guess = nearest(str(role), (*ROLES, *_OTHER_ROLES))
    hint = f"; did you mean {guess!r}?" if guess else f"; known are {', '.join(ROLES)}"
    raise RowError(f"turn {number} has the unknown role {role!r}{hint}")


def _content(content: object, role: object, number: int) -> str:
    """Text of a turn; of a list of parts, their texts put together."""
    if content is None:
        return ""
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in content]
        other = next((part for part in parts if not isinstance(part.get("text"), str)), None)
        if other is not None:
            raise RowError(f"turn {number} ({role}) has a part of type {other.get('type')!r}; only text is learned")
        content = "".join(part["text"] for part in parts)
    if not isinstance(content, str):
        raise RowError(f"turn {number} ({role}) should have text as its content, but has {_kind(content)}")
    return content if content.isascii() else _checked(content, f"turn {number}")


def _is_trained(weight: object, number: int) -> bool:
    if weight not in (None, 0, 1):
        raise RowError(f"turn {number} has the weight {weight!r}, but only 0 (not learned from) and 1 are known")
    return weight != 0


def _tool_calls(calls: object, number: int) -> list[Any]:
    """Calls with their arguments as an object: templates write them as JSON themselves."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError(f"turn {number}: 'tool_calls' should be a list of objects")
    parsed = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"turn {number} calls a tool without a name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                function = {**function, "arguments": json.loads(arguments or "{}")}
            except ValueError:
                raise RowError(
                    f"turn {number}: the arguments of the call of {function['name']!r} are no JSON"
                ) from None
        parsed.append({**call, "function": function} if "function" in call else function)
    return parsed


def _tools(tools: object) -> list[Any] | None:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise RowError("'tools' is text, but no JSON") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("'tools' should be a list of objects that describe functions")
    return tools


def _kind(value: object) -> str:
    kinds = {list: "a list", dict: "an object", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
