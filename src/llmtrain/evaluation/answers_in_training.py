"""Lets a model answer a sample of evaluation.data while it trains, and measures the answers as `eval` does.

The model answers with its present weights: on a GPU, or if it is sharded, in the precision of training, else in that of
the weights. All processes answer every question together if it is sharded. This does not change the training: it has
random generators of its own.
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
from llmtrain.evaluation.answers import Answer, AnswerSettings, answer_all, render_questions
from llmtrain.evaluation.live_model import live_model, writing
from llmtrain.evaluation.metrics import metrics_named
from llmtrain.evaluation.questions import Question, RenderedQuestion, read_questions
from llmtrain.evaluation.scores import measures_of, row_statistics, scores
from llmtrain.generation.language_model import AnyModel, LanguageModel


@dataclass(frozen=True, kw_only=True)
class AnswersInTraining:
    """The questions of a run in training, and the model that answers them."""

    language_model: LanguageModel
    questions: Sequence[Question]
    rendered: Sequence[RenderedQuestion]
    settings: EvaluationConfig
    seed: int
    engine: Engine

    def generate(self, *, before_batch: Callable[[], None]) -> list[Answer]:
        """Return an answer to each question, on every rank. `before_batch` is called equally often on every rank."""
        assert self.language_model.encoder is not None
        with writing(self.language_model.model, engine=self.engine):
            return answer_all(
                self.language_model,
                self.rendered,
                AnswerSettings.of(
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
        metrics = metrics_named(settings.metrics, **settings.metric_options)
        statistics = row_statistics(pairs, settings.metrics, **settings.metric_options)
        found = scores(measures_of(metrics, with_loss=False), statistics)
        return {name_in_training(name): value for name, value in found.items()}


def open_answers(
    config: Config, engine: Engine, model: AnyModel, *, tokenizer: Path | None, model_folder: Path | None
) -> AnswersInTraining:
    """Return the questions of evaluation.data and the settings by which `model` answers them.

    `model_folder` is the folder from which the model was loaded, if it is one of transformers. Raises ConfigError for
    faults of rows, metrics that do not exist, and a model without a tokenizer.
    """
    settings = config.evaluation
    if tokenizer is None:
        raise ConfigError(
            "evaluation.every_steps: the data has no tokenizer, so the model cannot answer: remove the key"
        )
    metrics_named(settings.metrics, **settings.metric_options)
    language_model = live_model(
        config, model, engine=engine, tokenizer_folder=tokenizer, model_folder=model_folder, for_rows=True
    )
    questions = read_questions(settings.files, key="evaluation.data", max_samples=settings.max_samples)
    if len(questions) > settings.train_samples:
        chosen = random.Random(config.run.seed).sample(range(len(questions)), settings.train_samples)
        questions = [questions[row] for row in sorted(chosen)]
    return AnswersInTraining(
        language_model=language_model,
        questions=questions,
        rendered=render_questions(questions, language_model, chat=settings.chat),
        settings=settings,
        seed=config.run.seed,
        engine=engine,
    )
