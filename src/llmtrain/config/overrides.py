"""Overrides from the command line: `trainer.max_steps=100`.

The value is YAML 1.2: `[1, 2]`, `null`, `1e-3`, `true`, text. It replaces what stands at the key, a whole section or
list included. Sections that are absent are made. Where an override chooses another variant of a section
(`data.name=synthetic`), the keys in the file that only the variant of the file has are left out, so that one word
turns any config into a run on random tokens; keys that both variants have stay.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from llmtrain.config.base import Section
from llmtrain.config.errors import ConfigError
from llmtrain.config.tree import Place, Tree, put_override
from llmtrain.config.walk import Path, dotted, variants_by_name

OVERRIDE = re.compile(r"(?P<key>[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*)=(?P<value>.*)", re.DOTALL)
FILE_LINES = 10**9
"""Overrides sort after every line of a file."""


def looks_like_override(word: str) -> bool:
    """Whether a word of the command line is meant as key=value. A path such as `a/lr=3.yaml` is not."""
    return bool(OVERRIDE.fullmatch(word)) or word.startswith("=")


def apply_overrides(tree: Tree, overrides: Sequence[str], *, root: type[Section]) -> None:
    """Puts every override into the tree, in order; the last one wins.

    Raises ConfigError for a word that is not key=value, and for a key below something that is no section.
    """
    parsed = [(place_of_override(text, index), *_parse(text)) for index, text in enumerate(overrides)]
    for _, path, value in parsed:
        if len(path) == 2 and path[1] == "name":
            _leave_other_variant_out(tree, section=str(path[0]), name=value, root=root)
    for place, path, value in parsed:
        _make_sections(tree, path, place)
        put_override(tree, path, value, place=place)


def place_of_override(text: str, index: int = 0) -> Place:
    """How messages name an override."""
    return Place(FILE_LINES + index, f'override "{text}"')


def _parse(text: str) -> tuple[Path, str]:
    match = OVERRIDE.fullmatch(text)
    if not match:
        hint = (
            "and a list is replaced whole: key=[a, b]"
            if "[" in text.partition("=")[0]
            else "such as trainer.max_steps=100"
        )
        raise ConfigError(f'override "{text}": expected key=value, {hint}')
    return tuple(match["key"].split(".")), match["value"]


def _make_sections(tree: Tree, path: Path, place: Place) -> None:
    parent: Any = tree.values
    for end, part in enumerate(path[:-1], start=1):
        if parent.get(part) is None:
            parent[part] = {}
            tree.places[path[:end]] = place
        parent = parent[part]
        if not isinstance(parent, dict):
            raise ConfigError(
                f"{place.label}: {dotted(path[:end])} is not a section; it was given as a value at "
                f"{tree.place_of(path[:end]).label}"
            )


def _leave_other_variant_out(tree: Tree, *, section: str, name: str, root: type[Section]) -> None:
    field = root.model_fields.get(section)
    variants = variants_by_name(field) if field else {}
    in_file = tree.values.get(section)
    if not isinstance(in_file, dict):
        return
    old, new = variants.get(str(in_file.get("name"))), variants.get(name.strip())
    if old is None or new is None or old is new:
        return
    for key in [key for key in in_file if key in old.model_fields and key not in new.model_fields]:
        tree.drop((section, key))
