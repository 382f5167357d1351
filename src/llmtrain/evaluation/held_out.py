"""Opens the held-out data on which a model's loss is measured: token shards or rows, of its run or named ones."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from llmtrain.config.loading.load import section_of
from llmtrain.config.sections.chat import ChatConfig
from llmtrain.config.sections.data import TokensConfig
from llmtrain.config.sections.schema import Config
from llmtrain.data.batches import ValidationSet
from llmtrain.data.chat.items import RowItems
from llmtrain.data.chat.shapes import is_text
from llmtrain.data.files.find import format_of
from llmtrain.data.files.read import Row, read_rows
from llmtrain.data.manifest import find_manifest
from llmtrain.data.prepare.token_shards import ensure_shards
from llmtrain.data.tokens import open_validation_data
from llmtrain.distributed.engine import Engine
from llmtrain.errors import ConfigError
from llmtrain.generation.language_model import LanguageModel
from llmtrain.generation.open_model import config_beside
from llmtrain.storage.address import is_remote

DEFAULT_SEQ_LEN = 1024


def evaluation_config(folder: Path, *, data: list[str]) -> Config:
    """Return the config with which the model in `folder` was trained, or a default one, with `data` if that is given.

    Raises ConfigError if neither the model's run nor `data` names data.
    """
    config = config_beside(folder)
    if config is None and not data:
        raise ConfigError(f"{folder} belongs to no run, so there is no validation data: name some with --data")
    if config is not None and not data:
        return config
    seq_len = DEFAULT_SEQ_LEN if config is None else config.data.seq_len
    named: ChatConfig | TokensConfig
    if are_rows(data):
        tuned = config.data if config is not None and isinstance(config.data, ChatConfig) else None
        rows = {"train": list(data), "val": list(data), "val_fraction": 0.0}
        named = tuned.model_copy(update=rows) if tuned else ChatConfig.model_validate({**rows, "seq_len": seq_len})
    else:
        shards = {"train": list(data), "val": list(data), "seq_len": seq_len}
        named = section_of(TokensConfig, shards, name="data")
    return (config or Config(data=named)).model_copy(update={"data": named, "prepare": None})


def are_rows(data: list[str]) -> bool:
    """Return whether these are rows of text and not token shards. Raises ConfigError for a mixture of both."""
    rows = [path for path in data if _holds_rows(path)]
    if rows and len(rows) < len(data):
        shards = next(path for path in data if path not in rows)
        raise ConfigError(f"--data {rows[0]} has rows, and {shards} token shards: measure the model on each separately")
    return bool(rows)


def ask_something(data: list[str]) -> bool:
    """Return whether these are rows that can be answered; token shards and rows of text have a loss alone."""
    if not are_rows(data):
        return False
    first = next(read_rows(data[0], key="evaluation.data", default_split="test"))
    return not (isinstance(first, Row) and is_text(first.values))


def open_held_out(config: Config, language_model: LanguageModel, *, engine: Engine) -> ValidationSet:
    """Open the held-out data of `config` for this model.

    Raises ConfigError if there is none, or if it has tokens that the model does not have.
    """
    found: ValidationSet | None
    limit = language_model.model.max_seq_len or config.data.seq_len
    if isinstance(config.data, ChatConfig):
        found = _open_rows(config.data, language_model, seq_len=min(config.data.seq_len, limit), engine=engine)
    else:
        with engine.main_first():
            ready = ensure_shards(config)
        ready = ready.model_copy(update={"seq_len": min(ready.seq_len, limit)})
        found = open_validation_data(ready, seed=config.run.seed)
    if found is None:
        raise ConfigError(f"{language_model.folder} names no validation data: name some with --data")
    vocab_size = language_model.model.vocab_size
    if isinstance(config.data, ChatConfig):  # rows are tokenized by the model's tokenizer
        language_model.check_vocab_size(found.facts.vocab_size, of=f"the tokenizer of {language_model.folder}")
    if found.facts.vocab_size > vocab_size:
        raise ConfigError(
            f"{found.name} has tokens of a vocabulary of {found.facts.vocab_size}, but the model's is "
            f"{vocab_size}: prepare the data with the model's tokenizer"
        )
    return found


def _open_rows(
    config: ChatConfig, language_model: LanguageModel, *, seq_len: int, engine: Engine
) -> ValidationSet | None:
    from llmtrain.data.chat.open_rows import open_validation_rows

    if language_model.encoder is None or language_model.tokenizer is None:
        raise ConfigError(f"{language_model.folder} has no tokenizer for rows: name token shards with --data")
    rows = open_validation_rows(
        config.model_copy(update={"seq_len": seq_len, "packing": False}),
        template=language_model.encoder.template,
        tokenizer_folder=language_model.folder,
        engine=engine,
    )
    if rows is None:
        return None
    assert isinstance(rows.items, RowItems)
    (store,) = rows.items.stores
    supervised = int(store.num_supervised.sum())
    texts = (ids[learned] for ids, learned in map(store.tokens, range(len(store))))
    num_bytes = language_model.tokenizer.num_bytes(texts)
    # The loss is that of supervised tokens, so only their bytes count.
    return replace(rows, facts=replace(rows.facts, num_tokens=supervised, num_bytes=num_bytes))


def _holds_rows(path: str) -> bool:
    """Return whether a path has rows, by the kind of its files. Parquet has rows unless a manifest says otherwise."""
    local = Path(os.path.expanduser(path))
    kind = format_of(path)
    if is_remote(path) or kind not in (None, "parquet"):
        return True
    names = [path] if not local.is_dir() else [name for _, _, files in os.walk(local) for name in files]
    if not any(map(format_of, names)):
        return local.is_dir() and any(name in ("dataset_dict.json", "state.json") for name in names)
    return find_manifest(local) is None
