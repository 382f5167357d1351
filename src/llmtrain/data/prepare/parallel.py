"""Run tasks on all workers, with their results in order.

    prepare ─ WorkPool ─ Executor.run(task, item) ─┬─ LocalExecutor     on a thread of this process
                                                   └─ RayExecutor       on a node of a cluster (`ray_cluster`)

A task is a callable that can be pickled, and has one argument. What it makes, and what it raises, does not depend on
where it runs. An executor decides only where that is.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from llmtrain.data.prepare.inputs import CorpusInput
from llmtrain.distributed.limits import usable_cores
from llmtrain.errors import ConfigError
from llmtrain.installing import install_extra

EngineName = Literal["local", "ray"]
"""Names of the executors on the command line."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def resolve_num_workers(num_workers: int | None) -> int:
    """Return the number of workers: the given one, else the number of cores that this process may use."""
    return usable_cores() if num_workers is None else num_workers


class Executor(Protocol):
    """Place where tasks run."""

    @property
    def num_workers(self) -> int:
        """Number of tasks that run at once."""

    @property
    def shares_gil(self) -> bool:
        """True if tasks that run at once take turns at Python code, as the threads of a process do."""

    def check(self, output: Path, inputs: Sequence[CorpusInput]) -> None:
        """Raise ConfigError unless a task, wherever it runs, can write beside `output` and read the inputs."""

    def run(self, task: Callable[[_Item], _Result], item: _Item) -> _Result:
        """Return `task(item)`, or raise what it raises. Called from as many threads as there are workers.

        Raises Preempted when the place where it ran was lost again and again.
        """

    def stop(self) -> None:
        """End the tasks that are running, if that is possible: nobody waits for their results any more."""


class LocalExecutor:
    """Runs tasks on the threads of this process.

    Threads do it: the tokenizers library, hashing, compression and file reading let go of the GIL (measured: encoding
    leaves another thread nearly all of its speed). Processes would cost start-up, copies of all tokens, a guard around
    `__main__` in users' scripts, and orphans when the parent is killed.
    """

    shares_gil = True

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers

    def check(self, output: Path, inputs: Sequence[CorpusInput]) -> None:
        """Do nothing: this process has found the inputs, and holds the lock of the output."""

    def run(self, task: Callable[[_Item], _Result], item: _Item) -> _Result:
        """Return `task(item)`."""
        return task(item)

    def stop(self) -> None:
        """Do nothing: a thread cannot be ended, and a task takes a moment."""


@contextmanager
def open_executor(engine: EngineName, *, num_workers: int | None, address: str | None = None) -> Iterator[Executor]:
    """Open the executor of an engine; `address` is that of a Ray cluster (see `ray_cluster.connected`).

    Raises ConfigError when Ray is not installed, or no cluster can be reached.
    """
    if engine == "local":
        yield LocalExecutor(resolve_num_workers(num_workers))
        return
    if find_spec("ray") is None:
        raise ConfigError(f"--engine ray needs Ray: {install_extra('ray')}")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # both are read on import
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # under `uv run` Ray would upload the working folder
    from llmtrain.data.prepare.ray_cluster import connected

    with connected(address, num_workers=num_workers, local_workers=resolve_num_workers(num_workers)) as executor:
        yield executor


class WorkPool:
    """Hands tasks to an executor, as many at once as it has workers. A context manager.

    On leaving it, work that has not begun is dropped. After an error, running work is stopped too.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._threads = ThreadPoolExecutor(executor.num_workers, thread_name_prefix="prepare")

    def __enter__(self) -> WorkPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        if kind is not None:
            self._executor.stop()
        self._threads.shutdown(wait=True)

    def submit(self, task: Callable[[_Item], _Result], item: _Item) -> Future[_Result]:
        """Begin a task as soon as a worker is free."""
        return self._threads.submit(self._executor.run, task, item)

    def in_order(self, task: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
        """Yield the results in the order of the items; at most twice as many as there are workers wait in memory."""
        waiting: deque[Future[_Result]] = deque()
        for item in items:
            waiting.append(self.submit(task, item))
            if len(waiting) > 2 * self._executor.num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def ordered_map(task: Callable[[_Item], _Result], items: Iterable[_Item], *, executor: Executor) -> Iterator[_Result]:
    """`map` on an executor, by a pool of its own. The first exception, in the order of the items, ends it."""
    with WorkPool(executor) as pool:
        yield from pool.in_order(task, items)
