"""Reads an evaluation's metrics.json: the comparison with a baseline, and whether it shows an improvement."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.config.loading.renamed import old_value
from llmtrain.errors import ConfigError, RunError

_PARTS_IN_RUNS = 4
"""Number of last parts of a model's path that identify it in the folder of all runs: RUN/checkpoints/STEP/model."""


@dataclass(frozen=True)
class Evaluation:
    """One metrics.json."""

    file: Path
    document: Mapping[str, Any]

    @property
    def comparison(self) -> Mapping[str, Mapping[str, Any]]:
        """Results by metric: base, tuned, difference, low, high (95 %), wins, losses, ties, verdict; may be empty."""
        found: Mapping[str, Mapping[str, Any]] = self.document.get("comparison") or {}
        return found


def find_evaluation(folders: Iterable[Path], *, models: Sequence[Path]) -> Evaluation | None:
    """Return the newest evaluation of any of `models` in the eval/ folders; None if there is none.

    Evaluations with a comparison are preferred. A run that was moved is recognized by the end of its path.
    """
    found = []
    for file in sorted((path for folder in folders for path in folder.glob("*/metrics.json")), reverse=True):
        with suppress(OSError, ValueError):
            document = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(document, dict) and any(_is_of(document.get("model"), model) for model in models):
                found.append(Evaluation(file, document))
    return next((one for one in found if one.comparison), found[0] if found else None)


def check_improvement(evaluation: Evaluation | None, metric: str, *, how: str) -> None:
    """Raise RunError unless the comparison shows that `metric` is better. `how` is the command that compares."""
    if evaluation is None or not evaluation.comparison:
        raise RunError(f"not published: this model was not compared with a baseline yet: {how}")
    found = evaluation.comparison.get(metric)
    if found is None:
        renamed = old_value(("publish", "require_improvement"), metric)
        answer = f"{metric} {renamed.answer}; " if renamed else ""
        raise ConfigError(
            f"require_improvement {metric}: {answer}{evaluation.file} compares {', '.join(evaluation.comparison)}"
        )
    if any(found.get(key, 0.0) is None for key in ("base", "tuned", "difference", "low", "high")):
        raise RunError(
            f"not published: {metric} is not defined for these rows: their expected texts have nothing that it counts; "
            f"require another metric, such as chrf ({evaluation.file})"
        )
    if found.get("verdict") != "better":
        raise RunError(
            f"not published: {metric} is not shown to be better than the baseline's: {found['tuned']:.4g} against "
            f"{found['base']:.4g}, difference {found['difference']:+.4g}, 95 % interval "
            f"{found['low']:+.4g} to {found['high']:+.4g} ({evaluation.file})"
        )


def _is_of(named: Any, model: Path) -> bool:
    if not isinstance(named, str):
        return False
    parts = Path(named).parts
    in_run = "checkpoints" in parts[-_PARTS_IN_RUNS:]
    return Path(named) == model or (in_run and parts[-_PARTS_IN_RUNS:] == model.parts[-_PARTS_IN_RUNS:])
