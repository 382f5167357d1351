"""Report what the loop does: metrics to the sinks, progress to the terminal, seconds to the timings.

The loop measures; this file puts names on it. Nothing here changes the run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from llmtrain.contracts import Batch, MetricSink
from llmtrain.data.batches import TrainingSet
from llmtrain.data.mixture_report import change_in_words, source_rows
from llmtrain.distributed.watchdog import Watchdog
from llmtrain.runs.events import EventLog
from llmtrain.runs.summary import ParameterCount, RunSummary
from llmtrain.tracking import metric_names as names
from llmtrain.tracking.progress import Progress
from llmtrain.tracking.system import model_flops_utilisation
from llmtrain.tracking.times import Activity, Spent, Throughput, Timings, Waiting
from llmtrain.training.slow_steps import SlowSteps
from llmtrain.training.state import RunState
from llmtrain.training.step import StepDone

log = logging.getLogger("llmtrain.train")
batch_log = logging.getLogger("llmtrain.batch")

_SHOWN_AS: dict[Activity, str] = {"step": "training", "data": "training"}


@dataclass(frozen=True)
class Outputs:
    """Destinations of a run's metrics, events and progress."""

    sinks: MetricSink
    events: EventLog
    progress: Progress


@dataclass(frozen=True)
class Compute:
    """Devices and FLOPs of a run, and the time that it has spent so far."""

    num_devices: int
    flops_per_token: float
    peak_flops: float | None
    """Peak FLOPs a second of one device; None where it is not known."""
    compiles: bool
    spent: Spent
    """Time of the attempts before this one."""


