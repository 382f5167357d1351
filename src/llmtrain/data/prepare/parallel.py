"""Work on all cores, results in order.

Threads do it: the tokenizers library, hashing and file reading let go of the GIL (measured: encoding leaves another
thread nearly all of its speed). Processes would cost start-up, copies of all tokens, a guard around `__main__` in
users' scripts, and orphans when the parent is killed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from llmtrain.distributed.limits import usable_cores

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def resolve_num_workers(num_workers: int | None) -> int:
    """Return the number of workers: the given one, else the number of cores that this process may use."""
    return usable_cores() if num_workers is None else num_workers


def ordered_map(function: Callable[[_Item], _Result], items: Iterable[_Item], *, num_workers: int) -> Iterator[_Result]:
    """`map` on threads: results in the order of the items, at most twice `num_workers` of them waiting in memory.

    The first exception, in that order, ends it; work that has not begun is dropped.
    """
    executor = ThreadPoolExecutor(num_workers, thread_name_prefix="prepare")
    waiting: deque[Future[_Result]] = deque()
    try:
        for item in items:
            waiting.append(executor.submit(function, item))
            if len(waiting) > 2 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
