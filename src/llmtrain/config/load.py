"""From a file, or the name of a config that ships, to a checked Config; and back to YAML.

    CONFIG ─▶ text ─▶ tree.py ─▶ overrides.py ─▶ interpolate.py ─▶ pydantic ─▶ Config
                                                                     └─▶ faults.py ─▶ ConfigError

Everything that is wrong comes out as one ConfigError that lists each fault with its line.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from io import StringIO
from pathlib import Path as FilePath
from typing import Any, TypeVar

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from llmtrain.config.base import Section
from llmtrain.config.errors import ConfigError
from llmtrain.config.faults import booleans_for_numbers, faults_of, path_of
from llmtrain.config.interpolate import escape, interpolate
from llmtrain.config.overrides import apply_overrides
from llmtrain.config.schema import Config
from llmtrain.config.tree import Tree, config_error, parse_file

FILE_ENDINGS = (".yaml", ".yml", ".json")
AnySection = TypeVar("AnySection", bound=Section)


class _Representer(SafeRepresenter):
    """Quotes text with the line break NEL, which ruamel.yaml would otherwise write plain and read back as a space."""

    def represent_str(self, data: str) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if "\x85" in data else None)


_Representer.add_representer(str, _Representer.represent_str)


@dataclass(frozen=True, kw_only=True)
class LoadedConfig:
    """A config, and what it was made from."""

    config: Config
    source: str
    """The path as it was given, or the name of the config that ships."""
    as_written: str
    """The text of the file, before overrides and interpolation."""


def load_config(ref: str, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Loads a YAML or JSON file, or a config that ships with the package, and applies `key=value` overrides.

    A bare name such as `quickstart` is the config that ships; `./quickstart` is a file.
    Raises ConfigError for whatever is wrong, all faults at once.
    """
    text, label = _read(ref)
    tree = parse_file(text, label=label, is_json=label.endswith(".json"))
    apply_overrides(tree, overrides, root=Config)
    interpolate(tree)
    return LoadedConfig(config=_check(tree), source=ref, as_written=text)


def section_of(kind: type[AnySection], values: Mapping[str, Any], *, name: str) -> AnySection:
    """The section `name` of values that stand in no file. Raises ConfigError for the first that cannot be."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, (name, *first["loc"])))
        raise ConfigError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from error


def plain_config(overrides: Sequence[str]) -> Config:
    """A config of defaults and overrides alone, for what needs no data of its own. Raises ConfigError as above."""
    tree = parse_file("data: {name: synthetic}", label="the defaults", is_json=False)
    apply_overrides(tree, overrides, root=Config)
    return _check(tree)


def shipped_configs() -> dict[str, str]:
    """Name → first line of its comment, of every config that ships with the package."""
    found = {}
    for file in _shipped_folder().iterdir():
        if file.name.endswith(".yaml"):
            first = file.read_text(encoding="utf-8").partition("\n")[0]
            found[file.name.removesuffix(".yaml")] = first.removeprefix("#").strip() if first.startswith("#") else ""
    return dict(sorted(found.items()))


def to_yaml(config: Config) -> str:
    """The config with every default filled in, in the order of the schema; loads back to an equal Config."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 10**6
    stream = StringIO()
    yaml.dump(_escaped(config.model_dump(mode="json")), stream)
    return stream.getvalue()


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a config file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def _check(tree: Tree) -> Config:
    try:
        config = Config.model_validate(tree.values)
    except ValidationError as error:
        if _take_as_text(error, tree):
            return _check(tree)
        faults = faults_of(error.errors(include_url=False), tree, root=Config)
        raise config_error([*faults, *booleans_for_numbers(tree, root=Config)]) from None
    faults = booleans_for_numbers(tree, root=Config)
    if faults:
        raise config_error(faults)
    return config


def _take_as_text(error: ValidationError, tree: Tree) -> bool:
    """Where text is wanted and an unquoted number stands (`precision: 32`, `run_id: 007`), takes it as written."""
    changed = False
    for fault in error.errors(include_url=False):
        path = path_of(fault, tree)
        text = tree.texts.get(path)
        wanted = fault["type"] == "string_type" or (
            fault["type"] == "literal_error" and f"'{text}'" in str(fault["ctx"]["expected"])
        )
        if wanted and text is not None:
            tree.put(path, text)
            del tree.texts[path]
            changed = True
    return changed


def _read(ref: str) -> tuple[str, str]:
    """The text of a config, and its name in messages."""
    if ref in shipped_configs():
        return (_shipped_folder() / f"{ref}.yaml").read_text(encoding="utf-8"), f"{ref}.yaml"
    path = FilePath(ref)
    try:
        return path.read_text(encoding="utf-8-sig"), ref
    except FileNotFoundError:
        raise ConfigError(_not_found(path)) from None
    except IsADirectoryError:
        inside = path / "config.yaml"
        hint = f"; its config is {inside}" if inside.is_file() else ""
        raise ConfigError(f"{ref}: a folder, where a config file was expected{hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{ref}: not a text file in UTF-8 (byte {error.start})") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{ref}: cannot be read: {error}") from None


def _not_found(path: FilePath) -> str:
    shipped = list(shipped_configs())
    folder = path.parent
    beside = [str(file) for file in folder.iterdir() if file.suffix in FILE_ENDINGS] if folder.is_dir() else []
    by_name = {FilePath(name).stem.lower(): name for name in [*shipped, *beside]}
    close = difflib.get_close_matches(path.stem.lower(), by_name, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(by_name[name] for name in close)}?" if close else ""
    return f"{path}: no such file, and no config of this name ships{hint} (there are: {', '.join(shipped)})"


def _shipped_folder() -> Any:
    return resources.files("llmtrain") / "configs"


def _escaped(values: Any) -> Any:
    if isinstance(values, str):
        return escape(values)
    if isinstance(values, dict):
        return {key: _escaped(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_escaped(value) for value in values]
    return values
