"""Calls of tools and their descriptions, in the forms that rows have.

    tool_calls: [{"type", "function": {"name", "arguments"}}]   OpenAI's; the arguments are an object or JSON text
    function_call: {"name", "arguments"}, functions: [...]      OpenAI's older ones
    {"from": "function_call", "value": "{\\"name\\" …}"}          ShareGPT's: a turn of its own, whose text is the call

Calls and descriptions stay as the row has them; only the other two forms are brought into the first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from llmtrain.data.files.row_faults import RowError

Call = dict[str, Any]

MAX_DEPTH = 100
"""Levels of objects and lists in a row."""
_TAGGED = re.compile(r"\s*(?:<tool_call>(.*?)</tool_call>\s*)+", re.DOTALL)
_TAG = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def function_of(call: Mapping[str, Any]) -> Any:
    """Return the function of a call or description, which some rows do not put under `function`."""
    return call.get("function", call)


def checked_calls(calls: object, number: int) -> list[Call]:
    """Return the calls of a turn as they are. Raises RowError where one has no name, or arguments that are no JSON."""
    if isinstance(calls, str):
        calls = _parsed(calls, f"turn {number}: 'tool_calls' is text, but no JSON")
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError(f"turn {number}: 'tool_calls' should be a list of objects")
    for call in calls:
        function = function_of(call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RowError(f"turn {number} calls a tool without a name")
        arguments = function.get("arguments")
        if isinstance(arguments, str) and arguments.strip():
            no_json = f"turn {number}: the arguments of the call of {function['name']!r} are no JSON"
            reject_what_cannot_be_shown(_parsed(arguments, no_json), f"turn {number}: the call of {function['name']!r}")
    return calls


def calls_in_text(text: str, number: int) -> list[Call]:
    """Return the calls that a turn of ShareGPT's role `function_call` holds as text."""
    no_call = f"turn {number} should hold the call of a tool as JSON: an object with name and arguments"
    if _TAGGED.fullmatch(text):
        found = [_parsed(inner, no_call) for inner in _TAG.findall(text)]
    else:
        parsed = _parsed(text, no_call)
        found = parsed if isinstance(parsed, list) else [parsed]
    if not found or not all(isinstance(call, dict) and "name" in (function_of(call) or ()) for call in found):
        raise RowError(no_call)
    return checked_calls([_as_function(call) for call in found], number)


def tools_of(given: Mapping[str, Any], *, wrapped: bool) -> list[Any] | None:
    """Return the descriptions of the tools that stand beside the turns; `wrapped` puts each under `function`."""
    tools = given.get("tools") or given.get("functions")
    if isinstance(tools, str) and tools.strip():
        tools = _parsed(tools, "'tools' is text, but no JSON")
    if not tools or isinstance(tools, str):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("'tools' should be a list of objects that describe functions")
    reject_what_cannot_be_shown(tools, "tools")
    return [_as_function(tool) for tool in tools] if wrapped or not given.get("tools") else tools


def with_arguments(message: Mapping[str, Any], *, as_text: bool) -> dict[str, Any]:
    """Return the turn with the arguments of its calls as JSON text, or as objects."""
    if not message.get("tool_calls"):
        return dict(message)
    calls = []
    for call in message["tool_calls"]:
        function = function_of(call)
        arguments = function.get("arguments")
        if as_text and arguments is not None and not isinstance(arguments, str):
            function = {**function, "arguments": json.dumps(arguments, ensure_ascii=False, default=str)}
        elif not as_text and isinstance(arguments, str):
            function = {**function, "arguments": json.loads(arguments) if arguments.strip() else {}}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls}


def reject_what_cannot_be_shown(value: object, where: str, *, depth: int = 0) -> None:
    """Raise RowError where text in `value` holds half of a surrogate pair, which no tokenizer takes.

    Raise it also for what is nested more than MAX_DEPTH levels deep: what searches and writes values is recursive.
    """
    if depth > MAX_DEPTH:
        raise RowError(f"{where.partition('.')[0].partition('[')[0]!r} is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise RowError(f"{where!r} holds half of a surrogate pair, which is no valid Unicode") from None
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            reject_what_cannot_be_shown(key, where)
            reject_what_cannot_be_shown(inner, f"{where}.{key}" if where else str(key), depth=depth + 1)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            reject_what_cannot_be_shown(inner, f"{where}[{index}]", depth=depth + 1)


def _as_function(entry: dict[str, Any]) -> dict[str, Any]:
    return entry if "function" in entry else {"type": "function", "function": entry}


def _parsed(text: str, no_json: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowError(no_json) from None
