"""Errors of collectives and of the rendezvous that mean that other processes are gone or do not answer."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator

import torch

from llmtrain.errors import ConfigError, Hang, Preempted

_LOST_PEER = re.compile("gloo.*(closed by peer|reset by peer|timed out|broken pipe)|NCCL", re.IGNORECASE | re.DOTALL)
"""gloo raises RuntimeError, with the name of its own source file in the message."""
_TIMED_OUT = re.compile("time[d]? ?out", re.IGNORECASE)


def is_lost_peer(error: Exception) -> bool:
    """Return whether `error` is of a collective that failed because another process is gone or does not answer."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    return isinstance(error, torch.distributed.DistError) or bool(_LOST_PEER.search(str(error)))


def is_timeout(error: Exception) -> bool:
    """Return whether `error`, for which `is_lost_peer` is true, is a timeout, so that the peer may still be alive.

    gloo says "timed out" also after its last attempt to connect was refused: there the peer is gone.
    """
    text = str(error)
    return bool(_TIMED_OUT.search(text)) and "refused" not in text.lower()


@contextlib.contextmanager
def explained_rendezvous() -> Iterator[None]:
    """Explain why the processes could not connect to each other within the block.

    Raises ConfigError if the port that the user chose is taken, Hang after a timeout, and Preempted for the rest.
    """
    try:
        yield
    except torch.distributed.DistError as error:
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        why = str(error).splitlines()[0]
        if "EADDRINUSE" in why and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun would choose another port
            raise ConfigError(
                f"the processes cannot meet at port {port}, where another program listens: name a free port in "
                "MASTER_PORT or distributed.rendezvous.master_port"
            ) from error
        world_size = os.environ.get("WORLD_SIZE")
        message = (
            f"the {world_size} processes did not meet at {address}:{port} ({why}): start all of them, on machines that "
            "can reach that address"
        )
        raise (Hang if is_timeout(error) else Preempted)(message) from error


def keep_gloo_groups() -> None:
    """Keep gloo's process groups from being destroyed before the process ends.

    Their destructor waits for running operations, and holds Python's lock meanwhile. An operation may wait for a lost
    process (in one of thirty starts with ddp), or its own end for that lock (torch 2.13, where a group is destroyed
    with ddp's reducer): the process would hang at the end of its run.
    """
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        if torch.distributed.get_backend(group) == "gloo":
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
