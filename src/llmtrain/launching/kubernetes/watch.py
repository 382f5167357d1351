"""Reads the state of a run on a cluster: its pods, its progress, what is wrong, and its exit code.

kubectl get job, pods, events ─▶ read_state ─▶ ClusterState: pods with rank and cause · step and loss · exit code
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from llmtrain.distributed.exit_codes import STRONGEST_FIRST, strongest
from llmtrain.errors import ConfigError
from llmtrain.launching.kubernetes.kubectl import Kubectl
from llmtrain.launching.kubernetes.launch import REPLICA, Document
from llmtrain.launching.kubernetes.pod import CONTAINER

WORKLOADS: Final = ("job", "statefulset", "jobset")
INSTANCE: Final = "app.kubernetes.io/instance"
INDEX: Final = ("batch.kubernetes.io/job-completion-index", "apps.kubernetes.io/pod-index")
STEP: Final = re.compile(r"step (\d+)/(\S+)\s+loss ([\d.]+)")
LOG_LINES: Final = 200
IMAGE: Final = "check the image's name, and that the cluster may pull it (kubernetes.image; on kind: `make k8s-image`)"
WAITING: Final = {
    "ErrImagePull": (IMAGE, False),  # the kubelet tries again, so a registry may be down for a moment
    "ImagePullBackOff": (IMAGE, True),
    "ErrImageNeverPull": (IMAGE, True),
    "InvalidImageName": (IMAGE, True),
    "CreateContainerConfigError": ("create the Secret or ConfigMap that it names", True),
    "CreateContainerError": ("look at `kubectl describe pod`", True),
    "RunContainerError": ("check that the image has `llmtrain` on its PATH", True),
}
"""Reason for which a container waits → what to do, and whether it can never start without that."""
OUT_OF_MEMORY: Final = (
    "out of memory (OOMKilled): raise kubernetes.memory, or lower trainer.micro_batch_size or data.num_workers"
)
EVICTED: Final = "evicted"


@dataclass(frozen=True, kw_only=True)
class PodState:
    """State of a pod of the run."""

    name: str
    index: int | None
    ranks: str
    """Ranks of its processes: `rank 0`, `ranks 0 to 7`."""
    phase: str
    exit_code: int | None
    cause: str | None
    """Reason why the pod fails or waits, with what to do."""
    is_stuck: bool
    """True if the pod can never start."""
    pending: bool
    """True if the pod waits for a node."""
    created: str


@dataclass(frozen=True, kw_only=True)
class ClusterState:
    """State of a run on the cluster at one moment."""

    kind: str
    pods: list[PodState]
    """The newest pod of each number."""
    step: int | None
    loss: float | None
    exit_code: int | None
    """Exit code of the run; None until it ends."""
    cause: str | None
    """Message of the cluster about the run itself."""

    @property
    def state(self) -> str:
        """The run's state in one word."""
        if self.exit_code is not None:
            return "finished" if self.exit_code == 0 else "failed"
        return "running" if any(pod.phase == "Running" for pod in self.pods) else "pending"


def find_workload(kubectl: Kubectl, name: str) -> tuple[str, Document]:
    """Return the kind and the workload of the run `name`. Raises ConfigError if there is none."""
    for kind in WORKLOADS:
        if (found := kubectl.get(kind, name)) is not None:
            return kind, found
    raise ConfigError(f"there is no run {name!r} on the cluster: `llmtrain launch k8s status` lists all")


def read_state(kubectl: Kubectl, name: str) -> ClusterState:
    """Return the state of the run `name`. Raises ConfigError if there is none."""
    kind, workload = find_workload(kubectl, name)
    pods = newest_pods(kubectl.items("pods", f"--selector={INSTANCE}={name}"))
    step, loss = _progress(kubectl, pods)
    cause = _cause_of(workload)
    if cause is None and not pods:
        cause = _no_pods(kubectl, name, kind=kind)
    return ClusterState(
        kind=kind, pods=pods, step=step, loss=loss, exit_code=exit_code(kind, workload, pods), cause=cause
    )


def newest_pods(documents: list[Document]) -> list[PodState]:
    """Return the newest pod of each number, in the order of the numbers."""
    newest: dict[int | None, PodState] = {}
    for pod in sorted((describe_pod(document) for document in documents), key=lambda pod: pod.created):
        newest[pod.index] = pod
    return [newest[index] for index in sorted(newest, key=lambda index: -1 if index is None else index)]


def describe_pod(document: Document) -> PodState:
    """Return the state of a pod from its Kubernetes object."""
    metadata, status = document["metadata"], document.get("status", {})
    container: Document = next((one for one in status.get("containerStatuses", []) if one["name"] == CONTAINER), {})
    state, last = container.get("state", {}), container.get("lastState", {})
    ended = state.get("terminated") or last.get("terminated")
    cause, is_stuck = _cause_of_pod(status, state.get("waiting"), ended)
    index = _index(metadata)
    return PodState(
        name=metadata["name"],
        index=index,
        ranks=_ranks(document["spec"]["containers"], index),
        phase=status.get("phase", "Pending"),
        exit_code=ended["exitCode"] if ended else None,
        cause=cause,
        is_stuck=is_stuck,
        pending=status.get("phase", "Pending") == "Pending" and not container,
        created=metadata.get("creationTimestamp") or "",
    )


