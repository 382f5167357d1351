"""The state of a run on a cluster: its pods, how far it is, what is wrong, and the exit code it ended with.

kubectl get job, pods, events ─▶ look ─▶ Seen: pods with rank and cause · step and loss · over or not
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from llmtrain.distributed.exit_codes import STRONGEST_FIRST
from llmtrain.errors import ConfigError
from llmtrain.launching.kubernetes.kubectl import Kubectl
from llmtrain.launching.kubernetes.launch import REPLICA, Document
from llmtrain.launching.kubernetes.pod import CONTAINER

WORKLOADS: Final = ("job", "statefulset", "jobset")
INSTANCE: Final = "app.kubernetes.io/instance"
INDEX: Final = ("batch.kubernetes.io/job-completion-index", "apps.kubernetes.io/pod-index")
STEP: Final = re.compile(r"step (\d+)/(\S+)\s+loss ([\d.]+)")
LOG_LINES: Final = 200
IMAGE: Final = "is the image's name right, and may the cluster pull it? (kubernetes.image; on kind: `make k8s-image`)"
WAITING: Final = {
    "ErrImagePull": (IMAGE, False),  # tried again, so a registry's hiccup passes
    "ImagePullBackOff": (IMAGE, True),
    "ErrImageNeverPull": (IMAGE, True),
    "InvalidImageName": (IMAGE, True),
    "CreateContainerConfigError": ("make the Secret or ConfigMap that it names", True),
    "CreateContainerError": ("look at `kubectl describe pod`", True),
    "RunContainerError": ("does the image have `llmtrain` on its PATH?", True),
}
"""Reasons for which a container waits: what to do, and whether it waits in vain."""
OUT_OF_MEMORY: Final = (
    "out of memory (OOMKilled): raise kubernetes.memory, or lower trainer.micro_batch_size or data.num_workers"
)
EVICTED: Final = "evicted"


@dataclass(frozen=True, kw_only=True)
class PodSeen:
    """A pod of the run."""

    name: str
    index: int | None
    ranks: str
    """The ranks of its processes, in words."""
    phase: str
    exit_code: int | None
    cause: str | None
    """Reason why the pod fails or waits, with what to do."""
    in_vain: bool
    """True if the pod waits for something that does not come."""
    pending: bool
    """True if the pod waits for a node."""
    created: str


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A run at one moment."""

    kind: str
    pods: list[PodSeen]
    """The newest of each number."""
    step: int | None
    loss: float | None
    exit_code: int | None
    """Exit code of the run; None while it is not over."""
    cause: str | None
    """Message of the cluster about the run itself."""

    @property
    def state(self) -> str:
        """The run's state in one word."""
        if self.exit_code is not None:
            return "finished" if self.exit_code == 0 else "failed"
        return "running" if any(pod.phase == "Running" for pod in self.pods) else "pending"


def find_workload(kubectl: Kubectl, name: str) -> tuple[str, Document]:
    """Return kind and object of the run `name`. Raises ConfigError if there is none."""
    for kind in WORKLOADS:
        if (found := kubectl.get(kind, name)) is not None:
            return kind, found
    raise ConfigError(f"there is no run {name!r} on the cluster: `llmtrain launch k8s status` lists all")


def look(kubectl: Kubectl, name: str) -> Seen:
    """Return the state of the run `name`. Raises ConfigError if there is none."""
    kind, workload = find_workload(kubectl, name)
    pods = newest_pods(kubectl.items("pods", f"--selector={INSTANCE}={name}"))
    step, loss = _progress(kubectl, pods)
    cause = _cause_of(workload)
    if cause is None and not pods:
        cause = _no_pods(kubectl, name, kind=kind)
    return Seen(kind=kind, pods=pods, step=step, loss=loss, exit_code=exit_code(kind, workload, pods), cause=cause)


def newest_pods(documents: list[Document]) -> list[PodSeen]:
    """Return the newest pod of each number, in the order of the numbers."""
    newest: dict[int | None, PodSeen] = {}
    for pod in sorted((describe_pod(document) for document in documents), key=lambda pod: pod.created):
        newest[pod.index] = pod
    return [newest[index] for index in sorted(newest, key=lambda index: -1 if index is None else index)]


