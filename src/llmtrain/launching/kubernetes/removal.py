"""Ends a run's pods, and deletes its objects from the cluster, but not its volumes."""

from __future__ import annotations

import time
from typing import Final

from llmtrain.errors import ConfigError, RunError
from llmtrain.launching.kubernetes.kubectl import Kubectl
from llmtrain.launching.kubernetes.launch import Document
from llmtrain.launching.kubernetes.watch import INSTANCE, WORKLOADS, exit_code, find_workload, newest_pods

SURROUNDINGS: Final = "service,configmap,networkpolicy,poddisruptionbudget"
POLL_SEC: Final = 1.0
REMOVAL_SEC: Final = 60
"""Time for the cluster to remove pods, after their grace period."""


def delete_failed(kubectl: Kubectl, name: str) -> None:
    """Delete the workload `name` if it has failed. Raises ConfigError if it is still running, or finished."""
    for kind in WORKLOADS:
        if (old := kubectl.get(kind, name)) is None:
            continue
        code = exit_code(kind, old, newest_pods(kubectl.items("pods", f"--selector={INSTANCE}={name}")))
        if code is None:
            raise ConfigError(
                f"the run {name} is on the cluster and has not ended: look at it (llmtrain launch k8s status {name}), "
                f"stop it (llmtrain launch k8s stop {name}), or give the new one another --name"
            )
        if code == 0:
            raise ConfigError(
                f"the run {name} is finished: give the new one another --name, or delete the old one first (llmtrain "
                f"launch k8s delete {name})"
            )
        end_pods(kubectl, name)


def end_pods(kubectl: Kubectl, name: str) -> dict[str, int | None]:
    """Delete a run's workload, wait until its pods have ended, and return their exit codes; None if it was not seen.

    The pods get SIGTERM and save. Raises RunError if they still exist long after their grace period.
    """
    kind, workload = find_workload(kubectl, name)
    kubectl.run("delete", kind, name, "--cascade=foreground", "--wait=false")
    codes: dict[str, int | None] = {}
    deadline = time.monotonic() + _grace_sec(kind, workload) + REMOVAL_SEC
    while documents := kubectl.items("pods", f"--selector={INSTANCE}={name}"):
        codes |= {pod.name: pod.exit_code for pod in newest_pods(documents)}
        if time.monotonic() > deadline:
            raise RunError(f"pods of {name} are still there after their grace period: {', '.join(codes)}")
        time.sleep(POLL_SEC)
    return codes


def delete_objects(kubectl: Kubectl, name: str) -> list[str]:
    """End a run and delete all its objects except the volumes. Return a line about each."""
    kind, workload = find_workload(kubectl, name)
    end_pods(kubectl, name)
    group = ",podgroup" if "schedulingGroup" in str(workload["spec"]) else ""
    lines = kubectl.run("delete", SURROUNDINGS + group, f"--selector={INSTANCE}={name}", "--ignore-not-found")
    return [f"{kind}/{name} deleted", *lines.splitlines()]


def _grace_sec(kind: str, workload: Document) -> float:
    spec = workload["spec"]["replicatedJobs"][0]["template"]["spec"] if kind == "jobset" else workload["spec"]
    return float(spec["template"]["spec"].get("terminationGracePeriodSeconds", 30))
