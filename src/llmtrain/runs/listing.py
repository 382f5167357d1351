"""Lists the runs of a folder and says what is known of each, without torch and without changing anything.

A file that a kill or a stranger left damaged makes its values None and is named under `problems`; it is no error.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from llmtrain.atomic import follow
from llmtrain.config.loading.flat import flat
from llmtrain.config.loading.tree import parse_file
from llmtrain.config.sections.running import OutputConfig
from llmtrain.errors import ConfigError
from llmtrain.runs.folders import is_locked, is_run
from llmtrain.runs.json_files import json_lines, json_object
from llmtrain.runs.stores import CopyRecord, fetched_runs
from llmtrain.runs.upload_owner import trains_elsewhere
from llmtrain.tracking import metric_names as names

STATES = ("running", "finished", "preempted", "failed", "killed")
SORTS = (
    *("time", "id", "name", "state", "steps", "loss", "val_loss", "best_val_loss", "bits_per_byte"),
    *("tokens_per_sec", "tokens", "seconds", "bytes"),
)
_ASCENDING = ("id", "name", "state", "loss", "val_loss", "best_val_loss", "bits_per_byte")
"""Sorted with the lowest first, such as the lowest loss; the others with the highest first."""
_TAIL_BYTES = 1 << 18
"""End of metrics.jsonl that is read for the last metrics: about a thousand lines."""


def list_runs(
    *,
    root_dir: str = "runs",
    sort: str = "time",
    states: Sequence[str] = (),
    find: str | None = None,
    limit: int | None = None,
    describe: Callable[[Path], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Return every run below `root_dir`, the newest first, or ordered by one of SORTS. Other folders are left out.

    `states`: only runs in one of these. `find`: only runs with this text in id, name, notes or a tag, in upper or lower
    case. `limit`: only the first `limit` runs. `describe`: instead of `describe_run`. Raises ConfigError when there is
    no such folder, sort or state.
    """
    if sort not in SORTS:
        raise ConfigError(f"runs cannot be sorted by {sort!r}; it should be one of {', '.join(SORTS)}")
    for state in states:
        if state not in STATES:
            raise ConfigError(f"{state!r} is no state of a run; it should be one of {', '.join(STATES)}")
    runs = [
        run
        for run in map(describe or describe_run, find_runs(fetched_runs(root_dir)))
        if (not states or run["state"] in states) and (find is None or find.lower() in _words(run))
    ]
    if sort not in _ASCENDING:
        runs.reverse()
    known = sorted(
        (run for run in runs if run[sort] is not None), key=lambda run: run[sort], reverse=sort not in _ASCENDING
    )
    return (known + [run for run in runs if run[sort] is None])[:limit]


def _words(run: Mapping[str, Any]) -> str:
    """Return the text in which `find` looks."""
    tags = run["tags"] if isinstance(run["tags"], list) else []
    return "\n".join(str(word) for word in (run["id"], run["name"], run["notes"], *tags) if word is not None).lower()


def find_runs(root: Path) -> list[Path]:
    """Return the run folders in `root`, by name.

    Without runs yet, the folder that the first run makes if no other is named need not be there. Raises ConfigError
    for any other folder that is not there.
    """
    if not root.exists() and root == Path(OutputConfig.model_fields["root_dir"].default):
        return []
    if not root.is_dir():
        raise ConfigError(f"{root.absolute()}: there is no such folder; name the folder of runs with --root-dir")
    return [folder for folder in sorted(root.iterdir()) if is_run(folder) and not folder.is_symlink()]


def describe_run(folder: Path) -> dict[str, Any]:
    """Return what is known of a run, under the same keys for each."""
    problems: list[str] = []
    meta = json_object(folder / "meta.json", problems=problems)
    ended = (folder / "summary.json").exists()
    summary = json_object(folder / "summary.json", problems=problems) if ended else {}
    metrics = last_metrics(folder / "metrics.jsonl")
    step = _number(metrics.get("step"))
    steps = _number(summary.get("steps"))
    # A run that was resumed and killed after its summary was written is further than its summary.
    stale = step is not None and (steps is None or step > steps)
    if stale:
        summary = {}
    return {
        "id": folder.name,
        "name": _name(folder),
        "state": _state(folder, summary),
        "steps": step if stale else steps,
        "loss": _number(summary.get("last_loss"), metrics.get(names.TRAIN_LOSS)),
        "val_loss": _number(summary.get("val_loss"), metrics.get(names.VAL_LOSS)),
        "best_val_loss": _number(summary.get("best_val_loss"), _position(folder).get("best_val_loss")),
        "bits_per_byte": _number(metrics.get(names.VAL_BITS_PER_BYTE)),
        "tokens_per_sec": _number(summary.get("tokens_per_sec"), metrics.get(names.TRAIN_TOKENS_PER_SEC)),
        "tokens": _number(summary.get("tokens"), metrics.get(names.TRAIN_TOKENS_TOTAL)),
        "seconds": _seconds(meta, summary, metrics),
        "bytes": max(_size(folder), CopyRecord.of(folder).bytes),
        "time": meta.get("time") if isinstance(meta.get("time"), str) else None,
        "folder": str(folder.absolute()),
        "notes": meta.get("notes"),
        "tags": meta.get("tags"),
        "problems": problems,
    }


