"""Contracts between the rooms of the house: what a batch is, and what a model, data and a sink must do.

A class of the user's own that the config names by import path (model.name, data.name, tracking.sinks) meets `Model`,
`TokenSequences` or `MetricSink`, and nothing else; nothing is registered. docs/your-own.md shows one of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
"""Files of a tokenizer in Hugging Face format: they are hashed, and go along with shards and models."""


class Batch(TypedDict):
    """One micro-batch. `labels[b, t]` is the token that should follow `input_ids[b, t]`."""

    input_ids: Tensor
    """[b, t] int64."""
    labels: Tensor
    """[b, t] int64; IGNORE_INDEX where the token is not supervised."""
    document_ids: NotRequired[Tensor]
    """[b, t] int32; a position attends only to those of its own number in the row. Absent: a row is one document."""
    cu_seqlens: NotRequired[Tensor]
    """[n + 1] int32; where each document of the flattened batch begins, then b · t, as often as fills the tensor. There
    are few values of n, so that code is not compiled for each number of documents. Beside `document_ids`."""
    supervised: NotRequired[Tensor]
    """[n] int64; the supervised positions of the flattened batch, in order. Absent: a model may look for them in the
    labels, and the host waits for a GPU to find them."""
    lengths: NotRequired[Tensor]
    """[b] int64; tokens of each row before its padding, whether supervised or not. Absent: the supervised ones."""


class Model(Protocol):
    """A model that the loop trains: a torch module (`nn.Module`), causal, so that no token sees a later one.

    One of the user's own is made as `Class(vocab_size=…, **model.options)`, after torch's generator was seeded, and
    draws its weights there. Its state dict is saved, so buffers in it have finite values; processes do not exchange
    buffers, and those of the first are saved. These members are optional:

    - `max_seq_len`: an int, the longest sequence in tokens. Absent: there is no limit.
    - `layers() -> list[nn.Module]`: what is sharded one at a time under fsdp. Absent: the module as a whole.
    - `flops_per_token(seq_len) -> int`: forward and backward. Absent: 6 for each weight that multiplies, 4 where it is
      frozen, and attention is not counted.
    - `checkpoint_blocks()`: keep less for the backward pass, in all layers. Absent: trainer.activation_checkpointing is
      rejected, other than none and auto.
    - `compile_parts(**options)`: compile what torch.compile should compile. Absent: the module is compiled as a whole.
    - `new_cache(batch_size, max_len, *, first_slots=None)`: a `generation.decoding.DecodingCache`; `logits` then also
      takes `cache` and `last_only`. Absent: generation computes every token again for each new one.

    Matrices whose name has `blocks.` in it are those that optimizer.name muon takes.
    """

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of the supervised tokens' losses in nats (float32 scalar), and their number (int64 scalar)."""
        ...

    def logits(self, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Return [b, t, vocab] scores of the token after each position; the arguments are as in `Batch`."""
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
        """Yield this rank's micro-batches of each step, from the step that begins at `start_item`."""
        ...


class TokenSequences(Protocol):
    """Data as numbered sequences of tokens; llmtrain permutes them, and shares them out over ranks and steps.

    A class of the user's own is made as `Class(split=…, seq_len=…, **data.options)`, in every process that reads, for
    the splits "train" and "val". These attributes are optional:

    - `tokenizer`: a folder with tokenizer.json. It is saved with the model, which can then be given text.
    - `eos_id`: the token that ends a document; those of one sequence do not see each other. Absent: the tokenizer's,
      or a sequence is one document.
    - `fingerprint`: text that changes with the content, since a run is not resumed on other data. Absent: the options.
    """

    vocab_size: int
    """Tokens are in [0, vocab_size)."""

    def __len__(self) -> int:
        """Return the number of sequences in an epoch. A split "val" of length 0 says that there is no validation."""
        ...

    def __getitem__(self, index: int) -> Sequence[int]:
        """Return a sequence: 2 to seq_len + 1 tokens (a list, or a numpy array), always the same for this index."""
        ...


class Unreachable(Exception):
    """Raised by a sink whose tracker does not answer now: the same call is made again later, and metrics wait."""


class MetricSink(Protocol):
    """Destination of metrics. A sink's exception never reaches the loop; any but Unreachable turns the sink off."""

    def start(self, run_info: Mapping[str, Any]) -> None:
        """Called once, before the first metric. `run_info` holds run_id; folder; config, the resolved one as plain
        values, its secrets redacted; resumed_step, the steps that the checkpoint had behind it, None for a new run.
        """
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Figures of a step, by their full names (train/loss)."""
        ...

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Called once, at the end of the run, however it ended."""
        ...
