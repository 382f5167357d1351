"""Which columns of a table hold what: named by options, or found by their usual names.

question, answer, id   ─→   prompt, completion
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from llmtrain.config.faults import nearest
from llmtrain.data.chat.faults import RowError
from llmtrain.data.chat.shapes import COMPLETION_KEYS, INPUT_KEYS

PROMPT_NAMES = ("prompt", "instruction", "question", "query", "input", "user", "source")
COMPLETION_NAMES = ("completion", "response", "output", "answer", "assistant", "reply", "target")
_KNOWN = {*PROMPT_NAMES, *COMPLETION_NAMES, *INPUT_KEYS, "messages", "conversations", "system", "text", "tools"}


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
        """What is named, and by which column."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: column for key, column in named.items() if column is not None}

    def chosen(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A row of the columns that are named, and of a prompt or completion by its usual name where only the other is.

        Raises RowError where a column is missing.
        """
        row = {}
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
        return row


def found(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """A row of the columns with usual names; None where there are none."""
    by_name = _known(values)
    for name in ("messages", "conversations"):
        if by_name.get(name):
            return {name: _turns(by_name[name]), **_pick(by_name, "system", "tools")}
    if "instruction" in by_name and any(name in by_name for name in COMPLETION_KEYS):
        return _pick(by_name, "instruction", *INPUT_KEYS, *COMPLETION_KEYS, "system")
    prompt = next((name for name in PROMPT_NAMES if name in by_name), None)
    completion = next((name for name in COMPLETION_NAMES if name in by_name), None)
    if prompt is not None and completion is not None:
        return {"prompt": by_name[prompt], "completion": by_name[completion], **_pick(by_name, "system")}
    return _pick(by_name, "text") or None


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """The columns with usual names, in small letters."""
    lowered = {str(key).strip().lower(): value for key, value in values.items()}
    return {name: value for name, value in lowered.items() if name in _KNOWN}


def _pick(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _turns(cell: object) -> object:
    """A list of turns; of a cell that holds it as JSON too. Raises RowError."""
    if not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell)
    except ValueError as error:
        raise RowError(f"should hold turns as JSON, but is no JSON ({error})") from None
