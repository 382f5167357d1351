"""`runs`: all runs of a folder in a list, or some of them side by side. Needs no torch, and changes nothing.

What a kill or a stranger left in a run's files makes its figures None and is named under `problems`; it is no error.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from llmtrain.config.errors import ConfigError
from llmtrain.config.tree import parse_file
from llmtrain.files import follow
from llmtrain.tracking import metrics as names
from llmtrain.training.runs import find_run, is_locked, is_run

STATES = ("running", "finished", "preempted", "failed", "killed")
SORTS = (
    *("time", "id", "name", "state", "steps", "loss", "val_loss", "best_val_loss", "bits_per_byte"),
    *("tokens_per_sec", "tokens", "seconds", "bytes"),
)
_ASCENDING = ("id", "name", "state", "loss", "val_loss", "best_val_loss", "bits_per_byte")
"""For these the first of all is the one to look at: the lowest loss. For the others it is the highest."""
_TAIL_BYTES = 1 << 18
"""Of metrics.jsonl, what is read for the last figures: about a thousand lines."""


def list_runs(
    *,
    root_dir: str = "runs",
    sort: str = "time",
    states: Sequence[str] = (),
    find: str | None = None,
    limit: int | None = None,
    describe: Callable[[Path], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Every run below `root_dir`, the newest first, or ordered by one of SORTS. Other folders are passed over.

    `states`: only runs in one of these; `find`: only those with this text in id, name, notes or a tag, upper or lower
    case; `limit`: only the first so many; `describe`: instead of `describe_run`. Raises ConfigError when there is no
    such folder, sort or state.
    """
    if sort not in SORTS:
        raise ConfigError(f"runs cannot be sorted by {sort!r}; it should be one of {', '.join(SORTS)}")
    for state in states:
        if state not in STATES:
            raise ConfigError(f"{state!r} is no state of a run; it should be one of {', '.join(STATES)}")
    runs = [
        run
        for run in map(describe or describe_run, find_runs(Path(root_dir)))
        if (not states or run["state"] in states) and (find is None or find.lower() in _words(run))
    ]
    if sort not in _ASCENDING:
        runs.reverse()
    known = sorted(
        (run for run in runs if run[sort] is not None), key=lambda run: run[sort], reverse=sort not in _ASCENDING
    )
    return (known + [run for run in runs if run[sort] is None])[:limit]


def _words(run: Mapping[str, Any]) -> str:
    """Where `find` looks."""
    tags = run["tags"] if isinstance(run["tags"], list) else []
    return "\n".join(str(word) for word in (run["id"], run["name"], run["notes"], *tags) if word is not None).lower()


def find_runs(root: Path) -> list[Path]:
    """The run folders in `root`, by name. Raises ConfigError when there is no such folder."""
    if not root.is_dir():
        raise ConfigError(f"{root.absolute()}: there is no such folder; name the folder of runs with --root-dir")
    return [folder for folder in sorted(root.iterdir()) if is_run(folder) and not folder.is_symlink()]


def compare_runs(refs: Sequence[str], *, root_dir: str = "runs") -> dict[str, Any]:
    """Runs side by side: what each came to, the keys in which their configs differ, their curves, their newest
    evaluations and last figures.

    Raises ConfigError when one is not found.
    """
    from llmtrain.tracking.curves import means_by_step, read_curves  # here: a list of runs needs no numpy

    folders = [find_run(ref, Path(root_dir))[0] for ref in refs]
    runs = [describe_run(folder) for folder in folders]
    configs = [flat_config(folder, problems=run["problems"]) for folder, run in zip(folders, runs, strict=True)]
    figures = [last_figures(folder / "metrics.jsonl") for folder in folders]
    curves = [read_curves(folder / "metrics.jsonl", began=None) for folder in folders]
    return {
        "runs": runs,
        "config": side_by_side(configs, only_different=True),
        "curves": {
            name: means_by_step([one.by_name.get(name) for one in curves])
            for name in (names.TRAIN_LOSS, names.VAL_LOSS)
        },
        "evaluations": side_by_side([_newest_evaluation(folder) for folder in folders], only_different=False),
        "figures": [row for row in side_by_side(figures, only_different=False) if row["key"] != "time"],
    }


