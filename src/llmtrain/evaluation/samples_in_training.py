"""Let a model in training complete the prompts of `tracking.samples` at each evaluation, for its report.

    module in training ─ evaluation mode, not compiled ─▶ generate ─▶ <run>/samples.jsonl, a line a prompt ─▶ report

The first process alone writes, with the module itself, so that the others need not take part; where the module is
sharded they all do, and the first keeps the texts. Random numbers are the samples' own: losses are the same with and
without them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtrain.atomic import append_lines
from llmtrain.config.sections.running import SamplesConfig
from llmtrain.config.sections.schema import Config
from llmtrain.distributed.engine import Engine
from llmtrain.errors import ConfigError
from llmtrain.evaluation.live_model import live_model, writing
from llmtrain.generation.completion import Completion
from llmtrain.generation.language_model import AnyModel, LanguageModel
from llmtrain.runs.generated_samples import SAMPLES_NAME

log = logging.getLogger("llmtrain.tracking")

KEY = "tracking.samples.prompts"
BATCH_SIZE = 16
BATCH_TOKENS = 4096
"""Largest number of prompts, and of new tokens in all, between two meetings of the ranks."""


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
            self._ask(self.settings.prompts, seed=self.seed, max_new_tokens=1)
        except ConfigError as error:
            raise ConfigError(f"{KEY}: {error}") from error

    def write(self, run: Path, *, step: int, before_batch: Callable[[], None]) -> None:
        """Append what the model writes now, after `step` steps. All ranks call it.

        `before_batch` is called equally often on every rank. There the ranks meet, so those that do not write never
        wait longer than a batch takes, and a signal need not wait for all of them.
        """
        done: list[Completion] = []
        limit = self.settings.max_new_tokens
        batch_size = min(BATCH_SIZE, max(1, BATCH_TOKENS // limit))
        for first in range(0, len(self.settings.prompts), batch_size):
            before_batch()
            if self.engine.is_main or self.engine.is_sharded:
                prompts = self.settings.prompts[first : first + batch_size]
                done += self._ask(prompts, seed=self.seed + first, max_new_tokens=limit)
        if self.failed or not self.engine.is_main:
            return
        turn = {"turn": True} if self.model.chats else {}
        lines = [{"step": step, "prompt": one.prompt, "completion": one.completion, **turn} for one in done]
        try:
            append_lines(run / SAMPLES_NAME, map(json.dumps, lines))
        except OSError as error:
            log.warning("%s cannot be written; the run goes on without it (%s)", run / SAMPLES_NAME, error.strerror)
            self.failed = True

    def _ask(self, prompts: Sequence[str], *, seed: int, max_new_tokens: int) -> list[Completion]:
        with writing(self.model.model, engine=self.engine):
            return self.model.generate(
                prompts,
                max_new_tokens=max_new_tokens,
                temperature=self.settings.temperature,
                seed=seed,
                chat=self.model.chats,
            )


def open_samples(
    config: Config,
    engine: Engine,
    module: AnyModel,
    *,
    tokenizer: Path | None,
    model_folder: Path | None,
    validates: bool,
) -> Samples:
    """Return what writes the samples that `config` asks for, from `module` on its device.

    `model_folder` is where the model came from, if from transformers; `validates`: whether there are validation data.
    Raises ConfigError where there is no text, or no evaluation.
    """
    settings = config.tracking.samples
    if tokenizer is None:
        raise ConfigError(f"{KEY}: the data has no tokenizer, so that the model can write no text; remove the prompts")
    if not validates:
        raise ConfigError(f"{KEY} are asked at evaluations, and there is no validation data; name it in data.val")
    model = live_model(config, module, tokenizer_folder=tokenizer, model_folder=model_folder)
    samples = Samples(model, settings, seed=config.run.seed, engine=engine)
    samples.check()
    return samples
