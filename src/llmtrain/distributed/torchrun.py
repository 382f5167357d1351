"""torchrun for `launch`, without its traceback and table of failures: the workers say why they end, and leave a code.

What no worker can say is said here: that a signal killed it, or that none was started, since the machines did not meet.

All machines end with the first one, whose torchrun holds the store in which they meet. Otherwise a machine that is
replaced might join the store of a start that is just ending, and wait there for the first machine, which is started
again and waits in a new store.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress

import psutil
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.run import main

from llmtrain.distributed.exit_codes import exit_codes_in, exit_folder, leave_exit_code
from llmtrain.distributed.rendezvous import split_address
from llmtrain.errors import ConfigError, Hang, Preempted

WAIT_SECONDS = 600.0
"""Seconds to wait for the first machine, where PET_RDZV_CONF has no timeout: torchrun's own default."""
GRACE_SECONDS = 10.0
"""Seconds for the workers to end by themselves after the first machine's torchrun has ended, and after SIGTERM."""
_is_alone = threading.Event()
"""Set when the first machine's torchrun has ended long before this one."""


def run() -> int:
    """Run torchrun with the arguments in sys.argv, and return its exit code."""
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        if (place := _option("--rdzv-endpoint")) and _option("--node-rank") not in (None, "0"):
            connection = _connect_to_first_machine(place)
            threading.Thread(target=_end_with_first_machine, args=(connection,), daemon=True).start()
        main()
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:  # with SIGTERM torchrun ends the others
                print(f"[rank {rank}] ended by {failure.signal_name()}", file=sys.stderr)
        return 1
    except SignalException:
        if _is_alone.is_set() and (folder := exit_folder()) is not None and not exit_codes_in(folder):
            leave_exit_code(Preempted.exit_code)
        return 1
    except (DistError, RendezvousError, TimeoutError) as error:
        _explain(error)
        return 1
    return 0


def _option(name: str) -> str | None:
    return next((word.partition("=")[2] for word in sys.argv if word.startswith(f"{name}=")), None)


def _connect_to_first_machine(place: str) -> socket.socket:
    """Return a connection to the first machine's store. Raises TimeoutError where it does not come in time."""
    address = split_address(place)
    assert address is not None, place
    settings = dict(pair.partition("=")[::2] for pair in os.environ.get("PET_RDZV_CONF", "").split(","))
    wait_sec = float(settings.get("timeout", WAIT_SECONDS))
    deadline = time.monotonic() + wait_sec
    while True:
        try:
            connection = socket.create_connection(address, timeout=min(10.0, wait_sec))
            connection.settimeout(None)
            return connection
        except OSError as error:  # it does not listen yet, or its name is not known yet
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer for {wait_sec:.0f} s: {error}") from error
        time.sleep(0.5)


def _end_with_first_machine(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.recv(1)  # the store sends nothing to who asks nothing, so this returns when it is gone
    time.sleep(GRACE_SECONDS)
    _is_alone.set()
    os.kill(os.getpid(), signal.SIGTERM)  # torchrun passes it on: a worker that waits for no other one saves
    time.sleep(GRACE_SECONDS)
    for worker in psutil.Process().children(recursive=True):
        worker.kill()


def _explain(error: Exception) -> None:
    """Say that the machines did not meet, and leave this machine's exit code. If a worker has left one, it said why."""
    folder = exit_folder()
    if folder is None or exit_codes_in(folder):
        return
    place = _option("--rdzv-endpoint") or "127.0.0.1"
    why = str(error).splitlines()[0]
    if "EADDRINUSE" in why:
        message = f"the machines cannot meet at {place}, where another program listens: name a free port"
        leave_exit_code(ConfigError.exit_code)
    else:
        message = f"the machines did not meet at {place} ({why}): start all of them, so that each reaches that address"
        leave_exit_code(Hang.exit_code)
    print(message, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run())
