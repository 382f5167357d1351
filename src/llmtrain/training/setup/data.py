"""Fetch the folders of a run's model and tokenizer, and open its data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from llmtrain.config.sections.base import Section
from llmtrain.config.sections.chat import ChatConfig
from llmtrain.config.sections.data import TokensConfig
from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.schema import Config, ModelConfig
from llmtrain.config.sections.sources import used_paths
from llmtrain.config.sections.training import RendezvousConfig
from llmtrain.data.batches import TrainingSet, ValidationSet
from llmtrain.data.prepare.token_shards import ensure_shards
from llmtrain.data.tokens import open_training_data, open_validation_data, reading_advice
from llmtrain.distributed.engine import Engine
from llmtrain.errors import ConfigError
from llmtrain.tracking.redaction import redact
from llmtrain.training.setup.ingredients import paths_of

log = logging.getLogger("llmtrain.data")


class Folders(NamedTuple):
    """Local folders of the model and the tokenizer; None where the decoder or the data needs none."""

    model: Path | None
    """Folder of a transformers model."""
    tokenizer: Path | None
    """Folder of the tokenizer of a transformers model, or of the one that tokenises the rows."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Data that a run draws its batches from."""

    training: TrainingSet
    validation: ValidationSet | None
    chat_template: str | None
    """Chat template that renders the turns; None if it is the tokenizer's own, or the data are not rows."""
    folders: Folders
    train_paths: Sequence[str]
    """Paths of the rows or the shards that are read; empty for synthetic data."""
    val_paths: Sequence[str]


def fetch_folders(config: Config, engine: Engine) -> Folders:
    """Fetch model and tokenizer, once for all ranks of a machine. Raises ConfigError for what cannot be had."""
    model = config.model
    named = config.data.tokenizer if isinstance(config.data, ChatConfig) else None
    if not isinstance(model, HuggingFaceConfig):
        if not isinstance(config.data, ChatConfig):
            return Folders(None, None)
        named = named or getattr(model, "init_from", None)
        if named is None:
            raise ConfigError(
                f"data.tokenizer: the {model.name} has no tokenizer of its own; name a folder or a Hub id"
            )
    with engine.main_first():
        if not engine.is_main:
            with suppress(ConfigError):  # what is not in this machine's cache is fetched below
                return _folders(model, named, local_only=True)
        return _folders(model, named, local_only=getattr(model, "local_files_only", False))


def _folders(model: ModelConfig, named: str | None, *, local_only: bool) -> Folders:
    from llmtrain.models.fetch import fetch_tokenizer
    from llmtrain.models.huggingface.load import fetch

    model_folder, tokenizer = None, None
    if isinstance(model, HuggingFaceConfig):
        model_folder, tokenizer = fetch(model.model_copy(update={"local_files_only": local_only}))
    return Folders(model_folder, fetch_tokenizer(named, local_files_only=local_only) if named else tokenizer)


def as_recorded(config: Config, folders: Folders) -> Config:
    """Return `config` as the run records it, so that it can go on at another place, at another time."""
    # Who a process is among the others belongs to this start, not to the run: a later one goes on alone, or with more.
    distributed = config.distributed.model_copy(update={"rendezvous": RendezvousConfig()})
    config = config.model_copy(update={"distributed": distributed, **_without_secrets(config)})
    if isinstance(config.model, HuggingFaceConfig) and folders.model and Path(config.model.path).expanduser().is_dir():
        # The initial model must be found later too, when a link such as runs/latest leads elsewhere.
        model = config.model.model_copy(update={"path": str(folders.model.resolve())})
        config = config.model_copy(update={"model": model})
    return config


def _without_secrets(config: Config) -> dict[str, Section | None]:
    """Return the sections with free text, in which people write tokens: every file of the run has what is in them."""

    def redacted(section: Section, *keys: str) -> Section:
        return section.model_copy(update={key: redact(getattr(section, key)) for key in keys})

    return {
        "run": redacted(config.run, "name", "notes", "tags"),
        "publish": redacted(config.publish, "description", "limits", "tags") if config.publish else None,
    }


def open_data(config: Config, engine: Engine, folders: Folders) -> RunData:
    """Open training and validation data; make them first where they are missing and the config says how.

    Raises ConfigError with every fault of the rows, and as `ensure_shards` does.
    """
    seed, on_gpu = config.run.seed, engine.device.type == "cuda"
    if isinstance(config.data, ChatConfig):
        from llmtrain.data.chat.open_rows import open_rows

        assert folders.tokenizer is not None
        rows = open_rows(config.data, tokenizer_folder=folders.tokenizer, seed=seed, engine=engine)
        return RunData(
            training=replace(rows.training, pinned=on_gpu),
            validation=rows.validation,
            chat_template=rows.template.replacement,
            folders=folders,
            train_paths=used_paths(config.data.train, config.data.mixture),
            val_paths=paths_of(config.data.val),
        )
    with engine.main_first():
        ready = ensure_shards(config)
    training = open_training_data(
        ready, seed=seed, rank=engine.data_parallel_rank, world_size=engine.data_parallel_size
    )
    if engine.is_main and (advice := reading_advice(ready, training)):
        log.warning(advice)
    validation = open_validation_data(ready, seed=seed, training=training)
    return RunData(
        training=replace(training, pinned=on_gpu),
        validation=validation,
        chat_template=None,
        folders=folders,
        train_paths=used_paths(ready.train, ready.mixture) if isinstance(ready, TokensConfig) else [],
        val_paths=paths_of(ready.val) if isinstance(ready, TokensConfig) else [],
    )
