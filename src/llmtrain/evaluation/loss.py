"""Loss, perplexity and bits per byte on held-out text, weighted by token (a mean of batch means is not the mean)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

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
    """Bits that the model needs for one byte of the text; None where the bytes are unknown."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is too large for a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def metrics(self) -> dict[str, float]:
        """Return the metrics by their names for sinks; bits per byte only where the bytes are known."""
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
    """The loss of `model` on `batches`: this rank's share of the evaluation, of equal length on every rank.

    `tokens_per_byte` is that of the whole validation text. `before_batch` is called before each batch: to show
    progress, or to raise.
    """
    was_training = model.training
    model.eval()
    loss_sum, num_tokens = 0.0, 0
    try:
        with torch.no_grad():
            for batch in batches:
                before_batch()
                batch_loss_sum, batch_tokens = model(engine.to_device(batch))
                loss_sum += float(batch_loss_sum)
                num_tokens += int(batch_tokens)
    finally:
        model.train(was_training)
    loss_sum = engine.sum_floats([loss_sum])[0] / engine.tensor_parallel_size
    num_tokens = engine.sum(num_tokens)[0] // engine.tensor_parallel_size
    loss = loss_sum / num_tokens if num_tokens else math.nan
    bits_per_byte = None if tokens_per_byte is None else loss / math.log(2) * tokens_per_byte
    return LossResult(loss=loss, num_tokens=num_tokens, bits_per_byte=bits_per_byte)
