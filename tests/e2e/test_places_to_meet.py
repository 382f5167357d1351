"""Processes that nobody but the user started, and machines that meet: by environment, config, file, address."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import free_port
from tests.support.tiny_run import weight_hash
from tests.support.worker_groups import GroupServer

pytestmark = [pytest.mark.slow, pytest.mark.processes]

KEYS = ["trainer.max_steps=6", "trainer.micro_batch_size=2", "trainer.eval_every_steps=null"]


def test_ranks_set_by_hand_in_the_environment_the_config_or_a_file_make_the_same_run(
    config_file: Path, groups: GroupServer, tmp_path: Path
) -> None:
    runs = config_file.parent / "runs"
    assert groups.run(["train", str(config_file), *KEYS, "output.run_id=environment"], world_size=2) == [0, 0]

    where = "distributed.rendezvous"
    address = [f"{where}.master_addr=127.0.0.1", f"{where}.master_port={free_port()}"]
    url = [f"{where}.init_method=tcp://127.0.0.1:{free_port()}"]
    file = [f"{where}.init_method=file://{tmp_path}/meet"]
    for name, meeting in (("address", address), ("url", url), ("file", file)):
        numbers = [[f"{where}.rank={rank}", f"{where}.world_size=2"] for rank in (0, 1)]
        command = ["train", str(config_file), *KEYS, f"output.run_id={name}", *meeting]
        started = [groups.start([*command, *mine]) for mine in numbers]
        codes = [each.wait()[0] for each in started]
        assert codes == [0, 0], "".join(each.stderr for each in started)
        assert weight_hash(runs / name) == weight_hash(runs / "environment")
        assert (runs / name / "logs" / "rank_1.log").exists()
        assert f"{where}:" not in (runs / name / "config.yaml").read_text()
    alone = groups.start(["train", f"--resume={runs / 'address'}", "trainer.max_steps=7"])
    assert alone.wait() == [0], "a run keeps nothing of who its processes were: " + alone.stderr


def test_what_contradicts_is_2_and_names_both_places(config_file: Path, groups: GroupServer) -> None:
    group = groups.start(["train", str(config_file), "distributed.rendezvous.world_size=3"], world_size=2)
    assert group.wait() == [2, 2]
    assert "distributed.rendezvous.world_size says 3, but WORLD_SIZE says 2" in group.stderr
    group = groups.start(["train", str(config_file)], environment={"RANK": "1"})
    assert group.wait() == [2]
    assert "RANK is 1, but WORLD_SIZE is not set" in group.stderr


def test_a_machine_whose_peers_do_not_come_ends_in_bounded_time_with_the_code_of_a_hang(config_file: Path) -> None:
    environment = {**os.environ, "PET_RDZV_CONF": "timeout=2"}
    places = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    machines = []
    for number, place in enumerate(places):
        meeting = ["--nproc=1", "--nnodes=2", f"--rendezvous={place}", f"--node-rank={number}"]
        command = [sys.executable, "-m", "llmtrain", "train", str(config_file), f"output.run_id={number}", *meeting]
        machines.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for machine, place in zip(machines, places, strict=True):
        _, err = machine.communicate(timeout=120)
        assert machine.returncode == 76, err
        assert f"the machines did not meet at {place} (" in err
        assert "Traceback" not in err


@pytest.mark.parametrize("numbered", [True, False], ids=["static", "c10d"])
def test_two_machines_train_as_one(config_file: Path, groups: GroupServer, numbered: bool) -> None:
    runs = config_file.parent / "runs"
    assert groups.run(["train", str(config_file), *KEYS, "output.run_id=one"], world_size=2) == [0, 0]
    meeting = ["--nproc=1", "--nnodes=2", f"--rendezvous=127.0.0.1:{free_port()}", "--json"]
    command = [sys.executable, "-m", "llmtrain", "train", str(config_file), *KEYS, "output.run_id=two", *meeting]
    machines = [
        subprocess.Popen(
            [*command, *([f"--node-rank={rank}"] if numbered else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ,
        )
        for rank in (0, 1)
    ]
    outputs = [machine.communicate(timeout=240) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    documents = [json.loads(out) for out, _ in outputs if out.strip()]
    assert [document["world_size"] for document in documents if document] == [2]
    assert weight_hash(runs / "two") == weight_hash(runs / "one")
