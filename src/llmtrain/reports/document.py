"""Collects what a page shows of runs, as plain values for JSON: curves, events, results, config, environment, data.

    run folder: meta, config, summary, metrics, events, samples, eval/, the data's manifest ─▶ run_document ─┐
                                                                                       ▼
                                                              page_document ─▶ `report` (a file) and `ui` (live)

The run itself needs none of this, so whatever is missing or damaged is left out and named under `problems`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmtrain._version import __version__
from llmtrain.data.manifest import find_manifest, read_manifest
from llmtrain.errors import ConfigError
from llmtrain.runs.curves import DRAWN_POINTS, Curves, as_drawn, read_curves, tokens_by_step
from llmtrain.runs.events import EVENTS_NAME, read_events
from llmtrain.runs.folders import AS_WRITTEN
from llmtrain.runs.generated_samples import SAMPLES_NAME, read_samples
from llmtrain.runs.json_files import json_object, json_value
from llmtrain.runs.listing import describe_run, flat_config, side_by_side
from llmtrain.tracking.redaction import redact

MAX_EVENTS = 400
NO_CURVES = Curves()
_POINTS_OF_ALL_RUNS = 4 * DRAWN_POINTS
_SUMMARY_KEYS = (
    *("state", "resumed_from_step", "world_size", "tokens_per_sec", "first_loss", "skipped_steps", "parameters"),
    *("peak_memory_bytes", "goodput", "time_spent"),
)


def page_document(folders: Sequence[Path]) -> dict[str, Any]:
    """Return the document of one page: each run, and the keys in which their configs differ."""
    num_points = max(DRAWN_POINTS // 4, min(DRAWN_POINTS, _POINTS_OF_ALL_RUNS // max(1, len(folders))))
    runs = [run_document(folder, num_points=num_points) for folder in folders]
    return {
        "version": __version__,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": runs,
        "differences": side_by_side([run["config"] for run in runs], only_different=True) if len(runs) > 1 else [],
    }


def run_document(folder: Path, *, num_points: int = DRAWN_POINTS) -> dict[str, Any]:
    """Return all that a page shows of one run; a curve has at most `num_points` points."""
    description = describe_run(folder)
    problems: list[str] = description.pop("problems")
    meta = json_object(folder / "meta.json", problems=[])
    summary = json_object(folder / "summary.json", problems=[])
    config = redact(flat_config(folder, problems=problems))
    events = read_events(folder / EVENTS_NAME)
    curves = read_curves(
        folder / "metrics.jsonl",
        began=_epoch_seconds(meta.get("time")),
        resumes=[event["time"] for event in events if event["event"] == "resumed" and _is_number(event.get("time"))],
    )
    if curves.damaged_lines:
        problems.append(f"metrics.jsonl: {curves.damaged_lines} damaged lines are left out")
    if summary.get("steps") != description["steps"]:  # written before the run was resumed
        summary = {}
    shown = {
        **{key: value for key, value in description.items() if key != "folder"},
        "summary": {key: summary[key] for key in _SUMMARY_KEYS if key in summary},
        "evaluations": list(_evaluations(folder)),
        "samples": read_samples(folder / SAMPLES_NAME),
        "config": config,
        "config_as_written": _text(folder / AS_WRITTEN),
        "environment": redact(_environment(meta)),
        "data": _data(config, meta),
        "problems": problems,
    }
    return {
        **json_value(shown),
        "curves": as_drawn(curves, num_points=num_points),
        "num_points": curves.num_points,
        "tokens_by_step": tokens_by_step(curves),
        "clock_began": curves.began,
        "events": shown_events(events, curves),
        "followed_from": f"{curves.num_bytes}-{curves.file_id}",
    }


def shown_events(events: Sequence[Mapping[str, Any]], curves: Curves = NO_CURVES) -> list[dict[str, Any]]:
    """Return the newest events, with the metrics that were not finite among them."""
    shown = [{**event, "details": _details(event)} for event in events]
    shown += [
        {"step": step, "event": "non-finite", "details": f"{name} was {what}"}
        for step, name, what in curves.non_finite[-MAX_EVENTS:]
    ]
    return sorted(shown, key=lambda event: event["step"])[-MAX_EVENTS:]


def _details(event: Mapping[str, Any]) -> str:
    extra = {key: value for key, value in event.items() if key not in ("time", "step", "event") and value is not False}
    return ", ".join(key if value is True else f"{key} {value}" for key, value in extra.items())


def _evaluations(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield scores and comparison of each eval/<time>/metrics.json, the newest last; of another kind the whole file."""
    for path in sorted(folder.glob("eval/*/metrics.json")):
        with contextlib.suppress(OSError, ValueError):
            document = json.loads(path.read_bytes())
            if isinstance(document, dict):
                is_ours = isinstance(document.get("scores"), dict) and isinstance(document.get("files"), dict)
                yield {"name": path.parent.name, **(_scores(document) if is_ours else {"metrics": document})}


