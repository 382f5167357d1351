"""Asking a model while it trains: a sample of evaluation.data, answered now and then, and measured as `eval` does.

The weights are those of the moment, and the precision is that of the weights; of training, where they are cut over the
processes, which then answer every question together. Asking changes nothing of the training: it draws from generators
of its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtrain.config.sections.evaluation import EvaluationConfig, name_in_training
from llmtrain.config.sections.schema import Config
from llmtrain.distributed.engine import Engine
from llmtrain.errors import ConfigError
from llmtrain.evaluation.answers import Answer, Asking, answer_all, ask_all
from llmtrain.evaluation.live_model import live_model, writing
from llmtrain.evaluation.metrics import metrics_named
from llmtrain.evaluation.questions import Asked, Question, read_questions
from llmtrain.evaluation.scores import measures_of, row_statistics, scores
from llmtrain.generation.language_model import AnyModel, LanguageModel


@dataclass(frozen=True, kw_only=True)
class Interview:
    """The questions of a run, and the model that is asked."""

    language_model: LanguageModel
    questions: Sequence[Question]
    asked: Sequence[Asked]
    settings: EvaluationConfig
    seed: int
    engine: Engine

    def hold(self, *, before_batch: Callable[[], None]) -> list[Answer]:
        """An answer to each question, on every rank. `before_batch` is called as often on each of them."""
        assert self.language_model.encoder is not None
        with writing(self.language_model.model, engine=self.engine):
            return answer_all(
                self.language_model,
                self.asked,
                Asking.of(
                    self.settings,
                    seed=self.seed,
                    end_of_turn=self.language_model.encoder.template.end_of_turn,
                    with_loss=False,
                ),
                engine=self.engine,
                before_batch=before_batch,
            )

    def metrics(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Return the metrics of the answers, by their names for sinks."""
        settings = self.settings
        pairs = [(answer.prediction, row.expected) for answer, row in zip(answers, self.questions, strict=True)]
        metrics = metrics_named(settings.metrics, ignore_case=settings.ignore_case)
        statistics = row_statistics(pairs, settings.metrics, ignore_case=settings.ignore_case)
        found = scores(measures_of(metrics, with_loss=False), statistics)
        return {name_in_training(name): value for name, value in found.items()}


def open_interview(
    config: Config, engine: Engine, model: AnyModel, *, tokenizer: Path | None, model_folder: Path | None
) -> Interview:
    """Return the questions that `config` wants the model to be asked while it trains, and the model that is asked.

    `model_folder` is where the model came from, if from transformers. Raises ConfigError for faults of rows, metrics
    that do not exist, and a model that cannot be asked.
    """
    settings = config.evaluation
    if tokenizer is None:
        raise ConfigError("evaluation.every_steps: the data have no tokenizer, so the model cannot be asked anything")
    metrics_named(settings.metrics, ignore_case=settings.ignore_case)
    language_model = live_model(config, model, tokenizer_folder=tokenizer, model_folder=model_folder, for_rows=True)
    questions = read_questions(settings.files, key="evaluation.data", max_samples=settings.max_samples)
    if len(questions) > settings.train_samples:
        chosen = random.Random(config.run.seed).sample(range(len(questions)), settings.train_samples)
        questions = [questions[row] for row in sorted(chosen)]
    return Interview(
        language_model=language_model,
        questions=questions,
        asked=ask_all(questions, language_model, chat=settings.chat),
        settings=settings,
        seed=config.run.seed,
        engine=engine,
    )
