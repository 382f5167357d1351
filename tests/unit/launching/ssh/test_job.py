"""Following a job: each byte of its log once however often the connection breaks, and one exit code for all nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.config.sections.schema import Config
from llmtrain.errors import ConfigError
from llmtrain.launching.ssh import connection, group, job
from llmtrain.launching.ssh.connection import ConnectionLost
from llmtrain.launching.ssh.job import Node, name_of_run
from llmtrain.launching.ssh.remote import remote_of
from llmtrain.runs.metadata import name_in

LOG = b"".join(b"line %d\n" % number for number in range(30))


def nodes(number: int) -> list[Node]:
    remote = remote_of(None, {"host": [f"host{index}" for index in range(number)], "dir": "~/x"})
    return job.nodes_of(remote, "train")


def breaking(cuts: Sequence[int]) -> Callable[..., int]:
    """A connection that breaks after so many bytes of its stream, then holds; it comes in pieces of 7 bytes."""
    left = list(cuts)

    def stream(machine: object, name: str, its_job: str, at: str, mode: str, *, write: Callable[[bytes], None]) -> int:
        begin = int(at) if int(at) >= 0 else len(LOG) - len(b"".join(LOG.splitlines(keepends=True)[int(at) :]))
        content = b"%d\n" % begin + LOG[begin:]
        whole = not left
        for index in range(0, len(content) if whole else left[0], 7):
            write(content[index : min(index + 7, len(content) if whole else left[0])])
        if not whole:
            left.pop(0)
            raise ConnectionLost("no connection")
        return 75

    return stream


@given(cuts=st.lists(st.integers(0, len(LOG)), max_size=4), begin=st.sampled_from([0, 9, -1, -5]))
def test_a_log_arrives_complete_and_once_however_often_the_connection_breaks(cuts: list[int], begin: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "stream_script", breaking(cuts))
        patch.setattr("time.sleep", lambda seconds: None)
        received: list[bytes] = []
        assert job.follow(nodes(1)[0], received.append, begin=begin) == 75
    wanted = LOG[begin:] if begin >= 0 else b"".join(LOG.splitlines(keepends=True)[begin:])
    assert b"".join(received) == wanted


def test_a_connection_that_stays_lost_ends_with_a_message_that_the_job_continues(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job, "stream_script", breaking([0] * 99))
    monkeypatch.setattr(connection, "RECONNECT_SECONDS", 0.0)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(ConnectionLost, match=r"The job goes on there: .* logs --follow"):
        job.follow_all(nodes(1))


def test_when_one_node_fails_the_others_are_stopped_and_the_strongest_code_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[int] = []

    def follow(node: Node, write: object, *, begin: int) -> int:
        if node.number == 1:
            return 2
        while node.number not in told:
            time.sleep(0.01)
        return 75

    monkeypatch.setattr(job, "follow", follow)
    monkeypatch.setattr(job, "terminate", lambda node: told.append(node.number))
    monkeypatch.setattr(job, "GRACE_SECONDS", 0.1)
    assert job.follow_all(nodes(3)) == 2
    assert sorted(told) == [0, 2]


def test_a_job_that_left_no_exit_code_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "stream_script", lambda *words, write: job.LOST)
    assert job.follow_all(nodes(1)) == 75


def test_a_run_is_named_by_the_resumed_run_or_by_its_config() -> None:
    config = Config.model_validate({"data": {"name": "synthetic"}, "output": {"run_id": "mine"}})
    assert name_of_run("runs/one/checkpoints/step_000010", config) == "one"
    assert name_of_run("runs/one", None) == name_of_run("one", None) == "one"
    assert name_of_run("auto", config) == name_of_run(None, config) == "mine"
    assert name_of_run("latest", None) == "latest"


def test_jobs_that_start_in_one_second_have_runs_of_their_own_which_their_name_finds() -> None:
    config = Config.model_validate({"data": {"name": "synthetic"}, "run": {"name": "demo"}})
    started = [name_of_run(None, config) for _ in range(3)]
    assert len(set(started)) == 3
    assert {name_in(one) for one in started} == {"demo"}


def test_every_machine_gets_its_process_options(monkeypatch: pytest.MonkeyPatch) -> None:
    facts: dict[str, dict[str, Any]] = {
        f"host{index}": {"folder": "/x", "gpu": ["H100"] * 4, "rsync": "yes", "tmux": "yes"} for index in range(2)
    }
    monkeypatch.setattr(group, "inspect_machine", lambda machine, job: facts[machine.name])
    monkeypatch.setattr(group, "address_of", lambda machine: "10.0.0.1")
    monkeypatch.setattr(group, "check_sharing", lambda *words, **options: True)
    monkeypatch.setattr(group, "free_port", lambda machine, remote: 1234)
    remote = remote_of(None, {"host": ["host0", "host1"], "dir": "~/x"})

    def words(config: Config | None = None, **given: Any) -> list[list[str]]:
        options = {"nproc": None, "rendezvous": None, "resume": False, **given}
        return group.group_words(nodes(2), remote, config, **options)

    common = ["--nproc=4", "--nnodes=2", "--rendezvous=10.0.0.1:1234"]
    assert words() == [[*common, "--node-rank=0"], [*common, "--node-rank=1"]]
    assert words(nproc=2, rendezvous="a:1")[1] == ["--nproc=2", "--nnodes=2", "--rendezvous=a:1", "--node-rank=1"]
    config = Config.model_validate({"data": {"name": "synthetic"}})
    assert words(config)[1] == [*common, "--node-rank=1"]
    monkeypatch.setattr(group, "check_sharing", lambda *words, **options: False)  # so that only ddp can save
    assert words(config)[1] == [*common, "distributed.strategy=ddp", "--node-rank=1"]
    facts["host1"]["gpu"] = []
    with pytest.raises(ConfigError, match="different numbers of GPUs \\(host0 has 4, host1 has 0\\)"):
        words()
    facts["host1"]["folder"] = "/y"
    with pytest.raises(ConfigError, match="folder is /x on host0 and /y on host1"):
        words()
    assert group.group_words(nodes(1), remote, None, nproc=None, rendezvous=None, resume=True) == [[]]
