"""The training loop, for pretraining and fine-tuning alike.

    until the last step:
        evaluate and save, where this step's number says so
        micro-batches → gradients → update → next item
        say what happened

The top of the loop does what is due *at* the current step, and notes what it did in the state; so a run that is stopped
anywhere and resumed makes up for what it missed and repeats nothing. What is interruptible changes no state.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping

from torch import nn

from llmtrain.contracts import Batch
from llmtrain.distributed.engine import Engine
from llmtrain.testing.faults import reach
from llmtrain.training.optimizers import NamedOptimizer
from llmtrain.training.plan import Schedule
from llmtrain.training.report import Reporter
from llmtrain.training.signals import StopRequested, StopSignal
from llmtrain.training.state import RunState, seed_step
from llmtrain.training.step import compute_gradients, gradient_norm, refuse_non_finite, update

log = logging.getLogger("llmtrain.train")


def fit(
    *,
    model: nn.Module,
    optimizer: NamedOptimizer,
    batches: Iterator[list[Batch]],
    evaluate: Callable[[], Mapping[str, float]] | None,
    save: Callable[[RunState, bool], None],
    schedule: Schedule,
    state: RunState,
    engine: Engine,
    stop: StopSignal,
    report: Reporter,
) -> bool:
    """Train from `state` to the end of the schedule. True: finished; False: stopped by a signal, and saved.

    `batches` begins at `state.item`; `evaluate` gives figures by their names, val/loss among them;
    `save(state, best)` writes a checkpoint. Raises WillFailAgain if a loss or a gradient is no finite number.
    """
    start_step, model_can_stop_alone = state.step, engine.world_size == 1
    model.train()
    try:
        while True:
            best = evaluated = False
            if evaluate is not None and schedule.evaluation_due(state):
                with report.spent("evaluation"), stop.interrupts(when=model_can_stop_alone):
                    reach("evaluation", step=state.step)
                    figures = evaluate()
                best, evaluated = state.record_validation(figures), True
                report.evaluated(state, figures)
            if best or (schedule.save_due(state.step) and (evaluated or state.step > start_step)):
                with report.spent("saving"):
                    save(state, best)
            if state.step >= schedule.total_steps:
                return True

            began = time.perf_counter()
            micro_batches = _wait_for(batches, stop, report)
            with report.spent("step" if state.step > start_step else "compile"):
                with stop.interrupts(when=model_can_stop_alone):
                    reach("step", step=state.step)
                    seed_step(schedule.seed, state.step, engine.rank)
                    loss_sum, num_tokens = compute_gradients(
                        model, micro_batches, engine=engine, stop_requested=stop.requested
                    )
                reach("update", step=state.step)
                items = range(state.item, min(state.item + schedule.batch_size, schedule.end_item))
                grad_norm = gradient_norm(optimizer)
                refuse_non_finite(state.step + 1, loss_sum=loss_sum, grad_norm=grad_norm, items=items)
                optimizer.set_lr_scale(schedule.learning_rate_scale(state.step))
                update(optimizer, grad_norm=grad_norm, max_grad_norm=schedule.max_grad_norm)
            state.step, state.item, state.tokens = state.step + 1, items.stop, state.tokens + num_tokens
            report.stepped(
                state,
                loss_sum=loss_sum,
                num_tokens=num_tokens,
                grad_norm=grad_norm,
                lr=optimizer.lr,
                items=items,
                micro_batches=micro_batches,
                seconds=time.perf_counter() - began,
                due=state.step % schedule.log_every == 0 or state.step >= schedule.total_steps,
            )
            reach("stepped", step=state.step)
    except StopRequested:
        log.warning("%s: saving step %d, then stopping", stop.received.name if stop.received else "a rank", state.step)
        with report.spent("saving"):
            save(state, False)
        return False


def _wait_for(batches: Iterator[list[Batch]], stop: StopSignal, report: Reporter) -> list[Batch]:
    """The next step's micro-batches; none if a signal came during the wait, which the step then makes known to all."""
    try:
        with report.spent("data"), stop.interrupts():
            reach("data")
            return next(batches)
    except StopRequested:
        return []
