"""Turns what pydantic found into lines for people: `train.yaml:12: trainer.max_step: unknown key; did you mean …`."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from typing import Any

from pydantic_core import ErrorDetails

from llmtrain.config.base import Section
from llmtrain.config.renamed import SECTION_AS_VALUE, look_up
from llmtrain.config.tree import Fault, Tree
from llmtrain.config.walk import (
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
    "list_type": "a list",
    "tuple_type": "a list",
    "model_type": "a section, with keys of its own",
    "model_attributes_type": "a section, with keys of its own",
}
SECTION_TYPES = ("model_type", "model_attributes_type")


def faults_of(errors: Iterable[ErrorDetails], tree: Tree, *, root: type[Section]) -> list[Fault]:
    """One fault for each key that is wrong, whatever number of alternatives pydantic tried for it."""
    by_path: dict[Path, list[ErrorDetails]] = {}
    for error in errors:
        by_path.setdefault(path_of(error, tree), []).append(error)
    faults: list[Fault] = []
    for path, found in by_path.items():
        deeper = any(len(other) > len(path) and other[: len(path)] == path for other in by_path)
        if deeper and all(error["type"].endswith("_type") for error in found):
            continue  # the value met another alternative of the key, and something inside it is wrong
        faults += _faults_at(path, found, tree, root)
    return faults


def booleans_for_numbers(tree: Tree, *, root: type[Section]) -> list[Fault]:
    """Keys that want a number and got true or false, which pydantic would take for 1 or 0."""
    faults = []
    for path, value in _leaves(tree.values, ()):
        field = field_at(root, path, tree.values) if isinstance(value, bool) else None
        types = leaf_types(field.annotation) if field else []
        if (int in types or float in types) and bool not in types:
            faults.append(Fault(tree.place_of(path), dotted(path), f"expected a number (got {show(value)})"))
    return faults


def path_of(error: ErrorDetails, tree: Tree) -> Path:
    """Where the error is, without the names of union members that pydantic puts between the keys."""
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
    """The most similar of `words`, or None if none is similar."""
    lower = {candidate.lower(): candidate for candidate in words}
    found = difflib.get_close_matches(word.lower().replace("-", "_"), lower, n=1, cutoff=cutoff)
    return lower[found[0]] if found else None


def show(value: Any) -> str:
    """A value as it would stand in a config, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"


def _faults_at(path: Path, found: list[ErrorDetails], tree: Tree, root: type[Section]) -> list[Fault]:
    error = found[0]
    match error["type"]:
        case "extra_forbidden":
            return _unknown_key(path, tree, root)
        case "value_error":
            return [_section_fault(path, str(item.get("ctx", {}).get("error", item["msg"])), tree) for item in found]
        case "missing":
            return [_missing(path, tree, root)]
        case "union_tag_invalid" | "union_tag_not_found":
            return [_bad_variant(path, error, tree, root)]
    return [Fault(tree.place_of(path), dotted(path), _expectation(path, found, tree, root))]


def _expectation(path: Path, found: list[ErrorDetails], tree: Tree, root: type[Section]) -> str:
    got = show(_value_at(path, tree))
    expected: list[str] = []
    for error in found:
        words = _expected(error, path, tree, root)
        if words is None:
            return f"{error['msg']} (got {got})"
        expected += [words] if words not in expected else []
    text = f"expected {' or '.join(expected)} (got {got})"
    if found[0]["type"] in SECTION_TYPES:
        meant = SECTION_AS_VALUE.get(dotted(path))
        if not meant:
            return text
        return f"{text}; " + (f"{dotted(path)} as a value {meant.answer}" if meant.to else meant.answer)
    choices = [choice for error in found if error["type"] == "literal_error" for choice in _quoted(error)]
    guess = nearest(str(_value_at(path, tree)), choices)
    return f"{text}; did you mean {guess}?" if guess else text


def _expected(error: ErrorDetails, path: Path, tree: Tree, root: type[Section]) -> str | None:
    kind, context = error["type"], error.get("ctx", {})
    field = field_at(root, path, tree.values)
    if kind in LIMITS:
        (limit,) = context.values()
        return f"a number {LIMITS[kind]} {f'{limit:g}' if isinstance(limit, float) else limit}"
    if kind == "literal_error":
        choices = _quoted(error) or [str(context["expected"])]
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if kind == "string_pattern_mismatch" and field and field.description:
        return f"text: {field.description.rstrip('.')}"
    if kind in ("too_short", "too_long"):
        wanted = context.get("max_length", context.get("min_length"))
        return f"a list of {wanted}"
    if kind == "string_too_short":
        return "text that is not empty"
    return EXPECTED.get(kind)


def _quoted(error: ErrorDetails) -> list[str]:
    return re.findall(r"'([^']*)'", str(error.get("ctx", {}).get("expected", "")))


