"""The training loop, for pretraining and fine-tuning alike.

    until the run is over:
        evaluate and save, where this step's number or the clock says so
        micro-batches → gradients → update, unless they are not finite → next item
        say what happened

The top of the loop does what is due *at* the current step, and notes what it did in the state; so a run that is stopped
anywhere and resumed makes up for what it missed and repeats nothing. What is interruptible changes no state.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping

from llmtrain.contracts import Batch
from llmtrain.faults import reach
from llmtrain.training.cadence import NOT_LATE, Due, Late, Stopwatch
from llmtrain.training.report import Reporter
from llmtrain.training.schedule import Schedule
from llmtrain.training.signals import StopRequested, StopSignal
from llmtrain.training.state import RunState
from llmtrain.training.step import Learner, take_step
from llmtrain.training.stragglers import StragglerWatch

log = logging.getLogger("llmtrain.train")

FREEZE_AFTER = 3
"""Steps of a process after which garbage collections leave out what is there by then: modules, graphs, optimizer. Each
would walk over all of it, while the device waits."""


def fit(
    learner: Learner,
    batches: Iterator[list[Batch]],
    *,
    schedule: Schedule,
    state: RunState,
    evaluate: Callable[[Due], Mapping[str, float]],
    save: Callable[[bool, bool], None],
    stop: StopSignal,
    report: Reporter,
) -> bool:
    """Train from `state` to the end of the schedule. True: finished; False: stopped by a signal, and saved.

    `batches` begins at `state.item`; `evaluate` gives the metrics that are due by their names; `save(best, final)`
    writes a checkpoint of `state`. At a loss or a gradient that is no finite number it raises WillFailAgain or
    RollBack, or skips the step, as the schedule says.
    """
    start_step, engine = state.step, learner.engine
    evaluation_watch = Stopwatch(schedule.evaluate.every_seconds if schedule.evaluate else None)
    save_watch = Stopwatch(schedule.save.every_seconds)
    late, stragglers = NOT_LATE, StragglerWatch(learner.model, engine=engine)
    learner.model.train()
    try:
        while True:
            best = evaluated = False
            due = schedule.evaluations_due(state, late=late.evaluation)
            if any(due):
                with report.spent("evaluation"), stop.interrupts(when=engine.world_size == 1):
                    reach("evaluation", step=state.step)
                    metrics = evaluate(due)
                best = state.record_evaluation(
                    metrics,
                    due,
                    keep_best=schedule.keep_best,
                    stop_by=schedule.stop_by,
                    min_delta=schedule.min_delta,
                )
                report.evaluated(state, metrics)
                evaluated = True
                if due.validation:
                    evaluation_watch.reset()
            over = schedule.is_over(state)
            if best or ((over or schedule.save_due(state, late=late.save)) and (evaluated or state.step > start_step)):
                with report.spent("saving"):
                    save(best, over)
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
                    learner,
                    micro_batches,
                    items,
                    schedule=schedule,
                    state=state,
                    stop=stop,
                    stragglers=stragglers,
                    late=Late(evaluation_watch.is_late, save_watch.is_late) if engine.is_main else NOT_LATE,
                )
            late = done.late
            state.advance(items, num_tokens=done.num_read)
            report.stepped(
                state,
                done,
                lr=learner.optimizer.lr,
                items=items,
                micro_batches=micro_batches,
                seconds=time.perf_counter() - began,
                due=state.step % schedule.log_every == 0 or state.step >= schedule.total_steps,
            )
            if state.step == start_step + FREEZE_AFTER:
                gc.freeze()
            stragglers.stepped(state.step, waited_sec=waited_sec, seconds=time.perf_counter() - began)
            reach("stepped", step=state.step)
    except StopRequested:
        log.warning("%s: saving step %d, then stopping", stop.received.name if stop.received else "a rank", state.step)
        with report.spent("saving"):
            save(False, False)
        return False
    finally:
        gc.unfreeze()


def _wait_for(batches: Iterator[list[Batch]], stop: StopSignal, report: Reporter) -> list[Batch]:
    """The next step's micro-batches; none if a signal came during the wait, which the step then makes known to all."""
    try:
        with report.spent("data"), stop.interrupts():
            reach("data")
            return next(batches)
    except StopRequested:
        return []
