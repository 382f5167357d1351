"""Writes configs/every-key.yaml, which shows every key with its meaning and its default, from the schema.

    python -m llmtrain.config.loading.every_key        # after a change to the schema

The other variants of a section, and sections that are off, cannot stand beside the rest: they are comments.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from llmtrain.config.loading.reference import meaning_of, type_of
from llmtrain.config.loading.tree import read_scalar
from llmtrain.config.loading.walk import sections_in, variants_by_name
from llmtrain.config.sections.base import Section
from llmtrain.config.sections.schema import Config

PATH: Final = Path(__file__).parents[2] / "configs" / "every-key.yaml"
EXAMPLES: Final = {
    "data.train": "data/every-key/train",
    "prepare.input": "${sysconfig:stdlib}/json",
    "prepare.output": "data/every-key",
}
"""Values for keys that have no default. An optional section whose required keys are all here is shown switched on."""
HEAD: Final = """\
# Every key, with its meaning and its default. Copy single keys from here; begin a config from another one.
# Brackets hold the values that a key takes, where its default does not show them. The other variants of a section,
# and sections that are off, stand behind a #.
"""
WIDTH: Final = 120
COMMENT_COLUMN: Final = 30
PLACEHOLDER: Final = "…"


def every_key() -> str:
    """Return the text of configs/every-key.yaml, which loads as a config."""
    lines = []
    for name, field in Config.model_fields.items():
        key = _key(name, field, path=name, indent=0)
        lines += key if len(key) == 1 else ["", *key]
    return HEAD + "\n".join(lines) + "\n"


def _key(name: str, field: FieldInfo, *, path: str, indent: int) -> list[str]:
    """Return the lines of a key and of everything below it, from column `indent` on."""
    sections = list(dict.fromkeys(sections_in(field.annotation)))
    if variants_by_name(field) and get_origin(field.annotation) is not list:
        first, *others = sections
        lines = _block(name, field, first, path=path, indent=indent)
        for other in others:
            lines += ["", *_behind(_block(name, field, other, path=path, indent=indent), indent=indent)]
        return lines
    if isinstance(field.default, Section):
        return _block(name, field, type(field.default), path=path, indent=indent)
    if field.default is None and len(sections) == 1:
        required = [key for key, below in sections[0].model_fields.items() if below.default is PydanticUndefined]
        lines = _block(name, field, sections[0], path=path, indent=indent)
        is_on = bool(required) and all(f"{path}.{key}" in EXAMPLES for key in required)
        return lines if is_on else _behind(lines, indent=indent)
    lines = _with_comment(f"{' ' * indent}{name}: {_value(path, field)}", _meaning(field))
    items = [line for section in sections for line in _item(section, path=path, indent=indent + 2)]
    return [*lines, *_behind([f"{' ' * indent}{name}:", *items], indent=indent)] if items else lines


def _item(section: type[Section], *, path: str, indent: int) -> list[str]:
    """Return the lines of an item of a list."""
    first, *others = _fields(section, path=path, indent=indent + 2)
    return [f"{' ' * indent}- {first.lstrip()}", *others]


def _block(name: str, field: FieldInfo, section: type[Section], *, path: str, indent: int) -> list[str]:
    """Return the lines of a section under its key."""
    meaning = meaning_of(section) or field.description or ""
    return [*_with_comment(f"{' ' * indent}{name}:", meaning), *_fields(section, path=path, indent=indent + 2)]


def _fields(section: type[Section], *, path: str, indent: int) -> list[str]:
    keys = sorted(section.model_fields.items(), key=lambda item: item[0] != "name")
    return [line for name, field in keys for line in _key(name, field, path=f"{path}.{name}", indent=indent)]


def _value(path: str, field: FieldInfo) -> str:
    """Return the value as YAML. A key that has neither a default nor an example is only shown as a comment."""
    if field.default is PydanticUndefined and path not in EXAMPLES:
        return PLACEHOLDER
    value: Any = EXAMPLES[path] if field.default is PydanticUndefined else field.default
    if isinstance(value, str) and re.fullmatch(r"[\w./~-]+", value) and isinstance(read_scalar(value), str):
        return value
    return json.dumps(value, ensure_ascii=False, default=lambda section: section.model_dump())


def _meaning(field: FieldInfo) -> str:
    """Return the description, and which values the key takes where the value beside it does not show that."""
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    tells = field.default not in (None, PydanticUndefined) and not field.metadata and len(choices) < 2
    return f"{field.description or ''}{'' if tells else f' ({type_of(field)})'}".replace("`", "").lstrip()


def _with_comment(line: str, meaning: str) -> list[str]:
    """Return a line with its comment behind it, or above it where both are too long for one line."""
    if not meaning:
        return [line]
    beside = f"{line:<{COMMENT_COLUMN}}  # {meaning}"
    if len(beside) <= WIDTH:
        return [beside]
    margin = " " * (len(line) - len(line.lstrip())) + "# "
    return [
        *textwrap.wrap(meaning, WIDTH, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False),
        line,
    ]


def _behind(lines: Sequence[str], *, indent: int) -> list[str]:
    """Return the lines as comments that begin at column `indent`."""
    return [f"{' ' * indent}# {line[indent:]}".rstrip() for line in lines]


if __name__ == "__main__":
    PATH.write_text(every_key(), encoding="utf-8")
