"""Removes run folders for good, but never one in which a process trains.

    every ref → its folder, or nothing is removed at all ─▶ the caller asks ─▶ lock, rename, remove ─▶ latest

A folder is renamed while it is locked. From then on nobody finds it as a run, even if the removal of its files fails.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmtrain.atomic import follow
from llmtrain.errors import ConfigError, RunError
from llmtrain.runs.folders import find_run, is_locked, locked, point_to_latest
from llmtrain.runs.listing import describe_run, find_runs
from llmtrain.runs.stores import address_of, delete_run, fetched_runs
from llmtrain.runs.upload_owner import trains_elsewhere

REMOVED = ".removed-"


def remove_runs(
    refs: Sequence[str], *, root_dir: str = "runs", agree: Callable[[Sequence[Mapping[str, Any]]], bool]
) -> dict[str, Any]:
    """Remove the runs that `refs` name, if `agree` returns true for their descriptions (`describe_run`, and `used_by`).

    Returns `removed`, their ids, and `bytes`, their size. Raises ConfigError, and removes nothing, when one does not
    exist or trains. Raises RunError when a folder cannot be removed, and StorageError for one in a store.
    """
    folders = list(dict.fromkeys(_whole_run(ref, fetched_runs(root_dir, ref)) for ref in refs))
    training = [folder.name for folder in folders if is_locked(folder) or trains_elsewhere(folder)]
    if training:
        raise ConfigError(f"{', '.join(training)}: a process trains in it, so nothing is removed; stop it first")
    descriptions = [{**describe_run(folder), "used_by": _users(folder, besides=folders)} for folder in folders]
    if not agree(descriptions):
        return {"removed": [], "bytes": 0}
    for folder in folders:
        if address := address_of(folder):
            delete_run(address)
        remove_folder(folder)
    return {"removed": [run["id"] for run in descriptions], "bytes": sum(run["bytes"] for run in descriptions)}


def _whole_run(ref: str, root: Path) -> Path:
    folder, checkpoint = find_run(ref, root)
    if checkpoint is not None:
        raise ConfigError(f"{ref} is a checkpoint, and only whole runs are removed; its run is {folder.name}")
    return folder


def _users(folder: Path, *, besides: Sequence[Path]) -> list[str]:
    """Return the runs beside it whose config names a file in it, such as their initial model or an adapter's base."""
    needles = (f"/{folder.name}/", f"/{folder.name}\n")
    users = []
    for other in find_runs(folder.parent):
        with suppress(OSError):
            text = (other / "config.yaml").read_text(encoding="utf-8", errors="replace")
            if other not in besides and any(needle in text for needle in needles):
                users.append(other.name)
    return users


def remove_folder(folder: Path) -> None:
    """Remove a run's folder, and let `latest` point to another run. Raises RunError when it cannot be removed."""
    gone = folder.with_name(REMOVED + folder.name)
    latest = folder.parent / "latest"
    was_latest = follow(latest).name == folder.name
    try:
        with locked(folder):
            folder.rename(gone)
        (gone / "config.yaml").unlink()  # from here on it is no run, whatever else is left
        if was_latest:
            point_to_latest(folder.parent)
        shutil.rmtree(gone)
    except OSError as error:
        left = gone if gone.exists() else folder
        raise RunError(f"{left} cannot be removed ({error.strerror}); what is left of it is there") from error
