"""A wish to stop (SIGTERM, SIGINT, SIGUSR1, SIGHUP), heard wherever the run is: in a step, an evaluation, a wait.

A flag that is looked at between two steps comes too late when a step compiles for minutes. So the parts of the loop
that change nothing which a checkpoint holds run inside `interrupts()`, where a signal raises at once; everywhere else
it is only noted.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType, TracebackType

from llmtrain.distributed.stop_signals import signals_to_handle


class StopRequested(BaseException):
    """Raised by a stop signal inside `interrupts()`. No Exception, so that nobody's `except Exception` eats it."""


class StopSignal:
    """Context manager that owns the handlers of the stop signals while a run lasts.

    In a thread other than the main one it owns none: a run there is not stopped by signals.

    >>> with StopSignal() as stop:
    ...     with stop.interrupts():  # StopRequested may be raised anywhere in here
    ...         ...
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._interruptible = False
        self._previous: dict[signal.Signals, object] = {}
        self._ends = ExitStack()

    def __enter__(self) -> StopSignal:
        for number in signals_to_handle():
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned before
        self._ends.close()

    @property
    def requested(self) -> bool:
        """True once a signal has come."""
        return self.received is not None

    @contextmanager
    def interrupts(self, *, when: bool = True) -> Iterator[None]:
        """Let a signal raise StopRequested inside this block, also one that came before it. Does not nest."""
        if not when:
            yield
            return
        self._interruptible = True
        try:
            if self.requested:
                raise StopRequested
            yield
        finally:
            self._interruptible = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # Ctrl-C again: the user does not want to wait
        self.received = signal.Signals(number)
        if self._interruptible:
            self._interruptible = False  # once: what unwinds must not be interrupted again
            self._ends.enter_context(warnings.catch_warnings())
            # torch.compile looks for the line in the model at which a backward pass "failed", and warns of it.
            warnings.filterwarnings("ignore", message="Error detected in")
            raise StopRequested
