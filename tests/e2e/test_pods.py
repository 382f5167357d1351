"""The pods of a Job without a cluster: commands as rendered, started again as the failure policy says."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from llmtrain.config.loading.load import load_config
from llmtrain.launching.kubernetes.launch import PORT, ClusterRun
from llmtrain.launching.kubernetes.render import render
from llmtrain.runs.events import read_events
from llmtrain.verbs.launch_k8s import cluster_run
from tests.support.failure_policy import FailurePolicy
from tests.support.ranks import free_port
from tests.support.tiny_run import SYNTHETIC, weight_hash, write_config

pytestmark = [pytest.mark.slow, pytest.mark.processes]

KEYS = ["trainer.max_steps=12", "model.dropout=0", "trainer.micro_batch_size=2", "trainer.save_every_steps=2"]
WAIT_SEC = 300


class JobOnThisMachine:
    """Starts the pods of a run, and starts each again that ends with a code for which the Job's policy does so."""

    def __init__(self, run: ClusterRun, folder: Path) -> None:
        self.job: dict[str, Any] = render(run)[-1]
        self.container = self.job["spec"]["template"]["spec"]["containers"][0]
        self.places = {
            "/etc/llmtrain/": f"{folder}/",
            "/runs": str(folder / "runs"),
            f"{run.first_host}:{PORT}": f"127.0.0.1:{free_port()}",
        }
        (folder / run.config_file).write_text(run.config_text)
        self._policy = FailurePolicy(self.job)
        self.ended: list[int] = []
        self.pods = {index: self.start(index) for index in range(self.job["spec"]["completions"])}

    def start(self, index: int) -> subprocess.Popen[bytes]:
        """Start a pod."""
        program, *words = self.container["command"]
        assert program == "llmtrain"
        for place, here in {**self.places, "$(NODE_RANK)": str(index)}.items():
            words = [word.replace(place, here) for word in words]
        fixed = ("HOME", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
        given = {
            one["name"]: one["value"] for one in self.container["env"] if "value" in one and one["name"] not in fixed
        }
        environment = {**os.environ, **given, "NODE_RANK": str(index), "LLMTRAIN_FAULTS": "sleep@step:0.3"}
        return subprocess.Popen([sys.executable, "-m", program, *words], env=environment)

    def kill(self, index: int) -> None:
        """End a pod as the loss of its node does: all its processes at once."""
        pod = psutil.Process(self.pods[index].pid)
        for process in [*pod.children(recursive=True), pod]:
            process.kill()

    def workers(self, index: int) -> list[psutil.Process]:
        """Return the processes that train in a pod."""
        torchrun = "llmtrain.distributed.torchrun"
        below = psutil.Process(self.pods[index].pid).children(recursive=True)
        return [one for one in below if "train" in one.cmdline() and torchrun not in one.cmdline()]

    def wait(self) -> None:
        """Return when all pods have ended with 0. Fails where the Job would."""
        deadline = time.monotonic() + WAIT_SEC
        while any(pod.poll() != 0 for pod in self.pods.values()):
            assert time.monotonic() < deadline
            for index, pod in self.pods.items():
                if (code := pod.poll()) is not None and code != 0:
                    self.ended.append(code)
                    self._policy.judge(code)
                    self.pods[index] = self.start(index)
            time.sleep(0.1)

    def close(self) -> None:
        """Leave no process."""
        for index, pod in self.pods.items():
            if pod.poll() is None:
                self.kill(index)
            pod.wait()


def wait_for_saves(run: Path, number: int) -> None:
    deadline = time.monotonic() + WAIT_SEC
    while len([event for event in read_events(run / "events.jsonl") if event["event"] == "saved"]) < number:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_pod_that_is_replaced_while_its_peer_still_ends_joins_the_next_start(
    config_file: Path, undisturbed: Callable[..., str], tmp_path: Path
) -> None:
    words = ["kubernetes.nodes=2", *KEYS]
    run = cluster_run(load_config(str(config_file), words), words, name="pods", env={})
    job, folder = JobOnThisMachine(run, tmp_path), tmp_path / "runs" / "pods"
    try:
        wait_for_saves(folder, 1)
        job.kill(0)
        job.wait()
    finally:
        job.close()
    assert weight_hash(folder) == undisturbed(*KEYS, world_size=2)


@pytest.mark.nightly  # a minute; the containers' test replaces pods as well
def test_a_pod_that_is_replaced_before_its_peer_has_ended_does_not_wait_for_it_in_vain(tmp_path: Path) -> None:
    config = write_config(tmp_path / "tiny.yaml", SYNTHETIC)
    words = ["kubernetes.nodes=2", "trainer.max_steps=12", "trainer.save_every_steps=2", "run.device=cpu"]
    run = cluster_run(load_config(str(config), words), words, name="pods", env={})
    job = JobOnThisMachine(run, tmp_path)
    try:
        wait_for_saves(tmp_path / "runs" / "pods", 1)
        first = job.workers(0)
        for process in first:
            process.suspend()  # so that its torchrun, and the store in it, stay
        job.kill(1)
        job.pods[1].wait()
        job.pods[1] = job.start(1)
        deadline = time.monotonic() + WAIT_SEC
        while not job.workers(1):  # it has met the store of the first start
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for process in first:
            process.resume()
        began = time.monotonic()
        job.wait()
        assert time.monotonic() - began < 240  # distributed.timeout_sec is 600
    finally:
        job.close()
    assert set(job.ended) == {75}
