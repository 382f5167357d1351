"""What the loop says while it runs: figures to the sinks, progress to the terminal, seconds to the time book.

The loop measures; this file puts names on it. Nothing here changes the run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

from llmtrain.contracts import Batch, MetricSink
from llmtrain.distributed.watchdog import Watchdog
from llmtrain.tracking import metrics as names
from llmtrain.tracking.events import EventLog
from llmtrain.tracking.progress import Progress
from llmtrain.tracking.summary import ParameterCount, RunSummary
from llmtrain.tracking.system import model_flops_utilisation
from llmtrain.tracking.times import Activity, Throughput, TimeBook, Waiting
from llmtrain.training.state import RunState
from llmtrain.training.step import StepDone

log = logging.getLogger("llmtrain.train")
batch_log = logging.getLogger("llmtrain.batch")

_SHOWN_AS: dict[Activity, str] = {"step": "training", "data": "training", "compile": "compiling"}


class Reporter:
    """Turns what the loop measured into figures with names; one for the whole of `fit`."""

    def __init__(
        self,
        *,
        sinks: MetricSink,
        events: EventLog,
        progress: Progress,
        items_per_epoch: int,
        flops_per_token: float,
        peak_flops: float | None,
        num_devices: int,
        log_batches: Literal["first-last", "all", "none"],
        own_items: Callable[[range], Sequence[int]],
        total_steps: int,
        machine: Callable[[], Mapping[str, float]],
        advice: Mapping[Activity, str],
        watchdog: Watchdog,
    ) -> None:
        """`machine` gives the machine's figures; every rank calls it at the same steps. `advice`: see Waiting.

        `own_items`: which of a step's items this rank computes, for the log.
        """
        self._sinks = sinks
        self._events = events
        self._progress = progress
        self._times = TimeBook()
        self._throughput = Throughput(self._times)
        self._waiting = Waiting(self._times, advice=advice)
        self._machine = machine
        self._items_per_epoch = items_per_epoch
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._num_devices = num_devices
        self._log_batches = log_batches
        self._own_items = own_items
        self._total_steps = total_steps
        self._window = _LossSum()
        self._epoch = _LossSum()
        self._told_a_batch = False
        self._watchdog = watchdog

    @contextmanager
    def spent(self, activity: Activity) -> Iterator[None]:
        """Book the block's seconds under `activity`, show it as the stage, and tell the watchdog of it."""
        self._watchdog.beat("step" if activity == "compile" else activity)
        self._progress.stage(_SHOWN_AS.get(activity, activity))
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
        """A step is done; `due`: its figures are wanted."""
        loss = done.loss_sum / done.num_tokens if done.num_tokens else math.nan
        if math.isfinite(loss):  # what was skipped or left out counts nowhere, least of all as 0
            state.first_loss = loss if state.first_loss is None else state.first_loss
            state.last_loss = loss
            for total in (self._window, self._epoch):
                total.add(done.loss_sum, done.num_tokens)
        if state.skipped_in_a_row:
            self._events.add("skipped", step=state.step)
        self._throughput.add(done.num_read)
        self._describe_batch(state.step, items, micro_batches, loss=loss, seconds=seconds)
        figures = self._figures(state, grad_norm=done.grad_norm, lr=lr) if due else None
        if figures is not None:
            self._sinks.log(state.step, figures)
            self._window = _LossSum()
        self._progress.update(state.step, figures)
        if items.stop // self._items_per_epoch > items.start // self._items_per_epoch:
            self._end_epoch(items.stop // self._items_per_epoch)

    def evaluated(self, state: RunState, figures: Mapping[str, float]) -> None:
        """An evaluation is done."""
        self._sinks.log(state.step, figures)
        is_best = state.best_step == state.step
        self._progress.evaluated(state.step, figures, best=is_best)
        best = "  (the best so far)" if is_best else ""
        log.info("step %d  %s%s", state.step, names.describe(figures), best)

    def saved(self, state: RunState, *, best: bool) -> None:
        """A checkpoint of this step is being written."""
        self._progress.saved(state.step)
        self._events.add("saved", step=state.step, best=best)

    def summary(
        self,
        state: RunState,
        outcome: Literal["finished", "preempted", "failed"],
        *,
        parameters: ParameterCount,
        peak_memory_bytes: int,
        resumed_step: int | None,
    ) -> RunSummary:
        """What the run came to so far."""
        spent = self._times.summary()
        return RunSummary(
            state=outcome,
            steps=state.step,
            resumed_from_step=resumed_step,
            world_size=self._num_devices,
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
        )

    def _figures(self, state: RunState, *, grad_norm: float, lr: float) -> dict[str, float]:
        figures = {
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
            figures[names.TRAIN_SKIPPED_STEPS] = float(state.skipped_steps)
        if state.loss_scale is not None:
            figures[names.TRAIN_LOSS_SCALE] = state.loss_scale.value
        if (speed := figures.get(names.TRAIN_TOKENS_PER_SEC)) is not None:
            mfu = model_flops_utilisation(
                speed,
                flops_per_token=self._flops_per_token,
                peak_flops=self._peak_flops,
                num_devices=self._num_devices,
            )
            if mfu is not None:
                figures[names.TRAIN_MFU] = mfu
        return figures

    def _describe_batch(
        self, step: int, items: range, micro_batches: Sequence[Batch], *, loss: float, seconds: float
    ) -> None:
        first_or_last = not self._told_a_batch or step == self._total_steps
        if self._log_batches == "none" or (self._log_batches == "first-last" and not first_or_last):
            return
        self._told_a_batch = True
        if not batch_log.isEnabledFor(logging.DEBUG):
            return
        if not micro_batches:
            batch_log.debug("step %d: items %d to %d are left out", step, items.start, items.stop - 1)
            return
        numbers = " ".join(str(item) for item in sorted(self._own_items(items)))
        shapes = ", ".join("×".join(map(str, batch["input_ids"].shape)) for batch in micro_batches)
        batch_log.debug("step %d: items %s in %s, loss %.4f, %.3f s", step, numbers, shapes, loss, seconds)

    def _end_epoch(self, epoch: int) -> None:
        log.info("epoch %d is done: mean loss %.4f over %s tokens", epoch, self._epoch.mean, self._epoch.num_tokens)
        self._epoch = _LossSum()


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
