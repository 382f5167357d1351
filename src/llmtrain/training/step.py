"""One full optimizer step (`take_step`): gradients of a step's micro-batches, then the update.

    agree             add up over the ranks what the loader has counted: supervised tokens
    compute_gradients each micro-batch: backward(loss_sum · data_parallel_size / count), exchanged at the last one only
    gradient_norm     the global one, the same on every rank
    update            clip → optimizer, which leaves the weights as they are if loss or norm is not finite
    judge             what is done about such a step (non_finite.py)

The host queues all of this on a GPU, and waits once: for the loss and the norm, whose copy is queued before the update.
So the GPU updates while the host reads them and prepares the next step.

Dividing by the step's own count of tokens, and not each micro-batch by its, makes 16×1 equal 1×16 and one rank equal
two, however the supervised tokens lie. `data_parallel_size` undoes the averaging of gradients over the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import nn

from llmtrain.contracts import IGNORE_INDEX, Batch
from llmtrain.distributed.engine import Engine
from llmtrain.distributed.sharding import by_mesh, full_tensor
from llmtrain.faults import reach
from llmtrain.models.device_type import device_type_of
from llmtrain.training.cadence import NOT_LATE, Late
from llmtrain.training.non_finite import StepNumbers, judge
from llmtrain.training.optimizers import NamedOptimizer
from llmtrain.training.schedule import Schedule
from llmtrain.training.signals import StopRequested, StopSignal
from llmtrain.training.state import RunState, seed_step
from llmtrain.training.stragglers import StragglerWatch


@dataclass(frozen=True)
class Learner:
    """Model, optimizer and settings that a step computes with and updates."""

    model: nn.Module
    """The model as the engine wrapped it."""
    optimizer: NamedOptimizer
    engine: Engine


class StepDone(NamedTuple):
    """Result of a step over all ranks."""

    loss_sum: float
    """Nats, over the supervised tokens."""
    num_tokens: int
    """Supervised ones."""
    num_read: int
    """Tokens that are no padding."""
    grad_norm: float
    """Before clipping."""
    late: Late
    """Events that are due by the main process's clock."""


def take_step(
    learner: Learner,
    micro_batches: Sequence[Batch],
    items: range,
    *,
    schedule: Schedule,
    state: RunState,
    stop: StopSignal,
    stragglers: StragglerWatch,
    late: Late,
) -> StepDone:
    """Train on the micro-batches of `items`. No gradient is left; `state` stays at this step, but for its skips.

    `late`: what is due by this rank's clock. Raises StopRequested on every rank before anything was changed, NonFinite
    or RollBack where the loss or the gradient norm is not finite and the schedule's policy wants it.
    """
    engine, optimizer = learner.engine, learner.optimizer
    with stop.interrupts(when=engine.world_size == 1):  # one of several would leave the others waiting
        reach("step", step=state.step)
        seed_step(schedule.seed, state.step, engine.data_parallel_rank)
        agreed = agree(micro_batches, engine=engine, stop_requested=stop.requested, late=late)
        scale = state.loss_scale.value if state.loss_scale else 1.0
        with stragglers.computing():
            loss_sum = compute_gradients(
                learner.model, micro_batches, engine=engine, num_tokens=agreed.num_tokens, loss_scale=scale
            )
    reach("update", step=state.step)
    norm = gradient_norm(optimizer) / scale
    numbers = torch.stack([loss_sum, norm.to(loss_sum.dtype)])
    read, finite = engine.to_host(numbers), numbers.isfinite().all()
    optimizer.set_lr_scale(schedule.learning_rate_scale(state.step))
    try:
        update(optimizer, grad_norm=norm, max_grad_norm=schedule.max_grad_norm, loss_scale=scale, finite=finite)
    finally:
        optimizer.zero_grad()  # a roll-back goes on with the same parameters: no gradient may be left
    total, grad_norm = read()
    found = StepNumbers(state.step + 1, total / max(1, agreed.num_tokens), grad_norm, items)
    judge(found, state, policy=schedule.non_finite)
    return StepDone(total, agreed.num_tokens, agreed.num_read, grad_norm, agreed.late)


class StepAgreement(NamedTuple):
    """Values that all ranks agree on before a step."""

    num_tokens: int
    """Supervised tokens of the step, on all ranks."""
    num_read: int
    """Tokens of the step that are no padding."""
    late: Late
    """Events that are due after the step by the main process's clock."""


