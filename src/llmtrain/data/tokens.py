"""Token data for training and evaluation: from `data` in the config to batches of tensors.

    config -> sources (checked shards, or synthetic) -> plan (rows.py) -> read ahead (loader.py) -> tensors

The order of the items is order.py's; a position in the data is the number of an item.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from llmtrain.config.data import ReadyData, SyntheticConfig, TokensConfig
from llmtrain.config.errors import ConfigError
from llmtrain.config.sources import WeightedSource
from llmtrain.contracts import Batch
from llmtrain.data.loader import read_ahead
from llmtrain.data.order import ItemOrder, block_quotas, rank_share
from llmtrain.data.rows import EvaluationPlan, RowFormat, Rows, TrainingPlan, WindowSource
from llmtrain.data.shards import ShardWindows
from llmtrain.data.sources import (
    GivenTokenizer,
    ShardSource,
    check_same_tokenizer,
    open_given_tokenizer,
    open_source,
)
from llmtrain.data.synthetic import SyntheticWindows


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What is known of tokens besides themselves."""

    name: str
    """Where they are, for messages."""
    vocab_size: int
    """Tokens are in [0, vocab_size)."""
    eos_id: int | None
    """Ends every document; None: there are no documents."""
    num_tokens: int
    """End tokens counted."""
    num_bytes: int | None
    """UTF-8 bytes of the text; None: there is no text."""
    tokenizer: Path | None
    """Folder of the tokenizer; None: there is no text."""
    tokenizer_sha256: str | None
    content_sha256: str
    """Of what the windows hold, wherever their files lie."""

    @property
    def tokens_per_byte(self) -> float | None:
        """For bits per byte; None where there is no text."""
        return self.num_tokens / self.num_bytes if self.num_bytes else None


@dataclass(frozen=True, kw_only=True)
class TokenData:
    """Training data of one rank. Meets TrainingData."""

    facts: DataFacts
    sources: Sequence[WindowSource]
    weights: Sequence[float] | None
    """Of the sources; None: there is one."""
    format: RowFormat
    shuffle_chunks: int
    seed: int
    rank: int
    world_size: int
    num_workers: int

    @property
    def name(self) -> str:
        """For messages."""
        return self.facts.name

    @property
    def items_per_epoch(self) -> int:
        """Windows of all sources together; in a mixture each source goes through its own epochs, by its weight."""
        return sum(source.num_windows for source in self.sources)

    @property
    def fingerprint(self) -> str:
        """Changes when an item number would mean another window; the seed and seq_len are left to the caller."""
        order = f"{self.facts.content_sha256} {self.weights} {self.shuffle_chunks}"
        return sha256(order.encode()).hexdigest()

    def own_items(self, items: range) -> list[int]:
        """Those of a step's items that this rank computes."""
        places = self._order.locate(np.arange(items.start, items.stop))
        share = rank_share(places, rank=self.rank, world_size=self.world_size)
        return [items[index] for index in share.tolist()]

    def batches(
        self, *, start_item: int, batch_size: int, end_item: int, micro_batch_size: int
    ) -> Generator[list[Batch], None, None]:
        """For each step from the one that begins at `start_item`, this rank's micro-batches.

        `batch_size` items over all ranks make a step; the last one ends at `end_item`. Each micro-batch is
        [micro_batch_size, seq_len], and all ranks have as many: rows that no item fills have only ignored labels.
        It reads ahead, so close the generator (contextlib.closing) where it may not be used up.
        """
        plan = self._plan(
            start_item=start_item, batch_size=batch_size, end_item=end_item, micro_batch_size=micro_batch_size
        )
        steps = read_ahead(plan.open, num_steps=plan.num_steps, num_workers=self.num_workers)
        with closing(steps):
            for rows in steps:
                yield to_batches(rows, micro_batch_size)

    @cached_property
    def _order(self) -> ItemOrder:
        """For the log; whoever reads ahead makes one for itself."""
        return self._plan(start_item=0, batch_size=1, end_item=0, micro_batch_size=1).order()

    def _plan(self, **steps: int) -> TrainingPlan:
        return TrainingPlan(
            sources=self.sources,
            weights=self.weights,
            format=self.format,
            shuffle_chunks=self.shuffle_chunks,
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
            **steps,
        )


@dataclass(frozen=True, kw_only=True)
class ValidationData:
    """Held-out data: the same windows at each evaluation."""

    facts: DataFacts
    source: WindowSource
    format: RowFormat

    @property
    def name(self) -> str:
        """For messages."""
        return self.facts.name

    @property
    def num_items(self) -> int:
        """Windows of the whole set."""
        return self.source.num_windows

    def evaluation_batches(
        self, *, batch_size: int, max_batches: int | None = None, rank: int = 0, world_size: int = 1
    ) -> Generator[Batch, None, None]:
        """A rank's batches [batch_size, seq_len], as many on every rank; over all ranks each window comes once.

        `max_batches` counts batches over all ranks: as many windows as fill them are taken, evenly spaced, so that the
        windows are the same at each evaluation and for any number of ranks. None takes all.
        """
        plan = EvaluationPlan(
            source=self.source,
            format=self.format,
            batch_size=batch_size,
            max_batches=max_batches,
            rank=rank,
            world_size=world_size,
        )
        batches = read_ahead(plan.open, num_steps=plan.num_batches, num_workers=0)
        with closing(batches):
            for rows in batches:
                yield to_batches(rows, batch_size)[0]


