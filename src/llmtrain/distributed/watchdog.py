"""Ends a run that makes no progress, after each of its processes has written its stacks.

    main thread ── beat("step") … beat() … ──▶ Watchdog ── too long without a beat ─▶ logs/stacks_rank_N.txt ─▶ exit 76
                                                   └── another rank has written its stacks ──▶ write ours too, and exit

A rank that waits for a stopped peer is in a library's C code, where no exception reaches it, so this thread ends the
process. All ranks wait for the same thing and notice at about the same time. They exchange no messages, which could
hang as well: a rank that notices early is seen by the others through its file in the run's folder.

A run of one process waits for no other, so it is not watched.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from llmtrain.distributed.exit_codes import leave_exit_code
from llmtrain.errors import Hang, Preempted

log = logging.getLogger("llmtrain.hang")

FIRST_TIME = 3
"""Factor on the timeout for the first time of each stage, in which code is compiled."""
OTHERS_SEC = 3.0
"""Seconds for which a rank waits for the others' stacks, before it names those that are missing."""
REPORT_SEC = 2.0
"""Seconds for the log message, since logging may hang as well."""

_HANG, _LOST = "hang", "a process is gone"


class Watchdog:
    """Watches one rank. `end(code)` ends the process at once, whatever it is doing."""

    def __init__(
        self, *, rank: int, world_size: int, timeout_sec: float, end: Callable[[int], object] = os._exit
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._timeout_sec = self._limit_sec = timeout_sec
        self._end = end
        self._stages: set[str] = set()
        self._stage = "start"
        self._last_beat = time.monotonic()
        self._logs: Path | None = None
        self._sizes: dict[int, int] = {}
        self._stopped = threading.Event()

    @property
    def last_beat(self) -> float:
        """Time of the last progress, on the monotonic clock."""
        return self._last_beat

    def beat(self, stage: str | None = None) -> None:
        """Record progress. `stage` is the name of the stage that begins now, if one does."""
        if stage is not None:
            self._stage = stage
            self._limit_sec = self._timeout_sec if stage in self._stages else FIRST_TIME * self._timeout_sec
            self._stages.add(stage)
        self._last_beat = time.monotonic()

    @contextmanager
    def over(self, logs: Path) -> Iterator[None]:
        """Watch while the block runs. Stacks are written to `logs`."""
        if self._world_size == 1:
            yield
            return
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = logs
        self._sizes = {rank: self._size(rank) for rank in range(self._world_size)}
        self._stopped.clear()
        self.beat()
        with self._path(self._rank).open("a", encoding="utf-8") as file:
            faulthandler.enable(file)  # writes the stacks at a fatal signal too (SIGSEGV; SIGABRT, which NCCL raises)
            thread = threading.Thread(target=self._watch, args=(file,), name="llmtrain-watchdog", daemon=True)
            thread.start()
            try:
                yield
            finally:
                self._stopped.set()
                thread.join()
                faulthandler.cancel_dump_traceback_later()
                faulthandler.disable()
        if self._size(self._rank) == 0:
            self._path(self._rank).unlink(missing_ok=True)

    def peer_lost(self, error: BaseException) -> None:
        """Write this rank's stacks after a collective failed because another process is gone or does not answer."""
        if self._logs is None:
            return
        with self._path(self._rank).open("a", encoding="utf-8") as file:
            _write_stacks(file, f"{_LOST}: {str(error).splitlines()[0]}")
            traceback.print_exception(error, file=file)

    # -- the thread --------------------------------------------------------------------------------------------------

    def _watch(self, file: IO[str]) -> None:
        tick = min(1.0, self._timeout_sec / 10)
        while not self._stopped.wait(tick):
            # faulthandler's thread, written in C, runs even if C code holds the GIL and this thread cannot run.
            faulthandler.dump_traceback_later(self._limit_sec + OTHERS_SEC, file=file)
            quiet = time.monotonic() - self._last_beat
            if quiet > self._limit_sec:
                self._notice(file, f"no progress for {quiet:.0f} s in stage {self._stage!r}", kind=_HANG)
            elif quiet > 2 * tick and (found := self._noticed_elsewhere()) is not None:
                rank, kind = found
                self._notice(file, f"rank {rank} noticed ({kind}); no progress here for {quiet:.0f} s", kind=kind)

    def _noticed_elsewhere(self) -> tuple[int, str] | None:
        """Return another rank that has written its stacks since the watch began, and why it did."""
        for rank in range(self._world_size):
            if rank != self._rank and self._has_written(rank):
                with self._path(rank).open(encoding="utf-8") as file:
                    file.seek(self._sizes[rank])
                    return rank, _LOST if _LOST in file.readline() else _HANG
        return None

    def _notice(self, file: IO[str], what: str, *, kind: str) -> None:
        if self._stopped.is_set():  # the block ended meanwhile
            return
        code = Hang.exit_code if kind == _HANG else Preempted.exit_code
        leave_exit_code(code)
        _write_stacks(file, f"{kind}: {what}")
        deadline = time.monotonic() + OTHERS_SEC
        missing = self._missing()
        while missing and time.monotonic() < deadline:
            time.sleep(0.05)
            missing = self._missing()
        message = f"{kind}: {what}. The stacks are in {self._path(self._rank)}"
        if missing:
            ranks = ", ".join(map(str, missing))
            message += f"; rank {ranks} wrote none in {OTHERS_SEC:.0f} s: stopped, killed or cut off"
        report = threading.Thread(target=_report, args=(message, self._rank), daemon=True)
        report.start()
        report.join(REPORT_SEC)
        self._end(code)

    def _missing(self) -> list[int]:
        return [rank for rank in range(self._world_size) if not self._has_written(rank)]

    def _has_written(self, rank: int) -> bool:
        return self._size(rank) > self._sizes[rank]

    def _size(self, rank: int) -> int:
        try:
            return self._path(rank).stat().st_size
        except OSError:
            return 0

    def _path(self, rank: int) -> Path:
        assert self._logs is not None
        return self._logs / f"stacks_rank_{rank}.txt"


def _report(message: str, rank: int) -> None:
    log.error("%s", message)
    if rank != 0:  # rank 0's log is on the terminal already
        print(f"[rank {rank}] error: {message}", file=sys.stderr, flush=True)


def _write_stacks(file: IO[str], why: str) -> None:
    """Append the reason, and the stack of every thread of this process."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    file.write(f"--- {why} ({now}, process {os.getpid()})\n")
    names = ", ".join(f"0x{thread.ident or 0:016x} {thread.name}" for thread in threading.enumerate())
    file.write(f"threads: {names}\n")
    file.flush()
    faulthandler.dump_traceback(file)