def _missing(path: Path, tree: Tree, root: type[Section]) -> Fault:
    place = tree.place_of(path)
    if isinstance(path[-1], int):
        parent = path[:-1]
        return Fault(place, dotted(parent), f"expected a longer list (got {show(_value_at(parent, tree))})")
    field = field_at(root, path, tree.values)
    meaning = f": {field.description}" if field and field.description else ""
    variants = ", ".join(variants_by_name(field)) if field else ""
    hint = f" Its name is one of {variants}." if variants else ""
    return Fault(place, dotted(path), f"missing{meaning}{hint}")


def _bad_variant(path: Path, error: ErrorDetails, tree: Tree, root: type[Section]) -> Fault:
    below = (*path, "name")
    field = field_at(root, path, tree.values)
    names = list(variants_by_name(field)) if field else []
    if error["type"] == "union_tag_not_found":
        return Fault(tree.place_of(below), dotted(below), f"missing: one of {', '.join(names)}")
    got = _value_at(below, tree)
    guess = nearest(str(got), names)
    hint = f"; did you mean {guess}?" if guess else ""
    return Fault(tree.place_of(below), dotted(below), f"expected one of {', '.join(names)} (got {show(got)}){hint}")


def _section_fault(path: Path, message: str, tree: Tree) -> Fault:
    """A fault of several keys together: it stands where the first of them that was overridden, or written, stands."""
    mentioned = [
        (*path, *word.split("."))
        for word in re.findall(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*", message)
        if (*path, *word.split(".")) in tree.places
    ]
    if not mentioned:
        return Fault(tree.place_of(path), dotted(path), message)
    overridden = [key for key in mentioned if tree.places[key].label.startswith("override ")]
    return Fault(tree.places[(overridden or mentioned)[0]], dotted(path), message)


def _unknown_key(path: Path, tree: Tree, root: type[Section]) -> list[Fault]:
    value = _value_at(path, tree)
    answer = _answer(path, tree, root)
    if isinstance(value, dict) and value and (answer is None or look_up(_names(path))):
        inside = [(below, _answer(below, tree, root)) for below, _ in _leaves(value, path)]
        answered = [Fault(tree.place_of(below), dotted(below), text) for below, text in inside if text]
        if answered:
            return answered
    return [Fault(tree.place_of(path), dotted(path), answer or _list_keys(path, tree, root))]


def _answer(path: Path, tree: Tree, root: type[Section]) -> str | None:
    """What to write instead of an unknown key, or None if nothing is like it."""
    name = _names(path)[-1]
    siblings = {key for section in sections_at(root, path[:-1], tree.values) for key in section.model_fields}
    here = nearest(name, siblings)
    variant = _other_variant(path, tree, root, instead_of=here)
    if variant:
        return variant
    renamed = look_up(_names(path))
    if renamed:
        return str(renamed)
    elsewhere = list(dict.fromkeys(key.dotted for key in walk(root) if key.path[-1] == name))
    if here and (not elsewhere or _similarity(name, here) >= 0.8):
        return f"unknown key; did you mean {dotted((*path[:-1], here))}?"
    if elsewhere:
        return f"unknown key here; it is {' or '.join(elsewhere[:3])}"
    everywhere = {key.path[-1]: key.dotted for key in walk(root)}
    far = nearest(name, everywhere, cutoff=0.8)
    return f"unknown key; did you mean {everywhere[far]}?" if far else None


def _other_variant(path: Path, tree: Tree, root: type[Section], *, instead_of: str | None) -> str | None:
    """Says so if the key is one of another variant of its section, or far more like one than like `instead_of`."""
    field = field_at(root, path[:-1], tree.values)
    variants = variants_by_name(field) if field else {}
    name = _names(path)[-1]
    meant = nearest(name, {key for section in variants.values() for key in section.model_fields}, cutoff=0.8)
    if meant is None or (instead_of and _similarity(name, instead_of) >= _similarity(name, meant)):
        return None
    owners = " or ".join(owner for owner, section in variants.items() if meant in section.model_fields)
    below = dotted((*path[:-1], "name"))
    assert field is not None
    about = f"a key of {below}: {owners}, but {below} is {variant_of(field, _value_at(path[:-1], tree))}"
    return about if meant == name else f"unknown key; did you mean {dotted((*path[:-1], meant))}? It is {about}"


def _list_keys(path: Path, tree: Tree, root: type[Section]) -> str:
    sections = sections_at(root, path[:-1], tree.values)
    keys = list(dict.fromkeys(key for section in sections for key in section.model_fields))
    where = dotted(path[:-1]) or "the top"
    return f"unknown key; {where} has {', '.join(keys)}"


def _similarity(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _names(path: Path) -> tuple[str, ...]:
    return tuple(part for part in path if isinstance(part, str))


def _value_at(path: Path, tree: Tree) -> Any:
    value: Any = tree.values
    for part in path:
        value = child(value, part)
    return value


def _leaves(values: Any, path: Path) -> list[tuple[Path, Any]]:
    if isinstance(values, dict):
        return [leaf for key, value in values.items() for leaf in _leaves(value, (*path, key))]
    if isinstance(values, list):
        return [leaf for index, value in enumerate(values) for leaf in _leaves(value, (*path, index))]
    return [(path, values)]