def open_training_data(config: ReadyData, *, seed: int, rank: int = 0, world_size: int = 1) -> TokenData:
    """The training data of `config`, for one rank. Raises ConfigError for what cannot be read."""
    weights: list[float] | None = None
    sources: list[WindowSource]
    if isinstance(config, SyntheticConfig):
        windows = _synthetic_windows(config, "train", config.num_items, seed=seed)
        sources, facts, shuffle_chunks = [windows], _synthetic_facts(windows), 1
    else:
        shards, weights = _training_shards(config)
        sources = [ShardWindows(source.stream, config.seq_len) for source in shards]
        facts, shuffle_chunks = _shard_facts(shards), config.shuffle_chunks
    return TokenData(
        facts=facts,
        sources=sources,
        weights=weights,
        format=_row_format(config, facts),
        shuffle_chunks=shuffle_chunks,
        seed=seed,
        rank=rank,
        world_size=world_size,
        num_workers=config.num_workers,
    )


def open_validation_data(config: ReadyData, *, seed: int, training: TokenData | None = None) -> ValidationData | None:
    """The validation data of `config`, or None where it names none.

    Raises ConfigError for what cannot be read, and where its tokenizer is not that of `training`.
    """
    source: WindowSource
    if isinstance(config, SyntheticConfig):
        if config.num_val_items == 0:
            return None
        source = windows = _synthetic_windows(config, "val", config.num_val_items, seed=seed)
        facts = _synthetic_facts(windows)
    else:
        if config.val is None:
            return None
        shards = open_source(config.val, key="data.val", given=_given_tokenizer(config))
        source, facts = ShardWindows(shards.stream, config.seq_len), _shard_facts([shards])
    if training is not None and training.facts.tokenizer_sha256 != facts.tokenizer_sha256:
        raise ConfigError(
            f"data.val: {facts.name} was made with another tokenizer than {training.name} (data.train): "
            "prepare one of them again with the tokenizer of the other"
        )
    return ValidationData(facts=facts, source=source, format=_row_format(config, facts))


def to_batches(rows: Rows, micro_batch_size: int) -> list[Batch]:
    """Tensors over the rows' memory, cut into micro-batches."""
    batches: list[Batch] = []
    for begin in range(0, len(rows.input_ids), micro_batch_size):
        cut = slice(begin, begin + micro_batch_size)
        batch = Batch(input_ids=torch.from_numpy(rows.input_ids[cut]), labels=torch.from_numpy(rows.labels[cut]))
        if rows.document_ids is not None:
            batch["document_ids"] = torch.from_numpy(rows.document_ids[cut])
        if rows.lengths is not None:
            batch["lengths"] = torch.from_numpy(rows.lengths[cut])
        batches.append(batch)
    return batches


def _training_shards(config: TokensConfig) -> tuple[list[ShardSource], list[float] | None]:
    """The sources of a mixture with their weights, or all that is named as one."""
    paths = [config.train] if isinstance(config.train, str) else config.train
    given = _given_tokenizer(config)
    weighted = [source for source in paths if isinstance(source, WeightedSource)]
    if not weighted:
        return [open_source([path for path in paths if isinstance(path, str)], key="data.train", given=given)], None
    weights = [source.weight for source in weighted]
    block_quotas(weights)  # raises for a weight that is too small
    sources = [open_source(source.path, key="data.train", given=given) for source in weighted]
    first = sources[0]
    for other in sources[1:]:
        check_same_tokenizer(first.tokenizer, other.tokenizer, names=(first.name, other.name), key="data.train")
    return sources, weights


def _given_tokenizer(config: TokensConfig) -> GivenTokenizer | None:
    return open_given_tokenizer(config.tokenizer, cache_dir=config.cache_dir) if config.tokenizer else None


def _shard_facts(sources: Sequence[ShardSource]) -> DataFacts:
    first = sources[0]
    num_bytes = [source.num_bytes for source in sources]
    return DataFacts(
        name=", ".join(source.name for source in sources),
        vocab_size=first.tokenizer.vocab_size,
        eos_id=first.tokenizer.eos_id,
        num_tokens=sum(source.stream.num_tokens for source in sources),
        num_bytes=None if None in num_bytes else sum(filter(None, num_bytes)),
        tokenizer=first.tokenizer_folder,
        tokenizer_sha256=first.tokenizer.sha256,
        content_sha256=sha256(" ".join(source.content_sha256 for source in sources).encode()).hexdigest(),
    )


def _synthetic_windows(
    config: SyntheticConfig, split: Literal["train", "val"], num_items: int, *, seed: int
) -> SyntheticWindows:
    return SyntheticWindows(
        num_windows=num_items, seq_len=config.seq_len, vocab_size=config.vocab_size, seed=seed, split=split
    )


def _synthetic_facts(windows: SyntheticWindows) -> DataFacts:
    return DataFacts(
        name="synthetic",
        vocab_size=windows.vocab_size,
        eos_id=None,
        num_tokens=windows.num_windows * (windows.seq_len + 1),
        num_bytes=None,
        tokenizer=None,
        tokenizer_sha256=None,
        content_sha256=sha256(repr(windows).encode()).hexdigest(),
    )


def _row_format(config: ReadyData, facts: DataFacts) -> RowFormat:
    apart = isinstance(config, TokensConfig) and config.mask_documents
    return RowFormat(seq_len=config.seq_len, pad_id=facts.eos_id or 0, end_id=facts.eos_id if apart else None)
