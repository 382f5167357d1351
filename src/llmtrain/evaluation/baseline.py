"""Finds the baseline of an evaluation: the base of the model, the model published last, or a named one."""

from __future__ import annotations

import json
from pathlib import Path

from llmtrain.config.sections.evaluation import AUTO_BASELINE, LAST_PUBLISHED, EvaluationConfig
from llmtrain.errors import ConfigError
from llmtrain.evaluation.folder import PUBLISHED_NAME
from llmtrain.generation.open_model import base_of, locate_model, tuned_from
from llmtrain.runs.stores import runs_folder


def find_base(folder: Path, *, trust_remote_code: bool = False) -> Path:
    """Return the folder of the model from which the one in `folder` was fine-tuned. Raises ConfigError without one."""
    base = tuned_from(folder, trust_remote_code=trust_remote_code)
    if base is None:
        raise ConfigError(
            f"evaluation.subject is base, but the model from which {folder} was tuned is not known: name the base"
        )
    return base


def find_baseline(
    folder: Path, settings: EvaluationConfig, *, root: str, trust_remote_code: bool = False
) -> Path | None:
    """Return the folder of the model that `settings.baseline` names; None if there is nothing to compare with.

    Raises ConfigError if it cannot be opened, or is the model itself.
    """
    if settings.baseline is None:
        return None
    if settings.baseline == AUTO_BASELINE:
        try:
            is_base = settings.subject == "base"
            return None if is_base else tuned_from(folder, trust_remote_code=trust_remote_code)
        except ConfigError as error:
            raise ConfigError(f"{error}. Name another --baseline, or compare with none: --no-baseline") from error
    ref = _last_published(root) if settings.baseline == LAST_PUBLISHED else settings.baseline
    try:
        baseline = locate_model(ref, root_dir=root, trust_remote_code=trust_remote_code)
        base_of(baseline, trust_remote_code=trust_remote_code)
    except ConfigError as error:
        if settings.baseline != LAST_PUBLISHED:
            raise
        raise ConfigError(
            f"the model published last, {ref} (see {runs_folder(root) / PUBLISHED_NAME}), cannot be opened: {error}. "
            "Name another --baseline, or compare with none: --no-baseline"
        ) from error
    if baseline == folder:
        raise ConfigError(
            f"evaluation.baseline: {settings.baseline} is the model itself, {folder}: name another --baseline, or "
            "compare with none: --no-baseline"
        )
    return baseline


def _last_published(root: str) -> str:
    file = runs_folder(root) / PUBLISHED_NAME
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["model"])
    except FileNotFoundError:
        raise ConfigError(
            f"nothing was published from {file.parent.absolute()} yet: there is no {file.name}; name another --baseline"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} does not say what was published last ({error!r})") from error
