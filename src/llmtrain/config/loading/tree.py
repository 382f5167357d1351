"""A config as plain values, each with the place that it came from: `train.yaml:12`, or an override.

    text of a file ──parse_file──┐
                                 ├─▶ Tree(values, places, texts) ─▶ interpolate ─▶ pydantic (load.py)
    key=value ────put_override───┘

YAML 1.2 and JSON go through the same reader, which keeps line numbers. Nothing here knows the schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from llmtrain.config.loading.walk import Path, child, dotted
from llmtrain.errors import ConfigError
from llmtrain.screen import counted

CONSTRUCTED_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float"))
# YAML's timestamps and merge keys are read as the text that they are: the schema has neither.
TEXT_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("str", "timestamp", "merge", "value"))
MOST_VALUES = 200_000


class Place(NamedTuple):
    """Place in which something was written; sorts by file line, overrides after the file."""

    order: int
    label: str


class ConfigFault(NamedTuple):
    """One wrong key or value, for one line of the message."""

    place: Place
    key: str
    text: str


def config_error(faults: list[ConfigFault]) -> ConfigError:
    """Return all faults as one error, in the order of the file."""
    lines = [
        ": ".join(part for part in (fault.place.label, fault.key, fault.text) if part) for fault in sorted(set(faults))
    ]
    return ConfigError(
        lines[0] if len(lines) == 1 else "\n".join([f"{counted(len(lines), 'fault')} in the config", *lines])
    )


@dataclass(kw_only=True)
class Tree:
    """Values and places by path. `texts` holds how a scalar other than text was written (`1e-3`, `007`)."""

    label: str
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Path, Place] = field(default_factory=dict)
    texts: dict[Path, str] = field(default_factory=dict)

    def place_of(self, path: Path) -> Place:
        """Return the place of `path`, or of the nearest section around it that was written."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return Place(1, f"{self.label}:1")

    def get(self, path: Path) -> Any:
        """Return the value at `path`, or None."""
        value: Any = self.values
        for part in path:
            value = child(value, part)
        return value

    def put(self, path: Path, value: Any) -> None:
        """Set the value at `path`, whose parent exists."""
        self.get(path[:-1])[path[-1]] = value

    def drop(self, path: Path) -> None:
        """Remove the value at `path`, and everything below it."""
        parent = self.get(path[:-1])
        if isinstance(parent, dict):
            parent.pop(path[-1], None)
        for table in (self.places, self.texts):
            for known in [known for known in table if known[: len(path)] == path]:
                del table[known]

    def leaves(self, path: Path = ()) -> Iterator[tuple[Path, Any]]:
        """Yield the path and value of everything at or below `path` that is neither a mapping nor a list."""
        value = self.get(path)
        if not isinstance(value, dict | list):
            yield path, value
            return
        for part in list(value) if isinstance(value, dict) else range(len(value)):
            yield from self.leaves((*path, part))


def parse_file(text: str, *, label: str, is_json: bool) -> Tree:
    """Read a config file. `label` is its name in messages.

    Raises ConfigError with `label:line:column` for text that is not YAML 1.2 (or JSON), for duplicate keys, for an
    empty file and for one whose top is not a mapping.
    """
    tree = Tree(label=label, places={(): Place(1, f"{label}:1")})
    json_values = _json_values(text, label=label) if is_json else None
    # Valid JSON is valid YAML 1.2, except for tabs between tokens; JSON's strings contain none.
    node = _compose(text.replace("\t", " ") if is_json else text, label=label)
    if node is None:
        raise ConfigError(f"{label}:1:1: the file is empty; `llmtrain print-config quickstart` shows a whole config")
    if not isinstance(node, MappingNode):
        kind = "list" if isinstance(node, SequenceNode) else "single value"
        mark = node.start_mark
        raise ConfigError(
            f"{label}:{mark.line + 1}:{mark.column + 1}: the top of a config holds sections "
            f"(data:, model:, trainer:, …), but here it is a {kind}"
        )
    tree.values = _Reader(tree).read(node, ())
    if isinstance(json_values, dict):  # which has joined surrogate pairs, as YAML's escapes are not
        tree.values = json_values
    return tree


