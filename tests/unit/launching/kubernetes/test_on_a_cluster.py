"""launch k8s against an API server, with the real kubectl: submit, status, logs, --follow, stop, delete."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli.app import run
from llmtrain.launching.kubernetes import follow as follow_module
from llmtrain.launching.kubernetes import removal
from tests.support.kubernetes_api import FakeCluster, cluster, pod

LAUNCH = ("launch", "k8s", "quickstart", "run.device=cpu", "--nodes", "2", "--name", "one")
LOG = (
    "12:00:00 INFO  [train] step 20/100  loss 3.210  lr 1e-3\n12:00:01 INFO  [train] step 40/100  loss 2.100  lr 1e-3\n"
)


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    monkeypatch.setattr(follow_module, "POLL_SEC", 0.01)
    monkeypatch.setattr(removal, "POLL_SEC", 0.01)
    with cluster(tmp_path, monkeypatch) as api:
        yield api


def started(api: FakeCluster, *pods: dict[str, Any], kind: str = "job") -> None:
    """A run `one` that was submitted, with these pods."""
    assert run([*LAUNCH, "--kind", kind]) == 0
    for each in pods or (pod("one", 0), pod("one", 1)):
        api.put("pods", each)
    api.logs["one-0-0"] = LOG


def ended(code: int, **more: Any) -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "reason": "Error", **more}}


def test_a_run_is_submitted_by_server_side_apply(api: FakeCluster, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(list(LAUNCH)) == 0
    assert "the run one is submitted" in capfd.readouterr().out
    claims = [f"persistentvolumeclaims/llmtrain-{name}" for name in ("runs", "data", "models", "cache")]
    made = ["serviceaccounts/llmtrain", "configmaps/one", *claims, "services/one", "networkpolicies/one"]
    made += ["poddisruptionbudgets/one", "jobs/one"]
    assert api.changes == [("PATCH", name) for name in made]
    assert api.of("jobs")[0]["spec"]["completions"] == 2


def test_a_dry_run_checks_and_prints_and_submits_nothing(api: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*LAUNCH, "--dry-run"]) == 0
    assert "kind: Job" in capsys.readouterr().out
    assert run(["launch", "k8s", "render", *LAUNCH[2:]]) == 0
    assert "kind: Job" in capsys.readouterr().out
    assert api.changes == []


def test_a_running_or_finished_run_is_not_replaced(api: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    started(api)
    assert run(list(LAUNCH)) == 2
    assert "the run one is on the cluster and has not ended" in capsys.readouterr().err
    api.end("one", "Complete")
    assert run(list(LAUNCH)) == 2
    assert "the run one is finished" in capsys.readouterr().err


def test_a_failed_run_is_replaced_by_the_next(api: FakeCluster) -> None:
    started(api)
    api.drop("pods")
    api.end("one", "Failed")
    api.changes.clear()
    assert run(list(LAUNCH)) == 0
    assert api.changes[0] == ("DELETE", "jobs/one")
    assert api.changes[-1] == ("PATCH", "jobs/one")


def test_status_shows_pods_ranks_step_and_loss(api: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    started(api)
    capsys.readouterr()
    assert run(["launch", "k8s", "status", "one"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "one  job  running  step 40  loss 2.1",
        "  rank 0  one-0-0  Running",
        "  rank 1  one-1-0  Running",
    ]
    api.of("pods")[1]["spec"]["containers"][0]["command"] = ["llmtrain", "train", "c.yaml", "--nproc=8"]
    assert run(["launch", "k8s", "status", "one"]) == 0
    assert "  ranks 8 to 15  one-1-0  Running" in capsys.readouterr().out
    assert run(["launch", "k8s", "status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"run": "one", "kind": "Job"}]
    assert run(["launch", "k8s", "status", "two"]) == 2
    assert "there is no run 'two'" in capsys.readouterr().err


def test_logs_are_those_of_the_newest_pod_of_a_rank(api: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    started(api, pod("one", 0, "Failed", **ended(75)), pod("one", 0, number=1), pod("one", 1))
    api.logs["one-0-1"] = "the second\n"
    capsys.readouterr()
    assert run(["launch", "k8s", "logs", "one"]) == 0
    assert capsys.readouterr().out == "the second\n"
    assert run(["launch", "k8s", "logs", "one", "--rank", "2"]) == 2
    assert "has no pod 2; there are 0, 1" in capsys.readouterr().err


@pytest.mark.parametrize("code", [1, 2, 42, 76])
def test_following_ends_with_the_run_s_own_exit_code(
    api: FakeCluster, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    started(
        api, pod("one", 0, "Failed", **ended(75)), pod("one", 1, "Failed", **ended(code, message="a\nthe loss is nan"))
    )
    api.end("one", "Failed", reason="PodFailurePolicy", message=f"failed with exit code {code} matching FailJob")
    assert run(["launch", "k8s", "status", "one", "--follow"]) == code
    out, err = capfd.readouterr()
    assert f"exit code {code}" in out
    assert "one-1-0: the loss is nan" in err


def test_following_prints_the_log_and_ends_with_0_when_the_run_is_complete(
    api: FakeCluster, capfd: pytest.CaptureFixture[str]
) -> None:
    reads = []

    def time_passes() -> None:
        reads.append(1)
        if len(reads) == 1:
            for index in (0, 1):
                api.put("pods", pod("one", index))
            api.logs["one-0-0"] = LOG
        if len(reads) == 3:
            api.end("one", "Complete")

    api.on_read = time_passes
    assert run([*LAUNCH, "--follow"]) == 0
    out, _ = capfd.readouterr()
    assert "step 20/100  loss 3.210" in out
    assert "one  job  finished  step 40" in out


CAUSES: dict[str, tuple[dict[str, Any], str]] = {
    "image": (
        pod("one", 0, "Pending", waiting={"reason": "ImagePullBackOff", "message": "Back-off pulling x"}),
        "one-0-0 cannot start: ImagePullBackOff (Back-off pulling x): check the image's name",
    ),
    "secret": (
        pod("one", 0, "Pending", waiting={"reason": "CreateContainerConfigError", "message": 'secret "x" not found'}),
        'CreateContainerConfigError (secret "x" not found): create the Secret',
    ),
    "no node": (
        pod(
            "one",
            0,
            "Pending",
            conditions=[
                {
                    "type": "PodScheduled",
                    "status": "False",
                    "reason": "Unschedulable",
                    "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
                }
            ],
        ),
        "has had no node for 0 s: pending, Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
    ),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_a_pod_that_can_never_start_ends_the_wait_with_its_cause(
    api: FakeCluster, cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    waiting, message = CAUSES[cause]
    started(api, waiting)
    assert run(["launch", "k8s", "status", "one", "--follow", "--patience", "0"]) == 1
    assert message in capsys.readouterr().err


def test_out_of_memory_and_eviction_are_named_as_causes(api: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    evicted = pod("one", 1, "Failed", reason="Evicted", message="The node was low on resource: ephemeral-storage.")
    out_of_memory = pod("one", 0, "Failed", terminated={"exitCode": 137, "reason": "OOMKilled"})
    started(api, out_of_memory, evicted)
    api.end("one", "Failed", reason="BackoffLimitExceeded")
    capsys.readouterr()
    assert run(["launch", "k8s", "status", "one", "--follow"]) == 1
    out = capsys.readouterr().out
    assert "out of memory (OOMKilled): raise kubernetes.memory" in out
    assert "evicted: The node was low on resource: ephemeral-storage." in out
    assert "BackoffLimitExceeded" in out


def test_a_run_without_pods_gets_the_clusters_reason(api: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    started(api)
    api.drop("pods")
    event = {
        "involvedObject": {"name": "one"},
        "type": "Warning",
        "reason": "FailedCreate",
        "message": "quota exceeded",
    }
    api.put("events", {"metadata": {"name": "e"}, **event})
    assert run(["launch", "k8s", "status", "one", "--follow"]) == 1
    assert "the cluster creates no pods, FailedCreate: quota exceeded" in capsys.readouterr().err


def test_stopping_waits_until_the_pods_have_saved(api: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    started(api)
    reads = []

    def time_passes() -> None:
        reads.append(1)
        if len(reads) == 2:
            for index in (0, 1):
                api.put("pods", pod("one", index, "Failed", **ended(75)))
        if len(reads) == 3:
            api.drop("pods")

    api.on_read = time_passes
    api.changes.clear()
    assert run(["launch", "k8s", "stop", "one"]) == 0
    assert api.changes == [("DELETE", "jobs/one")]
    assert "one-1-0 ended with exit code 75" in capsys.readouterr().out


def test_deleting_leaves_the_volumes(api: FakeCluster) -> None:
    started(api)
    api.drop("pods")
    assert run(["launch", "k8s", "delete", "one"]) == 0
    assert {resource for resource, _ in api.objects} == {"serviceaccounts", "persistentvolumeclaims"}


def test_a_stateful_set_ends_with_the_last_exit_codes_of_its_pods(
    api: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    started(api, kind="statefulset")
    assert run(["launch", "k8s", "status", "one"]) == 0
    assert "one  statefulset  running" in capsys.readouterr().out
    for index in (0, 1):
        again = pod("one", index)
        again["status"]["containerStatuses"][0]["lastState"] = ended(0)
        api.put("pods", again)
    assert run(["launch", "k8s", "status", "one", "--follow"]) == 0


def test_a_kind_that_is_not_installed_is_one_message(api: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*LAUNCH, "--kind", "jobset"]) == 1
    assert "install its controller, or use --kind job" in capsys.readouterr().err


def test_no_cluster_and_no_kubectl_are_one_message_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with cluster(tmp_path, monkeypatch):
        pass
    assert run(list(LAUNCH)) == 1
    assert "there is no cluster at that address" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(list(LAUNCH)) == 2
    assert "kubectl, which talks to the cluster, is not installed" in capsys.readouterr().err


def test_wrong_arguments_are_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["launch", "k8s"]) == 2
    assert "CONFIG is missing" in capsys.readouterr().err
    assert run([*LAUNCH, "--env", "A", "--dry-run"]) == 2
    assert "--env A: expected K=V" in capsys.readouterr().err
    assert run([*LAUNCH, "--set", "kubernetes.imag=x", "--dry-run"]) == 2
    assert "did you mean kubernetes.image?" in capsys.readouterr().err
