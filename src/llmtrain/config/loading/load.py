"""Reads a config, from a file or by the name of one that ships, into a checked Config; and writes it as YAML.

    CONFIG ─▶ text ─▶ tree.py ─▶ overrides.py ─▶ interpolate.py ─▶ pydantic ─▶ Config
                                                                     └─▶ messages.py ─▶ ConfigError

All faults of a config are raised as one ConfigError that lists each with its line.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path as FilePath
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver

from llmtrain.config.loading.interpolate import escape, interpolate
from llmtrain.config.loading.messages import faults_of, faults_of_values, path_of
from llmtrain.config.loading.overrides import apply_overrides
from llmtrain.config.loading.renamed import old_config
from llmtrain.config.loading.tree import Tree, config_error, parse_file
from llmtrain.config.loading.walk import field_at, leaf_types
from llmtrain.config.sections.base import Section
from llmtrain.config.sections.schema import Config
from llmtrain.errors import ConfigError
from llmtrain.storage.address import is_remote, shown

log = logging.getLogger("llmtrain.config")

FILE_ENDINGS = (".yaml", ".yml", ".json")
AnySection = TypeVar("AnySection", bound=Section)


_YAML_1_1 = VersionedResolver(version=(1, 1))


class _Representer(SafeRepresenter):
    """Quotes text that some reader of YAML takes for something else.

    ruamel.yaml itself would read the line break NEL back as a space. A reader of YAML 1.1, as the Hub's is, takes `no`
    for false, and `1:30` for 90.
    """

    def represent_str(self, data: str) -> ScalarNode:
        tag = _YAML_1_1.resolve(ScalarNode, data, (True, False))
        is_text = str(tag) == "tag:yaml.org,2002:str" and data.lower() not in ("y", "n")
        style = '"' if "\x85" in data else None if is_text else "'"
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Representer.add_representer(str, _Representer.represent_str)


@dataclass(frozen=True, kw_only=True)
class LoadedConfig:
    """A config, and the text that it was made from."""

    config: Config
    source: str
    """The path as it was given, or the name of the shipped config."""
    as_written: str
    """The text of the file, before overrides and interpolation."""


def load_config(ref: str, overrides: Sequence[str] = (), *, say: bool = True) -> LoadedConfig:
    """Load a YAML or JSON file, or a config that ships with the package, and apply `key=value` overrides.

    A bare name such as `quickstart` is the shipped config; `./quickstart` is a file. `say`: log which keys of the file
    gave their place to overrides. Raises one ConfigError for all faults.
    """
    text, label = _read(ref)
    tree = parse_file(text, label=label, is_json=label.endswith(".json"))
    replaced = apply_overrides(tree, overrides)
    interpolate(tree)
    config = _check(tree)
    for line in replaced if say and os.environ.get("RANK", "0") == "0" else ():
        log.warning(line)
    return LoadedConfig(config=config, source=ref, as_written=text)


def section_of(kind: type[AnySection], values: Mapping[str, Any], *, name: str) -> AnySection:
    """Return the section `name`, made of values that stand in no file. Raises ConfigError for the first wrong value."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, (name, *first["loc"])))
        raise ConfigError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from error


def plain_config(overrides: Sequence[str]) -> Config:
    """Return a config of defaults and overrides alone, for work without data. Raises ConfigError as `load_config`."""
    tree = parse_file("data: {name: synthetic}", label="the defaults", is_json=False)
    apply_overrides(tree, overrides)
    return _check(tree)


def shipped_configs() -> dict[str, str]:
    """Return every config that ships with the package: its name, and the first line of its comment."""
    found = {}
    for file in _shipped_folder().iterdir():
        if file.name.endswith(".yaml"):
            first = file.read_text(encoding="utf-8").partition("\n")[0]
            found[file.name.removesuffix(".yaml")] = first.removeprefix("#").strip() if first.startswith("#") else ""
    return dict(sorted(found.items()))


def to_yaml(config: Config) -> str:
    """Return the config with every default filled in, in the order of the schema; it loads as an equal Config.

    Only what a signed link holds after its question mark is left out: it is a secret.
    """
    tree = Tree(label="", values=config.model_dump(mode="json"))
    for path, value in tree.leaves():
        if isinstance(value, str):
            tree.put(path, escape(shown(value) if is_remote(value) else value))
    return yaml_text(tree.values)


def yaml_text(values: Mapping[str, Any]) -> str:
    """Return plain values as YAML that every reader takes alike, in their order."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 10**6
    stream = StringIO()
    yaml.dump(dict(values), stream)
    return stream.getvalue()


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a config file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def _check(tree: Tree) -> Config:
    _leave_nulls_out(tree)
    faults = faults_of_values(tree)
    try:
        config = Config.model_validate(tree.values)
    except ValidationError as error:
        details = error.errors(include_url=False)
        if _take_as_text(details, tree):
            return _check(tree)
        known = [fault.key for fault in faults]
        found = faults_of(details, tree)
        faults += [fault for fault in found if not any(key == fault.key or key in fault.text for key in known)]
    if faults:
        raise config_error(faults)
    return config


def _leave_nulls_out(tree: Tree) -> None:
    """Remove each null whose key does not take null but has a default: null says that the key is not given."""
    for path, value in list(tree.leaves()):
        if value is None and path and isinstance(path[-1], str):
            field = field_at(Config, path, tree.values)
            if field and not field.is_required() and type(None) not in leaf_types(field.annotation):
                tree.drop(path)


def _take_as_text(errors: Sequence[ErrorDetails], tree: Tree) -> bool:
    """Replace unquoted numbers by their text where text is wanted (`precision: 32`, `run_id: 007`)."""
    changed = False
    for error in errors:
        path = path_of(error, tree)
        text = tree.texts.get(path)
        wanted = error["type"] == "string_type" or (
            error["type"] == "literal_error" and f"'{text}'" in str(error["ctx"]["expected"])
        )
        if wanted and text is not None:
            tree.put(path, text)
            del tree.texts[path]
            changed = True
    return changed


def _read(ref: str) -> tuple[str, str]:
    """Return the text of a config, and its name in messages."""
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
    if renamed := old_config(str(path)):
        hint = f"; {renamed}"
    return f"{path}: no such file, and no config of this name ships{hint} (there are: {', '.join(shipped)})"


def _shipped_folder() -> FilePath:
    return FilePath(__file__).parents[2] / "configs"
