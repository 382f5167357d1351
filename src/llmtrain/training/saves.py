"""Saves of a run: what happens to one that the file system does not take.

    begin ─▶ the outcome of the save before: failed ─▶ a warning, an event, `best` is taken back ─▶ the next one is due
    finish ─▶ the last save failed ─▶ once more ─▶ failed again: CheckpointError on every rank

The state in memory is all that the steps since the last checkpoint came to, so a full disk does not end a run.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import NamedTuple

from llmtrain.runs.events import EventLog
from llmtrain.tracking.times import Spent
from llmtrain.training.checkpoint import CheckpointError, CheckpointStore, SaveFailed
from llmtrain.training.job import Job

log = logging.getLogger("llmtrain.checkpoint")


class _Best(NamedTuple):
    value: float | None
    step: int | None


@dataclass(frozen=True)
class _Begun:
    """A save under way."""

    step: int
    is_best: bool
    final: bool
    best: _Best
    """The best of the run if this save succeeds."""


class Saves:
    """Saves what a job comes to. `store`: None on a rank that saves nothing, and learns only how the last one ended."""

    def __init__(self, store: CheckpointStore | None, job: Job, events: EventLog) -> None:
        self._store, self._job, self._events = store, job, events
        self._begun: _Begun | None = None
        self._saved_best = _Best(job.state.best, job.state.best_step)

    def begin(self, *, best: bool, final: bool, spent: Spent) -> None:
        """Begin to save a checkpoint of this moment, once the save before it has ended.

        Raises CheckpointError if that one failed for a reason that is not the file system's.
        """
        if self._store is None:
            return
        if (failure := self._outcome()) is not None:
            self._report(failure)
            best = self._take_back_best() or best
        state = self._job.state
        state.spent = spent
        self._begun = _Begun(state.step, best, final, _Best(state.best, state.best_step) if best else self._saved_best)
        self._store.save(self._job.snapshot(), best=best, final=final)

    def finish(self) -> None:
        """Return when the last save is on the disk. Raises CheckpointError on every rank if it failed twice."""
        begun = self._begun
        failure = self._outcome_on_all()
        if failure is not None and begun is not None:
            log.warning("%s. Trying once more", failure)
        if failure is not None and self._store is not None and begun is not None:
            self._begun = begun
            self._store.save(self._job.snapshot(), best=begun.is_best, final=begun.final)
        if failure is not None and (failure := self._outcome_on_all()) is not None:
            if begun is not None:
                self._events.add("not_saved", step=begun.step)
            raise CheckpointError(failure)

    def close(self) -> None:
        """Wait for the save under way, and give back what the store holds. It must not hide why the run ended."""
        if self._store is None:
            return
        try:
            if (failure := self._outcome()) is not None:
                self._report(failure)
        finally:
            self._store.close()

    def _outcome(self) -> SaveFailed | None:
        """Wait for the save under way, and return what kept it from the disk."""
        assert self._store is not None
        try:
            self._store.wait()
        except SaveFailed as error:
            return error
        if self._begun is not None:
            self._saved_best, self._begun = self._begun.best, None
        return None

    def _outcome_on_all(self) -> str | None:
        """Wait on every rank until the last save has ended, and return what kept it from the disk."""
        engine, failure = self._job.engine, None
        with engine.main_first():  # the others wait without a collective, which would time out
            if self._store is not None:
                failure = self._outcome()
        return engine.from_main(lambda: None if failure is None else str(failure))

    def _report(self, failure: SaveFailed) -> None:
        assert self._begun is not None
        self._events.add("not_saved", step=self._begun.step)
        if self._job.engine.is_main:
            log.warning("%s. The run goes on, and saves again when the next save is due", failure)

    def _take_back_best(self) -> bool:
        """Forget a best whose checkpoint is not there. Return whether the step that is being saved is the best now."""
        begun, self._begun = self._begun, None
        if begun is None or not begun.is_best:
            return False
        return self._job.state.take_back_best(*self._saved_best, metric=self._job.schedule.keep_best)
