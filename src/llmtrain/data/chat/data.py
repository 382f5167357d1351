"""Chat data for training and evaluation: tokenised rows (cache.py) -> batches of tensors.

    SampleStore … -> plan (plan.py) -> arrays, read ahead (batches.py, data/loader.py) -> tensors

The same names as in `data.tokens`, so that a recipe need not ask which of the two it has.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np

from llmtrain.contracts import Batch
from llmtrain.data.chat.batches import (
    ChatEvaluationPlan,
    ChatFormat,
    ChatTrainingPlan,
    deal,
    item_lengths,
    item_plan,
)
from llmtrain.data.chat.cache import SampleStore
from llmtrain.data.chat.plan import PLAN_VERSION, ChatOrder, ItemPlan
from llmtrain.data.loader import read_ahead
from llmtrain.data.tokens import DataFacts, to_batches


@dataclass(frozen=True, kw_only=True)
class ChatData:
    """Training data of one rank. Meets TrainingData. An item is a pack of rows, or one row without packing."""

    facts: DataFacts
    stores: Sequence[SampleStore]
    weights: Sequence[float] | None
    """Of the stores; None: there is one."""
    format: ChatFormat
    seed: int
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0

    @property
    def name(self) -> str:
        """For messages."""
        return self.facts.name

    @property
    def items_per_epoch(self) -> int:
        """Items of all sources together; in a mixture each source goes through its own epochs, by its weight."""
        return self._plan.items_per_epoch

    @property
    def fingerprint(self) -> str:
        """Changes when an item number would mean other rows; the seed and seq_len are left to the caller."""
        contents = " ".join(store.content_sha256 for store in self.stores)
        order = f"{PLAN_VERSION} {contents} {self.weights} {self.format.packing}"
        return sha256(order.encode()).hexdigest()

    def batches(
        self, *, start_item: int, batch_size: int, end_item: int, micro_batch_size: int
    ) -> Generator[list[Batch], None, None]:
        """For each step from the one that begins at `start_item`, this rank's micro-batches.

        `batch_size` items over all ranks make a step; the last one ends at `end_item`. Packs are
        [micro_batch_size, seq_len]; single rows [micro_batch_size, t] with t that of the longest, rounded up. All ranks
        have as many micro-batches: sequences that no item fills have only ignored labels. It reads ahead, so close the
        generator (contextlib.closing) where it may not be used up.
        """
        plan = ChatTrainingPlan(
            stores=self.stores,
            weights=self.weights,
            format=self.format,
            seed=self.seed,
            start_item=start_item,
            end_item=end_item,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            rank=self.rank,
            world_size=self.world_size,
        )
        steps = read_ahead(plan.open, num_steps=plan.num_steps, num_workers=self.num_workers)
        with closing(steps):
            for micro_batches in steps:
                yield [to_batches(rows, micro_batch_size)[0] for rows in micro_batches]

    def own_items(self, items: range) -> list[int]:
        """Those of a step's items that this rank computes, in their order there."""
        found = self._plan.locate(np.arange(items.start, items.stop))
        share = deal(item_lengths(found, self.stores), rank=self.rank, world_size=self.world_size)
        return [items[index] for index in share.tolist()]

    def sources_of(self, item: int) -> list[str]:
        """`file:line` of each row of an item, for messages."""
        (found,) = self._plan.locate(np.array([item]))
        return [self.stores[found.source].source(row) for row in found.rows.tolist()]

    @cached_property
    def _plan(self) -> ItemPlan:
        """For figures and messages; whoever reads ahead makes one for itself."""
        return item_plan(self.stores, self.weights, self.format, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class ChatValidation:
    """Held-out rows: the same items at each evaluation."""

    facts: DataFacts
    store: SampleStore
    format: ChatFormat

    @property
    def name(self) -> str:
        """For messages."""
        return self.facts.name

    @property
    def num_items(self) -> int:
        """Items of the whole set."""
        return self._order.num_items

    def evaluation_batches(
        self, *, batch_size: int, max_batches: int | None = None, rank: int = 0, world_size: int = 1
    ) -> Generator[Batch, None, None]:
        """A rank's batches of `batch_size` items, as many on every rank; over all ranks each row comes once.

        `max_batches` counts batches over all ranks: as many items as fill them are taken, evenly spaced, so that they
        are the same at each evaluation and for any number of ranks. None takes all.
        """
        plan = ChatEvaluationPlan(
            store=self.store,
            order=self._order,
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

    @cached_property
    def _order(self) -> ChatOrder:
        return self.format.order(self.store, seed=0, source=0)


def chat_facts(
    stores: Sequence[SampleStore],
    *,
    name: str,
    vocab_size: int,
    eos_id: int | None,
    tokenizer: Path | None,
    tokenizer_sha256: str | None,
) -> DataFacts:
    """What is known of the rows besides themselves. Their bytes are not: templates add text that is in no row."""
    return DataFacts(
        name=name,
        vocab_size=vocab_size,
        eos_id=eos_id,
        num_tokens=sum(store.manifest.tokens for store in stores),
        num_bytes=None,
        tokenizer=tokenizer,
        tokenizer_sha256=tokenizer_sha256,
        content_sha256=sha256(" ".join(store.content_sha256 for store in stores).encode()).hexdigest(),
    )
