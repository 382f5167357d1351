"""Starts the processes of a run on this machine through torchrun, and gives one exit code for all of them.

    llmtrain train CONFIG --nproc 4 ─▶ torchrun ─▶ 4 × llmtrain train CONFIG
                                                     └─ each leaves its exit code in a folder

torchrun ends with 1 whatever its workers ended with; the contract of exit codes (2, 42, 75, …) is kept by that folder.
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

import psutil

from llmtrain.config.errors import ConfigError
from llmtrain.distributed.limits import usable_cores

EXIT_FOLDER = "LLMTRAIN_EXIT_FOLDER"
"""Environment variable: where a worker leaves its exit code."""

SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
SHUTDOWN_SECONDS = 600
"""torchrun kills a worker so long after it told it to stop; its own 30 s are too short for a large checkpoint."""

OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Otherwise processes that are started again find the addresses of the dead ones in torchrun's own store, and wait."""

TO_WAKE_SEC = 10.0
"""So long may a worker that was stopped, was told to end and was woken for it, take; then it is killed."""

LAST_PORT = 65535

STRONGEST_FIRST = (2, 42, 1, 76, 75)
"""One worker's word for all: a mistake, then what will fail again, then a failure that others only followed."""


@dataclass(frozen=True)
class Gang:
    """The processes of one run."""

    nproc: int
    """On this machine."""
    nnodes: int = 1
    node_rank: int | None = None
    """This machine's number; None: the rendezvous gives one."""
    rendezvous: str | None = None
    """HOST:PORT of the first machine."""
    max_restarts: int = 0
    """How often all processes are started again when one fails."""


def launch(gang: Gang, arguments: Sequence[str], *, capture: bool) -> tuple[int, str]:
    """Run `llmtrain *arguments` in the gang's processes; the exit code for all, and rank 0's stdout if `capture`.

    A stop signal to this process goes to all of them. Raises ConfigError for a gang that cannot be.
    """
    with tempfile.TemporaryDirectory(prefix="llmtrain-") as folder:
        environment = {**os.environ, EXIT_FOLDER: folder}
        environment.setdefault(SHUTDOWN_TIMEOUT, str(SHUTDOWN_SECONDS))
        environment.setdefault(OWN_STORE, "1")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // gang.nproc)))
        command = [*_torchrun(gang), "-m", "llmtrain", *arguments]
        pipe = subprocess.PIPE if capture else None
        torchrun = subprocess.Popen(command, env=environment, stdout=pipe, text=True, start_new_session=True)
        with torchrun, _signals_go_to(torchrun), _stopped_workers_end(torchrun):
            output, _ = torchrun.communicate()
        codes = _codes_in(Path(folder))
    return _one_code(codes, expected=gang.nproc, torchrun=torchrun.returncode), output or ""


def leave_exit_code(code: int) -> None:
    """Tell the launcher, if there is one, how this worker ends."""
    if folder := _exit_folder():
        (folder / os.environ.get("RANK", "0")).write_text(str(code))


def fails_again() -> int | None:
    """The exit code of this worker if torchrun started it again though a worker ended with what will fail again.

    What an earlier start left is forgotten otherwise.
    """
    folder = _exit_folder()
    if folder is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    codes = _codes_in(folder)
    hopeless = next((code for code in STRONGEST_FIRST[:2] if code in codes), None)
    if hopeless is None:
        (folder / os.environ.get("RANK", "0")).unlink(missing_ok=True)
    return hopeless


def _exit_folder() -> Path | None:
    folder = os.environ.get(EXIT_FOLDER)
    return Path(folder) if folder and Path(folder).is_dir() else None


def _codes_in(folder: Path) -> list[int]:
    codes = []
    for path in folder.iterdir():
        with suppress(OSError, ValueError):  # another worker writes or removes its own at this moment
            codes.append(int(path.read_text()))
    return codes


def _torchrun(gang: Gang) -> list[str]:
    if "RANK" in os.environ:
        raise ConfigError(
            "--nproc starts processes, but this is one that torchrun started already: leave one of them out"
        )
    if gang.node_rank is not None and gang.node_rank >= gang.nnodes:
        raise ConfigError(
            f"--node-rank is {gang.node_rank}, but --nnodes is {gang.nnodes}: machines are numbered from 0"
        )
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={gang.nproc}", f"--nnodes={gang.nnodes}"]
    start.append(f"--max-restarts={gang.max_restarts}")
    if gang.nnodes == 1:
        if gang.rendezvous is not None:
            raise ConfigError(
                f"{gang.rendezvous} is where several machines would meet, but --nnodes is 1: add --nnodes N, or leave "
                "out --rendezvous, and distributed.rendezvous.master_addr and master_port of the config"
            )
        return [*start, "--standalone"]
    if gang.rendezvous is None:
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "29500")
        if address is None:
            raise ConfigError("--nnodes over 1 needs --rendezvous HOST:PORT of the first machine, or MASTER_ADDR")
        rendezvous = f"{address}:{port}"
    else:
        rendezvous = gang.rendezvous
    host, _, port = rendezvous.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= LAST_PORT:
        raise ConfigError(
            f"{rendezvous} is no HOST:PORT with a port of 1 to {LAST_PORT}: it is where the machines meet"
        )
    if gang.node_rank is None:
        return [*start, "--rdzv-backend=c10d", f"--rdzv-endpoint={rendezvous}", "--rdzv-id=llmtrain"]
    return [*start, f"--node-rank={gang.node_rank}", f"--master-addr={host}", f"--master-port={port}"]


def _one_code(codes: Sequence[int], *, expected: int, torchrun: int) -> int:
    """The strongest of the workers' codes. A worker that left none was killed, so the run can be tried again."""
    if not codes:
        return 75 if torchrun < 0 else 1  # torchrun was killed, or could not start them
    killed = [75] * (expected - len(codes))
    failed = [code for code in (*codes, *killed) if code]
    return next((code for code in STRONGEST_FIRST if code in failed), failed[0] if failed else 0)


@contextmanager
def _signals_go_to(process: subprocess.Popen[str]) -> Iterator[None]:
    """Pass stop signals on; torchrun tells its workers of SIGTERM."""

    def forward(number: int, frame: object) -> None:
        process.send_signal(signal.SIGTERM)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _stopped_workers_end(torchrun: subprocess.Popen[str]) -> Iterator[None]:
    """Wake a worker that is stopped (SIGSTOP) when torchrun tells it to end, and kill it if that does not help.

    A stopped process does not hear SIGTERM, so torchrun would wait for all of SHUTDOWN_SECONDS. Woken, it finds its
    peers gone, writes its stacks and ends.
    """
    over = threading.Event()

    def watch() -> None:
        told: dict[int, float] = {}
        while not over.wait(0.5):
            for worker in _children(torchrun.pid):
                with suppress(psutil.Error):
                    if worker.pid in told and time.monotonic() - told[worker.pid] > TO_WAKE_SEC:
                        worker.kill()
                    elif worker.status() == psutil.STATUS_STOPPED and _is_told_to_end(worker.pid):
                        told.setdefault(worker.pid, time.monotonic())
                        worker.resume()

    thread = threading.Thread(target=watch, name="llmtrain-stopped", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _children(pid: int) -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = psutil.Process(pid).children()
    except psutil.Error:
        found = []
    return found


def _is_told_to_end(pid: int) -> bool:
    """Whether SIGTERM waits for the process. Linux says so; elsewhere torchrun's own patience has to do."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    waiting = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("ShdPnd:"))
    return bool(waiting >> (signal.SIGTERM - 1) & 1)
