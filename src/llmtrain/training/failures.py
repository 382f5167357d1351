"""Turn failures from outside of a run (a lost process, too little memory) into its exit code and message."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from llmtrain.distributed.peers import is_lost_peer, is_timeout, keep_gloo_groups
from llmtrain.errors import ConfigError, Hang, Preempted, RunError, WillFailAgain
from llmtrain.runs.removal import remove_folder
from llmtrain.tracking.logs import log_end_reason
from llmtrain.training.signals import StopRequested, StopSignal

if TYPE_CHECKING:
    from llmtrain.distributed.engine import Engine
    from llmtrain.training.job import Job

_NO_MEMORY: Final = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|CUBLAS_STATUS_ALLOC_FAILED|out of memory", re.IGNORECASE
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocator said no: that of CUDA, of the CPU, of MPS, Python's own, or the system (ENOMEM)."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


@contextmanager
def removed_if_rejected(run: Path, job: Job) -> Iterator[None]:
    """Remove the folder of a new run, which this process has locked, if its first step ends in ConfigError."""
    try:
        yield
    except ConfigError:
        is_new = job.start.origin is None and job.state.step == 0
        if is_new and job.engine.is_main:
            with suppress(RunError):
                remove_folder(run)
        raise


@contextmanager
def before_first_step(stop: StopSignal) -> Iterator[None]:
    """Let a stop signal end the block. Raises Preempted then."""
    try:
        with stop.interrupts():
            yield
    except StopRequested:
        raise Preempted("stopped before the first step: nothing is lost, start it again") from None


class Failures:
    """Context manager that gives the errors of allocators and of lost processes their message and exit code.

    Raises WillFailAgain (42), Preempted (75), or Hang (76) in place of these; others pass.
    """

    def __init__(self) -> None:
        self.engine: Engine | None = None
        """Told of a lost process, and closed at the end, once the run is set up."""

    def __enter__(self) -> Failures:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if isinstance(error, RuntimeError | MemoryError | OSError):
                self._explain(error)
            if isinstance(error, Exception):
                log_end_reason(error)
        except RunError as explained:
            log_end_reason(explained)
            raise
        finally:
            if self.engine is not None:
                self.engine.close()

    def _explain(self, error: Exception) -> None:
        if is_out_of_memory(error):  # in a step the run itself says more
            why = str(error).splitlines()[0] if str(error) else "MemoryError"
            raise WillFailAgain(f"out of memory before the first step ({why}): see `llmtrain plan`") from error
        if not is_lost_peer(error):
            return
        keep_gloo_groups()  # an engine that is only being made cannot
        if self.engine is not None:
            self.engine.watchdog.peer_lost(error)
        why = str(error).splitlines()[0]
        if is_timeout(error):
            raise Hang(f"another process of the run does not answer ({why}): resume it") from error
        raise Preempted(f"another process of the run is gone ({why}): resume it") from error
