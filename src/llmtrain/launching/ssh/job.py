"""A job on one machine or several: a command of llmtrain in tmux there, which runs on without a connection.

    start ─▶ tmux there ─▶ llmtrain train …          follow    ─▶ its log, from any position, and its exit code
                                                     terminate ─▶ SIGTERM, after which it saves

Each machine is a node with a folder .llmtrain/KIND-NODE, so machines may share one file system.
"""

from __future__ import annotations

import logging
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from secrets import token_hex

from llmtrain.config.loading.load import LoadedConfig, shipped_configs
from llmtrain.config.sections.schema import Config
from llmtrain.distributed.exit_codes import strongest
from llmtrain.distributed.stop_signals import handled_by
from llmtrain.errors import RunError
from llmtrain.launching.ssh.connection import SCRIPTS, ConnectionLost, run_script, stream_script, with_reconnects
from llmtrain.launching.ssh.environment import OWN_PYTHON
from llmtrain.launching.ssh.quoting import quote, quote_path
from llmtrain.launching.ssh.remote import Remote, RemoteMachine
from llmtrain.runs.folders import make_run_id

log = logging.getLogger("llmtrain.ssh")

LOST = 98
"""Exit code of follow.sh for a job without an exit code: it was killed, or the machine was restarted."""
TRY_AGAIN = 75
NEWEST, AUTO = "latest", "auto"
GRACE_SECONDS = 30.0
"""Seconds that the other nodes have to end by themselves after one has failed."""


@dataclass(frozen=True)
class Node:
    """One machine's part of a job."""

    machine: RemoteMachine
    kind: str
    """train or eval."""
    number: int

    @property
    def job(self) -> str:
        """Name of the job's folder there."""
        return f"{self.kind}-{self.number}"


def nodes_of(remote: Remote, kind: str) -> list[Node]:
    """Return the nodes of a job of this kind."""
    return [Node(machine, kind, number) for number, machine in enumerate(remote.machines)]


def write_file(machine: RemoteMachine, name: str, content: str) -> None:
    """Write a file below .llmtrain there, readable only by its owner. The content is never on a command line."""
    run_script(machine, "put", name, stdin=content.encode())


def put_variables(machine: RemoteMachine, remote: Remote) -> None:
    """Write the variables of the env file there, if there is one."""
    if remote.variables is not None:
        write_file(machine, "env", "".join(f"{name}={quote(value)}\n" for name, value in remote.variables.items()))


def read_file(machine: RemoteMachine, name: str) -> bytes:
    """Return the content of a file below .llmtrain there; empty if there is none."""
    return run_script(machine, "get", name).stdout


def start(node: Node, words: Sequence[str], *, remote: Remote, name: str) -> None:
    """Start `llmtrain *words` there, as the job `name`. Raises RunError if one is running already."""
    put_variables(node.machine, remote)
    write_file(node.machine, f"{node.job}/command.new", f"exec {_python(remote)} -m llmtrain {quote(*words)}\n")
    write_file(node.machine, f"{node.job}/run.new", (SCRIPTS / "job.sh").read_text(encoding="utf-8"))
    session = re.sub(r"[^\w-]", "_", f"{node.job}-{name}-{token_hex(3)}", flags=re.ASCII)
    run_script(node.machine, "start", node.job, session, name)


def name_of_run(resume: str | None, config: Config | None) -> str:
    """Return the id of the run that `resume` names, or of the new run."""
    if resume not in (None, AUTO):
        parts = Path(str(resume)).parts
        return parts[parts.index("checkpoints") - 1] if "checkpoints" in parts[1:] else parts[-1]
    if config is None:
        return NEWEST
    return config.output.run_id or make_run_id(config.run, mark=token_hex(2))  # other machines' folders are not seen


def config_there(node: Node, loaded: LoadedConfig | None) -> list[str]:
    """Return CONFIG for the command there: the name of a shipped config, else the path of a copy of the file."""
    if loaded is None:
        return []
    if loaded.source in shipped_configs():
        return [loaded.source]
    place = f"{node.job}/{Path(loaded.source).name}"
    write_file(node.machine, place, loaded.as_written)
    return [f".llmtrain/{place}"]


