"""Looks at the schema from outside: which sections and keys there are, and what a key accepts.

Suggestions, the reference in the docs and the tests use it; it knows no section by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic.fields import FieldInfo

from llmtrain.config.sections.base import IMPORT_PATH, Section, variant_named

Path = tuple[str | int, ...]
"""Place of a value in the config: keys, and indices into lists."""


class Key(NamedTuple):
    """One key of the schema. Keys of a list's items have the list's path before them."""

    path: tuple[str, ...]
    owner: type[Section]
    field: FieldInfo

    @property
    def dotted(self) -> str:
        """The key as users type it."""
        return ".".join(self.path)


def dotted(path: Sequence[str | int]) -> str:
    """Return a path as users read it: `data.train[0].weight`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def leaf_types(annotation: Any) -> list[Any]:
    """Return the plain types and literals inside unions, lists and tuples."""
    if get_origin(annotation) is Literal:
        return [annotation]
    inner = [arg for arg in get_args(annotation) if arg is not Ellipsis]
    return [leaf for arg in inner for leaf in leaf_types(arg)] if inner else [annotation]


def sections_in(annotation: Any) -> list[type[Section]]:
    """Return the sections that a key may hold: several where a section has variants."""
    return [leaf for leaf in leaf_types(annotation) if isinstance(leaf, type) and issubclass(leaf, Section)]


def variants_by_name(field: FieldInfo | None) -> dict[str, type[Section]]:
    """Return the variants of a section that is one of several by its `name`; none for any other key."""
    if field is None or not _has_variants(field):
        return {}
    return {
        name: section
        for section in sections_in(field.annotation)
        for name in get_args(section.model_fields["name"].annotation) or (IMPORT_PATH,)
    }


def _has_variants(field: FieldInfo) -> bool:
    """Return whether a section, or each section of a list, is one of several by its `name`."""
    items = [one for arg in get_args(field.annotation) for one in getattr(arg, "__metadata__", ())]
    return any(isinstance(one, FieldInfo) and one.discriminator is not None for one in (field, *items))


def variant_of(field: FieldInfo, values: Any) -> str | None:
    """Return the `name` of a section with variants: the one that is given, else that of its default, if it has one."""
    name = values.get("name") if isinstance(values, dict) else None
    if name is None and isinstance(field.default, Section):
        name = getattr(field.default, "name", None)
    return name if isinstance(name, str) else None


def walk(root: type[Section], prefix: tuple[str, ...] = ()) -> Iterator[Key]:
    """Yield every key, depth first, in the order of the schema; a key of two variants comes twice."""
    for name, field in root.model_fields.items():
        path = (*prefix, name)
        yield Key(path, root, field)
        for section in sections_in(field.annotation):
            yield from walk(section, path)


def sections_at(root: type[Section], path: Path, values: Any) -> list[type[Section]]:
    """Return the sections that may stand at `path`: one, or all variants where `values` names none."""
    sections: list[type[Section]] = [root]
    fields: list[FieldInfo] = []
    for part in path:
        values = child(values, part)
        if not isinstance(part, int):
            fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        sections = []
        for field in fields:
            chosen = variants_by_name(field).get(variant_named(variant_of(field, values)) or "")
            sections += [chosen] if chosen else sections_in(field.annotation)
    return sections


def field_at(root: type[Section], path: Path, values: Any) -> FieldInfo | None:
    """Return the key at `path`, for an item of a list the key of the list; None if there is no such key."""
    while path and isinstance(path[-1], int):
        path = path[:-1]
    name = str(path[-1]) if path else ""
    owners = sections_at(root, path[:-1], values)
    return next((owner.model_fields[name] for owner in owners if name in owner.model_fields), None)


def child(values: Any, part: str | int) -> Any:
    """Return the value under a key or index, or None."""
    if isinstance(values, dict):
        return values.get(part)
    if isinstance(values, list) and isinstance(part, int) and part < len(values):
        return values[part]
    return None
