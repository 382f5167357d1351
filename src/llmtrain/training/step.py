"""One optimizer step, whole: gradients of a step's micro-batches, then the update.

    count supervised tokens on the CPU; add them up over the ranks
    each micro-batch: backward(loss_sum · dp_size / count), exchanged between ranks at the last one only
    global gradient norm → finite or not, the same on every rank → clip → optimizer

Dividing by the step's own count of tokens, and not each micro-batch by its, makes 16×1 equal 1×16 and one rank equal
two, however the supervised tokens lie. `dp_size` undoes the averaging of gradients over the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from llmtrain.config.errors import WillFailAgain
from llmtrain.contracts import IGNORE_INDEX, Batch
from llmtrain.distributed.engine import Engine
from llmtrain.training.optimizers import NamedOptimizer
from llmtrain.training.signals import StopRequested


def compute_gradients(
    model: nn.Module, micro_batches: Sequence[Batch], *, engine: Engine, stop_requested: bool = False
) -> tuple[float, int]:
    """Leave the step's gradients in the parameters; the sum of the losses (nats) and the number of tokens, both global.

    Raises StopRequested on every rank if any of them wants to stop; nothing was computed then.
    """
    local_tokens = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in micro_batches)
    num_tokens, stopping = engine.sum(local_tokens, int(stop_requested))
    if stopping:
        raise StopRequested
    scale = engine.dp_size / max(1, num_tokens)
    loss_sum = torch.zeros((), device=engine.device)
    for index, batch in enumerate(micro_batches):
        with engine.no_sync(model, enabled=index < len(micro_batches) - 1):
            micro_loss_sum, _ = model(engine.to_device(batch))
            engine.backward(micro_loss_sum * scale)
        loss_sum += micro_loss_sum.detach()
    return engine.sum_floats([loss_sum.item()])[0], num_tokens


def gradient_norm(optimizer: NamedOptimizer) -> float:
    """The global norm of the gradients, the same on every rank."""
    return float(torch.nn.utils.get_total_norm(_gradients(optimizer)))


def refuse_non_finite(step: int, *, loss_sum: float, grad_norm: float, items: range) -> None:
    """Raise WillFailAgain (exit 42) if the step's loss or gradient norm is infinite or no number."""
    if math.isfinite(loss_sum) and math.isfinite(grad_norm):
        return
    raise WillFailAgain(
        f"step {step}: the loss is {loss_sum:g} and the gradient norm {grad_norm:g} (items {items.start} to "
        f"{items.stop - 1}). The weights were not updated, and the last checkpoint is good. "
        "Lower optimizer.lr, lengthen scheduler.warmup_steps, or look at those items"
    )


def update(optimizer: NamedOptimizer, *, grad_norm: float, max_grad_norm: float | None) -> None:
    """Clip the gradients to `max_grad_norm`, update the parameters, drop the gradients."""
    if max_grad_norm is not None and grad_norm > max_grad_norm:
        torch._foreach_mul_(_gradients(optimizer), max_grad_norm / grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def _gradients(optimizer: NamedOptimizer) -> list[torch.Tensor]:
    return [parameter.grad for parameter in optimizer.parameters if parameter.grad is not None]
