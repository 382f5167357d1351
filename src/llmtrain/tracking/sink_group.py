"""Runs several sinks as one, so that a sink that raises, hangs or is slow does not disturb the training loop.

    loop ── log(step, metrics) ─┬─ metrics.jsonl: at once, in the loop's thread, before the step ends
                                ├─ queue ─ thread ─ TensorBoard
                                └─ queue ─ thread ─ MLflow, W&B, a sink of the user's own

A sink must not use the process's random generators, which all threads, and so the training loop, share.
"""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from llmtrain.contracts import Unreachable
from llmtrain.errors import ConfigError
from llmtrain.import_path import import_callable
from llmtrain.installing import install_extra
from llmtrain.tracking.mlflow_sink import MlflowSink
from llmtrain.tracking.redaction import redact
from llmtrain.tracking.sinks import JsonlSink, TensorBoardSink
from llmtrain.tracking.wandb_sink import make_wandb_sink

if TYPE_CHECKING:
    from llmtrain.config.sections.running import SinkConfig, TrackingConfig
    from llmtrain.contracts import MetricSink

log = logging.getLogger("llmtrain.tracking")

_URGENT_TIMEOUT_SEC = 5.0
_FIRST_PAUSE_SEC = 1.0
_LONGEST_PAUSE_SEC = 60.0


def start_sinks(
    tracking: TrackingConfig, *, run: Path, config: Mapping[str, Any], resumed_step: int | None, is_main: bool
) -> SinkGroup:
    """Start the sinks that `tracking` names and return them; on ranks other than the main one there are none.

    The config that they get is redacted. A sink that is not installed, or whose set-up fails, gives a warning. Raises
    ConfigError if a sink of the user's own cannot be imported or does not accept its options.
    """
    sinks: list[MetricSink] = []
    if is_main:
        sinks.append(JsonlSink(run / "metrics.jsonl"))
        if tracking.tensorboard.enabled:
            sinks += _made("TensorBoard", lambda: TensorBoardSink(run / "tensorboard"))
        if tracking.mlflow.enabled:
            sinks += _made("MLflow", lambda: MlflowSink(tracking.mlflow, run=run), extra="mlflow")
        if tracking.wandb.enabled:
            sinks += _made("W&B", lambda: make_wandb_sink(tracking, run=run), extra="wandb")
        for own in tracking.sinks:
            sinks += _made(own.name, partial(_own_sink, own))
    group = SinkGroup(sinks, finish_timeout_sec=tracking.finish_timeout_sec)
    group.start({"run_id": run.name, "folder": run, "config": redact(config), "resumed_step": resumed_step})
    return group


def check_own_sinks(tracking: TrackingConfig) -> None:
    """Raise ConfigError if a sink of the user's own cannot be imported."""
    for own in tracking.sinks:
        import_callable(own.name, key="tracking.sinks")


def _own_sink(own: SinkConfig) -> MetricSink:
    make = import_callable(own.name, key="tracking.sinks")
    try:
        inspect.signature(make).bind(**own.options)
    except TypeError as error:
        raise ConfigError(
            f"tracking.sinks: {own.name} does not accept its options ({error}): correct `options`"
        ) from None
    sink: MetricSink = make(**own.options)
    return sink


def _made(name: str, make: Callable[[], MetricSink | None], *, extra: str | None = None) -> list[MetricSink]:
    """Return the sink that `make` returns, as a list. After a failure, warn and return an empty list."""
    try:
        sink = make()
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        fix = f": {install_extra(extra)}" if extra else f" ({error})"
        log.warning("%s is not installed%s. The run goes on without it", name, fix)
        return []
    except Exception as error:
        log.warning("%s is off, and the run goes on without it: %s", name, error)
        log.debug("where %s failed:", name, exc_info=True)
        return []
    return [] if sink is None else [sink]


class SinkGroup:
    """A MetricSink made of others. The first exception of a sink gives one warning and turns that sink off.

    A sink whose tracker does not answer (Unreachable) gets the same call again. `queue_size`: number of calls that may
    wait for a slow sink; further metrics are dropped and counted. `finish_timeout_sec`: time that `finish` waits for
    all sinks together, but at most five seconds if the run was stopped from outside or failed.
    """

    def __init__(self, sinks: Sequence[MetricSink], *, queue_size: int = 1000, finish_timeout_sec: float = 5.0) -> None:
        self._finish_timeout_sec = finish_timeout_sec
        guards = [_Guard(sink) for sink in sinks]
        self._guards = guards
        self._direct = [guard for guard in guards if isinstance(guard.sink, JsonlSink)]
        self._writers = [_SinkWriter(guard, queue_size=queue_size) for guard in guards if guard not in self._direct]

    def start(self, run_info: Mapping[str, Any]) -> None:
        """Start every sink."""
        self._call_all("start", lambda sink: sink.start(run_info))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass a copy of the metrics to every sink that is not off, without waiting for those that have a thread."""
        copy = {name: float(value) for name, value in metrics.items()}
        for guard in self._direct:
            guard.deliver_metrics(step, copy)
        for writer in self._writers:
            writer.send_metrics(step, copy)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Finish every sink, wait for those that have a thread, and warn about metrics that did not arrive."""
        self._call_all("finish", lambda sink: sink.finish(summary))
        is_urgent = summary.get("state") in ("preempted", "failed")
        timeout_sec = min(self._finish_timeout_sec, _URGENT_TIMEOUT_SEC) if is_urgent else self._finish_timeout_sec
        deadline = time.monotonic() + timeout_sec
        for writer in self._writers:
            writer.close(timeout_sec=max(0.0, deadline - time.monotonic()))
        for name, missed in self.dropped.items():
            log.warning("%s missed %d of the run's lines of metrics", name, missed)

    @property
    def dropped(self) -> dict[str, int]:
        """Number of `log` calls that have not reached a sink or its tracker, by sink; only sinks with any."""
        return {guard.name: guard.missed for guard in self._guards if guard.missed}

    def _call_all(self, what: str, call: Callable[[MetricSink], None]) -> None:
        for guard in self._direct:
            guard.deliver(what, call)
        for writer in self._writers:
            writer.send(what, call)


