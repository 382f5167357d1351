"""Finds the rank that all others wait for: each times its own work, without the waiting, and they compare.

    own work of a step = waiting for data + forward and backward, up to the moment when the last gradient is computed

Behind that moment a rank waits for the slowest, so the step as a whole takes equally long everywhere and tells nothing.
This holds for ddp; where parameters are cut over the ranks (fsdp) each layer waits for all ranks, and nothing is
compared.
"""

from __future__ import annotations

import logging
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from llmtrain.distributed.engine import Engine

log = logging.getLogger("llmtrain.pace")

EVERY_STEPS = 10
"""Steps between two comparisons, which cost one small collective."""
IN_A_ROW = 2
"""Comparisons that a rank must be slow in before it is named."""
SLOW, RECOVERED = 1.5, 1.2
"""Times the others' median."""
WORTH_NAMING = 0.2
"""Share of the step that the others lose at least."""


class Pace:
    """Of one rank, for the whole of `fit`. Does nothing where there is nothing to compare."""

    def __init__(self, model: nn.Module, *, engine: Engine) -> None:
        self._engine = engine
        self._compares = engine.world_size > 1 and engine.resolved.strategy == "ddp"
        self._device = engine.device
        self._marks: list[tuple[_Moment, _Moment]] = []
        self._last_gradients: list[_Moment] = []
        """Of each micro-batch of the step."""
        self._waited_sec = self._steps_sec = 0.0
        self._num_steps = -1  # the first compiles, and is not counted
        self._slow_for = [0] * engine.world_size
        self._hosts: list[str] = []
        # Gradients come from the last layer to the first, so this parameter's is computed last.
        self._first = next(parameter for parameter in model.parameters() if parameter.requires_grad)

    def _note_gradient(self, _: torch.Tensor) -> None:
        self._last_gradients.append(_Moment(self._device))

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The block computes a step's gradients."""
        if not self._compares:
            yield
            return
        began = _Moment(self._device)
        self._last_gradients.clear()
        hook = self._first.register_post_accumulate_grad_hook(self._note_gradient)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            hook.remove()
        if self._last_gradients and self._num_steps >= 0:
            self._marks.append((began, self._last_gradients[-1]))

    def stepped(self, step: int, *, waited_sec: float, seconds: float) -> None:
        """`step` steps are done; the last took `seconds`, of which it waited for data. Compares now and then."""
        if not self._compares:
            return
        if self._num_steps >= 0:
            self._waited_sec += waited_sec
            self._steps_sec += seconds
        self._num_steps += 1
        if step % EVERY_STEPS or self._num_steps <= 0:
            return
        own = [0.0] * self._engine.world_size
        computed_sec = sum(end.seconds_since(begin) for begin, end in self._marks)
        own[self._engine.rank] = (computed_sec + self._waited_sec) / self._num_steps
        step_sec = self._steps_sec / self._num_steps
        self._marks.clear()
        self._waited_sec = self._steps_sec = 0.0
        self._num_steps = 0
        self._compare(self._engine.sum_floats(own), step_sec=step_sec)

    def _compare(self, seconds: Sequence[float], *, step_sec: float) -> None:
        """Name the ranks that were slow, by the seconds of each rank's own work in a step."""
        if not self._hosts:
            self._hosts = self._engine.gather(socket.gethostname())
        for rank, others in others_median(seconds):
            ratio = seconds[rank] / others if others else 1.0
            if ratio >= SLOW and seconds[rank] - others >= WORTH_NAMING * step_sec:
                self._slow_for[rank] += 1
                if self._slow_for[rank] == IN_A_ROW:
                    log.warning(
                        "rank %d on %s is slow, and all wait for it: its own work takes %.3g s a step, %.1f times the "
                        "%.3g s of the others",
                        *(rank, self._hosts[rank], seconds[rank], ratio, others),
                    )
            elif self._slow_for[rank] < IN_A_ROW:
                self._slow_for[rank] = 0
            elif ratio < RECOVERED:
                log.info("rank %d is as fast as the others again", rank)
                self._slow_for[rank] = 0


def others_median(seconds: Sequence[float]) -> list[tuple[int, float]]:
    """Each rank, and the median of all other ranks' seconds."""
    return [
        (rank, statistics.median([other for index, other in enumerate(seconds) if index != rank]))
        for rank in range(len(seconds))
    ]


class _Moment:
    """Now: on a GPU when it comes to this point of its work, which the host is ahead of; else by the clock."""

    def __init__(self, device: torch.device) -> None:
        self._clock = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))

    def seconds_since(self, earlier: _Moment) -> float:
        """From `earlier` to this."""
        if self._event is None or earlier._event is None:
            return self._clock - earlier._clock
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1000.0
