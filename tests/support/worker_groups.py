"""The command line in one process or several, without the seconds that each new interpreter takes to import torch.

>>> with GroupServer() as server:
...     group = server.start(["train", "tiny.yaml"], world_size=2, faults="kill@step:rank=1:step=5")
...     codes = group.wait()  # [75, -9]

A process that has imported everything, and computed nothing, forks one for each rank; what they are told about each
other is what somebody sets by hand who starts them without torchrun. torchrun itself is not part of this.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

from llmtrain.faults import VARIABLE
from tests.support.ranks import free_port

WAIT_SEC = 240.0
_IMPORTS = ("llmtrain.verbs.train", "llmtrain.cli.app", "torch._dynamo")


class GroupServer:
    """A process that forks others which run `llmtrain …`."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._folder = TemporaryDirectory(prefix="llmtrain-workers-")
        self._num_started = 0

    def __enter__(self) -> GroupServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join(5)
        self._process.kill()
        self._folder.cleanup()

    def start(
        self,
        arguments: Sequence[str],
        *,
        world_size: int = 1,
        faults: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> WorkerGroup:
        """Run `llmtrain *arguments` in `world_size` processes, which meet on loopback if there are several."""
        self._num_started += 1
        folder = Path(self._folder.name) / str(self._num_started)
        folder.mkdir()
        given = {VARIABLE: faults, **(environment or {})}
        if world_size > 1:
            given |= {
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port()),
            }
        pids = self._ask("start", (list(arguments), world_size, given, str(folder)))
        return WorkerGroup(self, pids, folder)

    def run(self, arguments: Sequence[str], *, world_size: int = 1, faults: str = "") -> list[int]:
        """Start, wait, and give the exit codes."""
        return self.start(arguments, world_size=world_size, faults=faults).wait()

    def _ask(self, what: str, argument: object) -> Any:
        self._pipe.send((what, argument))
        return self._pipe.recv()


class WorkerGroup:
    """Processes that were started."""

    def __init__(self, server: GroupServer, pids: list[int], folder: Path) -> None:
        self._server = server
        self._folder = folder
        self.pids = pids
        """In rank order."""

    def wait(self, timeout_sec: float = WAIT_SEC) -> list[int]:
        """The exit codes in rank order, negative for a signal. Kills what is left, and raises, after `timeout_sec`."""
        deadline = time.monotonic() + timeout_sec
        while (codes := self.codes()) is None:
            if time.monotonic() > deadline:
                for pid in self.pids:
                    self.send(signal.SIGUSR2, pid=pid)  # which makes it write its stacks
                time.sleep(1.0)
                for pid in self.pids:
                    self.send(signal.SIGKILL, pid=pid)
                raise TimeoutError(f"no end in {timeout_sec:.0f} s:\n{self.stderr}")
            time.sleep(0.02)
        return codes

    def codes(self) -> list[int] | None:
        """As `wait` gives them; None while a process still runs."""
        codes: list[int] | None = self._server._ask("codes", self.pids)
        return codes

    def send(self, number: signal.Signals, *, pid: int) -> None:
        """Send a signal to one of the processes, if it still lives."""
        self._server._ask("signal", (pid, int(number)))

    @property
    def stderr(self) -> str:
        """What all ranks wrote there, rank by rank."""
        return "".join(path.read_text(errors="replace") for path in sorted(self._folder.glob("*.err")))

    @property
    def stdout(self) -> str:
        """What the first rank printed."""
        return (self._folder / "0.out").read_text()


def _serve(pipe: Connection) -> None:
    for name in _IMPORTS:
        importlib.import_module(name)
    codes: dict[int, int] = {}
    while True:
        try:
            what, argument = pipe.recv()
        except EOFError:
            return
        if what == "start":
            arguments, world_size, environment, folder = argument
            pipe.send([_fork(arguments, rank, environment, Path(folder)) for rank in range(world_size)])
        elif what == "signal":
            pid, number = argument
            if pid not in codes:
                os.kill(pid, number)
            pipe.send(None)
        else:
            for pid in argument:
                if pid not in codes:
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if ended:
                        codes[pid] = os.waitstatus_to_exitcode(status)
            pipe.send([codes[pid] for pid in argument] if all(pid in codes for pid in argument) else None)


def _fork(arguments: list[str], rank: int, environment: Mapping[str, str], folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(environment)
        if "WORLD_SIZE" in environment:
            os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for descriptor, suffix in ((1, "out"), (2, "err")):
            file = os.open(folder / f"{rank}.{suffix}", os.O_WRONLY | os.O_CREAT)
            os.dup2(file, descriptor)
        faulthandler.register(signal.SIGUSR2, file=2)
        sys.argv = ["llmtrain", *arguments]
        from llmtrain.cli.app import run

        code = run(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
