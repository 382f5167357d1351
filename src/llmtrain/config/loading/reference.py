"""The configuration reference of the docs, made from the schema: one table a section."""

from __future__ import annotations

import json
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from llmtrain.config.loading.walk import sections_in, variants_by_name
from llmtrain.config.sections.base import Section
from llmtrain.config.sections.schema import Config

LIMITS = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
TYPE_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}


def markdown() -> str:
    """Return the page: every key with its type, default and meaning, by section."""
    parts = ["## Top level\n\n" + _table(Config)]
    for name, field in Config.model_fields.items():
        parts += _sections(name, field, depth=2)
    return "\n\n".join(parts) + "\n"


def _sections(path: str, field: FieldInfo, *, depth: int) -> list[str]:
    variants = variants_by_name(field)
    name_of = {section: name for name, section in variants.items()}
    parts = []
    for section in dict.fromkeys(sections_in(field.annotation)):
        title = f"`{path}`" + (f" with `name: {name_of[section]}`" if section in name_of and len(variants) > 1 else "")
        parts += [f"{'#' * depth} {title}", *filter(None, [meaning_of(section)]), _table(section)]
        for name, below in section.model_fields.items():
            parts += _sections(f"{path}.{name}", below, depth=depth + 1)
    return parts


def _table(section: type[Section]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        cells = (f"`{name}`", type_of(field), _default(field), field.description or "")
        rows.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(rows)


def meaning_of(section: type[Section]) -> str:
    """Return the docstring of a section in one line; empty for a section that has none of its own."""
    return "" if section.__doc__ == Section.__doc__ else " ".join((section.__doc__ or "").split())


def type_of(field: FieldInfo) -> str:
    """Return in words which values a key takes."""
    limits = [
        f"{sign} {getattr(item, word)}" for item in field.metadata for word, sign in LIMITS if hasattr(item, word)
    ]
    return _type_name(field.annotation) + (f", {' and '.join(limits)}" if limits else "")


def _type_name(annotation: Any) -> str:
    args = get_args(annotation)
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in args)
    if get_origin(annotation) is list:
        return f"list of {_type_name(args[0])}"
    if get_origin(annotation) is dict:
        return "mapping"
    if get_origin(annotation) is tuple:
        return f"list of {len(args)} × {_type_name(args[0])}"
    if args:
        return " or ".join(dict.fromkeys(_type_name(arg) for arg in args))
    return TYPE_NAMES.get(annotation, "section")


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, Section):
        return "below"
    return f"`{json.dumps(field.default, default=lambda section: section.model_dump())}`"
