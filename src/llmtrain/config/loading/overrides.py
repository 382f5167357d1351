"""Overrides from the command line: `trainer.max_steps=100`.

The value is YAML 1.2: `[1, 2]`, `null`, `1e-3`, `true`, text. It replaces everything at the key, a whole section or
list included. Missing sections are created. Where an override chooses another variant of a section
(`data.name=synthetic`), the keys of the file that only the file's variant has are left out, so that one word turns any
config into a run on random tokens; keys that both variants have stay. A key takes the place of its alternatives in the
file: `trainer.max_steps=10` that of trainer.max_epochs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from llmtrain.config.loading.tree import Place, Tree, put_override
from llmtrain.config.loading.walk import Path, dotted, sections_at, variant_of, variants_by_name
from llmtrain.config.sections.base import variant_named
from llmtrain.config.sections.schema import Config
from llmtrain.errors import ConfigError

OVERRIDE = re.compile(r"(?P<key>[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*)=(?P<value>.*)", re.DOTALL)
FILE_LINES = 10**9
"""Overrides sort after every line of a file."""


def looks_like_override(word: str) -> bool:
    """Return whether a word of the command line is meant as key=value. A path such as `a/lr=3.yaml` is not."""
    return bool(OVERRIDE.fullmatch(word)) or word.startswith("=")


def apply_overrides(tree: Tree, overrides: Sequence[str]) -> list[str]:
    """Put every override into the tree, in order; the last one wins. Return which keys took the place of others.

    Raises ConfigError for a word that is not key=value, and for a key below a value that is not a section.
    """
    parsed = [(Place(FILE_LINES + index, f'override "{text}"'), *_parse(text)) for index, text in enumerate(overrides)]
    for _, path, value in parsed:
        if len(path) == 2 and path[1] == "name":
            _leave_other_variant_out(tree, section=str(path[0]), name=value)
    for place, path, value in parsed:
        _make_sections(tree, path, place)
        put_override(tree, path, value, place=place)
    return [line for _, path, _ in parsed for line in _take_the_place_of_alternatives(tree, path)]


def _parse(text: str) -> tuple[Path, str]:
    match = OVERRIDE.fullmatch(text)
    if not match:
        names_item = "[" in text.partition("=")[0]
        hint = "and a list is replaced whole: key=[a, b]" if names_item else "such as trainer.max_steps=100"
        raise ConfigError(f'override "{text}": expected key=value, {hint}')
    return tuple(match["key"].split(".")), match["value"]


def _make_sections(tree: Tree, path: Path, place: Place) -> None:
    for end in range(1, len(path)):
        section = path[:end]
        if tree.get(section) is None:
            tree.put(section, {})
            tree.places[section] = place
        if not isinstance(tree.get(section), dict):
            raise ConfigError(
                f"{place.label}: {dotted(section)} is not a section; it was given as a value at "
                f"{tree.place_of(section).label}"
            )


def _leave_other_variant_out(tree: Tree, *, section: str, name: str) -> None:
    in_file = tree.get((section,))
    if not isinstance(in_file, dict):
        return
    field = Config.model_fields.get(section)
    variants = variants_by_name(field)
    if field is None or not variants:
        return
    old, new = (variants.get(variant_named(each) or "") for each in (variant_of(field, in_file), name.strip()))
    if old is None or new is None or old is new:
        return
    for key in [key for key in in_file if key in old.model_fields and key not in new.model_fields]:
        tree.drop((section, key))


def _take_the_place_of_alternatives(tree: Tree, path: Path) -> Iterator[str]:
    """Remove the alternatives of an overridden key that the file gives, and say so of each."""
    *around, name = map(str, path)
    for section in sections_at(Config, tuple(around), tree.values):
        if name not in section.model_fields or not section.is_given(name, tree.get(path)):
            continue
        for other in [key for group in section.alternatives if name in group.keys for key in group.keys if key != name]:
            there = (*around, other)
            place = tree.places.get(there)
            if place is None or place.order >= FILE_LINES:
                continue
            if section.is_given(other, tree.get(there)):
                yield f"{dotted(path)} takes the place of {dotted(there)} ({place.label})"
            tree.drop(there)
