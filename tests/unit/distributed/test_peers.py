"""An error of the rendezvous says why the processes did not meet."""

from __future__ import annotations

import gc
import socket
import weakref
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import TCPStore

from llmtrain.distributed.peers import explained_rendezvous, is_lost_peer, is_timeout, keep_gloo_groups
from llmtrain.errors import ConfigError, Hang
from tests.support.ranks import free_port

MEET = {"MASTER_ADDR": "host", "MASTER_PORT": "29500"}


def test_processes_that_do_not_meet_give_one_message_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in {**MEET, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with (
            pytest.raises(ConfigError, match=f"cannot meet at port {port}, where another program listens"),
            explained_rendezvous(),
        ):
            TCPStore("127.0.0.1", port, 2, is_master=True)
    absent = r"the 2 processes did not meet at host:\d+ \(.*1/2 clients joined.*\): start all of them"
    with pytest.raises(Hang, match=absent), explained_rendezvous():
        TCPStore("127.0.0.1", free_port(), 2, is_master=True, timeout=timedelta(seconds=1))


@pytest.mark.parametrize(
    ("message", "may_be_alive"),
    [
        ("[../gloo/transport/tcp/pair.cc:144] Timed out waiting 600000ms for recv operation to complete", True),
        ("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3821", False),
        (
            "[../gloo/transport/tcp/connect.cc:81] timed out connecting: SO_ERROR: Connection refused, remote=[::1]",
            False,
        ),
    ],
)
def test_a_peer_that_refuses_connections_is_gone(
    monkeypatch: pytest.MonkeyPatch, message: str, may_be_alive: bool
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = RuntimeError(message)

    assert is_lost_peer(error)
    assert is_timeout(error) is may_be_alive


@pytest.mark.parametrize("kept", [True, False])
def test_a_kept_group_is_not_destroyed_with_its_last_reference(tmp_path: Path, kept: bool) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    group = weakref.ref(torch.distributed.group.WORLD)
    if kept:
        keep_gloo_groups()
    torch.distributed.destroy_process_group()
    gc.collect()

    assert (group() is not None) is kept
