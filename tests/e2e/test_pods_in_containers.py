"""The pods of a Job in containers: host names, user 1000, a read-only root; killed, replaced and stopped."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtrain.config.loading.load import load_config
from llmtrain.runs.events import read_events
from llmtrain.verbs.launch_k8s import cluster_run
from tests.support.containers import Podman, Pods, podman_in, why_no_containers
from tests.support.tiny_run import SYNTHETIC, weight_hash, write_config
from tests.support.worker_groups import GroupServer

pytestmark = [pytest.mark.slow, pytest.mark.processes]

KEYS = ["trainer.max_steps=16", "trainer.save_every_steps=2", "run.device=cpu", "tracking.tensorboard.enabled=false"]
SLOW = "sleep@step:2"
"""Half a minute for a run that takes a second, so that podman reaches it before it is over."""
WAIT_SEC = 240


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    folder = tmp_path_factory.mktemp("podman") / "work"
    if (reason := why_no_containers(folder.with_name("trial"))) is not None:
        pytest.skip(f"pods in containers: {reason}")
    with podman_in(folder) as podman:
        yield podman


def num_saves(run: Path) -> int:
    return len([event for event in read_events(run / "events.jsonl") if event["event"] == "saved"])


def wait_for_saves(run: Path, number: int) -> None:
    deadline = time.monotonic() + WAIT_SEC
    while num_saves(run) < number:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_pods_that_are_killed_replaced_and_stopped_end_with_the_weights_of_an_undisturbed_run(
    podman: Podman, groups: GroupServer, tmp_path: Path
) -> None:
    config = str(write_config(tmp_path / "tiny.yaml", SYNTHETIC))
    words = ["kubernetes.nodes=2", *KEYS]
    pods = Pods(podman, cluster_run(load_config(config, words), words, name="pods", env={}), tmp_path / "volumes")
    run = tmp_path / "volumes" / "runs" / "pods"
    for index in (1, 0):  # the first pod's name is not there yet
        pods.start(index, LLMTRAIN_FAULTS=SLOW)
    wait_for_saves(run, 1)
    assert pods.probe(1, "startupProbe") == "the run trains"
    assert "last sign of progress" in pods.probe(1, "livenessProbe")
    pods.kill(1)
    assert pods.wait(0) == 75, pods.log(0)
    before = num_saves(run)
    for index in (1, 0):
        pods.start(index, LLMTRAIN_FAULTS=SLOW)
    wait_for_saves(run, before + 1)
    assert pods.stop() == [75, 75], pods.log(0)
    for index in (0, 1):
        pods.start(index)
    assert [pods.wait(0), pods.wait(1)] == [0, 0], pods.log(0)
    whole = ["train", config, *KEYS, f"output.root_dir={tmp_path}", "output.run_id=whole"]
    group = groups.start(whole, world_size=2, environment={"OMP_NUM_THREADS": "1"})
    assert group.wait() == [0, 0], group.stderr
    assert weight_hash(run) == weight_hash(tmp_path / "whole")
