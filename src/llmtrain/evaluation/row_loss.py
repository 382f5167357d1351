"""The loss of each row for itself, so that rows can be compared pair by pair; of batches as a whole it is loss.py's."""

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
        """Device on which tokens should be."""
        ...

    @property
    def vocab_size(self) -> int:
        """Scores per position."""
        ...

    def logits(self, input_ids: Tensor) -> Tensor:
        """[b, t, vocab] scores of the token after each of `input_ids`."""
        ...


class RowLoss(NamedTuple):
    """Loss of the supervised tokens of a row."""

    loss_sum: float
    """Sum of the loss, in nats."""
    num_tokens: int
    is_likeliest: bool = True
    """True if each of the tokens is the likeliest one in its place."""


@torch.inference_mode()
def row_losses(
    model: ScoringModel,
    rows: Sequence[tuple[Sequence[int], Sequence[bool]]],
    *,
    after_batch: Callable[[int], None] = lambda _: None,
) -> list[RowLoss]:
    """The loss of each row, given as its tokens and which of them count, in their order.

    Rows of like length are computed together, padded on the right, where nothing looks at the padding. `after_batch` is
    told how many rows are done.
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