def _index(metadata: Mapping[str, Any]) -> int | None:
    marks = {**metadata.get("annotations", {}), **metadata.get("labels", {})}
    number = next((marks[mark] for mark in INDEX if mark in marks), metadata["name"].rpartition("-")[2])
    return int(number) if str(number).isdecimal() else None


def _ranks(containers: list[Document], index: int | None) -> str:
    """Return the ranks of a pod's processes as a phrase, from its number and --nproc of its command."""
    if index is None:
        return "no rank"
    words: list[str] = next((one.get("command", []) for one in containers if one["name"] == CONTAINER), [])
    nproc = next((int(word.removeprefix("--nproc=")) for word in words if word.startswith("--nproc=")), 1)
    first, last = index * nproc, (index + 1) * nproc - 1
    return f"rank {first}" if first == last else f"ranks {first} to {last}"


def _cause_of_pod(
    status: Mapping[str, Any], waiting: Mapping[str, Any] | None, ended: Mapping[str, Any] | None
) -> tuple[str | None, bool]:
    """Return what is wrong with a pod, and whether it can never start."""
    conditions = {one["type"]: one for one in status.get("conditions", [])}
    if status.get("reason") == "Evicted":
        return f"{EVICTED}: {status.get('message', 'its node was short of a resource')}", False
    disrupted = conditions.get("DisruptionTarget", {})
    if disrupted.get("status") == "True":
        return f"disrupted ({disrupted.get('reason')}): {disrupted.get('message', '')}".rstrip(": "), False
    if ended and ended.get("reason") == "OOMKilled":
        return OUT_OF_MEMORY, False
    if waiting and waiting.get("reason") in WAITING:
        advice, is_stuck = WAITING[waiting["reason"]]
        return f"{waiting['reason']} ({waiting.get('message', 'no message')}): {advice}", is_stuck
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        return f"pending, {scheduled.get('reason')}: {scheduled.get('message', '')}", False
    if ended and ended["exitCode"]:
        return (ended.get("message") or "").strip().rpartition("\n")[2] or f"exit code {ended['exitCode']}", False
    return None, False


def _cause_of(workload: Document) -> str | None:
    for condition in workload.get("status", {}).get("conditions", []):
        if condition["status"] == "True" and condition["type"] in ("Failed", "FailureTarget", "Suspended"):
            return f"{condition.get('reason', condition['type'])}: {condition.get('message', '')}".rstrip(": ")
    return None


def _no_pods(kubectl: Kubectl, name: str, *, kind: str) -> str | None:
    """Return the latest warning about a run without pods: a quota or a policy may forbid them."""
    owner = f"{name}-{REPLICA}-0" if kind == "jobset" else name
    selector = f"--field-selector=involvedObject.name={owner},type=Warning"
    events = sorted(kubectl.items("events", selector), key=lambda event: event.get("lastTimestamp") or "")
    return f"{events[-1]['reason']}: {events[-1]['message']}" if events else None


def exit_code(kind: str, workload: Document, pods: list[PodState]) -> int | None:
    """Return the exit code of the run; None until it ends.

    The pods' codes are combined like those of processes on one machine. Kubernetes does not end a StatefulSet: its run
    has ended when every pod has exited with 0, or when one has exited with a code that would come again.
    """
    codes = [pod.exit_code for pod in pods if pod.exit_code]
    if kind == "statefulset":
        if any(code in STRONGEST_FIRST[:2] for code in codes):
            return _strongest(codes)
        return 0 if pods and all(pod.exit_code == 0 for pod in pods) else None
    conditions = {
        one["type"]: one for one in workload.get("status", {}).get("conditions", []) if one["status"] == "True"
    }
    if "Complete" in conditions or "Completed" in conditions:
        return 0
    if "Failed" not in conditions:
        return None
    named = re.search(r"exit code (\d+)", conditions["Failed"].get("message", ""))
    return _strongest([*codes, *([int(named[1])] if named else [])])


def _strongest(codes: list[int]) -> int:
    """Return the code that counts for the failed run. A pod that was killed (137: out of memory) counts as 1."""
    return strongest(code if code in STRONGEST_FIRST else 1 for code in codes or [1])


def _progress(kubectl: Kubectl, pods: list[PodState]) -> tuple[int | None, float | None]:
    """Return the last step and loss that the first pod has logged."""
    first = next((pod for pod in pods if pod.index == 0 and pod.phase != "Pending"), None)
    if first is None:
        return None, None
    found = STEP.findall(kubectl.logs(first.name, f"--container={CONTAINER}", f"--tail={LOG_LINES}"))
    return (int(found[-1][0]), float(found[-1][2])) if found else (None, None)


def age_sec(pod: PodState, *, now: datetime) -> float:
    """Return the seconds since the pod was created."""
    try:
        return (now - datetime.fromisoformat(pod.created)).total_seconds()
    except ValueError:
        return 0.0
