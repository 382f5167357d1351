"""Where an evaluation writes: found again where one like it was stopped, and finished with metrics.json.

<run>/eval/<time>/{metrics.json, predictions.jsonl, report.html}
                  {identity, *.part-*.jsonl} until it is finished
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.evaluation.report import report_page
from llmtrain.tracking.summary import write_json
from llmtrain.training.runs import is_run

log = logging.getLogger("llmtrain.eval")


def evaluation_folder(model: Path, *, root: Path, identity: str) -> Path:
    """A new folder in the run of `model`, or below `root` for a model of no run; or the one in which an evaluation of
    the same `identity` was begun and not finished."""
    run = model.parent.parent.parent
    evaluations = run / "eval" if is_run(run) else root.absolute() / "eval"
    for begun in sorted(evaluations.glob("*/identity"), reverse=True):
        if begun.read_text(encoding="utf-8") == identity:
            log.info("going on with %s", begun.parent)
            return begun.parent
    name = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder, number = evaluations / name, 1
    while folder.exists():
        number += 1
        folder = evaluations / f"{name}-{number}"
    folder.mkdir(parents=True)
    (folder / "identity").write_text(identity, encoding="utf-8")
    return folder


def write_evaluation(folder: Path, document: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """The three files; metrics.json last: it says that all is there."""
    _replace(folder / "predictions.jsonl", (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    _replace(folder / "report.html", [report_page(document, rows)])
    write_figures(folder, document)


def write_figures(folder: Path, document: Mapping[str, Any]) -> None:
    """metrics.json, which ends an evaluation."""
    write_json(folder / "metrics.json", _finite(document))
    for part in [*folder.glob("*.part-*.jsonl"), folder / "identity"]:
        part.unlink(missing_ok=True)


def _replace(path: Path, lines: Iterable[str]) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(lines)
    part.replace(path)


def _finite(value: Any) -> Any:
    """What is not finite is null, as JSON wants it."""
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
