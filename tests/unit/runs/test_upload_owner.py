"""upload.json: who uploads a run, and for how long that holds without a sign of life."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from typing import Any

import pytest

from llmtrain.errors import ConfigError
from llmtrain.runs import upload_owner
from llmtrain.runs.upload_owner import Owner, TakenOver, is_alive, read_owner, wait_until_free
from llmtrain.storage.store import locate
from tests.support.run_in_store import Machines


def owner(**changes: Any) -> dict[str, Any]:
    return {"attempt": "a", "host": "other", "pid": 1, "renewed": time.time(), "ended": False} | changes


def write(address: str, content: dict[str, Any]) -> None:
    store, key = locate(f"{address}/upload.json")
    store.write(key, json.dumps(content).encode())


@pytest.mark.parametrize(
    ("changes", "alive"),
    [
        ({}, True),
        ({"ended": True}, False),
        ({"renewed": time.time() - 3600}, False),
        ({"host": socket.gethostname(), "pid": os.getppid()}, True),
        ({"host": socket.gethostname(), "pid": os.getpid()}, False),
        ({"host": socket.gethostname(), "pid": 2**22 + 1}, False),
    ],
)
def test_a_process_is_alive_for_a_minute_after_its_last_sign(changes: dict[str, Any], alive: bool) -> None:
    assert is_alive(owner(**changes)) is alive


def test_an_owner_renews_its_sign_until_it_is_released(root: str, machines: Machines) -> None:
    mine = Owner(root, attempt="a", known=[])
    mine.claim()
    first = read_owner(root)
    assert (first["attempt"], first["host"], first["ended"]) == ("a", socket.gethostname(), False)
    wait = threading.Event()
    while read_owner(root)["renewed"] == first["renewed"]:
        wait.wait(0.01)
    mine.release()
    assert read_owner(root)["ended"] is True


def test_an_attempt_may_only_follow_the_one_that_it_knows(root: str, machines: Machines) -> None:
    write(root, owner(attempt="before", ended=True))
    with pytest.raises(TakenOver, match="was continued on other: nothing of this run's course is uploaded over that"):
        Owner(root, attempt="a", known=[]).claim()
    follower = Owner(root, attempt="a", known=["before"])
    follower.claim()
    follower.stop()
    assert read_owner(root)["attempt"] == "a"


def test_a_run_that_shows_life_is_not_resumed_elsewhere(
    root: str, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root, owner())
    monkeypatch.setattr(time, "sleep", lambda seconds: write(root, owner()))
    with pytest.raises(ConfigError, match="is being trained by a process on other: wait for it, or stop it"):
        wait_until_free(root)


def test_a_run_whose_process_is_gone_is_free_after_a_while(
    root: str, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_owner, "LEASE_SECONDS", 0.2)
    write(root, owner())
    began = time.monotonic()
    wait_until_free(root)
    assert 0.1 < time.monotonic() - began < 10
    write(root, owner(ended=True, renewed=time.time() + 100))
    wait_until_free(root)
