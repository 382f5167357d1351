"""Finds the rank that all others wait for: each times its own work, without the waiting, and they compare.

    own work of a step = waiting for data + forward and backward, without the waits for other ranks in them

The step as a whole takes equally long everywhere, since all wait for the slowest, and tells nothing. Under ddp the wait
begins when a rank's last gradient is computed. Where parameters are sharded over the ranks (fsdp), each layer has its
waits: they are timed, by the clock on a CPU and by the stream that computes on a GPU, and taken off.

Ranks that share matrices (fsdp_tp) wait for each other inside of a layer as well, where nobody looks: they are compared
as one, by the least of their times. Where one of them is slow, the rest wait for it there, and no time is less than its
own; where a rank of another group is slow, one of them waits for it between the layers, and its own time is short.
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
from llmtrain.distributed.sharding import parameter_groups, waits_inside

log = logging.getLogger("llmtrain.stragglers")

EVERY_STEPS = 10
"""Steps between two comparisons, which cost one small collective."""
IN_A_ROW = 2
"""Comparisons that a rank must be slow in before it is named."""
SLOW, RECOVERED = 1.5, 1.2
"""Times the others' median."""
WORTH_NAMING = 0.2
"""Share of the step that the others lose at least."""


class StragglerWatch:
    """Time one rank for the whole of `fit`, and compare. Does nothing where there are no other ranks."""

    def __init__(self, model: nn.Module, *, engine: Engine) -> None:
        self._engine = engine
        self._compares = engine.data_parallel_size > 1
        self._device = engine.device
        self._began: _Moment | None = None
        self._waits: list[tuple[_Moment, _Moment]] = []
        """Begin and end of each wait for other ranks in this step."""
        self._own_sec = self._steps_sec = 0.0
        self._num_steps = -1  # the first compiles, and is not counted
        self._slow_for = [0] * engine.data_parallel_size
        self._hosts: list[str] = []
        self._groups = parameter_groups(model) if engine.is_sharded else []
        # Gradients come from the last layer to the first, so this parameter's is computed last.
        self._first = next(parameter for parameter in model.parameters() if parameter.requires_grad)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The block computes a step's gradients."""
        if not self._compares:
            yield
            return
        self._began = _Moment(self._device)
        self._waits.clear()
        with waits_inside(self._groups, self._waiting) if self._engine.is_sharded else self._last_gradient_noted():
            yield

    def _computed_sec(self) -> float:
        """Return the seconds of own work in the step's gradients, which a GPU has computed by now."""
        if not self._waits or self._began is None:
            return 0.0
        *_, (last, _) = self._waits  # behind it is nothing of this rank's own
        waited_sec = sum(end.seconds_since(begin) for begin, end in self._waits[:-1])
        return last.seconds_since(self._began) - waited_sec

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        begins = _Moment(self._device)
        yield
        self._waits.append((begins, _Moment(self._device)))

    @contextmanager
    def _last_gradient_noted(self) -> Iterator[None]:
        """Under ddp, where the only wait begins when the last gradient is there."""

        def note(_: torch.Tensor) -> None:
            self._waits[:] = [(now := _Moment(self._device), now)]  # of the last micro-batch alone: before, none waits

        hook = self._first.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            hook.remove()

    def stepped(self, step: int, *, waited_sec: float, seconds: float) -> None:
        """`step` steps are done; the last took `seconds`, of which it waited for data. Compares now and then.

        The host has read a number that the step's gradients give.
        """
        if not self._compares:
            return
        if self._num_steps >= 0:
            self._own_sec += waited_sec + self._computed_sec()
            self._steps_sec += seconds
        self._num_steps += 1
        if step % EVERY_STEPS or self._num_steps <= 0:
            return
        own = [0.0] * self._engine.world_size
        own[self._engine.rank] = self._own_sec / self._num_steps
        step_sec = self._steps_sec / self._num_steps
        self._own_sec = self._steps_sec = 0.0
        self._num_steps = 0
        of_ranks, group = self._engine.sum_floats(own), self._engine.tensor_parallel_size
        least = [min(of_ranks[first : first + group]) for first in range(0, len(of_ranks), group)]
        self._compare(least, step_sec=step_sec)

    def _compare(self, seconds: Sequence[float], *, step_sec: float) -> None:
        """Name who was slow, by the seconds of own work in a step: of each rank, or of those that share matrices."""
        if not self._hosts:
            self._hosts = self._engine.gather(socket.gethostname())
        for index, others in others_median(seconds):
            ratio = seconds[index] / others if others else 1.0
            if ratio >= SLOW and seconds[index] - others >= WORTH_NAMING * step_sec:
                self._slow_for[index] += 1
                if self._slow_for[index] == IN_A_ROW:
                    log.warning(
                        "%s is slow, and all wait for it: its own work takes %.3g s a step, %.1f times the %.3g s of "
                        "the others",
                        *(self._name(index, with_hosts=True), seconds[index], ratio, others),
                    )
            elif self._slow_for[index] < IN_A_ROW:
                self._slow_for[index] = 0
            elif ratio < RECOVERED:
                log.info("%s is as fast as the others again", self._name(index))
                self._slow_for[index] = 0

    def _name(self, index: int, *, with_hosts: bool = False) -> str:
        ranks = range(index * self._engine.tensor_parallel_size, (index + 1) * self._engine.tensor_parallel_size)
        hosts = ", ".join(sorted({self._hosts[rank] for rank in ranks}))
        who = f"rank {index}" if len(ranks) == 1 else f"one of the ranks {ranks[0]} to {ranks[-1]}"
        return f"{who} on {hosts}" if with_hosts else who


def others_median(seconds: Sequence[float]) -> list[tuple[int, float]]:
    """Return each rank with the median of all other ranks' seconds."""
    return [
        (rank, statistics.median([other for index, other in enumerate(seconds) if index != rank]))
        for rank in range(len(seconds))
    ]


class _Moment:
    """The present moment: of the work of a GPU, which the host is ahead of; else by the clock."""

    def __init__(self, device: torch.device) -> None:
        self._clock = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))

    def seconds_since(self, earlier: _Moment) -> float:
        """Return the seconds from `earlier` to this moment."""
        if self._event is None or earlier._event is None:
            return self._clock - earlier._clock
        return float(earlier._event.elapsed_time(self._event)) / 1000.0
