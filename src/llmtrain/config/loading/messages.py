"""Turns what is wrong with a config into lines for people: `train.yaml:12: trainer.max_step: unknown key; did you …`.

pydantic's errors ──┐
the tree ───────────┼─▶ faults_of, faults_of_values ─▶ one ConfigFault for each wrong key
schema, older names ┘
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from llmtrain.config.loading.renamed import SECTION_AS_VALUE, look_up, old_value
from llmtrain.config.loading.tree import ConfigFault, Tree
from llmtrain.config.loading.walk import (
    Path,
    child,
    dotted,
    field_at,
    leaf_types,
    sections_at,
    variant_of,
    variants_by_name,
    walk,
)
from llmtrain.config.sections.schema import Config

LIMITS = {"greater_than": ">", "greater_than_equal": "≥", "less_than": "<", "less_than_equal": "≤"}
EXPECTED = {
    "int_parsing": "an integer",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing_size": "a smaller integer",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "list_type": "a list",
    "tuple_type": "a list",
    "model_type": "a section, with keys of its own",
    "model_attributes_type": "a section, with keys of its own",
    "union_tag_not_found": "a section, with keys of its own",
}
SECTION_TYPES = ("model_type", "model_attributes_type", "union_tag_not_found")


def faults_of(errors: Iterable[ErrorDetails], tree: Tree) -> list[ConfigFault]:
    """Return one fault for each key that pydantic rejected, however many alternatives it tried for the key."""
    by_path: dict[Path, list[ErrorDetails]] = {}
    for error in errors:
        by_path.setdefault(path_of(error, tree), []).append(error)
    faults: list[ConfigFault] = []
    for path, found in by_path.items():
        deeper = any(len(other) > len(path) and other[: len(path)] == path for other in by_path)
        if deeper and all(error["type"].endswith("_type") for error in found):
            continue  # the value met another alternative of the key, and something inside it is wrong
        faults += _faults_at(_Spot(path, tree), found)
    return faults


def faults_of_values(tree: Tree) -> list[ConfigFault]:
    """Return faults that pydantic does not see: values of older systems, and true or false where a number is wanted.

    Pydantic would read true as 1.
    """
    faults = []
    for path, value in tree.leaves():
        spot = _Spot(path, tree)
        renamed = old_value(spot.names, value)
        field = spot.field if renamed or isinstance(value, bool) else None
        types = leaf_types(field.annotation) if field else []
        if field and renamed:
            faults.append(spot.fault(f"{show(value)} {renamed.answer}"))
        elif (int in types or float in types) and bool not in types:
            faults.append(spot.fault(f"expected a number (got {show(value)})"))
    return faults


def path_of(error: ErrorDetails, tree: Tree) -> Path:
    """Return where the error is, without the names of union members that pydantic puts between the keys."""
    path: Path = ()
    values: Any = tree.values
    for index, part in enumerate(error["loc"]):
        is_last = index == len(error["loc"]) - 1
        known = part in values if isinstance(values, dict) else isinstance(values, list) and isinstance(part, int)
        if known:
            path, values = (*path, part), child(values, part)
        elif is_last and error["type"] == "missing":
            path = (*path, part)
    return path


def nearest(word: str, words: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the most similar of `words`, or None if none is similar."""
    lower = {candidate.lower(): candidate for candidate in words}
    found = difflib.get_close_matches(word.lower().replace("-", "_"), lower, n=1, cutoff=cutoff)
    return lower[found[0]] if found else None


def show(value: Any) -> str:
    """Return a value as a config would hold it, shortened where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"


class _Spot(NamedTuple):
    """A key of a config that a message is about."""

    path: Path
    tree: Tree

    @property
    def names(self) -> tuple[str, ...]:
        """The keys of the path, without indices into lists."""
        return tuple(part for part in self.path if isinstance(part, str))

    @property
    def value(self) -> Any:
        return self.tree.get(self.path)

    @property
    def field(self) -> FieldInfo | None:
        return field_at(Config, self.path, self.tree.values)

    @property
    def siblings(self) -> list[str]:
        """The keys that the schema has in this section."""
        sections = sections_at(Config, self.path[:-1], self.tree.values)
        return list(dict.fromkeys(name for section in sections for name in section.model_fields))

    def beside(self, name: str) -> str:
        """Return the path of a key in the same section, as users read it."""
        return dotted((*self.path[:-1], name))

    def fault(self, text: str) -> ConfigFault:
        return ConfigFault(self.tree.place_of(self.path), dotted(self.path), text)


def _faults_at(spot: _Spot, found: Sequence[ErrorDetails]) -> list[ConfigFault]:
    found = [item for item in found if item["type"] == "value_error"] or found  # a section was meant, where one may be
    error = found[0]
    match error["type"]:
        case "extra_forbidden":
            return _unknown_key(spot)
        case "value_error":
            return [_fault_of_several(spot, str(item.get("ctx", {}).get("error", item["msg"]))) for item in found]
        case "missing":
            return [_missing(spot)]
        case "union_tag_invalid" | "union_tag_not_found" if isinstance(spot.value, dict):
            names = list(variants_by_name(spot.field))
            below = _Spot((*spot.path, "name"), spot.tree)
            if error["type"] == "union_tag_not_found":
                return [below.fault(f"missing: one of {', '.join(names)}")]
            return [below.fault(_mismatch(below.value, [f"one of {', '.join(names)}"], choices=names))]
    return [spot.fault(_wrong_value(spot, found))]


def _wrong_value(spot: _Spot, found: Sequence[ErrorDetails]) -> str:
    expected = [_expected(error, spot.field) for error in found]
    if None in expected:
        return f"{found[expected.index(None)]['msg']} (got {show(spot.value)})"
    choices = [choice for error in found if error["type"] == "literal_error" for choice in _quoted(error)]
    text = _mismatch(spot.value, [words for words in expected if words], choices=choices)
    meant = SECTION_AS_VALUE.get(dotted(spot.path)) if found[0]["type"] in SECTION_TYPES else None
    if not meant:
        return text
    return f"{text}; {dotted(spot.path)} as a value {meant.answer}"


def _mismatch(value: Any, expected: Iterable[str], *, choices: Iterable[str]) -> str:
    guess = nearest(str(value), choices)
    text = f"expected {' or '.join(dict.fromkeys(expected))} (got {show(value)})"
    return f"{text}; did you mean {guess}?" if guess else text


def _expected(error: ErrorDetails, field: FieldInfo | None) -> str | None:
    """Return in words what pydantic expected, or None where its own message says it best."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in LIMITS:
        (limit,) = context.values()
        return f"a number {LIMITS[kind]} {f'{limit:g}' if isinstance(limit, float) else limit}"
    if kind == "literal_error":
        choices = _quoted(error) or [str(context["expected"])]
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if kind == "string_pattern_mismatch" and field and field.description:
        return f"text: {field.description.rstrip('.')}"
    if kind in ("too_short", "too_long"):
        return f"a list of {context.get('max_length', context.get('min_length'))}"
    return EXPECTED.get(kind)


