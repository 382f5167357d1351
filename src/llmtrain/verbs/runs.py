"""`runs`: list the runs of a folder, compare some of them, or remove some. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtrain.errors import ConfigError
from llmtrain.runs.folders import find_run, is_run
from llmtrain.runs.json_files import json_object
from llmtrain.runs.listing import describe_run, flat_config, last_metrics, list_runs, side_by_side
from llmtrain.runs.removal import remove_runs
from llmtrain.runs.stores import address_of, fetch_run, fetched_runs, runs_folder
from llmtrain.runs.upload import upload_run
from llmtrain.storage.address import is_remote
from llmtrain.tracking import metric_names as names

__all__ = ["compare_runs", "holds_runs", "list_runs", "remove_runs", "upload_runs"]


def holds_runs(ref: str) -> bool:
    """Return whether `ref` is the address of a folder of runs rather than of a run. Raises StorageError."""
    return is_remote(ref) and fetch_run(ref) is None


def upload_runs(refs: Sequence[str], *, root_dir: str = "runs") -> list[dict[str, Any]]:
    """Upload what the stores of runs lack, from their copies on this machine. Return address and objects of each.

    Raises ConfigError where there is no copy or the run trains, and RunError where the store fails or has another
    course of the run.
    """
    if not refs:
        raise ConfigError("runs upload: name the runs to upload, by address, or by id with --root-dir")
    folders = [runs_folder(ref if is_remote(ref) else f"{root_dir.rstrip('/')}/{ref}") for ref in refs]
    for folder, ref in zip(folders, refs, strict=True):
        if not is_run(folder):
            raise ConfigError(f"{ref}: this machine has no copy of such a run in {folder}")
    return [{"address": address_of(folder), "objects": upload_run(folder)} for folder in folders]


def compare_runs(refs: Sequence[str], *, root_dir: str = "runs") -> dict[str, Any]:
    """Return runs side by side: the result of each, the keys in which their configs differ, their curves, their newest
    evaluations and last metrics.

    Raises ConfigError when one is not found.
    """
    from llmtrain.runs.curves import mean, newest, read_curves, values_by_step  # here: a list of runs needs no numpy

    folders = [find_run(ref, fetched_runs(root_dir, ref))[0] for ref in refs]
    runs = [describe_run(folder) for folder in folders]
    configs = [flat_config(folder, problems=run["problems"]) for folder, run in zip(folders, runs, strict=True)]
    metrics = [last_metrics(folder / "metrics.jsonl") for folder in folders]
    curves = [read_curves(folder / "metrics.jsonl", began=None) for folder in folders]
    return {
        "runs": runs,
        "config": side_by_side(configs, only_different=True),
        "curves": {
            name: values_by_step([one.by_name.get(name) for one in curves], take=take)
            for name, take in ((names.TRAIN_LOSS, mean), (names.VAL_LOSS, newest))
        },
        "evaluations": side_by_side([_newest_evaluation(folder) for folder in folders], only_different=False),
        "metrics": [row for row in side_by_side(metrics, only_different=False) if row["key"] != "time"],
    }


def _newest_evaluation(folder: Path) -> dict[str, Any]:
    """Return what `eval` measured last: scores by metric, those of benchmarks by task and metric; {} without any."""
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
