"""The folder of an evaluation. An evaluation that was stopped is continued in its folder; metrics.json finishes it.

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

from llmtrain.atomic import replacing, write_json
from llmtrain.reports.evaluation_page import report_page
from llmtrain.runs.folders import is_run
from llmtrain.runs.json_files import json_value

log = logging.getLogger("llmtrain.eval")

PUBLISHED_NAME = "last-published.json"
"""File in the folder of all runs that names the last published model; `--baseline last-published` reads it."""


def evaluation_folder(model: Path, *, root: Path, identity: str) -> Path:
    """Return the folder of an unfinished evaluation of the same `identity`, or make a new one.

    It is in the run of `model`, or below `root` for a model of no run.
    """
    run = model.parent.parent.parent
    evaluations = run / "eval" if is_run(run) else root.absolute() / "eval"
    for begun in sorted(evaluations.glob("*/identity"), reverse=True):
        if begun.read_text(encoding="utf-8") == identity:
            log.info("continuing the evaluation in %s", begun.parent)
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
    """Write the three files. metrics.json is the last, so that it shows that all are complete."""
    _replace(folder / "predictions.jsonl", (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    _replace(folder / "report.html", [report_page(document, rows)])
    write_metrics(folder, document)


def write_metrics(folder: Path, document: Mapping[str, Any]) -> None:
    """Write metrics.json, which finishes an evaluation, and delete the files of unfinished ones in the folder."""
    write_json(folder / "metrics.json", json_value(document))
    for part in [*folder.glob("*.part-*.jsonl"), folder / "identity"]:
        part.unlink(missing_ok=True)


def _replace(path: Path, lines: Iterable[str]) -> None:
    with replacing(path) as file:
        file.writelines(line.encode() for line in lines)