def last_metrics(path: Path) -> dict[str, Any]:
    """Return each metric's last value in a metrics.jsonl, and `step` and `time` of the last line; {} without a file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            content = file.read()
    except OSError:
        return {}
    metrics: dict[str, Any] = {}
    for line in json_lines(content):  # the first may be cut, since the file was not read from its beginning
        if line is not None and isinstance(line.get("step"), int):
            non_finite = line.pop("non_finite", None)
            metrics |= line | (non_finite if isinstance(non_finite, dict) else {})
    return metrics


def _state(folder: Path, summary: Mapping[str, Any]) -> Literal["running", "finished", "preempted", "failed", "killed"]:
    """Return the state; a run without a process that trains in it and without a summary of its end was killed."""
    if is_locked(folder) or trains_elsewhere(folder):
        return "running"
    state = summary.get("state")
    return state if state in ("finished", "preempted", "failed") else "killed"


def _position(folder: Path) -> dict[str, Any]:
    """Return the position of the newest checkpoint in the run and what was measured until then; {} without one."""
    state = follow(folder / "checkpoints" / "latest") / "state.json"
    position = json_object(state, problems=[]).get("position")
    return position if isinstance(position, dict) else {}


def _seconds(meta: Mapping[str, Any], summary: Mapping[str, Any], metrics: Mapping[str, Any]) -> float | None:
    """Return the seconds of the summary; without one those from the run's start to its last line."""
    seconds: float | None = _number(summary.get("seconds"))
    last: float | None = _number(metrics.get("time"))
    if seconds is None and last is not None:
        with contextlib.suppress(TypeError, ValueError, KeyError):
            return max(0.0, last - datetime.fromisoformat(meta["time"]).timestamp())
    return seconds


def _number(*candidates: Any) -> Any:
    """Return the first candidate that is a finite number."""
    for value in candidates:
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            return value
    return None


def _size(folder: Path) -> int:
    """Return the bytes of all files, each once, without following links or counting files that vanish meanwhile."""
    sizes: dict[tuple[int, int], int] = {}
    for parent, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                status = os.lstat(os.path.join(parent, name))
                sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())


def _name(folder: Path) -> str | None:
    """Return `run.name`."""
    name = config_section(folder, "run").get("name")
    return None if name is None else str(name)


def config_section(folder: Path, section: str) -> dict[str, Any]:
    """Return the values of a section of a run's config; {} where it cannot be read.

    Only the few lines of config.yaml that hold the section are parsed, so that lists of runs and probes are fast.
    """
    try:
        lines = (folder / "config.yaml").read_text(encoding="utf-8").splitlines()
        begin = lines.index(f"{section}:")
        end = next((index for index in range(begin + 1, len(lines)) if not lines[index].startswith(" ")), len(lines))
        values = parse_file("\n".join(lines[begin:end]), label="config.yaml", is_json=False).values[section]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return values if isinstance(values, dict) else {}


def flat_config(folder: Path, *, problems: list[str]) -> dict[str, Any]:
    """Return the config's values by dotted key. They are not validated, since another version may have written them."""
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        return flat(parse_file(text, label="config.yaml", is_json=False).values)
    except (OSError, ValueError) as error:
        problems.append(f"config.yaml cannot be read ({error})")
        return {}


def side_by_side(columns: Sequence[Mapping[str, Any]], *, only_different: bool) -> list[dict[str, Any]]:
    """Return one row for each key, in the order of the keys: its value in each column, None where it has none."""
    rows = []
    for key in dict.fromkeys(key for column in columns for key in column):
        values = [column.get(key) for column in columns]
        known = [key in column for column in columns]
        same = all(known) and all(value == values[0] for value in values)
        if not (only_different and same):
            rows.append({"key": key, "values": values})
    return rows
