"""Replaces the branches in a config's addresses of lakeFS by their commits, once, before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtrain.config.sections.base import Section
from llmtrain.config.sections.schema import Config
from llmtrain.errors import ConfigError
from llmtrain.storage.failures import StorageError
from llmtrain.storage.versions import at_commit

READ_FROM_STORES = ("model", "data", "prepare", "evaluation")
"""Sections whose addresses are read."""


def with_commits(config: Config, known: Mapping[str, str] | None = None) -> tuple[Config, dict[str, str]]:
    """Return `config` with the commit of each branch in its addresses of lakeFS, and the commits by branch.

    `known`: commits of an earlier start, which are kept. Raises ConfigError for a branch that is not there, or that
    these credentials may not see, and StorageError where lakeFS does not answer.
    """
    commits = dict(known or {})
    try:
        changed = {name: _resolved(getattr(config, name), commits) for name in READ_FROM_STORES}
    except (FileNotFoundError, PermissionError) as error:
        raise ConfigError(str(error)) from error
    except StorageError as error:
        raise StorageError(f"the branch cannot be resolved to its commit: {error}") from error
    changed = {name: value for name, value in changed.items() if value is not getattr(config, name)}
    return (config.model_copy(update=changed) if changed else config), commits


def _resolved(value: Any, commits: dict[str, str]) -> Any:
    """Return a value of a config with its addresses resolved; the same object where nothing changes."""
    if isinstance(value, str):
        resolved = at_commit(value, commits)
        return value if resolved == value else resolved
    if isinstance(value, list):
        items = [_resolved(one, commits) for one in value]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else items
    if isinstance(value, Section):
        fields = {name: getattr(value, name) for name in type(value).model_fields}
        changed = {name: new for name, old in fields.items() if (new := _resolved(old, commits)) is not old}
        return value.model_copy(update=changed) if changed else value
    return value
