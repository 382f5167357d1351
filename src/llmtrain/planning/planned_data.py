"""The training data of a plan: sequences an epoch and tokens, as far as they are known before the run.

Data are read if that is quick: token shards always, rows if they are few.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmtrain.config.sections.chat import ChatConfig
from llmtrain.config.sections.data import SyntheticConfig, TokensConfig
from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.own import OwnDataConfig
from llmtrain.config.sections.running import RunConfig
from llmtrain.config.sections.schema import Config
from llmtrain.config.sections.sources import used_paths
from llmtrain.config.sections.training import DistributedConfig, TrainerConfig
from llmtrain.data.batches import TrainingSet
from llmtrain.data.chat.items import RowItems
from llmtrain.data.files.datasets import RowDataset
from llmtrain.data.prepare.reuse import named_sources
from llmtrain.data.tokens import open_training_data
from llmtrain.distributed.engine import Engine
from llmtrain.distributed.resolve import resolve
from llmtrain.errors import ConfigError
from llmtrain.screen import counted
from llmtrain.storage.address import is_remote

MANY_BYTES = 64_000_000
MANY_ROWS = 200_000
"""Rows are not counted if there are this many, since tokenizing them would take too long for a plan."""


@dataclass(frozen=True, kw_only=True)
class PlannedData:
    """Facts about the training data on which memory and time depend. None: not known."""

    items_per_epoch: int | None = None
    tokens_per_item: float
    """The average, without padding; data.seq_len if it is not known."""
    mask_documents: bool
    """True if a sequence holds several documents, which do not attend to each other."""
    vocab_size: int | None = None
    """Vocabulary size of the tokenizer."""
    supervised_share: float | None = None
    """Share of the rows' tokens that is supervised; None if the data are not rows."""
    training: TrainingSet | None = None
    """The data; None if they were not read."""


def planned_data(config: Config, assumed: list[str]) -> PlannedData:
    """Return the known facts about the data of `config`, and add a line to `assumed` for each one that is not known."""
    data = config.data
    if isinstance(data, ChatConfig):
        return _planned_rows(config, data, assumed)
    if isinstance(data, TokensConfig):
        missing = [source for source in named_sources(data) if source.is_missing()]
        if missing:
            assumed.append(f"{missing[0]}: no token shards yet, so the number of epochs is not known")
            return unread_data(config)
    elif not isinstance(data, SyntheticConfig | OwnDataConfig):
        assumed.append(f"data.name is {data.name}: `train` makes its shards, so the number of epochs is not known yet")
        return unread_data(config)
    found = open_training_data(data, seed=config.run.seed)
    return PlannedData(
        items_per_epoch=found.items_per_epoch,
        tokens_per_item=data.seq_len,
        mask_documents=_mask_documents(config),
        vocab_size=found.facts.vocab_size,
        training=found,
    )


def unread_data(config: Config, *, vocab_size: int | None = None) -> PlannedData:
    """Return the facts that are known without reading the data, as if every sequence were full."""
    return PlannedData(
        tokens_per_item=config.data.seq_len, mask_documents=_mask_documents(config), vocab_size=vocab_size
    )


def _mask_documents(config: Config) -> bool:
    data = config.data
    if isinstance(data, SyntheticConfig | OwnDataConfig):
        return False
    return data.mask_documents and (not isinstance(data, ChatConfig) or data.packing)


def _planned_rows(config: Config, data: ChatConfig, assumed: list[str]) -> PlannedData:
    rows, why_not = _open_rows(config, data)
    if rows is None:
        assumed.append(
            f"{why_not}, so rows and tokens are not counted: every row counts as {counted(data.seq_len, 'token')}"
        )
        return unread_data(config)
    assert isinstance(rows.items, RowItems)
    supervised = sum(store.manifest.supervised_tokens for store in rows.items.stores)
    return PlannedData(
        items_per_epoch=rows.items_per_epoch,
        tokens_per_item=rows.facts.num_tokens / rows.items_per_epoch,
        mask_documents=_mask_documents(config),
        vocab_size=rows.facts.vocab_size,
        training=rows,
        supervised_share=supervised / rows.facts.num_tokens,
    )


def _open_rows(config: Config, data: ChatConfig) -> tuple[TrainingSet | None, str]:
    """Return the rows, tokenized as by `train`, or None and why they are not counted. Raises for faulty rows."""
    from llmtrain.data.chat.open_rows import open_rows
    from llmtrain.data.chat.parts import find_parts
    from llmtrain.data.chat.tokenizer import tokenizer_folder_of

    paths = used_paths(data.train, data.mixture)
    for path in paths:
        if is_remote(path):
            return None, f"{path} is {'a dataset of the Hub' if path.startswith('hf://') else 'not on this machine'}"
        if not any(character in path for character in "*?[") and not Path(path).expanduser().exists():
            return None, f"{path} is not here"
    parts = find_parts(data)
    sources = [source for part in parts.training for source in part.sources]
    num_bytes = sum(0 if isinstance(source, RowDataset) else source.size or MANY_BYTES for source in sources)
    num_rows = sum(len(source.dataset) for source in sources if isinstance(source, RowDataset))
    if num_bytes >= MANY_BYTES or num_rows >= MANY_ROWS:
        return None, f"{paths[0]} has very many rows"
    try:
        folder = tokenizer_folder_of(_offline(config))
    except ConfigError:
        return None, "the tokenizer is not on this machine"
    distributed, trainer = DistributedConfig(), TrainerConfig(precision="32", compile=False)
    engine = Engine(resolve(RunConfig(device="cpu"), trainer, distributed), distributed=distributed)
    return open_rows(data, tokenizer_folder=folder, seed=config.run.seed, engine=engine).training, ""


def _offline(config: Config) -> Config:
    """Return the config with a model of transformers that is never fetched."""
    if not isinstance(config.model, HuggingFaceConfig):
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"local_files_only": True})})