def _scores(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a page shows of an evaluation of rows: no list of rows, no settings."""
    kept = {key: document.get(key) for key in ("time", "model", "baseline", "data", "rows", "scores", "comparison")}
    files = {
        name: {key: part.get(key) for key in ("rows", "scores")}
        for name, part in document["files"].items()
        if isinstance(part, dict) and isinstance(part.get("scores"), dict)
    }
    found = document.get("contamination")
    contamination = {key: found.get(key) for key in ("checked", "rows", "exact")} if isinstance(found, dict) else None
    return {**kept, "files": files, "contamination": contamination}


def _text(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return None


def _environment(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return meta.json by titles, in the order in which people ask."""
    git = meta.get("git") if isinstance(meta.get("git"), dict) else {}
    argv = meta.get("argv")
    start = {
        "command": " ".join(["llmtrain", *map(str, argv[1:])]) if isinstance(argv, list) else None,
        "working folder": meta.get("working_folder"),
        "started": meta.get("time"),
        "host": meta.get("hostname"),
        **{f"commit of the {where.replace('_', ' ')}": _commit(state) for where, state in (git or {}).items()},
    }
    sections = {
        "Start": start,
        "Decided at the start": meta.get("resolved"),
        "Hardware": meta.get("hardware"),
        "Versions": meta.get("versions"),
        "Environment variables": meta.get("environment"),
    }
    return {title: values for title, values in sections.items() if isinstance(values, dict) and values}


def _commit(state: Any) -> str | None:
    if not isinstance(state, dict):
        return None
    return f"{state.get('sha')}{' with changes' if state.get('dirty') else ''}"


def _data(config: Mapping[str, Any], meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the sources that the config names, and for token shards what their manifest says."""
    home = Path(str(meta.get("working_folder") or "."))
    found: list[dict[str, Any]] = []
    seen: set[Path] = set()
    for split in ("train", "val"):
        for source in _sources(config, f"data.{split}"):
            folder = None if "://" in source else find_manifest(home / Path(source).expanduser())
            if folder is not None and folder not in seen:
                seen.add(folder)
                with contextlib.suppress(ConfigError):
                    found.append({"split": split, "source": source, **_manifest(folder)})
            elif folder is None:
                found.append({"split": split, "source": source})
    return found


def _sources(config: Mapping[str, Any], key: str) -> list[str]:
    """Return the paths under a key that is a path, or a list of paths or of {path, weight}."""
    value = config.get(key, config.get(f"{key}.path"))
    entries = value if isinstance(value, list) else [value]
    paths = [entry.get("path") if isinstance(entry, dict) else entry for entry in entries]
    return [path for path in paths if isinstance(path, str)]


def _manifest(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    return {
        "made_by": f"llmtrain {manifest.tool_version}",
        "tokenizer": manifest.tokenizer.model_dump(mode="json", exclude_none=True),
        "counts": manifest.counts.model_dump(mode="json"),
        "steps": [record.model_dump(mode="json") for record in manifest.steps],
        "splits": {
            name: {
                "documents": split.documents,
                "tokens": split.tokens,
                "bytes": split.bytes,
                "shards": len(split.shards),
            }
            for name, split in manifest.splits.items()
        },
        "inputs": [entry.model_dump(mode="json") for entry in manifest.inputs],
        "options": redact(manifest.options),
    }


def _epoch_seconds(value: Any) -> float | None:
    with contextlib.suppress(TypeError, ValueError):
        return datetime.fromisoformat(value).timestamp()
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
