"""The training loop, for pretraining and fine-tuning alike.

    until the run is over:
        evaluate and save, where this step's number or the clock says so
        micro-batches → gradients → update, unless they are not finite → next item
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
from llmtrain.training.cadence import NOT_LATE, Due, Late, Stopwatch
from llmtrain.training.non_finite import StepFigures, may_update
from llmtrain.training.optimizers import NamedOptimizer
from llmtrain.training.pace import Pace
from llmtrain.training.plan import Schedule
from llmtrain.training.report import Reporter
from llmtrain.training.signals import StopRequested, StopSignal
from llmtrain.training.state import RunState, seed_step
from llmtrain.training.step import agree, compute_gradients, gradient_norm, update

log = logging.getLogger("llmtrain.train")


def fit(
    *,
    model: nn.Module,
    optimizer: NamedOptimizer,
    batches: Iterator[list[Batch]],
    evaluate: Callable[[Due], Mapping[str, float]],
    save: Callable[[RunState, bool, bool], None],
    schedule: Schedule,
    state: RunState,
    engine: Engine,
    stop: StopSignal,
    report: Reporter,
) -> bool:
    """Train from `state` to the end of the schedule. True: finished; False: stopped by a signal, and saved.

    `batches` begins at `state.item`; `evaluate` gives the figures that are due by their names;
    `save(state, best, final)` writes a checkpoint. At a loss or a gradient that is no finite number it raises
    WillFailAgain or RollBack, or skips the step, as the schedule says.
    """
    start_step, model_can_stop_alone = state.step, engine.world_size == 1
    evaluation_watch = Stopwatch(schedule.evaluate.every_seconds if schedule.evaluate else None)
    save_watch = Stopwatch(schedule.save.every_seconds)
    late, pace = NOT_LATE, Pace(model, engine=engine)
    model.train()
    try:
        while True:
            best = evaluated = False
            due = schedule.evaluations_due(state, late=late.evaluation)
            if any(due):
                engine.watchdog.beat("evaluation")
                with report.spent("evaluation"), stop.interrupts(when=model_can_stop_alone):
                    reach("evaluation", step=state.step)
                    figures = evaluate(due)
                best = state.record_evaluation(
                    figures,
                    due,
                    keep_best=schedule.keep_best,
                    stop_by=schedule.stop_by,
                    min_delta=schedule.min_delta,
                )
                report.evaluated(state, figures)
                evaluated = True
                if due.validation:
                    evaluation_watch.reset()
            over = schedule.is_over(state)
            if best or ((over or schedule.save_due(state, late=late.save)) and (evaluated or state.step > start_step)):
                engine.watchdog.beat("saving")
                with report.spent("saving"):
                    save(state, best, over)
                report.saved(state, best=best)
                save_watch.reset()
            if over:
                return True

            engine.watchdog.beat("data")
            began = time.perf_counter()
            micro_batches, items = _wait_for(batches, stop, report), schedule.next_items(state)
            if state.leaves_out(items):
                micro_batches = []  # a step of no tokens, which changes nothing
            waited_sec = time.perf_counter() - began
            engine.watchdog.beat("step")
            with report.spent("step" if state.step > start_step else "compile"):
                with stop.interrupts(when=model_can_stop_alone):
                    reach("step", step=state.step)
                    seed_step(schedule.seed, state.step, engine.dp_rank)
                    watched = Late(evaluation_watch.is_late, save_watch.is_late) if engine.is_main else NOT_LATE
                    num_tokens, num_read, late = agree(
                        micro_batches, engine=engine, stop_requested=stop.requested, late=watched
                    )
                    scale = state.loss_scale.value if state.loss_scale else 1.0
                    with pace.computing():
                        loss_sum = compute_gradients(
                            model, micro_batches, engine=engine, num_tokens=num_tokens, loss_scale=scale
                        )
                reach("update", step=state.step)
                grad_norm = gradient_norm(optimizer) / scale
                found = StepFigures(state.step + 1, loss_sum / max(1, num_tokens), grad_norm, items)
                optimizer.set_lr_scale(schedule.learning_rate_scale(state.step))
                try:
                    if may_update(found, state, policy=schedule.non_finite):
                        update(optimizer, grad_norm=grad_norm, max_grad_norm=schedule.max_grad_norm, loss_scale=scale)
                finally:
                    optimizer.zero_grad()  # a roll-back goes on with the same parameters: no gradient may be left
            state.advance(items, num_tokens=num_read)
            report.stepped(
                state,
                loss_sum=loss_sum,
                num_tokens=num_tokens,
                num_read=num_read,
                grad_norm=grad_norm,
                lr=optimizer.lr,
                items=items,
                micro_batches=micro_batches,
                seconds=time.perf_counter() - began,
                due=state.step % schedule.log_every == 0 or state.step >= schedule.total_steps,
            )
            pace.stepped(state.step, waited_sec=waited_sec, seconds=time.perf_counter() - began)
            reach("stepped", step=state.step)
    except StopRequested:
        log.warning("%s: saving step %d, then stopping", stop.received.name if stop.received else "a rank", state.step)
        engine.watchdog.beat("saving")
        with report.spent("saving"):
            save(state, False, False)
        report.saved(state, best=False)
        return False


def _wait_for(batches: Iterator[list[Batch]], stop: StopSignal, report: Reporter) -> list[Batch]:
    """The next step's micro-batches; none if a signal came during the wait, which the step then makes known to all."""
    try:
        with report.spent("data"), stop.interrupts():
            reach("data")
            return next(batches)
    except StopRequested:
        return []
