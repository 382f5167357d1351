"""When something is due: every so many steps, epochs or seconds, whichever comes first.

Steps and epochs follow from the run's position, so a resumed run finds them again. Seconds are the main process's: it
votes in the exchange that every step makes anyway, so that all ranks evaluate and save at the same step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple


class Late(NamedTuple):
    """What is due by the clock."""

    evaluation: bool
    save: bool


class Due(NamedTuple):
    """What a model is to be measured by now."""

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
        """Whether a state is due by its numbers: `step` steps done, the last of them up to `item`."""
        if step == 0:
            return False
        by_steps = self.every_steps is not None and step % self.every_steps == 0
        if self.every_epochs is None:
            return by_steps
        period = self.every_epochs * items_per_epoch
        return by_steps or item // period > max(0, item - batch_size) // period


class Stopwatch:
    """The seconds of one cadence, as the main process counts them."""

    def __init__(self, every_seconds: float | None) -> None:
        self._every_seconds = every_seconds
        self.reset()

    @property
    def is_late(self) -> bool:
        """Whether the last reset was too long ago."""
        return self._every_seconds is not None and time.monotonic() - self._began >= self._every_seconds

    def reset(self) -> None:
        """What is timed was done just now."""
        self._began = time.monotonic()
