"""Worker groups that are impossible are rejected before a process starts."""

from __future__ import annotations

import pytest

from llmtrain.distributed.launch import WorkerGroup, launch
from llmtrain.errors import ConfigError


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (WorkerGroup(2, rendezvous="host:29500"), "host:29500 is where several machines would meet, but --nnodes is 1"),
        (WorkerGroup(2, node_rank=1), "--node-rank is 1, but --nnodes is 1: machines are numbered from 0"),
        (WorkerGroup(2, nnodes=2, node_rank=2, rendezvous="host:29500"), "--node-rank is 2, but --nnodes is 2"),
        (WorkerGroup(2, nnodes=2, node_rank=0, rendezvous="host"), "host is not HOST:PORT with a port from 1 to 65535"),
        (WorkerGroup(2, nnodes=2, rendezvous="host:port"), "host:port is not HOST:PORT"),
        (WorkerGroup(2, nnodes=2), "--nnodes over 1 needs --rendezvous HOST:PORT of the first machine, or MASTER_ADDR"),
    ],
)
def test_machines_that_cannot_meet_are_rejected_before_a_process_starts(
    monkeypatch: pytest.MonkeyPatch, group: WorkerGroup, message: str
) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError) as caught:
        launch(group, ["version"], capture=False)
    assert message in str(caught.value)