def agree(
    micro_batches: Sequence[Batch], *, engine: Engine, stop_requested: bool, late: Late = NOT_LATE
) -> StepAgreement:
    """Exchange what the ranks must know of each other, all in one collective of a few integers.

    Raises StopRequested on every rank if any of them wants to stop.
    """
    local_tokens = sum(_num_supervised(batch) for batch in micro_batches)
    local_read = sum(int(batch["lengths"].sum()) for batch in micro_batches if "lengths" in batch) or local_tokens
    num_tokens, num_read, stopping, *votes = engine.sum(
        local_tokens, local_read, int(stop_requested), *(int(vote) for vote in late)
    )
    if stopping:
        raise StopRequested
    votes_late = Late(*(vote > 0 for vote in votes))
    return StepAgreement(num_tokens // engine.tensor_parallel_size, num_read // engine.tensor_parallel_size, votes_late)


def _num_supervised(batch: Batch) -> int:
    return len(batch["supervised"]) if "supervised" in batch else int((batch["labels"] != IGNORE_INDEX).sum())


def compute_gradients(
    model: nn.Module, micro_batches: Sequence[Batch], *, engine: Engine, num_tokens: int, loss_scale: float = 1.0
) -> torch.Tensor:
    """Leave the step's gradients, times `loss_scale`, in the parameters. Return the sum of the losses of all ranks.

    The sum (nats) is a scalar on the device: reading it waits for the gradients. `num_tokens`: supervised tokens on all
    ranks, as `agree` counted them.
    """
    scale = loss_scale * engine.data_parallel_size / max(1, num_tokens)
    loss_sum = torch.zeros((), device=engine.device)
    for index, batch in enumerate(micro_batches):
        with engine.no_sync(model, enabled=index < len(micro_batches) - 1):
            micro_loss_sum, _ = model(engine.to_device(batch))
            if reach("loss", micro_batch=index):
                micro_loss_sum = micro_loss_sum * float("nan")
            engine.backward(micro_loss_sum * scale)
        loss_sum += micro_loss_sum.detach()
    return engine.sum_on_device(loss_sum) / engine.tensor_parallel_size


def gradient_norm(optimizer: NamedOptimizer) -> torch.Tensor:
    """Return the global norm of the gradients, a scalar on their device, the same on every rank."""
    norms = [full_tensor(torch.nn.utils.get_total_norm(some)) for some in by_mesh(_gradients(optimizer))]
    if len(norms) < 2:
        return norms[0] if norms else torch.zeros((), device=optimizer.parameters[0].device)
    return reduce(torch.hypot, [norm.double() for norm in norms])


def update(
    optimizer: NamedOptimizer,
    *,
    grad_norm: torch.Tensor,
    max_grad_norm: float | None,
    loss_scale: float = 1.0,
    finite: torch.Tensor | None = None,
) -> None:
    """Take `loss_scale` out of the gradients, clip them to `max_grad_norm`, update the parameters.

    `grad_norm` is the norm without the scale. If `finite` (a bool scalar) is false, nothing is updated; without it the
    norm decides.
    """
    if max_grad_norm is not None or loss_scale != 1.0:
        factor = _factor(grad_norm, max_grad_norm=max_grad_norm, loss_scale=loss_scale)
        if device_type_of(factor.device) != "cpu" or factor != 1.0:  # on a CPU the value is there, and may save a pass
            for some in by_mesh(_gradients(optimizer)):
                torch._foreach_mul_(some, factor.float())
    optimizer.step(grad_norm.isfinite() if finite is None else finite)


def _factor(grad_norm: torch.Tensor, *, max_grad_norm: float | None, loss_scale: float) -> torch.Tensor:
    """Return the factor on the gradients, in float64 where the device has it, so that it is rounded once."""
    wide = grad_norm if grad_norm.device.type == "mps" else grad_norm.double()
    limit = wide if max_grad_norm is None else torch.full_like(wide, max_grad_norm)
    return torch.where(wide > limit, limit / wide, 1.0) / loss_scale


def _gradients(optimizer: NamedOptimizer) -> list[torch.Tensor]:
    return [parameter.grad for parameter in optimizer.parameters if parameter.grad is not None]