def _newest_evaluation(folder: Path) -> dict[str, Any]:
    """What `eval` measured last: scores by metric, of benchmarks by task and metric; {} where it never did."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("eval/*/metrics.json")):
        document = json_object(path, problems=[])
        scores, tasks = document.get("scores"), document.get("tasks")
        if isinstance(scores, dict):
            about = {"data": document.get("data"), "rows": document.get("rows")}
            found = {key: value for key, value in found.items() if "/" in key} | about | scores
        if isinstance(tasks, dict):
            for name, task in tasks.items():
                measured = task.get("scores") if isinstance(task, dict) else None
                found |= {f"{name}/{metric}": value for metric, value in (measured or {}).items()}
    return found


def describe_run(folder: Path) -> dict[str, Any]:
    """What is known of a run, with the same keys for each."""
    problems: list[str] = []
    meta = json_object(folder / "meta.json", problems=problems)
    ended = (folder / "summary.json").exists()
    summary = json_object(folder / "summary.json", problems=problems) if ended else {}
    figures = last_figures(folder / "metrics.jsonl")
    step = _number(figures.get("step"))
    steps = _number(summary.get("steps"))
    # A run that went on from where a summary was written, and was killed, is further than that.
    stale = step is not None and (steps is None or step > steps)
    if stale:
        summary = {}
    return {
        "id": folder.name,
        "name": _name(folder),
        "state": _state(folder, summary),
        "steps": step if stale else steps,
        "loss": _number(summary.get("last_loss"), figures.get(names.TRAIN_LOSS)),
        "val_loss": _number(summary.get("val_loss"), figures.get(names.VAL_LOSS)),
        "best_val_loss": _number(summary.get("best_val_loss"), _position(folder).get("best_val_loss")),
        "bits_per_byte": _number(figures.get(names.VAL_BITS_PER_BYTE)),
        "tokens_per_sec": _number(summary.get("tokens_per_sec"), figures.get(names.TRAIN_TOKENS_PER_SEC)),
        "tokens": _number(summary.get("tokens"), figures.get(names.TRAIN_TOKENS_TOTAL)),
        "seconds": _seconds(meta, summary, figures),
        "bytes": _size(folder),
        "time": meta.get("time") if isinstance(meta.get("time"), str) else None,
        "folder": str(folder.absolute()),
        "notes": meta.get("notes"),
        "tags": meta.get("tags"),
        "problems": problems,
    }


def last_figures(path: Path) -> dict[str, Any]:
    """The last value of each figure in a metrics.jsonl, and `step` and `time` of the last line; {} without a file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return {}
    figures: dict[str, Any] = {}
    for text in lines:
        with contextlib.suppress(ValueError):  # cut at the beginning of what was read, or by a kill
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                non_finite = line.pop("non_finite", None)
                figures |= line | (non_finite if isinstance(non_finite, dict) else {})
    return figures


def _state(folder: Path, summary: Mapping[str, Any]) -> Literal["running", "finished", "preempted", "failed", "killed"]:
    """Without a process that trains in it, and without a summary of its end, a run was killed."""
    if is_locked(folder):
        return "running"
    state = summary.get("state")
    return state if state in ("finished", "preempted", "failed") else "killed"


def _position(folder: Path) -> dict[str, Any]:
    """Where the newest checkpoint stands, and what it had measured until then; {} without one."""
    state = follow(folder / "checkpoints" / "latest") / "state.json"
    position = json_object(state, problems=[]).get("position")
    return position if isinstance(position, dict) else {}


def _seconds(meta: Mapping[str, Any], summary: Mapping[str, Any], figures: Mapping[str, Any]) -> float | None:
    """Of the process that ran; from its beginning to the last sign of life where there were several, or no summary."""
    seconds: float | None = _number(summary.get("seconds"))
    last: float | None = _number(figures.get("time"))
    if seconds is not None and summary.get("resumed_from_step") is None:
        return seconds
    with contextlib.suppress(TypeError, ValueError, KeyError):
        if last is not None:
            return max(0.0, last - datetime.fromisoformat(meta["time"]).timestamp())
    return seconds


def _number(*candidates: Any) -> Any:
    """The first that is a finite number."""
    for value in candidates:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return value
    return None


def _size(folder: Path) -> int:
    """Bytes of all files, each once; links are not followed, and what vanishes meanwhile is not counted."""
    sizes: dict[tuple[int, int], int] = {}
    for parent, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                status = os.lstat(os.path.join(parent, name))
                sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())


def json_object(path: Path, *, problems: list[str]) -> dict[str, Any]:
    """What the file holds; {} for no file, no JSON and no object, which is noted in `problems`."""
    try:
        document = json.loads(path.read_bytes())
        if isinstance(document, dict):
            return document
        problems.append(f"{path.name} holds no object")
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read ({error})")
    return {}


def _name(folder: Path) -> str | None:
    """`run.name`, from the few lines of config.yaml that hold it: a list of runs should not take seconds."""
    try:
        lines = (folder / "config.yaml").read_text(encoding="utf-8").splitlines()
        begin = lines.index("run:")
        end = next((index for index in range(begin + 1, len(lines)) if not lines[index].startswith(" ")), len(lines))
        values = parse_file("\n".join(lines[begin:end]), label="config.yaml", is_json=False).values
        return str(values["run"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def flat_config(folder: Path, *, problems: list[str]) -> dict[str, Any]:
    """The config's values by dotted key, as it lies there: it may be that of another version, so it is not checked."""
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        return _flat(parse_file(text, label="config.yaml", is_json=False).values)
    except (OSError, ValueError) as error:
        problems.append(f"config.yaml cannot be read ({error})")
        return {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key. Lists are values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def side_by_side(columns: Sequence[Mapping[str, Any]], *, only_different: bool) -> list[dict[str, Any]]:
    """A row a key, in the order in which they come: its value in each of the columns, None where there is none."""
    rows = []
    for key in dict.fromkeys(key for column in columns for key in column):
        values = [column.get(key) for column in columns]
        known = [key in column for column in columns]
        same = all(known) and all(value == values[0] for value in values)
        if not (only_different and same):
            rows.append({"key": key, "values": values})
    return rows
