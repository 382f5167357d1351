"""`runs rm`: run folders that are done with, removed for good; never one that a process trains in.

    every ref → its folder, or nothing is removed at all ─▶ the caller asks ─▶ lock, rename, remove ─▶ latest

A folder is renamed while it is locked, so that from then on nobody finds it as a run, whatever becomes of its files.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmtrain.config.errors import ConfigError, RunError
from llmtrain.files import follow
from llmtrain.recipes.runs import describe_run, find_runs
from llmtrain.training.runs import find_run, is_locked, locked, point_to_latest

REMOVED = ".removed-"


def remove_runs(
    refs: Sequence[str], *, root_dir: str = "runs", agree: Callable[[Sequence[Mapping[str, Any]]], bool]
) -> dict[str, Any]:
    """Remove the runs that `refs` name, if `agree` says so of what they are (as `describe_run`, with `used_by`).

    Returns `removed`, their ids, and `bytes`, what they took. Raises ConfigError, and removes nothing, when one is not
    there or trains; RunError when a folder cannot be removed.
    """
    root = Path(root_dir)
    folders = list(dict.fromkeys(_whole_run(ref, root) for ref in refs))
    training = [folder.name for folder in folders if is_locked(folder)]
    if training:
        raise ConfigError(f"{', '.join(training)}: a process trains in it, so nothing is removed; stop it first")
    about = [{**describe_run(folder), "used_by": _users(folder, besides=folders)} for folder in folders]
    if not agree(about):
        return {"removed": [], "bytes": 0}
    for folder in folders:
        _remove(folder)
    return {"removed": [one["id"] for one in about], "bytes": sum(one["bytes"] for one in about)}


def _whole_run(ref: str, root: Path) -> Path:
    folder, checkpoint = find_run(ref, root)
    if checkpoint is not None:
        raise ConfigError(f"{ref} is a checkpoint, and only whole runs are removed; its run is {folder.name}")
    return folder


def _users(folder: Path, *, besides: Sequence[Path]) -> list[str]:
    """Runs beside it whose config names something in it: a model that they begin from, an adapter's base."""
    needles = (f"/{folder.name}/", f"/{folder.name}\n")
    users = []
    for other in find_runs(folder.parent):
        with suppress(OSError):
            text = (other / "config.yaml").read_text(encoding="utf-8", errors="replace")
            if other not in besides and any(needle in text for needle in needles):
                users.append(other.name)
    return users


def _remove(folder: Path) -> None:
    gone = folder.with_name(REMOVED + folder.name)
    latest = folder.parent / "latest"
    was_latest = follow(latest).name == folder.name
    try:
        with locked(folder):
            folder.rename(gone)
        (gone / "config.yaml").unlink()  # whatever else is left, it is no run
        if was_latest:
            point_to_latest(folder.parent)
        shutil.rmtree(gone)
    except OSError as error:
        left = gone if gone.exists() else folder
        raise RunError(f"{left} cannot be removed ({error.strerror}); what is left of it is there") from error
