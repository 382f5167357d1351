"""Answers flags that a command does not have: flags of an older system, and keys of the config.

argv, command ─▶ answers ─┬─ config/loading/renamed.py ─┐
                          └─ the schema ────────────────┴─▶ `--lora-r is model.lora.r now: model.lora.r=8`
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llmtrain.config.loading.renamed import look_up_flag, old_config
from llmtrain.config.loading.tree import read_scalar
from llmtrain.config.loading.walk import leaf_types, walk
from llmtrain.config.sections.schema import Config


def answers(argv: Sequence[str], command: Any) -> Iterator[str]:
    """Yield a line for each flag in `argv` that `command` lacks and that has an answer. None: the program itself."""
    parameters = command.params if command else []
    known = {flag for parameter in parameters for flag in (*parameter.opts, *parameter.secondary_opts)}
    takes_keys = command is None or any(parameter.name == "overrides" for parameter in parameters)
    for index, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if not flag.startswith("--") or flag == "--" or flag in known:
            continue
        values = [value] if equals else list(takewhile(lambda each: not each.startswith("-"), argv[index + 1 :]))
        yield from _answer(flag, values, command=command.name if command else "", takes_keys=takes_keys)


def _answer(flag: str, values: Sequence[str], *, command: str, takes_keys: bool) -> Iterator[str]:
    name = flag.removeprefix("--")
    if "." in name:
        yield f"keys of the config are given without dashes: {name}={values[0] if values else '…'}"
        return
    renamed = look_up_flag(flag, value=values[0] if values else None, command=command)
    if renamed and not renamed.to:
        config = old_config(values[0]) if name.startswith("config") and values else None
        yield f"{flag}: {renamed.note}" + (f"; {config}" if config else "")
        return
    here = list(dict.fromkeys(key.dotted for key in walk(Config) if key.path[-1] == name.replace("-", "_")))
    answer = renamed.answer if renamed else f"is {' or '.join(here)}"
    overrides = " ".join(_override(key, values) for key in (renamed.to if renamed else here[:1]))
    if overrides and takes_keys:
        yield f"{flag} {answer}: {overrides}"
    elif overrides:
        yield f"{flag} {answer}, which is a key of configs: `llmtrain {command}` takes none"


def _override(key: str, values: Sequence[str]) -> str:
    """Return an override for the shell, with the value in `key` (`trainer.precision: 32`) or else the typed one."""
    key, _, value = key.partition(": ")
    return shlex.quote(f"{key}={value or _typed(key, values)}")


def _typed(key: str, values: Sequence[str]) -> str:
    """Return the words after a flag as a value of `key`; `…` if they do not fit."""
    annotations: list[Any] = [each.field.annotation for each in walk(Config) if each.dotted == key]

    def takes(value: object) -> bool:
        for annotation in annotations:
            try:
                TypeAdapter(annotation).validate_python(value)
            except ValidationError:
                continue
            return True
        return False

    if len(values) > 1 and takes(list(values)):
        return f"[{', '.join(values)}]"
    if values and (takes(values[0]) or takes(read_scalar(values[0]))):
        return values[0]
    return "true" if any(bool in leaf_types(annotation) for annotation in annotations) else "…"
