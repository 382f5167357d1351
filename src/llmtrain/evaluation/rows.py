"""Evaluates rows: models → questions → answers of both models → statistics → scores, comparison → files.

Answers are written as they come, so that an evaluation that was stopped can be continued: `evaluation_folder` finds an
unfinished one with the same questions, models and decoding.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.config.sections.evaluation import EvaluationConfig
from llmtrain.config.sections.schema import Config
from llmtrain.data.chat.parts import training_rows
from llmtrain.distributed.engine import Engine
from llmtrain.errors import ConfigError
from llmtrain.evaluation.answers import Answer, AnswerJournal, AnswerSettings, answer_all, render_questions, unique_keys
from llmtrain.evaluation.contamination import Overlap, find_overlaps
from llmtrain.evaluation.folder import evaluation_folder, write_evaluation
from llmtrain.evaluation.measured import Measured, measure
from llmtrain.evaluation.metrics import metrics_named
from llmtrain.evaluation.questions import Question, RenderedQuestion, read_questions
from llmtrain.evaluation.scores import scores
from llmtrain.generation.language_model import LanguageModel
from llmtrain.generation.open_model import (
    load_language_model,
    model_fingerprint,
)
from llmtrain.runs.stores import runs_folder
from llmtrain.screen import counted
from llmtrain.tracking.progress import Progress

log = logging.getLogger("llmtrain.eval")

MIXED = (
    "small differences between them may come from that. A GPU with bfloat16 computes both in one precision; elsewhere "
    "export the model with --dtype, so that the weights of both have the same"
)


@dataclass(frozen=True, kw_only=True)
class Subjects:
    """Folders of the models or adapters that are measured."""

    model: Path
    baseline: Path | None
    trained_on: Config | None
    """Config whose training rows are searched for the questions."""
    trusts_model: bool = False
    """True if the Python code that comes with the model may run."""
    trusts_baseline: bool = False


def evaluate_rows(
    subjects: Subjects, settings: EvaluationConfig, *, seed: int, root_dir: str, engine: Engine
) -> dict[str, Any]:
    """Evaluate the models and write all files; return the document of metrics.json on every rank.

    Raises ConfigError for faults of rows, and for a model that cannot answer questions.
    """
    began = time.monotonic()
    metrics_named(settings.metrics, **settings.metric_options)  # a wrong metric is rejected before models load
    questions = read_questions(settings.files, key="evaluation.data", max_samples=settings.max_samples)
    model = _load(subjects.model, engine, trusts_code=subjects.trusts_model)
    rendered = render_questions(questions, model, chat=settings.chat)
    precisions = [model.precision]
    identity = _identity(subjects, settings, rendered, seed=seed, precision=precisions[0])
    make_folder = partial(evaluation_folder, subjects.model, root=runs_folder(root_dir), identity=identity)
    folder = engine.from_main(make_folder)
    assert model.encoder is not None
    answer = partial(
        _answers,
        rendered=rendered,
        how=AnswerSettings.of(settings, seed=seed, end_of_turn=model.encoder.template.end_of_turn),
        engine=engine,
        folder=folder,
    )
    answers, baseline_answers = answer(model, name="model"), None
    if subjects.baseline is not None:
        del model  # so that only one model is in memory
        opened = _load(subjects.baseline, engine, trusts_code=subjects.trusts_baseline)
        precisions.append(opened.precision)
        if engine.is_main and len(set(precisions)) > 1:
            log.warning("the model computes in %s, but its baseline in %s: %s", *precisions, MIXED)
        baseline_answers = answer(opened, name="baseline")

    def conclude() -> dict[str, Any]:
        measured = measure(questions, answers, baseline_answers, settings, precisions=precisions, seed=seed)
        overlaps = (
            _overlaps(questions, subjects.trained_on) if settings.contamination else "evaluation.contamination is false"
        )
        document = {
            "model": str(subjects.model),
            "baseline": str(subjects.baseline) if subjects.baseline else None,
            "output": str(folder),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            **measured.document(),
            "contamination": _contamination(overlaps, measured),
            "settings": {**settings.model_dump(mode="json"), "seed": seed},
            "seconds": time.monotonic() - began,
        }
        write_evaluation(folder, document, measured.rows(overlaps if isinstance(overlaps, list) else []))
        return document

    return engine.from_main(conclude)


def _load(folder: Path, engine: Engine, *, trusts_code: bool) -> LanguageModel:
    return load_language_model(
        folder,
        device=engine.device,
        for_rows=True,
        trust_remote_code=trusts_code,
        precision=engine.resolved.precision,
    )


def _answers(
    language_model: LanguageModel,
    *,
    name: str,
    rendered: Sequence[RenderedQuestion],
    how: AnswerSettings,
    engine: Engine,
    folder: Path,
) -> list[Answer]:
    log.info("%s to the %s, %s", counted(len(rendered), "question"), name, language_model.folder)
    share = len(rendered[engine.rank :: engine.world_size])
    with Progress(quiet=not engine.is_main) as progress:
        return answer_all(
            language_model,
            rendered,
            how,
            engine=engine,
            journal=AnswerJournal(folder, name, rank=engine.rank),
            after_row=lambda done: progress.track(f"answers of the {name}", done, share),
        )


def _identity(
    subjects: Subjects, settings: EvaluationConfig, rendered: Sequence[RenderedQuestion], *, seed: int, precision: str
) -> str:
    """Return a hash that is equal for evaluations with the same answers, whatever their batch size and metrics."""
    decoding = settings.model_dump(mode="json", include={"max_new_tokens", "temperature", "top_p"})
    models = [model_fingerprint(folder) for folder in (subjects.model, subjects.baseline) if folder is not None]
    content = json.dumps([models, decoding, seed, precision, unique_keys(rendered)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


# -- contamination -----------------------------------------------------------------------------------------------------


def _overlaps(questions: Sequence[Question], config: Config | None) -> list[Overlap] | str:
    """Return the questions that are in the training rows, or the reason why these were not searched."""
    if config is None:
        return "the model's training data is not known"
    try:
        return find_overlaps(questions, training_rows(config))
    except ConfigError as error:
        return str(error)


def _contamination(overlaps: list[Overlap] | str, measured: Measured) -> dict[str, Any]:
    if isinstance(overlaps, str):
        return {"checked": False, "why": overlaps}
    exact = sum(overlap.kind == "exact" for overlap in overlaps)
    found: dict[str, Any] = {"checked": True, "rows": len(overlaps), "exact": exact, "13-gram": len(overlaps) - exact}
    if overlaps:
        found["named"] = [
            f"{measured.questions[overlap.question].source} = {overlap.trained_on} ({overlap.kind})"
            for overlap in overlaps
        ]
        clean = np.ones(len(measured.questions), np.bool_)
        clean[[overlap.question for overlap in overlaps]] = False
        found["scores_with"] = scores(measured.measures, measured.statistics)
        found["scores_without"] = scores(measured.measures, measured.statistics, clean) if clean.any() else None
    return found
