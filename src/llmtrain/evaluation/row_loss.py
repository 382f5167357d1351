"""Measures the loss of each row, so that rows can be compared in pairs. loss.py measures that of full batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

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


@torch.inference_mode()
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
        for row, loss in zip(batch, _batch_losses(model, [rows[row] for row in batch]), strict=True):
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
    ids_bt, counts_bt = ids_bt.to(model.device), counts_bt.to(model.device)
    logits = model.logits(ids_bt[:, :-1])
    counted = counts_bt[:, 1:]
    losses = F.cross_entropy(logits[counted].float(), ids_bt[:, 1:][counted], reduction="none").double()
    sums = torch.zeros(counted.shape, dtype=torch.float64, device=losses.device)
    sums[counted] = losses
    missed = torch.zeros(counted.shape, dtype=torch.bool, device=losses.device)
    missed[counted] = logits[counted].argmax(-1) != ids_bt[:, 1:][counted]
    columns = (sums.sum(1).tolist(), counted.sum(1).tolist(), (~missed.any(1)).tolist())
    return [RowLoss(*row) for row in zip(*columns, strict=True)]