def put_override(tree: Tree, path: Path, text: str, *, place: Place) -> None:
    """Put the YAML in `text` at `path`, whose parents are mappings, in place of what is there.

    Raises ConfigError for text that is not YAML.
    """
    tree.drop(path)
    try:
        node = YAML(typ="safe", pure=True).compose(text)
    except (YAMLError, RecursionError) as error:
        raise ConfigError(
            f"{place.label}: the value is not YAML ({_problem(error)}); text with special characters needs quotes, "
            f"for the shell too: '{dotted(path)}=\"{text}\"'"
        ) from error
    tree.places[path] = place
    tree.put(path, None if node is None else _Reader(tree, override=place).read(node, path))


def read_scalar(text: str) -> Any:
    """Return what an unquoted scalar means in YAML 1.2: null, a boolean, a number, or text."""
    yaml = YAML(typ="safe", pure=True)
    tag = yaml.resolver.resolve(ScalarNode, text, (True, False))
    if str(tag) not in CONSTRUCTED_TAGS:
        return text
    return yaml.constructor.construct_object(ScalarNode(tag, text))


class _Reader:
    """Turns YAML nodes into values, and notes the place of each."""

    def __init__(self, tree: Tree, *, override: Place | None = None) -> None:
        self.tree = tree
        self.override = override
        self.faults: list[ConfigFault] = []
        self.open_nodes: set[int] = set()
        self.constructor = YAML(typ="safe", pure=True).constructor

    def read(self, node: Node, path: Path) -> Any:
        """Return the values below `node`. Raises ConfigError for everything that a config cannot hold."""
        values = self.value(node, path)
        if self.faults:
            raise config_error(self.faults)
        return values

    def place(self, node: Node) -> Place:
        line = node.start_mark.line + 1
        return self.override or Place(line, f"{self.tree.label}:{line}")

    def fault(self, node: Node, path: Path, text: str) -> None:
        self.faults.append(ConfigFault(self.place(node), dotted(path), text))

    def value(self, node: Node, path: Path) -> Any:
        self.tree.places.setdefault(path, self.place(node))
        if len(self.tree.places) > MOST_VALUES:  # aliases of aliases would fill the memory
            raise ConfigError(
                f"{self.place(node).label}: {dotted(path)}: the config has more than {MOST_VALUES:,} values"
            )
        if isinstance(node, ScalarNode):
            return self.scalar(node, path)
        if id(node) in self.open_nodes:
            raise ConfigError(f"{self.place(node).label}: {dotted(path)}: an alias that contains itself")
        self.open_nodes.add(id(node))
        if isinstance(node, SequenceNode):
            result: Any = [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        else:
            result = self.mapping(node, path)
        self.open_nodes.remove(id(node))
        return result

    def mapping(self, node: Node, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            below = (*path, key_node.value)
            if not isinstance(key_node, ScalarNode):
                self.fault(key_node, path, "a key must be plain text")
            elif key_node.value in result:
                self.fault(key_node, below, f"given twice; first at {self.tree.places[below].label}")
            else:
                self.tree.places[below] = self.place(key_node)
                result[key_node.value] = self.value(value_node, below)
        return result

    def scalar(self, node: ScalarNode, path: Path) -> Any:
        tag = str(node.tag)
        if tag in TEXT_TAGS:
            return node.value
        try:
            if tag not in CONSTRUCTED_TAGS:
                raise ValueError
            value = self.constructor.construct_object(node)
        except (ValueError, YAMLError):
            self.fault(node, path, f"the tag {node.tag} cannot be used here")
            return None
        if value is not None:
            self.tree.texts[path] = node.value
        return value


def _compose(text: str, *, label: str) -> Node | None:
    try:
        node: Node | None = YAML(typ="safe", pure=True).compose(text)
    except ReaderError as error:
        before = text[: error.position]
        column = len(before) - (before.rfind("\n") + 1) + 1
        raise ConfigError(
            f"{label}:{before.count(chr(10)) + 1}:{column}: a character that YAML does not allow "
            f"({error.character!r}); is this a text file?"
        ) from error
    except (YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{label}:{mark.line + 1}:{mark.column + 1}" if mark else label
        hint = "; indent with spaces, not tabs" if "'\\t'" in str(error) else ""
        raise ConfigError(f"{where}: not valid YAML: {_problem(error)}{hint}") from error
    return node


def _json_values(text: str, *, label: str) -> Any:
    try:
        return json.loads(text) if text.strip() else None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{label}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from error
    except RecursionError as error:
        raise ConfigError(f"{label}: not a config: {_problem(error)}") from error


def _problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if not isinstance(error, MarkedYAMLError):
        return str(error)
    return re.sub(r"\s+", " ", ", ".join(part for part in (error.context, error.problem) if part))
