"""What a page shows of runs, as plain values for JSON: curves, events, figures, config, environment, data.

    run folder: meta, config, summary, metrics, events, samples, eval/, the data's manifest ─▶ run_document ─┐
                                                                                       ▼
                                                              page_document ─▶ `report` (a file) and `ui` (live)

Nothing of it is needed for the run, so whatever is missing or damaged is left out, and named under `problems`.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmtrain._version import __version__
from llmtrain.config.errors import ConfigError
from llmtrain.data.manifest import find_manifest, read_manifest
from llmtrain.recipes.runs import describe_run, flat_config, json_object, side_by_side
from llmtrain.tracking.curves import DRAWN_POINTS, Curves, as_drawn, read_curves, tokens_by_step
from llmtrain.tracking.events import EVENTS_NAME, read_events
from llmtrain.tracking.redaction import redact
from llmtrain.training.runs import AS_WRITTEN

SAMPLES_NAME = "samples.jsonl"
MAX_EVENTS = 400
MAX_SAMPLES = 200
NO_CURVES = Curves()
_POINTS_OF_ALL_RUNS = 4 * DRAWN_POINTS


def page_document(folders: Sequence[Path]) -> dict[str, Any]:
    """One page about some runs: each of them, and the keys in which their configs differ."""
    num_points = max(DRAWN_POINTS // 4, min(DRAWN_POINTS, _POINTS_OF_ALL_RUNS // max(1, len(folders))))
    runs = [run_document(folder, num_points=num_points) for folder in folders]
    return {
        "version": __version__,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": runs,
        "differences": side_by_side([run["config"] for run in runs], only_different=True) if len(runs) > 1 else [],
    }


def run_document(folder: Path, *, num_points: int = DRAWN_POINTS) -> dict[str, Any]:
    """All that a page shows of one run; a curve has at most `num_points` points."""
    about = describe_run(folder)
    problems: list[str] = about.pop("problems")
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
    if summary.get("steps") != about["steps"]:  # of before the run went on
        summary = {}
    told = {
        **{key: value for key, value in about.items() if key != "folder"},
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
        **_finite(told),
        "curves": as_drawn(curves, num_points=num_points),
        "num_points": curves.num_points,
        "tokens_by_step": tokens_by_step(curves),
        "clock_began": curves.began,
        "events": told_events(events, curves),
        "followed_from": f"{curves.num_bytes}-{curves.file_id}",
    }


_SUMMARY_KEYS = (
    *("state", "resumed_from_step", "world_size", "tokens_per_sec", "first_loss", "skipped_steps", "parameters"),
    *("peak_memory_bytes", "goodput", "time_spent"),
)


def told_events(events: Sequence[Mapping[str, Any]], curves: Curves = NO_CURVES) -> list[dict[str, Any]]:
    """The newest events, the figures that were no numbers among them."""
    told = [{**event, "details": _details(event)} for event in events]
    told += [
        {"step": step, "event": "non-finite", "details": f"{name} was {what}"}
        for step, name, what in curves.non_finite[-MAX_EVENTS:]
    ]
    return sorted(told, key=lambda event: event["step"])[-MAX_EVENTS:]


def _details(event: Mapping[str, Any]) -> str:
    extra = {key: value for key, value in event.items() if key not in ("time", "step", "event") and value is not False}
    return ", ".join(key if value is True else f"{key} {value}" for key, value in extra.items())


def _evaluations(folder: Path) -> Iterator[dict[str, Any]]:
    """Scores and comparison out of each eval/<time>/metrics.json, the newest last; one of another kind whole."""
    for path in sorted(folder.glob("eval/*/metrics.json")):
        with contextlib.suppress(OSError, ValueError):
            document = json.loads(path.read_bytes())
            if isinstance(document, dict):
                is_ours = isinstance(document.get("scores"), dict) and isinstance(document.get("files"), dict)
                yield {"name": path.parent.name, **(_scores(document) if is_ours else {"metrics": document})}


def _scores(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a page shows of an evaluation of rows: no list of rows, no settings."""
    kept = {key: document.get(key) for key in ("time", "model", "baseline", "data", "rows", "scores", "comparison")}
    files = {
        name: {key: part.get(key) for key in ("rows", "scores")}
        for name, part in document["files"].items()
        if isinstance(part, dict) and isinstance(part.get("scores"), dict)
    }
    about = document.get("contamination")
    contamination = {key: about.get(key) for key in ("checked", "rows", "exact")} if isinstance(about, dict) else None
    return {**kept, "files": files, "contamination": contamination}


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The newest lines `{"step", "prompt", "completion"}` of samples.jsonl; the last ones of a step that came twice."""
    samples: dict[tuple[Any, Any], dict[str, Any]] = {}
    with contextlib.suppress(OSError):
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                line = json.loads(text)
                if isinstance(line["step"], int):
                    sample = {key: line[key] for key in ("step", "prompt", "completion")}
                    samples[line["step"], line["prompt"]] = sample | ({"turn": True} if line.get("turn") else {})
    return sorted(samples.values(), key=lambda sample: sample["step"])[-MAX_SAMPLES:]


def _text(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return None


def _environment(meta: Mapping[str, Any]) -> dict[str, Any]:
    """meta.json in the order in which people ask, by title."""
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
    """The sources that the config names, with what a manifest says of those that are token shards."""
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
    """The paths under a key that is a path, a list of them, or of {path, weight}."""
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


def _finite(value: Any) -> Any:
    """With None for what JSON has no number for, which a file of another's making may hold."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _epoch_seconds(value: Any) -> float | None:
    with contextlib.suppress(TypeError, ValueError):
        return datetime.fromisoformat(value).timestamp()
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