def describe_pod(document: Document) -> PodSeen:
    """Return what is known of a pod."""
    metadata, status = document["metadata"], document.get("status", {})
    container: Document = next((one for one in status.get("containerStatuses", []) if one["name"] == CONTAINER), {})
    state, last = container.get("state", {}), container.get("lastState", {})
    ended = state.get("terminated") or last.get("terminated")
    cause, in_vain = _cause_of_pod(status, state.get("waiting"), ended)
    index = _index(metadata)
    return PodSeen(
        name=metadata["name"],
        index=index,
        ranks=_ranks(document["spec"]["containers"], index),
        phase=status.get("phase", "Pending"),
        exit_code=ended["exitCode"] if ended else None,
        cause=cause,
        in_vain=in_vain,
        pending=status.get("phase", "Pending") == "Pending" and not container,
        created=metadata.get("creationTimestamp") or "",
    )


def _index(metadata: Mapping[str, Any]) -> int | None:
    marks = {**metadata.get("annotations", {}), **metadata.get("labels", {})}
    number = next((marks[mark] for mark in INDEX if mark in marks), metadata["name"].rpartition("-")[2])
    return int(number) if str(number).isdecimal() else None


def _ranks(containers: list[Document], index: int | None) -> str:
    """Return the ranks of a pod's processes in words, from its number and --nproc of its command."""
    if index is None:
        return "no rank"
    words: list[str] = next((one.get("command", []) for one in containers if one["name"] == CONTAINER), [])
    nproc = next((int(word.removeprefix("--nproc=")) for word in words if word.startswith("--nproc=")), 1)
    first, last = index * nproc, (index + 1) * nproc - 1
    return f"rank {first}" if first == last else f"ranks {first} to {last}"


def _cause_of_pod(
    status: Mapping[str, Any], waiting: Mapping[str, Any] | None, ended: Mapping[str, Any] | None
) -> tuple[str | None, bool]:
    """Return what is wrong with a pod, and whether waiting is in vain."""
    conditions = {one["type"]: one for one in status.get("conditions", [])}
    if status.get("reason") == "Evicted":
        return f"{EVICTED}: {status.get('message', 'its node ran short of something')}", False
    disrupted = conditions.get("DisruptionTarget", {})
    if disrupted.get("status") == "True":
        return f"disrupted ({disrupted.get('reason')}): {disrupted.get('message', '')}".rstrip(": "), False
    if ended and ended.get("reason") == "OOMKilled":
        return OUT_OF_MEMORY, False
    if waiting and waiting.get("reason") in WAITING:
        advice, in_vain = WAITING[waiting["reason"]]
        return f"{waiting['reason']} ({waiting.get('message', 'no message')}): {advice}", in_vain
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
    """Return why the run has no pods: a quota or a policy may forbid them."""
    owner = f"{name}-{REPLICA}-0" if kind == "jobset" else name
    selector = f"--field-selector=involvedObject.name={owner},type=Warning"
    events = sorted(kubectl.items("events", selector), key=lambda event: event.get("lastTimestamp") or "")
    return f"{events[-1]['reason']}: {events[-1]['message']}" if events else None


def exit_code(kind: str, workload: Document, pods: list[PodSeen]) -> int | None:
    """Return the exit code that the run ended with; None while it is not over.

    The pods' codes count as those of processes on one machine. A StatefulSet has no end of its own: its run is over
    when every pod has ended well, or one has ended with a code that would come again.
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
    told = re.search(r"exit code (\d+)", conditions["Failed"].get("message", ""))
    return _strongest([*codes, *([int(told[1])] if told else [])])


def _strongest(codes: list[int]) -> int:
    """Return the code that counts; that of a pod which was killed (137: out of memory) is 1."""
    known = {code if code in STRONGEST_FIRST else 1 for code in codes}
    return next((code for code in STRONGEST_FIRST if code in known), 1)


def _progress(kubectl: Kubectl, pods: list[PodSeen]) -> tuple[int | None, float | None]:
    """Return the last step and loss that the first pod has logged."""
    first = next((pod for pod in pods if pod.index == 0 and pod.phase != "Pending"), None)
    if first is None:
        return None, None
    found = STEP.findall(kubectl.logs(first.name, f"--container={CONTAINER}", f"--tail={LOG_LINES}"))
    return (int(found[-1][0]), float(found[-1][2])) if found else (None, None)


def age_sec(pod: PodSeen, *, now: datetime) -> float:
    """Return the seconds since the pod was made."""
    try:
        return (now - datetime.fromisoformat(pod.created)).total_seconds()
    except ValueError:
        return 0.0
