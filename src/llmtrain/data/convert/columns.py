"""Find the columns of a table that make a row: named by options, or found by their usual names.

question, answer, id   ─→   prompt, completion
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from llmtrain.config.loading.messages import nearest
from llmtrain.data.chat.shapes import COMPLETION_KEYS, INPUT_KEYS, holds_something
from llmtrain.data.files.row_faults import RowError

PROMPT_NAMES = ("prompt", "instruction", "question", "query", "input", "user", "source")
COMPLETION_NAMES = ("completion", "response", "output", "answer", "assistant", "reply", "target")
_WITH_QUESTION = (*INPUT_KEYS, "history", "system", "tools")
_KNOWN = {*PROMPT_NAMES, *COMPLETION_NAMES, *_WITH_QUESTION, "messages", "conversations", "text"}


class FoundRow(NamedTuple):
    """A row under the keys that rows have, and the columns that it was made without though they hold something."""

    row: dict[str, Any]
    left_over: list[str]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of columns, as the user gives them."""

    prompt: str | None = None
    completion: str | None = None
    system: str | None = None
    text: str | None = None
    messages: str | None = None

    @property
    def given(self) -> dict[str, str]:
        """The columns that are named, by what they hold."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: column for key, column in named.items() if column is not None}

    def chosen(self, values: Mapping[str, Any]) -> FoundRow:
        """Make a row of the named columns.

        Of prompt and completion, one that is not named is found by its usual name.
        Raises RowError where a column is missing.
        """
        row, used = {}, set(self.given.values())
        for key, column in self.given.items():
            if column not in values:
                guess = nearest(column, tuple(values), cutoff=0.6)
                hint = f"; did you mean {guess!r}?" if guess else ", only " + ", ".join(map(repr, list(values)[:8]))
                raise RowError(f"has no column {column!r} (--{key}-column){hint}")
            row[key] = values[column]
        if "messages" in row:
            row["messages"] = _turns(row["messages"])
        rest = _known({key: value for key, value in values.items() if key not in self.given.values()})
        for key, other, names in (("prompt", "completion", COMPLETION_NAMES), ("completion", "prompt", PROMPT_NAMES)):
            usual = next((name for name in names if name in rest), None)
            if key in row and other not in row and usual is not None:
                row[other] = rest[usual]
                used.add(usual)
        return FoundRow(row, _left_over(values, used))


def found(values: Mapping[str, Any]) -> FoundRow | None:
    """Make a row of the columns with usual names; None where there are none."""
    by_name = _known(values)
    prompt = next((name for name in PROMPT_NAMES if name in by_name), None)
    completion = next((name for name in COMPLETION_NAMES if name in by_name), None)
    turns = next((name for name in ("messages", "conversations") if by_name.get(name)), None)
    if turns is not None:
        row = {turns: _turns(by_name[turns]), **_pick(by_name, "system", "tools")}
    elif "instruction" in by_name and any(name in by_name for name in COMPLETION_KEYS):
        row = _pick(by_name, "instruction", *COMPLETION_KEYS, *_WITH_QUESTION)
    elif prompt is not None and completion is not None:
        row = {"prompt": by_name[prompt], "completion": by_name[completion], **_pick(by_name, "system")}
        return FoundRow(row, _left_over(values, {prompt, completion, "system"}))
    else:
        row = _pick(by_name, "text")
    return FoundRow(row, _left_over(values, set(row))) if row else None


def _left_over(values: Mapping[str, Any], used: set[str]) -> list[str]:
    return [key for key, value in values.items() if holds_something(value) and not {key, key.strip().lower()} & used]


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns with usual names, in small letters."""
    lowered = {str(key).strip().lower(): value for key, value in values.items()}
    return {name: value for name, value in lowered.items() if name in _KNOWN}


def _pick(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _turns(cell: object) -> object:
    """Return a list of turns, parsed if the cell holds it as JSON. Raises RowError."""
    if not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise RowError(f"should hold turns as JSON, but is no JSON ({error})") from None
