"""The contracts between the rooms of the house: what a batch is, what a model, a data set and a sink must do.

A model or a data source of the user's own need only meet these; nothing is registered or inherited.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NotRequired, Protocol, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

IGNORE_INDEX = -100
"""A label that is not supervised."""

PADDING_DOCUMENT = -1
"""The document number of padding: no document has it, so nothing but padding attends to padding."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""What a tokenizer in Hugging Face format may consist of: what is hashed, and goes along with shards and models."""


class Batch(TypedDict):
    """One micro-batch. `labels[b, t]` is the token that should follow `input_ids[b, t]`."""

    input_ids: Tensor
    """[b, t] int64."""
    labels: Tensor
    """[b, t] int64; IGNORE_INDEX where the token is not supervised."""
    document_ids: NotRequired[Tensor]
    """[b, t] int32; a position attends only to those of its own number in the row. Absent: a row is one document."""
    lengths: NotRequired[Tensor]
    """[b] int64; tokens of each row before its padding, whether supervised or not. Absent: the supervised ones."""


class Model(Protocol):
    """What the loop trains."""

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The sum of the supervised tokens' losses in nats (float32 scalar), and their number (int64 scalar)."""
        ...

    def logits(self, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """[b, t, vocab] scores of the token after each position."""
        ...


class TrainingData(Protocol):
    """A global sequence of items, each of which one rank computes as a row of a batch."""

    @property
    def items_per_epoch(self) -> int:
        """Items after which every token was seen once."""
        ...

    def batches(
        self, *, start_item: int, batch_size: int, end_item: int, micro_batch_size: int
    ) -> Iterator[list[Batch]]:
        """For each step from the one that begins at `start_item`, this rank's micro-batches."""
        ...


class Unreachable(Exception):
    """Raised by a sink whose tracker does not answer now: the same call is made again later, and figures wait."""


class MetricSink(Protocol):
    """Where figures go. What a sink raises never reaches the training loop; any but Unreachable turns it off."""

    def start(self, run_info: Mapping[str, Any]) -> None:
        """Called once, before the first figure. `run_info` holds run_id; folder; config, the resolved one as plain
        values, its secrets redacted; resumed_step, the steps that the checkpoint had behind it, None for a new run.
        """
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Figures of a step, by their full names (train/loss)."""
        ...

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Called once, at the end of the run, however it ended."""
        ...
