"""Starts the processes of a run on this machine by torchrun, and returns one exit code for all of them.

    llmtrain train CONFIG --nproc 4 ─▶ torchrun ─▶ 4 × llmtrain train CONFIG
                                                     └─ each leaves its exit code in a folder (exit_codes.py)

torchrun numbers the processes, lets them meet, restarts them and passes SIGTERM on. What it lacks is here: one exit
code, each stop signal as a request to stop, and an end for workers that are stopped or whose launcher is gone. Nothing
here imports torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from llmtrain.distributed.exit_codes import EXIT_FOLDER, exit_code_of, exit_codes_in
from llmtrain.distributed.limits import usable_cores
from llmtrain.distributed.orphans import seen_alive
from llmtrain.distributed.rendezvous import LAST_PORT, split_address
from llmtrain.distributed.stop_signals import heeded_signals
from llmtrain.errors import ConfigError

SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
SHUTDOWN_SECONDS = 600
"""Seconds between torchrun's SIGTERM and its SIGKILL. Its own 30 are too few for a large checkpoint."""

OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Without it, restarted processes find the addresses of the dead ones in torchrun's own store, and wait."""

WAKE_SECONDS = 10.0
"""Seconds that a stopped worker may take to end after it was told to and woken; then it is killed."""


@dataclass(frozen=True)
class WorkerGroup:
    """The processes of one run."""

    nproc: int
    """Number of processes on this machine."""
    nnodes: int = 1
    node_rank: int | None = None
    """Number of this machine; None: the rendezvous assigns one."""
    rendezvous: str | None = None
    """HOST:PORT of the first machine."""
    max_restarts: int = 0
    """Number of times that all processes are restarted when one fails."""


def launch(group: WorkerGroup, arguments: Sequence[str], *, capture: bool) -> tuple[int, str]:
    """Run `llmtrain *arguments` in the group's processes. Return one exit code, and rank 0's stdout if `capture`.

    A stop signal to this process goes to all of them. Raises ConfigError if the group is impossible.
    """
    command = [*_torchrun(group), "-m", "llmtrain", *arguments]
    with tempfile.TemporaryDirectory(prefix="llmtrain-") as folder, seen_alive(Path(folder)):
        environment = {**os.environ, EXIT_FOLDER: folder}
        environment.setdefault(SHUTDOWN_TIMEOUT, str(SHUTDOWN_SECONDS))
        environment.setdefault(OWN_STORE, "1")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // group.nproc)))
        pipe = subprocess.PIPE if capture else None
        torchrun = subprocess.Popen(command, env=environment, stdout=pipe, text=True, start_new_session=True)
        with torchrun, _stop_signals_go_to(torchrun), _stopped_workers_end(torchrun):
            output, _ = torchrun.communicate()
        codes = exit_codes_in(Path(folder))
    return exit_code_of(codes, num_workers=group.nproc, torchrun=torchrun.returncode), output or ""


def _torchrun(group: WorkerGroup) -> list[str]:
    if "RANK" in os.environ:
        raise ConfigError("--nproc starts processes, but torchrun started this one already: leave one of them out")
    if group.node_rank is not None and group.node_rank >= group.nnodes:
        raise ConfigError(
            f"--node-rank is {group.node_rank}, but --nnodes is {group.nnodes}: machines are numbered from 0"
        )
    options = {"nproc-per-node": group.nproc, "nnodes": group.nnodes, "max-restarts": group.max_restarts}
    command = [sys.executable, "-m", "llmtrain.distributed.torchrun", *(f"--{name}={n}" for name, n in options.items())]
    if group.nnodes == 1:
        if group.rendezvous is not None:
            raise ConfigError(
                f"{group.rendezvous} is where several machines would meet, but --nnodes is 1: add --nnodes N, or leave "
                "out --rendezvous, and distributed.rendezvous.master_addr and master_port of the config"
            )
        return [*command, "--standalone"]
    rendezvous = group.rendezvous
    if rendezvous is None:
        if "MASTER_ADDR" not in os.environ:
            raise ConfigError("--nnodes over 1 needs --rendezvous HOST:PORT of the first machine, or MASTER_ADDR")
        rendezvous = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '29500')}"
    if split_address(rendezvous) is None:
        raise ConfigError(
            f"{rendezvous} is no HOST:PORT with a port of 1 to {LAST_PORT}: it is where the machines meet"
        )
    number = ["--rdzv-backend=c10d", "--rdzv-id=llmtrain"]
    if group.node_rank is not None:
        number = [f"--node-rank={group.node_rank}"]
    return [*command, *number, f"--rdzv-endpoint={rendezvous}"]


@contextmanager
def _stop_signals_go_to(torchrun: subprocess.Popen[str]) -> Iterator[None]:
    """Pass every stop signal on as SIGTERM, which torchrun passes on to its workers.

    Once only, but for a second Ctrl-C: a terminal that closes sends several, and a second SIGTERM makes torchrun leave
    its workers alone before they have saved.
    """
    heard: set[int] = set()

    def forward(number: int, frame: object) -> None:
        if number == signal.SIGINT or not heard:
            torchrun.send_signal(signal.SIGTERM)
        heard.add(number)

    previous = {number: signal.signal(number, forward) for number in heeded_signals()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _stopped_workers_end(torchrun: subprocess.Popen[str]) -> Iterator[None]:
    """Wake a worker that is stopped (SIGSTOP) when torchrun tells it to end, and kill it if that does not help.

    A stopped process does not receive SIGTERM, so torchrun would wait for all of SHUTDOWN_SECONDS. When it is woken it
    finds its peers gone, writes its stacks and ends.
    """
    import psutil  # here, since it takes 20 ms that `--help` would wait for

    over = threading.Event()

    def watch() -> None:
        woken: dict[int, float] = {}
        while not over.wait(0.5):
            with suppress(psutil.Error):  # a process that ended meanwhile; the others are looked at next time
                for worker in psutil.Process(torchrun.pid).children():
                    if worker.pid in woken and time.monotonic() - woken[worker.pid] > WAKE_SECONDS:
                        worker.kill()
                    elif worker.status() == psutil.STATUS_STOPPED and _is_told_to_end(worker.pid):
                        woken.setdefault(worker.pid, time.monotonic())
                        worker.resume()

    thread = threading.Thread(target=watch, name="llmtrain-stopped", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _is_told_to_end(pid: int) -> bool:
    """Return whether SIGTERM is pending for the process. Only Linux says so; elsewhere torchrun's timeout applies."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    pending = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("ShdPnd:"))
    return bool(pending >> (signal.SIGTERM - 1) & 1)