class Reporter:
    """Turns what the loop measured into metrics with names; one for the whole of `fit`."""

    def __init__(
        self,
        outputs: Outputs,
        *,
        compute: Compute,
        batches: BatchLog,
        data: TrainingSet,
        machine: Callable[[], Mapping[str, float]],
        advice: Mapping[Activity, str],
        watchdog: Watchdog,
        slow_steps: SlowSteps,
    ) -> None:
        """`machine` gives the machine's metrics; every rank calls it at the same steps. `advice`: see Waiting."""
        self._sinks, self._events, self._progress = outputs.sinks, outputs.events, outputs.progress
        self._times = Timings(before=compute.spent.seconds)
        self._throughput = Throughput(self._times, before=compute.spent)
        self._waiting = Waiting(self._times, advice=advice)
        self._machine = machine
        self._items_per_epoch = data.items_per_epoch
        self._mixture = data.mixture
        self._compute = compute
        self._batches = batches
        self._window = _LossSum()
        self._shown_as: dict[Activity, str] = {**_SHOWN_AS, "compile": "compiling" if compute.compiles else "training"}
        self._watchdog = watchdog
        self._slow_steps = slow_steps
        self._step_sec = self._times.seconds("step")
        """Spent in steps so far, but for those that compiled."""

    @contextmanager
    def spent(self, activity: Activity) -> Iterator[None]:
        """Book the block's seconds under `activity`, show it as the stage, and tell the watchdog of it."""
        self._watchdog.beat("step" if activity == "compile" else activity)
        self._progress.stage(self._shown_as.get(activity, activity))
        with self._times.spent(activity):
            yield

    def stepped(
        self,
        state: RunState,
        done: StepDone,
        *,
        lr: float,
        items: range,
        micro_batches: Sequence[Batch],
        seconds: float,
        due: bool,
    ) -> None:
        """A step is done; `due`: its metrics are wanted."""
        loss = done.loss_sum / done.num_tokens if done.num_tokens else math.nan
        if math.isfinite(loss):  # what was skipped or left out counts nowhere, least of all as 0
            state.first_loss = loss if state.first_loss is None else state.first_loss
            state.last_loss = loss
            self._window.add(done.loss_sum, done.num_tokens)
            state.epoch_loss_sum += done.loss_sum
            state.epoch_tokens += done.num_tokens
        if state.skipped_in_a_row:
            self._events.add("skipped", step=state.step)
        self._throughput.add(done.num_read)
        before, self._step_sec = self._step_sec, self._times.seconds("step")
        self._slow_steps.stepped(self._step_sec - before, tokens=done.num_read)
        self._batches.describe(state.step, items, micro_batches, loss=loss, seconds=seconds)
        metrics = self._metrics(state, grad_norm=done.grad_norm, lr=lr) if due else None
        if metrics is not None:
            self._sinks.log(state.step, metrics)
            self._window = _LossSum()
        self._progress.update(state.step, metrics)
        self._tell_changes(state.step, items)
        if items.stop // self._items_per_epoch > items.start // self._items_per_epoch:
            self._end_epoch(items.stop // self._items_per_epoch, state)

    def evaluated(self, state: RunState, metrics: Mapping[str, float]) -> None:
        """An evaluation is done."""
        self._sinks.log(state.step, metrics)
        is_best = state.best_step == state.step
        self._progress.evaluated(state.step, metrics, best=is_best)
        best = "  (the best so far)" if is_best else ""
        log.info("step %d  %s%s", state.step, names.describe(metrics), best)

    def saved(self, step: int, *, best: bool) -> None:
        """A checkpoint of this step is on the disk. Called by the thread that saves."""
        self._progress.saved(step)
        self._events.add("saved", step=step, best=best)

    def spent_so_far(self) -> Spent:
        """Return what the run has spent, for a checkpoint to keep."""
        return self._throughput.add_to(Spent(self._times.summary().seconds))

    def summary(
        self,
        state: RunState,
        outcome: Literal["finished", "preempted", "failed"],
        *,
        parameters: ParameterCount,
        peak_memory_bytes: int,
        resumed_step: int | None,
    ) -> RunSummary:
        """Return the totals of the run so far."""
        spent = self._times.summary()
        return RunSummary(
            state=outcome,
            steps=state.step,
            resumed_from_step=resumed_step,
            world_size=self._compute.num_devices,
            tokens=state.tokens,
            seconds=spent.wall_sec,
            tokens_per_sec=self._throughput.tokens_per_sec(),
            first_loss=state.first_loss,
            last_loss=state.last_loss,
            best_val_loss=state.best_val_loss,
            val_loss=state.validation.get(names.VAL_LOSS),
            skipped_steps=state.skipped_steps,
            parameters=parameters,
            peak_memory_bytes=peak_memory_bytes,
            goodput=spent.goodput,
            time_spent=spent.seconds,
            mixture=source_rows(self._mixture, state.item) if self._mixture else None,
        )

    def _metrics(self, state: RunState, *, grad_norm: float, lr: float) -> dict[str, float]:
        metrics = {
            **({names.TRAIN_LOSS: self._window.mean} if self._window.num_tokens else {}),
            names.TRAIN_LR: lr,
            names.TRAIN_EPOCH: state.item / self._items_per_epoch,
            names.TRAIN_GRAD_NORM: grad_norm,
            names.TRAIN_TOKENS_TOTAL: float(state.tokens),
            **self._throughput.next_window(),
            **self._waiting.next_window(),
            **self._machine(),
        }
        if state.skipped_steps:
            metrics[names.TRAIN_SKIPPED_STEPS] = float(state.skipped_steps)
        if state.loss_scale is not None:
            metrics[names.TRAIN_LOSS_SCALE] = state.loss_scale.value
        if (speed := metrics.get(names.TRAIN_TOKENS_PER_SEC)) is not None:
            mfu = model_flops_utilisation(
                speed,
                flops_per_token=self._compute.flops_per_token,
                peak_flops=self._compute.peak_flops,
                num_devices=self._compute.num_devices,
            )
            if mfu is not None:
                metrics[names.TRAIN_MFU] = mfu
        return metrics

    def _tell_changes(self, step: int, items: range) -> None:
        """Say where the shares of the data's sources changed in a step, or right after it at the end of the data."""
        if self._mixture is None:
            return
        for change in self._mixture.changes:
            if change.item in items or items.stop == change.item == self._mixture.end:
                what = change_in_words(change, self._mixture)
                log.info("sequence %s: %s", f"{change.item:,}", what)
                self._events.add("mixture", step=step, sequence=change.item, what=what)

    def _end_epoch(self, epoch: int, state: RunState) -> None:
        mean = state.epoch_loss_sum / state.epoch_tokens if state.epoch_tokens else math.nan
        log.info("epoch %d is done: mean loss %.4f over %s tokens", epoch, mean, f"{state.epoch_tokens:,}")
        state.epoch_loss_sum, state.epoch_tokens = 0.0, 0


class BatchLog:
    """Logs, at level DEBUG, from what items a rank computed a step."""

    def __init__(
        self,
        which: Literal["first-last", "all", "none"],
        *,
        own_items: Callable[[range], Sequence[int]],
        total_steps: int,
    ) -> None:
        """`own_items`: which of a step's items this rank computes."""
        self._which = which
        self._own_items = own_items
        self._total_steps = total_steps
        self._has_told = False

    def describe(self, step: int, items: range, micro_batches: Sequence[Batch], *, loss: float, seconds: float) -> None:
        """Log what a step was computed from, if it is to be."""
        first_or_last = not self._has_told or step == self._total_steps
        if self._which == "none" or (self._which == "first-last" and not first_or_last):
            return
        self._has_told = True
        if not batch_log.isEnabledFor(logging.DEBUG):
            return
        if not micro_batches:
            batch_log.debug("step %d: sequences %d to %d are left out", step, items.start, items.stop - 1)
            return
        numbers = " ".join(str(item) for item in sorted(self._own_items(items)))
        shapes = ", ".join("×".join(map(str, batch["input_ids"].shape)) for batch in micro_batches)
        batch_log.debug("step %d: sequences %s in %s, loss %.4f, %.3f s", step, numbers, shapes, loss, seconds)


class _LossSum:
    """A loss over some steps, whose mean weighs each token the same."""

    def __init__(self) -> None:
        self.loss_sum, self.num_tokens = 0.0, 0

    def add(self, loss_sum: float, num_tokens: int) -> None:
        self.loss_sum += loss_sum
        self.num_tokens += num_tokens

    @property
    def mean(self) -> float:
        return self.loss_sum / self.num_tokens if self.num_tokens else math.nan
