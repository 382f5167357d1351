"""Runs that are kept in S3: killed in the middle of an upload and resumed elsewhere; a store that is down; reading."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli.app import run as run_command
from llmtrain.runs import upload
from llmtrain.runs.stores import CopyRecord, runs_folder
from llmtrain.storage import failures
from llmtrain.storage.store import forget_stores
from llmtrain.tracking.metric_names import TRAIN_LOSS
from tests.support.moto_s3 import LocalS3, environment_of
from tests.support.ranks import free_port
from tests.support.run_in_store import Machines, objects_of
from tests.support.tiny_run import tiny_config, weight_hash, write_config
from tests.support.worker_groups import GroupServer

pytestmark = pytest.mark.slow

SLOWLY = "sleep@loss:0.15"
"""Each interval between two saves takes a second and a half, in which the upload of the checkpoint before ends."""


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    found = Machines(tmp_path / "machines", monkeypatch)
    found.be("here")
    return found


@pytest.fixture
def config(shards: Path, tmp_path: Path) -> Callable[[str], str]:
    """The tiny config as a file, with its runs at an address."""

    def at(root: str) -> str:
        keys = tiny_config(shards, Path("runs")) | {"output": {"root_dir": root}}
        return str(write_config(tmp_path / "stored.yaml", keys))

    return at


def complete_steps(address: str) -> list[str]:
    return sorted(name.split("/")[1] for name in objects_of(address) if name.endswith("MANIFEST.json"))


def said(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert run_command([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_that_is_killed_in_the_middle_of_an_upload_goes_on_elsewhere(
    world_size: int,
    s3: LocalS3,
    config: Callable[[str], str],
    machines: Machines,
    groups: GroupServer,
    undisturbed: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys = ["distributed.strategy=fsdp"] if world_size > 1 else []
    root = f"{s3.make_bucket(f'killed-{world_size}')}/runs"
    environment = s3.environment | {"LLMTRAIN_CACHE": str(machines.be("here"))}
    started = ["train", config(root), *keys, "output.run_id=a", "trainer.keep_last=2"]
    kills = f"{SLOWLY},kill@upload-file:14:rank=0"  # each checkpoint has nine to twelve files
    killed = groups.start(started, world_size=world_size, environment=environment, faults=kills)
    assert killed.wait()[0] == -9, killed.stderr
    assert complete_steps(f"{root}/a") == ["step_000010"]
    assert [name for name in objects_of(f"{root}/a") if "step_000020" in name], "half of a checkpoint is there"

    environment["LLMTRAIN_CACHE"] = str(machines.be("elsewhere"))
    resumed = groups.start(["train", f"--resume={root}/a"], world_size=world_size, environment=environment)
    assert resumed.wait() == [0] * world_size, resumed.stderr
    run = runs_folder(root) / "a"
    assert weight_hash(run) == undisturbed(*keys, world_size=world_size)
    assert complete_steps(f"{root}/a") == [folder.name for folder in sorted((run / "checkpoints").glob("step_*"))]
    assert not CopyRecord.of(run).pending
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if TRAIN_LOSS in line] == list(range(1, 31)), "each step is there once"
    if world_size == 1:
        read_elsewhere(root, machines, capsys)


def read_elsewhere(root: str, machines: Machines, capsys: pytest.CaptureFixture[str]) -> None:
    """List, report, use and measure the run on a machine that has nothing of it."""
    machines.be("a third one")
    [listed] = said(capsys, "runs", root)
    assert (listed["id"], listed["state"], listed["steps"]) == ("a", "finished", 30)
    assert said(capsys, "runs", f"{root}/a")["runs"][0]["loss"] == listed["loss"]
    page = Path(said(capsys, "report", f"{root}/a")["report"])
    assert page.stat().st_size > 10_000
    assert said(capsys, "generate", f"{root}/a", "--prompt", "def", "--max-new-tokens", "3")
    assert not (runs_folder(root) / "a" / "checkpoints" / "latest" / "optimizer").exists()
    measured = said(capsys, "eval", "a", "--root-dir", root, "--steps", "2")
    assert measured["loss"] > 0


def test_a_store_that_is_down_costs_no_step_and_the_upload_is_made_up_for(
    config: Callable[[str], str],
    machines: Machines,
    undisturbed: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    port, root = free_port(), "s3://down/runs"
    for name, value in environment_of(f"http://127.0.0.1:{port}").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(failures, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(upload, "END_WAIT_SECONDS", 0.01)
    forget_stores()
    assert run_command(["train", config(root), "output.run_id=a"]) == 0
    run, said = runs_folder(root) / "a", capsys.readouterr().err
    assert weight_hash(run) == undisturbed(world_size=1)
    assert said.count("The run begins all the same") == 1
    assert said.count("the upload is tried again") == 1
    assert f"llmtrain runs upload {root}/a" in " ".join(said.split())
    assert (run / "summary.json").is_file()
    with LocalS3(port) as s3:
        s3.make_bucket("down")
        assert run_command(["runs", "upload", f"{root}/a"]) == 0
        assert f"{root}/a is complete" in capsys.readouterr().out
        assert complete_steps(f"{root}/a") == ["step_000010", "step_000020", "step_000030"]
    forget_stores()


def test_a_store_that_comes_back_has_all_at_the_end(
    config: Callable[[str], str], machines: Machines, groups: GroupServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, root, wait = free_port(), "s3://back/runs", threading.Event()
    environment = environment_of(f"http://127.0.0.1:{port}") | {"LLMTRAIN_CACHE": str(machines.be("here"))}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    faults = f"wait@step:{machines.be('here')}/go:step=25"
    trains = groups.start(["train", config(root), "output.run_id=a"], environment=environment, faults=faults)
    while "the upload is tried again" not in trains.stderr and trains.codes() is None:
        wait.wait(0.05)
    with LocalS3(port) as s3:
        s3.make_bucket("back")
        while complete_steps(f"{root}/a") != ["step_000010", "step_000020"] and trains.codes() is None:
            wait.wait(0.1)
        assert trains.codes() is None, trains.stderr
        assert "answers again" in trains.stderr
        (machines.be("here") / "go").touch()
        assert trains.wait() == [0], trains.stderr
        assert complete_steps(f"{root}/a") == ["step_000010", "step_000020", "step_000030"]
        assert "is complete in s3://back/runs/a" in trains.stderr
