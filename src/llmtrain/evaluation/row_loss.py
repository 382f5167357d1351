"""Measures the loss of each row, so that rows can be compared in pairs. loss.py measures that of full batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.distributed.sharding import without_gradients

TOKENS_AT_A_TIME = 8_192
SCORES_AT_A_TIME = 64_000_000
"""Number of logits in a batch: 256 MB in float32."""


class ScoringModel(Protocol):
    """Methods that the loss of rows needs of a model."""

    @property
    def device(self) -> torch.device:
        """Device on which the model expects tokens."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of logits per position."""
        ...

    def logits(self, input_ids: Tensor) -> Tensor:
        """Return logits [b, t, vocab] of the token after each of `input_ids`."""
        ...


class RowLoss(NamedTuple):
    """Loss of the supervised tokens of a row."""

    loss_sum: float
    """Sum of the loss, in nats."""
    num_tokens: int
    is_likeliest: bool = True
    """True if each of these tokens is the likeliest one at its position."""


def row_losses(
    model: ScoringModel,
    rows: Sequence[tuple[Sequence[int], Sequence[bool]]],
    *,
    after_batch: Callable[[int], None] = lambda _: None,
) -> list[RowLoss]:
    """Return the loss of each row, in their order. A row is its tokens, and for each whether it counts.

    Rows of similar length are computed together, padded on the right, where no token attends to the padding.
    `after_batch` is called with the number of rows that are done.
    """
    found = [RowLoss(0.0, 0) for _ in rows]
    by_length = sorted(range(len(rows)), key=lambda row: len(rows[row][0]), reverse=True)
    done = 0
    while done < len(by_length):
        length = len(rows[by_length[done]][0])
        size = max(1, min(TOKENS_AT_A_TIME, SCORES_AT_A_TIME // model.vocab_size) // max(1, length))
        batch = by_length[done : done + size]
        with without_gradients(model):
            losses = _batch_losses(model, [rows[row] for row in batch])
        for row, loss in zip(batch, losses, strict=True):
            found[row] = loss
        done += len(batch)
        after_batch(done)
    return found


def _batch_losses(model: ScoringModel, rows: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> list[RowLoss]:
    longest = max(2, *(len(ids) for ids, _ in rows))
    ids_bt = torch.zeros(len(rows), longest, dtype=torch.int64)
    counts_bt = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, (ids, supervised) in enumerate(rows):
        ids_bt[index, : len(ids)] = torch.tensor(list(ids))
        counts_bt[index, : len(ids)] = torch.tensor(list(supervised))
    # Found on the CPU: a GPU would be waited for to know how many there are.
    of_rows, places = counts_bt[:, 1:].nonzero(as_tuple=True)
    logits = model.logits(ids_bt[:, :-1].to(model.device))[of_rows.to(model.device), places.to(model.device)]
    expected = ids_bt[:, 1:][of_rows, places].to(model.device)
    losses = F.cross_entropy(logits.float(), expected, reduction="none").cpu()
    sums = torch.zeros(len(rows), longest - 1, dtype=torch.float64)
    sums[of_rows, places] = losses.double()
    missed = torch.zeros(len(rows), longest - 1, dtype=torch.bool)
    missed[of_rows, places] = (logits.argmax(-1) != expected).cpu()
    columns = (sums.sum(1).tolist(), counts_bt[:, 1:].sum(1).tolist(), (~missed.any(1)).tolist())
    return [RowLoss(*row) for row in zip(*columns, strict=True)]