def follow(node: Node, write: Callable[[bytes], None], *, begin: int = 0, wait_for_end: bool = True) -> int:
    """Pass the job's log to `write`, from byte `begin` (or its last -`begin` lines) on, and return the job's exit code.

    After a lost connection the log continues where it broke. Raises ConnectionLost if reconnecting fails for long.
    """
    copied = _Copied(begin, write)

    def attempt() -> int:
        copied.restart()
        words = (node.job, str(copied.position), "follow" if wait_for_end else "once")
        return stream_script(node.machine, "follow", *words, write=copied.take)

    code = with_reconnects(attempt) if wait_for_end else attempt()
    if code == LOST:
        log.error("%s: the job ended without an exit code: it was killed, or the machine was restarted", node.machine)
        return TRY_AGAIN
    return code


class _Copied:
    """Keeps the position in a received log. follow.sh first sends a line with the position at which it begins."""

    def __init__(self, begin: int, write: Callable[[bytes], None]) -> None:
        self.position = begin
        self._write = write
        self._head: bytes | None = b""

    def restart(self) -> None:
        self._head = b""

    def take(self, chunk: bytes) -> None:
        if self._head is not None:
            self._head += chunk
            line, newline, chunk = self._head.partition(b"\n")
            if not newline:
                return
            if not line.strip().isdigit():
                raise RunError(
                    f"a login there prints {line.decode(errors='replace')!r}: silence it (~/.bashrc), since rsync "
                    "does not work with it either"
                )
            self.position, self._head = int(line), None
        self._write(chunk)
        self.position += len(chunk)


def follow_all(nodes: Sequence[Node], *, begin: int = 0) -> int:
    """Show the logs of all nodes on stderr until all have ended, and return one exit code for them.

    SIGINT and SIGTERM stop the job there, after it has saved. When one node fails, the others are stopped after
    GRACE_SECONDS, since they may wait for it. Raises ConnectionLost if the connection to a machine cannot be restored.
    """
    codes: list[int] = []
    lost: list[ConnectionLost] = []
    following = {_in_background(partial(follow, node, LogPrinter(node).write, begin=begin)): node for node in nodes}
    with _stop_signals() as stop:
        failed_for = 0.0
        while following:
            done, _ = wait(following, timeout=0.2, return_when=FIRST_COMPLETED)
            for each in done:
                del following[each]
                try:
                    codes.append(each.result())
                except ConnectionLost as error:
                    lost.append(error)
            failed_for += 0.2 if any(codes) else 0
            if stop.is_set() or failed_for > GRACE_SECONDS:
                stop.clear()
                failed_for = float("-inf")
                for node in following.values():
                    terminate(node)
    if lost:
        raise ConnectionLost(f"{lost[0]}. The job goes on there: follow it with llmtrain launch ssh logs --follow")
    return strongest(codes)


def _in_background(work: Callable[[], int]) -> Future[int]:
    """Start `work` in a daemon thread, so that the program can end before it does."""
    future: Future[int] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def terminate(node: Node) -> None:
    """Send SIGTERM to the job, which then saves and ends. It does not wait for that."""
    log.info("%s: stopping the job, which saves first", node.machine)
    with_reconnects(lambda: run_script(node.machine, "stop", node.job))


class LogPrinter:
    """Writes a node's log to stderr. Lines of all nodes but the first begin with the machine's name."""

    def __init__(self, node: Node) -> None:
        self._prefix = f"[{node.machine}] ".encode() if node.number else b""
        self._rest = b""

    def write(self, chunk: bytes) -> None:
        """Write the complete lines, and keep the rest for the next chunk."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        sys.stderr.buffer.write(b"".join(self._prefix + line + b"\n" for line in lines))
        sys.stderr.flush()


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGINT and SIGTERM set. A second Ctrl-C raises KeyboardInterrupt."""
    requested = threading.Event()
    count = 0

    def note(number: int, frame: object) -> None:
        nonlocal count
        count += 1
        if count > 1 and number == signal.SIGINT:
            raise KeyboardInterrupt
        requested.set()

    with handled_by(note, (signal.SIGINT, signal.SIGTERM)):
        yield requested


def _python(remote: Remote) -> str:
    """Return the quoted name or path of Python there: `remote.python`, or that of the environment that we make."""
    python = remote.python or OWN_PYTHON
    return quote_path(python) if python.startswith("~/") else quote(python)
