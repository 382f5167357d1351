"""Computing the data of the next steps ahead of time: in a thread, or in worker processes, without torch.

    step s  ->  worker s mod N: batches of s  ->  in the order of the steps, whichever worker computed them

What a step holds is a function of its number, so workers cannot change it, and there is nothing to seed: no random draw
is made here. Workers are spawned, not forked. A fork of a process that runs torch, a saver and trackers copies locks
that threads hold; a fresh interpreter that imports only numpy and pyarrow is ready in a fifth of a second. See
docs/decisions/0002-loader.md.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Final, Protocol, TypeVar

from llmtrain.errors import ConfigError, RunError

STEPS_AHEAD_IN_THREAD: Final = 4
STEPS_AHEAD_PER_PROCESS: Final = 2
"""One that is ready to be taken, and one that is being made."""
CLOSE_SEC: Final = 2.0
"""A worker that does not stop in this time hangs in a read: a process is killed, a thread is abandoned."""
PARENT_DECIDES: Final = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}
"""Schedulers and terminals send these to all processes of a group; workers end when the training process lets them."""

Result = TypeVar("Result")


def read_ahead(
    open_: Callable[[], Callable[[int], Result]], *, num_steps: int, num_workers: int
) -> Generator[Result, None, None]:
    """Yield the results for steps 0 to `num_steps` - 1, in order.

    `open_` is called once in the thread (`num_workers` 0) or in each process, where it has to be picklable, and returns
    the function that is called there for the steps. A ConfigError or RunError is passed on; any other failure becomes a
    RuntimeError that holds the worker's traceback, and a worker's death a RunError. Closing the generator, or any
    exception in it, stops the workers.
    """
    workers: list[_Worker] = []
    close = partial(_close, workers)
    atexit.register(close)  # for a generator that nobody closed: multiprocessing would wait for its workers for ever
    try:
        if num_workers == 0:
            workers.append(_Thread(open_))
        if num_workers > 0:
            resource_tracker.ensure_running()  # would unblock the signals if it were started with the first process
        with _signals_blocked():  # inherited: a process is never without it
            for _ in range(min(num_workers, num_steps)):
                workers.append(_Process(open_))
        ahead = STEPS_AHEAD_PER_PROCESS * num_workers or STEPS_AHEAD_IN_THREAD
        requested = 0
        for step in range(num_steps):
            while requested < min(num_steps, step + ahead):
                workers[requested % len(workers)].request(requested)
                requested += 1
            yield workers[step % len(workers)].result()
    finally:
        close()
        atexit.unregister(close)


class _Worker(Protocol):
    def request(self, step: int) -> None: ...

    def result(self) -> Any:
        """Return the result of the oldest request that has none yet. Raises the worker's error."""
        ...

    def stop(self) -> None:
        """Ask the worker to end; requests are dropped."""
        ...

    def join(self) -> None:
        """Wait until the worker has ended, for CLOSE_SEC at most."""
        ...


def _close(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.stop()
    for worker in workers:
        worker.join()
    workers.clear()


@dataclass(frozen=True)
class _Failure:
    """An error that a worker sends in place of a result; it computes nothing more."""

    error: type[Exception]
    message: str


class _Stopped(Exception):
    """Nobody waits for results any more."""


def _serve(open_: Callable[[], Callable[[int], Any]], receive: Callable[[], int], send: Callable[[Any], None]) -> None:
    """Send a result for each step that is received, until `receive` or `send` raises _Stopped."""
    try:
        function = open_()
        while True:
            send(function(receive()))
    except _Stopped:
        return
    except (ConfigError, RunError) as error:
        failure = _Failure(type(error), str(error))
    except Exception:
        failure = _Failure(RuntimeError, f"reading the data failed:\n{traceback.format_exc()}")
    try:
        send(failure)
        while True:  # more requests may have been sent: the failure is the answer to all of them
            receive()
    except _Stopped:
        return


class _Thread:
    """A thread of this process. SimpleQueues, since an exception from a signal handler cannot leave them locked."""

    def __init__(self, open_: Callable[[], Callable[[int], Any]]) -> None:
        self._requests: SimpleQueue[int] = SimpleQueue()
        self._results: SimpleQueue[Any] = SimpleQueue()
        self._stopped = False
        # A daemon: a read that hangs must not keep the process from ending.
        self._thread = threading.Thread(
            target=_serve, args=(open_, self._receive, self._results.put), name="llmtrain-data", daemon=True
        )
        self._thread.start()

    def _receive(self) -> int:
        step = self._requests.get()
        if self._stopped:
            raise _Stopped
        return step

    def request(self, step: int) -> None:
        self._requests.put(step)

    def result(self) -> Any:
        result = self._results.get()
        if isinstance(result, _Failure):
            raise result.error(result.message)
        return result

    def stop(self) -> None:
        self._stopped = True
        self._requests.put(-1)  # wakes it

    def join(self) -> None:
        self._thread.join(timeout=CLOSE_SEC)


class _Process:
    """A process at the other end of a pipe; it ends when the pipe is closed, also by the parent's death."""

    def __init__(self, open_: Callable[[], Callable[[int], Any]]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_run_process, args=(open_, theirs), name="llmtrain-data", daemon=True)
        self._process.start()
        theirs.close()

    def request(self, step: int) -> None:
        with self._death_reported():
            self._connection.send(step)

    def result(self) -> Any:
        with self._death_reported():
            result = self._connection.recv()
        if isinstance(result, _Failure):
            raise result.error(result.message)
        return result

    @contextmanager
    def _death_reported(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError):
            self._process.join(timeout=CLOSE_SEC)
            raise RunError(
                f"a data worker (process {self._process.pid}) died with exit code {self._process.exitcode}; "
                "-9 is mostly the system running out of memory: lower data.num_workers"
            ) from None

    def stop(self) -> None:
        self._connection.close()

    def join(self) -> None:
        self._process.join(timeout=CLOSE_SEC)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _run_process(open_: Callable[[], Callable[[int], Any]], connection: Connection) -> None:
    def receive() -> int:
        try:
            return int(connection.recv())
        except (EOFError, ConnectionError):
            raise _Stopped from None

    def send(result: Any) -> None:
        try:
            connection.send(result)
        except ConnectionError:
            raise _Stopped from None

    _serve(open_, receive, send)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, PARENT_DECIDES)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
