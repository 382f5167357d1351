"""Several processes that talk over gloo, for tests: started once, then handed one function after another.

>>> with RankPool(2) as pool:
...     results = pool.run(function, argument)  # function(argument) on both ranks; their results in rank order

A process takes seconds to import torch, so a pool serves a whole test session. The function must be importable by name,
and its arguments and result picklable. The process group is there when it is called.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

RESULT_TIMEOUT_SEC = 300
COLLECTIVE_TIMEOUT_SEC = 180  # ranks that compile do not end together


class RankFailed(Exception):
    """A rank raised, died or took too long; the message holds its traceback."""


class RankPool:
    """`world_size` processes of one core each, as torchrun would start them."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }
            process = context.Process(target=_serve, args=(theirs, environment), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            process.kill()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`function(*arguments)` on every rank at the same time. Raises RankFailed with the first rank's traceback."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results: list[Any] = []
        failures: list[str] = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(RESULT_TIMEOUT_SEC):
                raise RankFailed(f"rank {rank} gave no result in {RESULT_TIMEOUT_SEC} s")
            try:
                succeeded, value = pipe.recv()
            except EOFError:
                raise RankFailed(f"rank {rank} died") from None
            if succeeded:
                results.append(value)
            else:
                failures.append(f"rank {rank}:\n{value}")
        if failures:
            raise RankFailed("\n".join(failures))
        return results


def free_port() -> int:
    """A TCP port on loopback that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(pipe: Connection, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_SEC))
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
