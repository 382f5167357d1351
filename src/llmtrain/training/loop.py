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
from llmtrain.training.optimizers import NamedOptimizer
from llmtrain.training.pace import Pace
from llmtrain.training.plan import Schedule
from llmtrain.training.report import Reporter
from llmtrain.training.signals import StopRequested, StopSignal
from llmtrain.training.state import RunState
from llmtrain.training.step import take_step

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
    start_step = state.step
    evaluation_watch = Stopwatch(schedule.evaluate.every_seconds if schedule.evaluate else None)
    save_watch = Stopwatch(schedule.save.every_seconds)
    late, pace = NOT_LATE, Pace(model, engine=engine)
    model.train()
    try:
        while True:
            best = evaluated = False
            due = schedule.evaluations_due(state, late=late.evaluation)
            if any(due):
                with report.spent("evaluation"), stop.interrupts(when=engine.world_size == 1):
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
                with report.spent("saving"):
                    save(state, best, over)
                report.saved(state, best=best)
                save_watch.reset()
            if over:
                return True

            began = time.perf_counter()
            micro_batches, items = _wait_for(batches, stop, report), schedule.next_items(state)
            if state.leaves_out(items):
                micro_batches = []  # a step of no tokens, which changes nothing
            waited_sec = time.perf_counter() - began
            with report.spent("step" if state.step > start_step else "compile"):
                done = take_step(
                    model,
                    optimizer,
                    micro_batches,
                    items,
                    engine=engine,
                    schedule=schedule,
                    state=state,
                    stop=stop,
                    pace=pace,
                    late=Late(evaluation_watch.is_late, save_watch.is_late) if engine.is_main else NOT_LATE,
                )
            late = done.late
            state.advance(items, num_tokens=done.num_read)
            report.stepped(
                state,
                done,
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
