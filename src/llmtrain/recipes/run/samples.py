"""What a model in training writes after the prompts of `tracking.samples`, at each evaluation, for its report.

    module in training ─ evaluation mode, not compiled ─▶ generate ─▶ <run>/samples.jsonl, a line a prompt ─▶ report

The first process alone writes, with the module itself, so that the others need not take part; where the module is cut
over them all do, and the first keeps what came of it. Random numbers are the samples' own: losses are the same with and
without them.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from llmtrain.config.errors import ConfigError
from llmtrain.config.running import SamplesConfig
from llmtrain.config.schema import Config
from llmtrain.distributed.engine import Engine
from llmtrain.evaluation.text import Completion
from llmtrain.files import append_lines
from llmtrain.recipes.loading.language_model import AnyModel, LanguageModel
from llmtrain.recipes.pages.document import SAMPLES_NAME
from llmtrain.recipes.run.live_model import live_model, writing

log = logging.getLogger("llmtrain.tracking")

KEY = "tracking.samples.prompts"


@dataclass
class Samples:
    """Lets a model in training write; a file that cannot be written gives one warning, and the run goes on."""

    model: LanguageModel
    settings: SamplesConfig
    seed: int
    engine: Engine
    failed: bool = False

    def check(self) -> None:
        """Ask for one token, so that what is wrong with the prompts is wrong before the run. Raises ConfigError."""
        try:
            self._ask(max_new_tokens=1)
        except ConfigError as error:
            raise ConfigError(f"{KEY}: {error}") from error

    def write(self, run: Path, *, step: int) -> None:
        """Append what the model writes now, after `step` steps. All ranks call it."""
        if not (self.engine.is_main or self.engine.cuts):
            return
        done = self._ask(max_new_tokens=self.settings.max_new_tokens)
        if self.failed or not self.engine.is_main:
            return
        turn = {"turn": True} if self.model.chats else {}
        lines = [{"step": step, "prompt": one.prompt, "completion": one.completion, **turn} for one in done]
        try:
            append_lines(run / SAMPLES_NAME, map(json.dumps, lines))
        except OSError as error:
            log.warning("%s cannot be written; the run goes on without it (%s)", run / SAMPLES_NAME, error.strerror)
            self.failed = True

    def _ask(self, *, max_new_tokens: int) -> list[Completion]:
        with writing(self.model.model, engine=self.engine):
            return self.model.generate(
                self.settings.prompts,
                max_new_tokens=max_new_tokens,
                temperature=self.settings.temperature,
                seed=self.seed,
                chat=self.model.chats,
            )


def samples_of(
    config: Config,
    module: AnyModel,
    *,
    tokenizer: Path | None,
    model_folder: Path | None,
    has_validation: bool,
    engine: Engine,
) -> Samples | None:
    """What writes the samples that `config` asks for, from `module` on its device; None if it asks for none.

    `model_folder` is where the model came from, if from transformers.
    Raises ConfigError where there is no text, or no evaluation.
    """
    settings = config.tracking.samples
    if not settings.prompts:
        return None
    if tokenizer is None:
        raise ConfigError(f"{KEY}: the data has no tokenizer, so that the model can write no text; remove the prompts")
    if not has_validation:
        raise ConfigError(f"{KEY} are asked at evaluations, and there is no validation data; name it in data.val")
    model = live_model(config, module, tokenizer_folder=tokenizer, model_folder=model_folder)
    samples = Samples(model, settings, seed=config.run.seed, engine=engine)
    samples.check()
    return samples
