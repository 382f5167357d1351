"""Build the model of a run, its identity, its schedule, and what its steps compute with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.own import OwnModelConfig
from llmtrain.config.sections.schema import Config
from llmtrain.distributed.engine import Engine
from llmtrain.models.float8 import use_float8
from llmtrain.training.optimizers import build_optimizer, trains_narrow_weights
from llmtrain.training.resume import identity_of
from llmtrain.training.schedule import Epoch, Schedule, make_schedule
from llmtrain.training.setup.data import Folders, RunData
from llmtrain.training.setup.trained import (
    Trained,
    TrainedHuggingFace,
    Vocabulary,
    train_decoder,
    train_huggingface,
    train_own,
)
from llmtrain.training.state import RunState, seed_step
from llmtrain.training.step import Learner


def build_model(config: Config, engine: Engine, data: RunData, folders: Folders) -> Trained:
    """Build the model that the config names, for the tokens of its data. Raises ConfigError where they do not fit."""
    seed_step(config.run.seed, -1, rank=0)  # every rank builds the same weights
    facts = data.training.facts
    if not isinstance(config.model, HuggingFaceConfig):
        vocabulary = Vocabulary(
            size=facts.vocab_size,
            tokenizer_folder=facts.tokenizer,
            eos_id=facts.eos_id,
            chat_template=data.chat_template,
        )
        if isinstance(config.model, OwnModelConfig):
            return train_own(config.model, vocabulary, seq_len=config.data.seq_len, sharded=engine.is_sharded)
        return train_decoder(config.model, vocabulary, sharded=engine.is_sharded)
    assert folders.model is not None
    return train_huggingface(
        config.model,
        folders.model,
        Vocabulary(size=facts.vocab_size, tokenizer_folder=folders.tokenizer, chat_template=data.chat_template),
        seq_len=config.data.seq_len,
        seed=config.run.seed,
        precision=engine.resolved.precision,
        device=engine.device,
        sharded=engine.is_sharded,
    )


def identity_of_run(config: Config, data: RunData, trained: Trained) -> Mapping[str, Mapping[str, Any]]:
    """Return what must not change while the run goes on."""
    return identity_of(
        trained.described, seed=config.run.seed, seq_len=config.data.seq_len, fingerprint=data.training.fingerprint
    )


def schedule_of(config: Config, data: RunData, state: RunState, engine: Engine) -> Schedule:
    """Return the schedule of a run that stands at `state`. Raises ConfigError if it cannot be."""
    return make_schedule(
        config.trainer,
        config.scheduler,
        seed=config.run.seed,
        epoch=Epoch.of(config.data, data.training.items_per_epoch, end_item=data.training.end_item),
        state=state,
        world_size=engine.data_parallel_size,
        validates=data.validation is not None,
        ask_every=config.evaluation.every_steps,
    )


def build_learner(config: Config, engine: Engine, trained: Trained) -> Learner:
    """Let the model compute as the config says, hand it to the engine, and build its optimizer."""
    if engine.resolved.float8:
        use_float8(trained.module)
    masters = None
    if isinstance(trained, TrainedHuggingFace) and trains_narrow_weights(config, engine.resolved):
        trained.module.to(engine.device)
        masters = trained.narrow()  # before it is wrapped, which needs to know the dtype of the gradients
    compiled = engine.resolved.compile
    if compiled:
        trained.module.compile_parts()
    model = engine.setup(trained.module)
    optimizer = build_optimizer(
        config.optimizer, trained.module, compiled=compiled, bf16=engine.resolved.bf16, masters=masters
    )
    return Learner(model, optimizer, engine)