class _Guard:
    """A sink that is turned off by the first exception it raises.

    A sink that keeps lines to send them later has an attribute `num_waiting` with their number.
    """

    def __init__(self, sink: MetricSink) -> None:
        self.sink = sink
        self.name = type(sink).__name__
        self.offered = 0
        self.delivered = 0
        self._off = threading.Event()

    def deliver(self, what: str, call: Callable[[MetricSink], None]) -> bool:
        """Call the sink unless it is off, and return whether that succeeded. Raises Unreachable if the sink does."""
        if self._off.is_set():
            return False
        try:
            call(self.sink)
        except Exception as error:
            if self._off.is_set():  # turned off meanwhile: nobody waits for it any more
                return False
            if isinstance(error, Unreachable):
                raise
            self.turn_off()
            cause = f"{type(error).__name__}: {error}"
            log.warning("%s failed at %s and is off from here on; the run goes on (%s)", self.name, what, cause)
            log.debug("where %s failed:", self.name, exc_info=True)
            return False
        return True

    @property
    def missed(self) -> int:
        """Number of lines of metrics that have not arrived."""
        waiting: int = getattr(self.sink, "num_waiting", 0)
        return self.offered - self.delivered + waiting

    def turn_off(self) -> None:
        """Deliver nothing from now on."""
        self._off.set()

    def deliver_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self.offered += 1
        self.delivered += self.deliver(f"step {step}", lambda sink: sink.log(step, metrics))


class _SinkWriter:
    """A guarded sink with a thread of its own, fed by a queue that never blocks the sender."""

    def __init__(self, guard: _Guard, *, queue_size: int) -> None:
        self._guard = guard
        self._queue_size = queue_size
        # None ends the thread. The queue itself has no limit, so that `finish` is queued even if metrics are dropped.
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._warned_full = False
        self._warned_unreachable = False
        self._closing = threading.Event()
        # A daemon, since a sink that blocks forever must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=f"sink-{guard.name}", daemon=True)
        self._thread.start()

    def send(self, what: str, call: Callable[[MetricSink], None]) -> None:
        def deliver() -> None:
            self._guard.deliver(what, call)

        self._queue.put(deliver)

    def send_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._guard.offered += 1
        if self._queue.qsize() >= self._queue_size:
            if not self._warned_full:
                log.warning("%s is too slow: metrics from step %d on may be missing there", self._guard.name, step)
            self._warned_full = True
            return

        def deliver() -> None:
            delivered = self._guard.deliver(f"step {step}", lambda sink: sink.log(step, metrics))
            self._guard.delivered += delivered

        self._queue.put(deliver)

    def close(self, *, timeout_sec: float) -> None:
        """End the thread once the queue is empty; wait for that for at most `timeout_sec`."""
        self._closing.set()
        self._queue.put(None)
        self._thread.join(timeout_sec)
        if self._thread.is_alive():
            self._guard.turn_off()
            log.warning("%s is still busy; not waiting for it any longer", self._guard.name)

    def _work(self) -> None:
        while (deliver := self._queue.get()) is not None:
            self._deliver(deliver)

    def _deliver(self, deliver: Callable[[], None]) -> None:
        """Make a call, and repeat it until the tracker answers or the run ends."""
        pause_sec, was_unreachable = _FIRST_PAUSE_SEC, False
        while True:
            try:
                deliver()
            except Unreachable as error:
                was_unreachable, is_over = True, self._closing.is_set()
                if not self._warned_unreachable:
                    then = "and the run is over" if is_over else "its metrics wait, and the run goes on"
                    log.warning("%s does not answer; %s (%s)", self._guard.name, then, error)
                self._warned_unreachable = True
                if is_over:
                    self._guard.turn_off()
                    return
                self._closing.wait(pause_sec)
                pause_sec = min(2 * pause_sec, _LONGEST_PAUSE_SEC)
            else:
                if was_unreachable:
                    log.info("%s answers again", self._guard.name)
                return
