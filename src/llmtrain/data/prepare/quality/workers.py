"""Run the steps that look at one document, in the calling thread or in processes beside it.

These steps are Python for the most part, and hold the GIL, which threads would take turns at. A process is at the other
end of a pipe, so it ends when the pipe is closed, also by the parent's death.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeVar

from llmtrain.config.sections.quality import QualityStep
from llmtrain.data.manifest import StepRecord
from llmtrain.data.prepare.quality.plan import Examined, Plan
from llmtrain.data.prepare.quality.records import identities
from llmtrain.errors import ConfigError, RunError

MIN_BYTES = 1 << 25
"""Text from which on processes pay for their start, which takes some seconds."""

_Result = TypeVar("_Result")


class OpenSteps:
    """The steps of a list, for any number of threads. Made by `open_steps`.

    When it is sent to another process, they run there, in the thread that calls.
    """

    def __init__(self, steps: Sequence[QualityStep], num_processes: int = 0) -> None:
        """Raises ConfigError when a step's library or function cannot be had."""
        self.options = tuple(steps)
        self.plan = Plan(steps)
        self._identities = identities(steps)
        self._processes = [_Process(self.options) for _ in range(num_processes)]
        self._free: SimpleQueue[_Process] = SimpleQueue()
        for process in self._processes:
            self._free.put(process)

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options, "_identities": self._identities, "_processes": []}

    @cached_property
    def plan(self) -> Plan:
        """The steps themselves. Raises ConfigError where they are not those of the process that sent them."""
        for here, there in zip(identities(self.options), self._identities, strict=True):
            if here != there:
                raise ConfigError(
                    f"prepare.steps: {socket.gethostname()} has another {here.name} than the machine of this command "
                    f"({_said(here)}, not {_said(there)}): install the same there"
                )
        return Plan(self.options)

    def examine(self, texts: Sequence[str], *, sample_share: float) -> Examined:
        """Return `Plan.examine` of the texts."""
        return self._call(partial(Plan.examine, texts=texts, sample_share=sample_share))

    def alter(self, texts: Sequence[str]) -> list[str]:
        """Return `Plan.alter` of the texts."""
        return self._call(partial(Plan.alter, texts=texts)) if self.plan.num_versions > 1 else list(texts)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.close()

    def _call(self, function: Callable[[Plan], _Result]) -> _Result:
        if not self._processes:
            return function(self.plan)
        process = self._free.get()
        try:
            return process.call(function)
        finally:
            self._free.put(process)


def _said(identity: StepRecord) -> str:
    function = identity.function_sha256 and f"code with sha256 {identity.function_sha256[:12]}"
    return ", ".join(part for part in (f"version {identity.version}", identity.library, function) if part)


@contextmanager
def open_steps(steps: Sequence[QualityStep], *, num_workers: int, num_bytes: int) -> Iterator[OpenSteps]:
    """Open the steps: in `num_workers` processes where they take long and there is much text.

    Raises ConfigError when a step's library or function cannot be had.
    """
    opened = OpenSteps(steps)
    if opened.plan.is_heavy and num_workers > 1 and num_bytes >= MIN_BYTES:
        opened = OpenSteps(steps, num_workers)
    try:
        yield opened
    finally:
        opened.close()


class _Process:
    def __init__(self, steps: Sequence[QualityStep]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(steps, theirs), name="llmtrain-steps", daemon=True)
        self._process.start()
        theirs.close()

    def call(self, function: Callable[[Plan], _Result]) -> _Result:
        try:
            self._connection.send(function)
            result, error = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(timeout=10)
            raise RunError(
                f"a process of the quality steps died with exit code {self._process.exitcode}; -9 is mostly the system "
                "running out of memory: lower prepare.num_workers"
            ) from None
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def close(self) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(steps: Sequence[QualityStep], connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal's process group: the parent decides
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    plan = Plan(steps)
    try:
        while True:
            function = connection.recv()
            result: tuple[Any, Exception | None]
            try:
                result = function(plan), None
            except Exception as error:
                result = None, error
            connection.send(result)
    except (EOFError, ConnectionError):
        return