def _quoted(error: ErrorDetails) -> list[str]:
    return re.findall(r"'([^']*)'", str(error.get("ctx", {}).get("expected", "")))


def _missing(spot: _Spot) -> ConfigFault:
    if isinstance(spot.path[-1], int):
        values = _Spot(spot.path[:-1], spot.tree)
        return values.fault(f"expected a longer list (got {show(values.value)})")
    meaning = f": {spot.field.description}" if spot.field and spot.field.description else ""
    variants = ", ".join(variants_by_name(spot.field))
    return spot.fault(f"missing{meaning}" + (f" Its name is one of {variants}." if variants else ""))


def _fault_of_several(spot: _Spot, message: str) -> ConfigFault:
    """Return a fault of several keys together, at the place of the first of them that was overridden or written."""
    words = re.findall(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*", message)
    paths = [(*spot.path, *word.split(".")) for word in words]
    mentioned = [place for path in paths if (place := spot.tree.places.get(path))]
    overridden = [place for place in mentioned if place.label.startswith("override ")]
    fault = spot.fault(message)
    return fault._replace(place=(overridden or mentioned or [fault.place])[0])


def _unknown_key(spot: _Spot) -> list[ConfigFault]:
    answer = _answer(spot)
    if isinstance(spot.value, dict) and spot.value and (answer is None or look_up(spot.names)):
        inside = [_Spot(path, spot.tree) for path, _ in spot.tree.leaves(spot.path)]
        if answered := [below.fault(text) for below in inside if (text := _answer(below))]:
            return answered
    where = dotted(spot.path[:-1]) or "the top"
    return [spot.fault(answer or f"unknown key; {where} has {', '.join(spot.siblings)}")]


def _answer(spot: _Spot) -> str | None:
    """Return what to write instead of an unknown key, or None if nothing is like it."""
    name = spot.names[-1]
    here = nearest(name, spot.siblings)
    if variant := _other_variant(spot, instead_of=here):
        return variant
    if renamed := look_up(spot.names, value=spot.value):
        return str(renamed)
    everywhere: dict[str, list[str]] = {}
    for key in walk(Config):
        everywhere.setdefault(key.path[-1], []).append(key.dotted)
    elsewhere = sorted(dict.fromkeys(everywhere.get(name, [])), key=lambda dotted: dotted.count("."))
    if here and (not elsewhere or _similarity(name, here) >= 0.8):
        return f"unknown key; did you mean {spot.beside(here)}?"
    if elsewhere:
        return f"unknown key here; it is {' or '.join(elsewhere[:3])}"
    far = nearest(name, everywhere, cutoff=0.8)
    return f"unknown key; did you mean {everywhere[far][-1]}?" if far else None


def _other_variant(spot: _Spot, *, instead_of: str | None) -> str | None:
    """Return that the key is one of another variant of its section, or far more like one than like `instead_of`."""
    section, name = _Spot(spot.path[:-1], spot.tree), spot.names[-1]
    variants = variants_by_name(section.field)
    meant = nearest(name, {key for variant in variants.values() for key in variant.model_fields}, cutoff=0.8)
    if not section.field or not meant or (instead_of and _similarity(name, instead_of) >= _similarity(name, meant)):
        return None
    owners = " or ".join(owner for owner, variant in variants.items() if meant in variant.model_fields)
    chosen = spot.beside("name")
    about = f"a key of {chosen}: {owners}, but {chosen} is {variant_of(section.field, section.value)}"
    return about if meant == name else f"unknown key; did you mean {spot.beside(meant)}? It is {about}"


def _similarity(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()
