"""Set up what the config lets look at the model while it trains: questions, and samples of its text.

What these need is imported only then; most runs need none of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtrain.config.sections.schema import Config
from llmtrain.distributed.engine import Engine
from llmtrain.training.setup.data import Folders, RunData
from llmtrain.training.setup.trained import Trained

if TYPE_CHECKING:
    from llmtrain.evaluation.answers_in_training import AnswersInTraining
    from llmtrain.evaluation.samples_in_training import Samples


def open_answers(
    config: Config, engine: Engine, trained: Trained, folders: Folders, data: RunData
) -> AnswersInTraining | None:
    """Return the questions that the model is asked while it trains, if it is; raises ConfigError if it cannot be."""
    if config.evaluation.every_steps is None:
        return None
    from llmtrain.evaluation import answers_in_training

    tokenizer = data.training.facts.tokenizer
    return answers_in_training.open_answers(
        config, engine, trained.module, tokenizer=tokenizer, model_folder=folders.model
    )


def open_samples(config: Config, engine: Engine, trained: Trained, folders: Folders, data: RunData) -> Samples | None:
    """Return what lets the model write at evaluations, if it is to; raises ConfigError if it cannot."""
    if not config.tracking.samples.prompts:
        return None
    from llmtrain.evaluation import samples_in_training

    return samples_in_training.open_samples(
        config,
        engine,
        trained.module,
        tokenizer=data.training.facts.tokenizer,
        model_folder=folders.model,
        validates=data.validation is not None,
    )
