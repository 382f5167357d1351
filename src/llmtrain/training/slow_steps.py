"""Says when steps became much slower than at the start of this process, once an episode, with the likely cause.

    steps ─▶ blocks of ten steps and ten seconds ─▶ median seconds a token ─▶ over 1.5 times the first block's: one line

Only the time inside steps counts: for slow data there is advice in `tracking.times`. A rank that the others wait for is
named by `stragglers`, which compares ranks; this compares now with the start, on each rank for itself.
"""

from __future__ import annotations

import logging
import statistics
from dataclasses import dataclass, field
from typing import Final, Protocol

from llmtrain.tracking.slowdown import Needs, Reading, Use, likely_cause, use_between

log = logging.getLogger("llmtrain.train")

WARM_UP_STEPS: Final = 3
"""Not compared, after the step that compiles: caches fill, and the allocator grows."""
BLOCK_STEPS: Final = 10
BLOCK_SEC: Final = 10.0
"""A block has at least so many steps and takes at least so long, so that a hiccup of a second is no episode."""
SLOW, RECOVERED = 1.5, 1.2
"""Times the first block's seconds a token."""
SIMILAR_TOKENS: Final = 1.5
"""Steps with this many times the tokens, or the reciprocal, are not compared: part of a step's time is fixed."""


class Machine(Protocol):
    """Counters of the machine that this module reads; see `tracking.slowdown.MachineCounters`."""

    def read(self) -> Reading:
        """Read the counters."""

    def clock_mhz(self) -> float | None:
        """Return the processors' clock."""


@dataclass
class _Block:
    """Consecutive steps, from the reading at their begin."""

    began: Reading
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return len(self.seconds) >= BLOCK_STEPS and sum(self.seconds) >= BLOCK_SEC

    def speed(self) -> _Speed:
        by_token = [seconds / tokens for seconds, tokens in zip(self.seconds, self.tokens, strict=True)]
        return _Speed(statistics.median(self.seconds), statistics.median(self.tokens), statistics.median(by_token))


@dataclass(frozen=True)
class _Speed:
    """Medians over the steps of a block."""

    step_sec: float
    tokens: float
    token_sec: float


class SlowSteps:
    """Compares the steps of one process with its first ones; for the whole of `fit`."""

    def __init__(self, machine: Machine, *, needs: Needs) -> None:
        self._machine = machine
        self._needs = needs
        self._num_warm_up = WARM_UP_STEPS
        self._block: _Block | None = None
        self._at_start: tuple[_Speed, Use] | None = None
        self._is_slow = self._is_off = False

    def stepped(self, seconds: float, *, tokens: int) -> None:
        """A step on `tokens` tokens took `seconds`, of which none were spent on compiling or waiting for data."""
        if self._is_off or not tokens or seconds <= 0:
            return
        if self._num_warm_up > 0:
            self._num_warm_up -= 1
            return
        try:
            if self._block is None:
                self._block = _Block(self._machine.read())
            self._block.seconds.append(seconds)
            self._block.tokens.append(tokens)
            if self._block.is_over:
                self._compare(self._block)
        except Exception as error:  # what the machine does not tell must not stop the run
            log.warning("the speed of steps is not watched any more (%s: %s)", type(error).__name__, error)
            self._is_off = True

    def _compare(self, block: _Block) -> None:
        """Compare a block with the first, and begin the next."""
        now, reading = block.speed(), self._machine.read()
        self._block = _Block(reading)
        if self._at_start is None:
            use = use_between(block.began, reading, clock_mhz=self._machine.clock_mhz())
            self._at_start = now, use
            log.debug("steps take %.3g s at the start; others use %.1f cores", now.step_sec, use.others_cores)
            return
        start, use_at_start = self._at_start
        if not 1 / SIMILAR_TOKENS <= now.tokens / start.tokens <= SIMILAR_TOKENS:
            return
        ratio = now.token_sec / start.token_sec
        if ratio >= SLOW and not self._is_slow:
            self._is_slow = True
            use = use_between(block.began, reading, clock_mhz=self._machine.clock_mhz())
            log.warning(
                "steps take %.1f times as long as at the start (%.3g s, was %.3g s): %s",
                *(ratio, now.step_sec, start.step_sec, likely_cause(use_at_start, use, needs=self._needs)),
            )
        elif ratio < RECOVERED and self._is_slow:
            self._is_slow = False
            log.info("steps take %.3g s again", now.step_sec)
