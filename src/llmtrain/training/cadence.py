"""Decide when something is due: every N steps, epochs or seconds, whichever comes first.

Steps and epochs follow from the run's position, so a resumed run finds them again. Seconds are the main process's: it
votes in the exchange that every step makes anyway, so that all ranks evaluate and save at the same step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple


class Late(NamedTuple):
    """Events that are due by the clock."""

    evaluation: bool
    save: bool


class Due(NamedTuple):
    """Measurements of the model that are due now."""

    validation: bool
    """Its loss on the validation data."""
    questions: bool
    """Its answers."""


NOT_LATE = Late(evaluation=False, save=False)


@dataclass(frozen=True)
class Cadence:
    """Periods; None: never because of this one."""

    every_steps: int | None = None
    every_epochs: int | None = None
    every_seconds: float | None = None

    def due(self, *, step: int, item: int, batch_size: int, items_per_epoch: int) -> bool:
        """Return whether the event is due after `step` steps, the last of which ended at `item` of the data order."""
        if step == 0:
            return False
        by_steps = self.every_steps is not None and step % self.every_steps == 0
        if self.every_epochs is None:
            return by_steps
        period = self.every_epochs * items_per_epoch
        return by_steps or item // period > max(0, item - batch_size) // period

    def times_within(self, num_steps: int, *, items_per_step: float, seconds: float) -> int:
        """Return how often something is done in a run of `num_steps` that takes `seconds`, once at its end included.

        `items_per_step`: the share of an epoch that a step is. An upper bound where several periods are given.
        """
        times = 0 if self.every_steps is None else num_steps // self.every_steps
        if self.every_epochs is not None:
            times += int(num_steps * items_per_step / self.every_epochs)
        if self.every_seconds is not None:
            times += int(seconds / self.every_seconds)
        return times + (0 if self.every_steps is not None and num_steps % self.every_steps == 0 else 1)


class Stopwatch:
    """The seconds of one cadence, as the main process counts them."""

    def __init__(self, every_seconds: float | None) -> None:
        self._every_seconds = every_seconds
        self.reset()

    @property
    def is_late(self) -> bool:
        """Return whether the last reset was longer ago than the interval."""
        return self._every_seconds is not None and time.monotonic() - self._began >= self._every_seconds

    def reset(self) -> None:
        """Restart the interval: the event happened just now."""
        self._began = time.monotonic()
