"""Starts the processes of a run on this machine with torchrun, and returns one exit code for all of them.

    llmtrain train CONFIG --nproc 4 ─▶ torchrun ─▶ 4 × llmtrain train CONFIG
                                                     └─ each writes its exit code to a folder (exit_codes.py)

torchrun numbers the processes, connects them, restarts them and passes SIGTERM on. This file adds what it lacks: the
workers' exit code, all stop signals, and an end for workers that are suspended (SIGSTOP) or have lost their launcher.
Nothing here imports torch.
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
from llmtrain.distributed.orphans import hold_launcher_lock
from llmtrain.distributed.rendezvous import LAST_PORT, split_address
from llmtrain.distributed.stop_signals import handled_by, signals_to_handle
from llmtrain.errors import ConfigError

SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
SHUTDOWN_SECONDS = 600
"""Seconds between torchrun's SIGTERM and its SIGKILL. Its own 30 are too few for a large checkpoint."""

OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Without it, restarted processes find the addresses of the dead ones in torchrun's own store, and wait."""

RESUME_SECONDS = 10.0
"""Seconds that a suspended worker has to end after it was resumed; then it is killed."""


@dataclass(frozen=True)
class WorkerGroup:
    """The processes of one run."""

    nproc: int
    """Number of processes on this machine."""
    nnodes: int = 1
    node_rank: int | None = None
    """Number of this machine, from 0; None: the rendezvous assigns one."""
    rendezvous: str | None = None
    """HOST:PORT of the first machine."""
    max_restarts: int = 0
    """Number of times that all processes are restarted when one fails."""


def launch(group: WorkerGroup, arguments: Sequence[str], *, capture: bool) -> tuple[int, str]:
    """Run `llmtrain *arguments` in the group's processes. Return one exit code, and rank 0's stdout if `capture`.

    A stop signal to this process goes to all of them. Raises ConfigError if the group is impossible.
    """
    command = [*_torchrun(group), "-m", "llmtrain", *arguments]
    with tempfile.TemporaryDirectory(prefix="llmtrain-") as folder, hold_launcher_lock(Path(folder)):
        environment = {**os.environ, EXIT_FOLDER: folder}
        environment.setdefault(SHUTDOWN_TIMEOUT, str(SHUTDOWN_SECONDS))
        environment.setdefault(OWN_STORE, "1")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // group.nproc)))
        pipe = subprocess.PIPE if capture else None
        torchrun = subprocess.Popen(command, env=environment, stdout=pipe, text=True, start_new_session=True)
        with torchrun, _pass_stop_signals_to(torchrun), _end_suspended_workers(torchrun):
            output, _ = torchrun.communicate()
        codes = exit_codes_in(Path(folder))
    return exit_code_of(codes, num_workers=group.nproc, torchrun=torchrun.returncode), output or ""


def _torchrun(group: WorkerGroup) -> list[str]:
    if "RANK" in os.environ:
        raise ConfigError(
            "--nproc starts processes, but torchrun has already started this one (RANK is set): remove --nproc, or "
            "start it without torchrun"
        )
    if group.node_rank is not None and group.node_rank >= group.nnodes:
        raise ConfigError(
            f"--node-rank is {group.node_rank}, but --nnodes is {group.nnodes}: machines are numbered from 0"
        )
    options = {"nproc-per-node": group.nproc, "nnodes": group.nnodes, "max-restarts": group.max_restarts}
    command = [sys.executable, "-m", "llmtrain.distributed.torchrun", *(f"--{name}={n}" for name, n in options.items())]
    if group.nnodes == 1:
        if group.rendezvous is not None:
            raise ConfigError(
                f"{group.rendezvous} is where several machines would meet, but --nnodes is 1: add --nnodes N, or "
                "remove --rendezvous, and distributed.rendezvous.master_addr and master_port of the config"
            )
        return [*command, "--standalone"]
    rendezvous = group.rendezvous
    if rendezvous is None:
        if "MASTER_ADDR" not in os.environ:
            raise ConfigError("--nnodes over 1 needs --rendezvous HOST:PORT of the first machine, or MASTER_ADDR")
        rendezvous = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '29500')}"
    if split_address(rendezvous) is None:
        raise ConfigError(
            f"{rendezvous} is not HOST:PORT with a port from 1 to {LAST_PORT}: give the address of the first machine, "
            "where the machines meet"
        )
    number = ["--rdzv-backend=c10d", "--rdzv-id=llmtrain"]
    if group.node_rank is not None:
        number = [f"--node-rank={group.node_rank}"]
    return [*command, *number, f"--rdzv-endpoint={rendezvous}"]


@contextmanager
def _pass_stop_signals_to(torchrun: subprocess.Popen[str]) -> Iterator[None]:
    """Send torchrun a SIGTERM for the first stop signal and for every Ctrl-C; torchrun passes it on to its workers.

    Other signals are not repeated: a terminal that closes sends several, and at a second SIGTERM torchrun no longer
    waits until its workers have saved.
    """
    received: set[int] = set()

    def forward(number: int, frame: object) -> None:
        if number == signal.SIGINT or not received:
            torchrun.send_signal(signal.SIGTERM)
        received.add(number)

    with handled_by(forward, signals_to_handle()):
        yield


@contextmanager
def _end_suspended_workers(torchrun: subprocess.Popen[str]) -> Iterator[None]:
    """Resume a worker that is suspended (SIGSTOP) when torchrun sends it SIGTERM; kill it if it does not end then.

    A suspended process does not handle SIGTERM, so torchrun would wait for all of SHUTDOWN_SECONDS. Once resumed, the
    worker finds its peers gone, writes its stacks and ends.
    """
    import psutil  # here, since it would delay `--help` by 20 ms

    over = threading.Event()

    def watch() -> None:
        resumed: dict[int, float] = {}
        while not over.wait(0.5):
            with suppress(psutil.Error):  # a process has just ended; the next round checks the others
                for worker in psutil.Process(torchrun.pid).children():
                    if worker.pid in resumed and time.monotonic() - resumed[worker.pid] > RESUME_SECONDS:
                        worker.kill()
                    elif worker.status() == psutil.STATUS_STOPPED and _has_pending_sigterm(worker.pid):
                        resumed.setdefault(worker.pid, time.monotonic())
                        worker.resume()

    thread = threading.Thread(target=watch, name="llmtrain-stopped", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _has_pending_sigterm(pid: int) -> bool:
    """Return whether SIGTERM is pending for the process; False where there is no /proc, as on macOS."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    pending = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("ShdPnd:"))
    return bool(pending >> (signal.SIGTERM - 1) & 1)
