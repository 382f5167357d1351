"""Measures loss, perplexity and bits per byte on batches. Every token has the same weight, whatever its batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmtrain.contracts import Batch
from llmtrain.distributed.engine import Engine
from llmtrain.tracking.metric_names import VAL_BITS_PER_BYTE, VAL_LOSS, VAL_PERPLEXITY


@dataclass(frozen=True)
class LossResult:
    """Loss of a model on held-out tokens."""

    loss: float
    """Mean over the supervised tokens, in nats."""
    num_tokens: int
    bits_per_byte: float | None
    """Bits that the model needs for one byte of the text; None if the number of bytes is not known."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite if that is too large for a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def metrics(self) -> dict[str, float]:
        """Return the metrics by their names for sinks, with bits per byte if it is known."""
        metrics = {VAL_LOSS: self.loss, VAL_PERPLEXITY: self.perplexity}
        return metrics if self.bits_per_byte is None else {**metrics, VAL_BITS_PER_BYTE: self.bits_per_byte}


def evaluate_loss(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    engine: Engine,
    tokens_per_byte: float | None,
    before_batch: Callable[[], None] = lambda: None,
) -> LossResult:
    """Return the loss of `model` over the batches of all ranks.

    `batches` are this rank's share; every rank has the same number. `tokens_per_byte` is that of the full validation
    text. `before_batch` is called before each batch: to show progress, or to raise.
    """
    was_training = model.training
    model.eval()
    sums: list[tuple[Tensor, Tensor]] = []
    """Loss and tokens of each batch. They are read at the end: to wait for each would leave a GPU idle."""
    try:
        with torch.no_grad():
            for batch in batches:
                before_batch()
                sums.append(model(engine.to_device(batch)))
    finally:
        model.train(was_training)
    loss_sum, num_tokens = 0.0, 0
    for batch_loss_sum, batch_tokens in sums:
        loss_sum += float(batch_loss_sum)
        num_tokens += int(batch_tokens)
    loss_sum = engine.sum_floats([loss_sum])[0] / engine.tensor_parallel_size
    num_tokens = engine.sum(num_tokens)[0] // engine.tensor_parallel_size
    loss = loss_sum / num_tokens if num_tokens else math.nan
    bits_per_byte = None if tokens_per_byte is None else loss / math.log(2) * tokens_per_byte
    return LossResult(loss=loss, num_tokens=num_tokens, bits_per_byte=bits_per_byte)
