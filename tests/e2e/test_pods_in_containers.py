"""The pods of a Job in containers, as user 1000 with a read-only root: killed, replaced, stopped, without a network."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtrain.config.loading.load import load_config
from llmtrain.runs.events import read_events
from llmtrain.verbs.launch_k8s import cluster_run
from tests.support.containers import KILLED, Job, Podman, Pods, podman_in, why_no_containers
from tests.support.tiny_run import SYNTHETIC, weight_hash, write_config
from tests.support.worker_groups import GroupServer

pytestmark = [pytest.mark.slow, pytest.mark.processes]

KEYS = ["trainer.max_steps=60", "trainer.save_every_steps=2", "run.device=cpu", "tracking.tensorboard.enabled=false"]
SLOW = "sleep@step:0.5"
"""Half a minute for a run that takes a second, so that podman reaches it before it is over."""
WAIT_SEC = 240


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    folder = tmp_path_factory.mktemp("podman") / "work"
    if (reason := why_no_containers(folder.with_name("trial"))) is not None:
        pytest.skip(f"pods in containers: {reason}")
    with podman_in(folder) as podman:
        yield podman


def wait_for(event: str, job: Job, run: Path) -> None:
    """Return when the run has written one more such event."""

    def number() -> int:
        return len([one for one in read_events(run / "events.jsonl") if one["event"] == event])

    before, deadline = number(), time.monotonic() + WAIT_SEC
    while number() == before:
        if not job.is_running:
            job.wait()  # which tells why
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("cut_sec", "replaced_after_sec", "timeout_sec"),
    [
        (3, 3, 600),
        pytest.param(30, 20, 600, marks=pytest.mark.nightly),  # minutes, of which most is waiting
        pytest.param(30, 3, 10, marks=pytest.mark.nightly),  # the network is away for longer than the pods wait for it
    ],
)
def test_pods_that_lose_their_network_their_peers_or_their_node_end_with_the_weights_of_an_undisturbed_run(
    podman: Podman, groups: GroupServer, tmp_path: Path, cut_sec: float, replaced_after_sec: float, timeout_sec: int
) -> None:
    config = str(write_config(tmp_path / "tiny.yaml", SYNTHETIC))
    words = ["kubernetes.nodes=2", f"distributed.timeout_sec={timeout_sec}", *KEYS]
    pods = Pods(podman, cluster_run(load_config(config, words), words, name="pods", env={}), tmp_path / "volumes")
    run = tmp_path / "volumes" / "runs" / "pods"
    with Job(pods, LLMTRAIN_FAULTS=SLOW) as job:
        job.replaced_after_sec = replaced_after_sec
        wait_for("saved", job, run)
        assert pods.probe(1, "startupProbe") == "the run trains"
        assert "last sign of progress" in pods.probe(1, "livenessProbe")
        name = pods.names[1]
        pods.cut_network(1)
        time.sleep(cut_sec)
        if cut_sec < timeout_sec:
            pods.mend_network(1)
        wait_for("saved", job, run)
        assert (pods.names[1] == name) == (cut_sec < timeout_sec)
        for index in (1, 0):
            pods.kill(index)
            wait_for("resumed", job, run)
            wait_for("saved", job, run)
        job.variables.clear()
        assert pods.stop() == [75, 75], pods.log(0)
        first, second = job.wait()
    assert first.count(KILLED) == second.count(KILLED) == 1
    assert {*first, *second} == ({75, KILLED} if cut_sec < timeout_sec else {75, 76, KILLED})
    whole = ["train", config, *KEYS, f"output.root_dir={tmp_path}", "output.run_id=whole"]
    group = groups.start(whole, world_size=2, environment={"OMP_NUM_THREADS": "1"})
    assert group.wait() == [0, 0], group.stderr
    assert weight_hash(run) == weight_hash(tmp_path / "whole")
